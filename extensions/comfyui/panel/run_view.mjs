// A training run as it goes on: where it stands, its chart, its previews, and what it can be told.
import { app } from "../../../scripts/app.js";
import { ask, previewOf, tell } from "./client.mjs";
import { Chart } from "./chart.mjs";
import { tellEnd, wanted } from "./notice.mjs";
import { button, element, lightbox } from "./page.mjs";
import { Series, counted, going, standing } from "./series.mjs";
import { t } from "../locales/words.mjs";

const GB = 2 ** 30;
const EVERY = 1000, AGAIN = 3000, MOST_PICTURES = 48;
// How long an answer to a button stays before the line says again where the run stands.
const NOTED = 5000;

/** Buttons for what a run can be told. run(): its name; say(text): what came of it. */
export function commandsOf(run, say) {
  const command = (wish, text, title, done) => button(text, title, async () => {
    // Said at once: a busy ComfyUI answers late.
    say(done);
    await tell(["runs", run(), "command"], { command: wish });
  }, (error) => say(error.message));
  const row = element(
    "div", { class: "retort-row" },
    command("sample", t("Sample now"), t("Draw previews after this step"), t("draws previews after this step")),
    command("save", t("Save now"), t("Write a checkpoint after this step"), t("saves after this step")),
    command("stop", t("Stop"), t("Save, hand out the LoRA so far and go on with the workflow; queue it again to train on"),
      t("saves and stops after this step")),
  );
  row.lastChild.classList.add("retort-apart");
  return row;
}

const views = new Set();
let reloading;

/** Read the lists of all nodes anew, once however many views ask for it. */
function reload() {
  clearTimeout(reloading);
  reloading = setTimeout(() => app.reloadNodeDefs?.()?.catch(() => {}), EVERY);
}

/** Let what shows a run follow it to its new name. */
export function renamed(name, now) {
  for (const view of views) if (view.name === name) view.renamed(now);
}

export class RunView {
  /**
   * settings: {shown, window, log} of the chart; changed(): they, or whether there is anything to show, changed;
   * looked(series): there was a look at the run; titled(): the run that one reads beside it.
   */
  constructor(settings, changed = () => {}, looked = () => {}, titled = () => this.name) {
    Object.assign(this, { changed, looked, titled });
    this.series = new Series();
    this.chart = new Chart(settings, changed);
    this.line = element("div", { class: "retort-line", role: "status" });
    this.bar = element("progress", { "aria-label": t("Steps done") });
    this.memory = element("div", { class: "retort-memory" });
    const failed = (error) => this.say(error.message);
    this.buttons = commandsOf(() => this.name, (text) => this.say(text));
    this.strip = element("div", { class: "retort-strip", role: "group", "aria-label": t("Previews") });
    const all = button(t("Over time"), t("All previews by prompt and step"), async () => {
      const { Gallery } = await import("./gallery.mjs");
      this.gallery = new Gallery(this.name, this.series.pictures);
    }, failed);
    this.opened = button(t("Open LoRA"), t("The LoRA in a new workflow"), async () => {
      const run = (await ask(["runs"])).find((one) => one.name === this.name);
      // Renamed or deleted meanwhile.
      if (!run) throw new Error(t("No run with a LoRA is called {name}: the Retort panel lists them.", { name: this.name }));
      await (await import("./new_workflow.mjs")).openLora(run);
    }, failed);
    this.opened.classList.add("retort-opened");
    this.previews = element("div", { class: "retort-previews" }, this.strip, all);
    this.root = element("div", { class: "retort-run" }, this.line, this.bar, this.memory, this.buttons, this.opened, this.chart.root, this.previews);
    this.root.hidden = true;
    // A node's own gestures must not begin on our controls.
    for (const kind of ["pointerdown", "wheel"]) this.root.addEventListener(kind, (event) => event.stopPropagation());
    this.seen = () => document.hidden || this.look();
    document.addEventListener("visibilitychange", this.seen);
    views.add(this);
  }

  /** Whether there is a run to show. */
  get filled() {
    return !this.root.hidden;
  }

  /** Show a run, and follow it while it goes on; `awaited` while something says that it will begin. */
  open(name, awaited = false) {
    if (name !== this.name) {
      this.series.clear();
      this.saved = undefined;
      this.went = false;
      this.shown = "";
      this.hide();
    }
    this.name = name;
    this.awaited = awaited;
    if (awaited) this.told = "";
    this.look();
  }

