// What is seen on the node: the prompt, its candidates, buttons and counts. Texts are set as text, never as HTML.
import { keyMeaning, markAt } from "./desk.mjs";
import { MOST } from "./drawing.mjs";
import { progress } from "./progress.mjs";
import { t } from "../locales/words.mjs";

// A second click of a double click is not meant for the pictures that have just come.
const GUARD = 250; // ms

function make(kind, className, more = {}) {
  return Object.assign(document.createElement(kind), { className }, more);
}

document.head.append(make("link", "", { rel: "stylesheet", href: new URL("./picker.css", import.meta.url).href }));

export class View {
  /**
   * does: pick(place), say(word), keep(count), more: [[text, title, work, when]], "late" being once there is a result, blind:
   * nothing is drawn ahead; away: on a phone; picture(id): its address.
   */
  constructor(does, picture) {
    Object.assign(this, { does, picture, shown: undefined, since: 0, mark: null, cells: [] });
    this.root = make("div", does.blind ? "retort-picker retort-blind" : "retort-picker", { tabIndex: 0 });
    // ComfyUI takes Ctrl+Z for the graph before any element hears of it, unless a text field has the focus: by its type
    // to older pages, and by whether it can be edited to newer ones.
    this.root.type = "textarea";
    Object.defineProperty(this.root, "isContentEditable", { value: true });
    this.root.setAttribute("role", "application");
    this.root.setAttribute("aria-roledescription", "preference picker");
    this.prompt = make("div", "retort-picker-prompt");
    this.before = make("img", "retort-picker-before", { draggable: false, hidden: true });
    this.before.alt = this.before.title = t("The picture that the candidates are edits of");
    this.grid = make("div", "retort-picker-grid");
    this.note = make("div", "retort-picker-note");
    this.note.setAttribute("role", "status");
    this.counts = make("span", "retort-picker-counts");
    this.buttons = {
      tie: this.button("tie", t("Tie"), "T", t("They are equally good (T or 0)")),
      skip: this.button("skip", t("Skip"), "S", t("Ask no more about these (S)")),
      undo: this.button("undo", t("Undo"), "U", t("Take the last answer back (U or Ctrl+Z)")),
      draw: this.button("draw", t("Generate"), "D", t("Queue the workflow for this node whenever fewer than so many wait (D)")),
    };
    this.keep = make("input", "retort-picker-keep", { type: "number", min: 1, max: MOST, step: 1 });
    this.keep.setAttribute("aria-label", t("How many sets are kept waiting for you"));
    this.keep.addEventListener("change", () => does.keep(this.keep.valueAsNumber));
    const ahead = make("label", "retort-picker-ahead", { title: t("How many sets are kept waiting for you") });
    ahead.append(t("keep waiting:"), " ", this.keep);
    const { tie, skip, undo, draw } = this.buttons;
    this.way = make("progress", "", { ariaHidden: true });
    this.far = make("span", "retort-picker-far");
    const more = make("div", "retort-picker-row");
    const made = does.more.map(([textContent, title, onclick, when]) => [when, make("button", "", { type: "button", title, textContent, onclick })]);
    this.late = made.filter(([when]) => when === "late").map(([, one]) => one);
    more.append(this.way, this.far, ...made.map(([, one]) => one), this.large());
    const answers = make("div", "retort-picker-row");
    answers.append(tie, skip, undo, this.counts);
    const drawing = make("div", "retort-picker-row");
    drawing.append(...(does.blind ? [] : [draw, ahead]), this.note);
    this.root.append(this.prompt, this.before, this.grid, answers, drawing, more);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("mousedown", (event) => this.focus(event));
    // The canvas would take the wheel and the pointer for itself.
    for (const name of ["pointerdown", "pointerup", "dblclick"])
      this.root.addEventListener(name, (event) => event.stopPropagation());
  }

  /** The button that fills the screen with the pictures, and leaves it again. */
  large() {
    const whole = () => document.fullscreenElement === this.root;
    const made = make("button", "", { type: "button", title: t("Large pictures; Escape ends it") });
    made.addEventListener("click", () => (whole() ? document.exitFullscreen() : this.root.requestFullscreen()));
    const said = () => (made.textContent = whole() ? t("Leave full screen") : t("Full screen"));
    this.root.addEventListener("fullscreenchange", said);
    said();
    return made;
  }

  button(word, text, key, title) {
    const button = make("button", "", { type: "button", title, tabIndex: -1 });
    button.setAttribute("aria-keyshortcuts", key);
    button.append(text, make("kbd", "", { textContent: key }));
    button.addEventListener("click", () => this.say(word));
    return button;
  }

  /** The whole widget has the focus, so that its keys work after a click too; a number field keeps its own. */
  focus(event) {
    if (event.target === this.keep) return;
    event.preventDefault();
    this.root.focus({ preventScroll: true });
  }

  key(event) {
    if (event.target === this.keep) {
      if (event.key === "Enter" || event.key === "Escape") this.root.focus();
      return event.stopPropagation();
    }
    // A button that has the focus is pressed, and no picture chosen.
    if (event.target !== this.root && event.target.tagName === "BUTTON" && /^(Enter| )$/.test(event.key)) return event.stopPropagation();
    const meaning = keyMeaning(event, this.shown?.candidates.length ?? 0);
    if (!meaning) return;
    event.preventDefault();
    event.stopPropagation();
    if ("pick" in meaning) this.pick(meaning.pick);
    else if ("mark" in meaning) this.move(meaning.mark);
    else this.say(meaning.say);
  }

