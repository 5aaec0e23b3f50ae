// Data to train on, page by page in a window: pictures with captions to edit, and pairs to take out and put back. It is
// asked for when it is first needed.
import { api } from "../../../scripts/api.js";
import { t } from "../locales/words.mjs";
import { address, ask, tell } from "./client.mjs";
import { List } from "./list.mjs";
import { button, element, openWindow } from "./page.mjs";

const PAGE = 50, AGAIN = 1000;
document.head.append(element("style", {}, `
.retort-data { height: 94vh; }
.retort-data .retort-list > li { flex-direction: row; }
.retort-data .retort-list > li > div { flex: 1 1 auto; min-width: 0; display: flex; flex-direction: column; align-items: flex-start; gap: 4px; }
.retort-data img { flex: none; width: 128px; height: 128px; object-fit: contain; }
.retort-data textarea { width: 100%; box-sizing: border-box; font: inherit; color: inherit; background: var(--comfy-input-bg, #222); border: 1px solid var(--retort-grid); }
.retort-data p { margin: 0; overflow-wrap: anywhere; }
`));

class Pages {
  /** parts: of the address. key(entry): what tells entries apart. row(entry) -> {root, show(entry)}. boxes: {query: label}. */
  constructor(title, parts, entries, key, row, boxes = {}) {
    Object.assign(this, { parts, entries, key, row, offset: 0, rows: new Map() });
    const { dialog, body } = openWindow(title, "retort-data");
    const anew = () => {
      this.offset = 0;
      this.look();
    };
    const box = (type, label) => {
      const made = element("input", { type });
      made.addEventListener("input", anew);
      this.bar.append(element("label", {}, ...(type === "text" ? [label, made] : [made, label])));
      return made;
    };
    const turn = (text, label, by) => button(text, label, () => this.turn(by), (error) => this.say(error.message));
    this.bar = element("div", { class: "retort-row" });
    this.find = box("text", t("find"));
    this.boxes = Object.entries(boxes).map(([name, label]) => [name, box("checkbox", label)]);
    this.back = turn("\u2039", t("Previous page"), -PAGE);
    this.on = turn("\u203a", t("Next page"), PAGE);
    this.note = element("p", { class: "retort-note", role: "status" });
    this.list = element("ul", { class: "retort-list" });
    this.bar.append(this.back, this.on, this.note);
    body.append(this.bar, this.list);
    dialog.addEventListener("close", () => {
      this.closed = true;
      clearTimeout(this.timer);
    });
    this.look();
  }

  say(text) {
    this.note.textContent = text;
  }

  async turn(by) {
    this.offset = Math.max(0, this.offset + by);
    await this.look();
    this.list.parentElement.scrollTop = 0;
  }

  async look() {
    clearTimeout(this.timer);
    const asked = (this.asked = {});
    const query = { offset: this.offset, find: this.find.value };
    for (const [name, { checked }] of this.boxes) if (checked) query[name] = 1;
    let again = false;
    try {
      const answer = await ask(this.parts, query);
      if (this.closed || asked !== this.asked) return;
      this.show(answer);
      again = answer.looked < answer.of;
    } catch (error) {
      if (this.closed || asked !== this.asked) return;
      this.say(error.message);
      again = error.status === 503;
    }
    if (again) this.timer = setTimeout(() => this.look(), AGAIN);
  }

  show(answer) {
    const { total, looked, of } = answer;
    const found = this.entries(answer);
    const last = this.offset + found.length;
    const counts = { first: total && this.offset + 1, last, total };
    this.say(t("{first} to {last} of {total}", counts) + (looked < of ? `, ${t("{looked} of {of} looked at", { looked, of })}` : ""));
    this.back.hidden = !this.offset;
    this.on.hidden = last >= total;
    const rows = new Map(found.map((entry) => [this.key(entry), this.rows.get(this.key(entry)) ?? this.row(entry)]));
    for (const entry of found) rows.get(this.key(entry)).show(entry);
    // What was taken out stays until the page is turned, so that it can be put back; what is written in is not moved.
    const roots = [...rows.values()].map((row) => row.root);
    if (roots.some((root, i) => this.list.children[i] !== root) || roots.length !== this.list.children.length) this.list.replaceChildren(...roots);
    this.rows = rows;
  }
}

/** A button that takes something out and puts it back; struck: what is struck through while it is out. */
function outButton(parts, what, out, title, struck, state) {
  const look = () => {
    struck.style.textDecoration = out ? "line-through" : "";
    turn.textContent = out ? t("Put back") : t("Take out");
    state.textContent = "";
  };
  const act = async () => {
    await tell([...parts, out ? "put_back" : "take_out"], what);
    out = !out;
    look();
  };
  const turn = button("", title, act, (error) => (state.textContent = error.message));
  look();
  return turn;
}