  /** The run has another name now. */
  renamed(name) {
    this.open(name);
  }

  hide() {
    if (this.root.hidden) return;
    this.root.hidden = true;
    this.changed();
  }

  close() {
    clearTimeout(this.timer);
    views.delete(this);
    this.name = undefined;
    document.removeEventListener("visibilitychange", this.seen);
    this.chart.close();
  }

  /** One look at the log, and the next when there is something to wait for. */
  async look() {
    clearTimeout(this.timer);
    const name = this.name;
    if (!name || this.looking) return;
    this.looking = true;
    let wait = null;
    try {
      let answer;
      do {
        answer = await ask(["runs", name, "log"], { offset: this.series.offset, step: this.series.last });
        if (this.name !== name) return;
        if (answer.status) this.series.add(answer);
      } while (answer.more);
      if (answer.status) this.show(answer.status);
      else if (!this.awaited) this.hide();
      if (this.awaited || (answer.status && going(answer.status))) wait = EVERY;
    } catch (error) {
      // ComfyUI restarts, or is away: the run may go on without it.
      this.say(error.status ? error.message : t("ComfyUI does not answer; looking again"));
      this.state = undefined;
      if (!(error.status < 500)) wait = AGAIN;
    } finally {
      this.looking = false;
      // Another run was asked for meanwhile.
      if (this.name !== name) this.look();
      else if (wait !== null && (!document.hidden || wanted())) this.timer = setTimeout(() => this.look(), document.hidden ? 10 * wait : wait);
    }
  }

  say(text) {
    this.note = text;
    this.noted = Date.now();
    this.line.textContent = text;
  }

  show(status) {
    const saved = this.series.saves.at(-1);
    if (saved !== undefined && this.saved !== undefined && saved > this.saved && going(status)) this.say(t("saved at step {saved}", { saved }));
    this.saved = saved ?? 0;
    if (this.went && !going(status)) {
      tellEnd(this.name, status);
      // What it has written is in the lists of all nodes from now on.
      if (status.lora) reload();
    }
    this.went = going(status);
    const state = standing(status);
    if (status.state !== this.state || Date.now() - this.noted > NOTED) {
      this.state = status.state;
      this.note = undefined;
    }
    this.line.textContent = this.note ?? [state, status.message].filter(Boolean).join(": ")
      + (this.titled() === this.name ? "" : ` · ${this.name}`) + (status.lora && !going(status) ? ` · ${status.lora}` : "") + (this.told ? ` · ${this.told}` : "");
    this.line.title = this.line.textContent;
    this.line.dataset.state = status.state;
    const [done, of] = counted(status);
    this.bar.max = Math.max(1, of);
    this.bar.value = done;
    this.bar.setAttribute("aria-label", status.phase || t("Steps done"));
    this.bar.hidden = this.buttons.hidden = !going(status);
    this.opened.hidden = going(status) || !status.lora;
    this.chart.root.hidden = !this.series.steps.length;
    this.chart.show(this.series, this.name);
    this.held(status);
    this.pictures();
    this.looked(this.series);
    if (this.root.hidden) {
      this.root.hidden = false;
      this.changed();
    }
  }

  /** How full the card has been. */
  held({ memory, card }) {
    this.memory.hidden = !(memory && card);
    if (this.memory.hidden) return;
    const text = t("{used} of {all} GB on the card", { used: (memory / GB).toFixed(1), all: (card / GB).toFixed(0) });
    if (this.memory.textContent === text) return;
    this.memory.replaceChildren(element("meter", { min: 0, max: card, value: memory, "aria-label": t("Memory of the card") }), text);
  }

  pictures() {
    const steps = this.series.pictures.slice(-MOST_PICTURES);
    if (this.gallery?.open && this.gallery.run === this.name) this.gallery.update(this.series.pictures);
    this.previews.hidden = !steps.length;
    if (steps.join() === this.shown) return;
    this.shown = steps.join();
    const pictures = steps.map((step) => ({
      source: previewOf(this.name, step),
      text: t("step {step}", { step }),
    }));
    // The newest first, whatever width it turns out to have.
    const made = pictures.map(({ source, text }, i) => {
      const image = element("img", { src: source, alt: t("Preview at {step}", { step: text }), loading: "lazy" });
      const one = element("button", { type: "button", title: text }, image, element("span", {}, text));
      one.addEventListener("click", () => lightbox(pictures, i));
      return one;
    });
    this.strip.replaceChildren(...made.reverse());
    this.strip.scrollLeft = 0;
  }
}