  move(step) {
    if (!this.shown) return;
    this.mark = markAt(this.mark, step, this.shown.candidates.length);
    this.cells.forEach((cell, place) => cell.classList.toggle("retort-picker-marked", place === this.mark));
    this.root.setAttribute("aria-activedescendant", this.cells[this.mark].id);
  }

  say(word) {
    if (word === "marked") this.mark !== null && this.pick(this.mark);
    else if (word === "draw" ? !this.does.blind : word === "undo" || this.ready(word === "skip")) this.does.say(word);
  }

  pick(place) {
    if (this.ready(false)) this.does.pick(place);
  }

  /** Whether these pictures can have been looked at; what cannot be shown may be skipped. */
  ready(broken) {
    const seen = this.cells.every((cell) => broken || cell.image.naturalWidth > 0);
    return Boolean(this.shown) && seen && performance.now() - this.since >= GUARD;
  }

  /** desk: `Desk.view`; drawing: a `Drawing`; drawn: a run is in the queue; note: what is said, or ""; glad: nothing went wrong. */
  render({ desk, canUndo, drawing, drawn, note, glad = false }) {
    if (desk.current?.id !== this.shown?.id || this.shown === undefined) this.show(desk.current);
    for (const word of ["tie", "skip"]) this.buttons[word].disabled = !desk.current;
    this.buttons.undo.disabled = !canUndo;
    this.buttons.draw.firstChild.data = drawing.on ? t("Stop drawing") : t("Generate");
    this.buttons.draw.setAttribute("aria-pressed", String(drawing.on));
    if (document.activeElement !== this.keep) this.keep.value = drawing.keep;
    const lost = desk.problems ? ` · ${t("{count} unreadable", { count: desk.problems })}` : "";
    this.counts.textContent = t("{judged} judged · {waiting} waiting · {skipped} skipped", desk) + lost;
    const { value, max, text } = progress({ ...desk, blind: desk.blind || this.does.blind });
    Object.assign(this.way, { max, value });
    this.far.textContent = text;
    this.far.classList.toggle("retort-picker-result", Boolean(desk.result));
    for (const one of this.late) one.hidden = !desk.result;
    const said = note || drawing.why;
    this.note.textContent = said || (drawn ? t("drawing…") : "");
    this.note.title = said;
    this.note.classList.toggle("retort-picker-trouble", Boolean(said) && !glad);
    if (!desk.current) {
      this.prompt.textContent = drawn
        ? t("The next candidates are being drawn.")
        : !this.does.blind
          ? this.does.away
            ? t("Nothing waits. Press Generate on the computer, or queue the workflow there.")
            : t("Nothing waits. Press Generate, or queue the workflow.")
          : desk.result ? t("The test is over. Open LoRA shows yours in a new workflow, and Load LoRA uses it in any other. Too little of your taste: pick more, or halve beta. Broken pictures: fewer training steps. Then press Train now again.") : t("Press Run: both models draw the same prompts, and you choose without knowing which drew what.");
    }
    // The next pictures are there when they are asked for.
    const next = desk.tickets[1];
    for (const id of [...(next?.candidates ?? []), next?.reference ?? []].flat()) make("img", "", { src: this.picture(id) });
  }

  show(ticket) {
    this.shown = ticket;
    this.since = performance.now();
    this.mark = null;
    this.root.removeAttribute("aria-activedescendant");
    this.prompt.classList.toggle("retort-picker-empty", !ticket);
    const prompt = ticket ? ticket.prompt || t("(no prompt)") : "";
    if (ticket) this.prompt.textContent = prompt;
    this.prompt.title = prompt;
    this.before.hidden = !ticket?.reference;
    if (ticket?.reference) this.before.src = this.picture(ticket.reference);
    this.cells = (ticket?.candidates ?? []).map((id, place, all) => this.cell(id, place, all.length, prompt));
    this.grid.dataset.count = this.cells.length;
    this.grid.replaceChildren(...this.cells);
    this.root.setAttribute("aria-label", ticket ? t("Which is best for: {prompt}", { prompt }) : t("No candidates wait"));
  }

  cell(id, place, count, prompt) {
    const cell = make("button", "retort-picker-cell", { type: "button", tabIndex: -1, id: `retort-${id}-${place}` });
    const label = t("Candidate {number} of {count} for: {prompt}", { number: place + 1, count, prompt });
    cell.setAttribute("aria-label", label);
    cell.setAttribute("aria-keyshortcuts", String(place + 1));
    cell.image = make("img", "", { draggable: false, alt: "" });
    cell.image.addEventListener("error", () => cell.classList.add("retort-picker-gone"));
    cell.image.addEventListener("load", () => {
      cell.classList.toggle("retort-picker-small", cell.image.naturalWidth <= 128);
      this.since = performance.now();
    });
    cell.image.src = this.picture(id);
    cell.append(cell.image, make("kbd", "", { textContent: String(place + 1) }));
    cell.addEventListener("click", () => this.pick(place));
    return cell;
  }
}