/** A folder's pictures with their captions. */
export function openPictures(folder) {
  const said = {
    like: (name) => t("looks like {name}", { name }), small: () => t("much smaller than the others"),
    long: () => t("much longer than wide, or wider than long"), size: () => t("another size than most"), bare: () => t("no caption"), bad: (why) => t("cannot be read: {why}", { why }),
  };
  const row = ({ name, file, caption, version, note }) => {
    const query = new URLSearchParams({ filename: file, subfolder: folder, type: "input" });
    const image = element("img", { src: api.apiURL(`/view?${query}`), alt: "", loading: "lazy" });
    const line = element("span", { class: "retort-line" });
    const marks = element("strong");
    const state = element("span", { role: "status" });
    const text = element("textarea", { rows: 3, "aria-label": t("Caption of {name}", { name }) });
    // What cannot be shown whole is not edited: saving would leave the rest out.
    text.readOnly = Boolean(note);
    state.textContent = note;
    text.value = caption;
    const other = element("p", { hidden: "" });
    let before = version;
    text.addEventListener("change", async () => {
      state.textContent = "";
      other.hidden = true;
      try {
        ({ version: before } = await tell(["data", folder, "caption"], { name, caption: text.value, before }));
        state.textContent = t("saved");
        mark();
      } catch (error) {
        state.textContent = error.message;
        if (error.status !== 409) return;
        // Seen beside the box before the next change replaces it.
        before = error.answer.version;
        other.hidden = false;
        other.textContent = error.answer.note || t("The file says: {caption}", { caption: error.answer.caption || "\u2013" });
      }
    });
    let found = [];
    const mark = () => {
      const left = found.filter(([kind]) => kind !== "bare" || !text.value);
      marks.textContent = left.map(([kind, what]) => said[kind](what)).join("; ");
    };
    const show = ({ size, marks: all }) => {
      line.textContent = [name, size?.join(" × ")].filter(Boolean).join(" · ");
      found = all;
      mark();
    };
    const title = t("Take this picture out of what is trained on, or put it back");
    const out = outButton(["data", folder], { name }, file !== name, title, line, state);
    return { root: element("li", {}, image, element("div", {}, line, text, other, marks, out, state)), show };
  };
  const boxes = { marked: t("only what is marked"), out: t("only what was taken out") };
  new Pages(folder, ["data", folder], (answer) => answer.pictures, (entry) => entry.file, row, boxes);
}

/** All pairs of a preference set. */
export function openPairs(set) {
  const row = ({ line, prompt, winner, loser, tie, by }) => {
    const picture = (id, alt) => (id ? element("img", { src: address(["picker", set, "images", id]), alt, loading: "lazy" }) : "");
    const state = element("span", { role: "status" });
    const text = element("p", {}, [prompt, by].filter(Boolean).join(" · "));
    const root = element(
      "li", {}, picture(winner, tie ? t("one of a tie") : t("the better one")), element("span", {}, tie ? "=" : ">"),
      picture(loser, tie ? t("one of a tie") : t("the worse one")), element("div", {}, text),
    );
    const title = t("Take this pair out of the set, or put it back");
    root.lastChild.append(outButton(["preferences", set], { line }, false, title, text, state), state);
    return { root, show: () => {} };
  };
  new Pages(set, ["preferences", set, "pairs"], (answer) => answer.pairs, (entry) => entry.line, row);
}

/** Folders of pictures in ComfyUI's input folder, in the panel. */
export class FolderList {
  constructor(root) {
    this.list = new List(root, {
      parts: ["data"],
      label: t("Folders of pictures"),
      empty: t("No folders of pictures yet: put one into ComfyUI's input folder, with a text file of the same name for each caption."),
      row: (name) => {
        const note = element("span", { class: "retort-line" });
        const open = async () => openPictures(name);
        const failed = (error) => (note.textContent = error.message);
        const title = button(name, t("Pictures and captions"), open, failed);
        title.className = "retort-title";
        const show = ({ pictures }) => (note.textContent = pictures === undefined ? "" : t("{count} pictures", { count: pictures }));
        const root = element("li", { class: "retort-opens" }, title, note);
        // The whole card opens it.
        root.addEventListener("click", ({ target }) => target === title || title.click());
        return { root, show };
      },
    });
  }

  close() {
    this.list.close();
  }
}
