// How a run's previews change: a row for each prompt, a column for each step, and one column that plays them.
import { ask, previewOf } from "./client.mjs";
import { element, lightbox, openWindow } from "./page.mjs";
import { evenly } from "./series.mjs";
import { cut, load } from "./sheets.mjs";
import { t } from "../locales/words.mjs";

const MOST_STEPS = 48;
const WIDE = 256; // pixels of a picture in the table
const PAUSE = 600; // ms that a step stays while it plays

export class Gallery {
  /** Opens over the page. steps: those that there are previews of. */
  constructor(run, steps) {
    this.run = run;
    const { dialog, body } = openWindow(t("{run} over time", { run }), "retort-gallery");
    this.dialog = dialog;
    this.slider = element("input", { type: "range", min: 0, value: 0, "aria-label": t("Step shown") });
    this.step = element("output");
    this.player = element("button", { type: "button", "aria-pressed": "false" }, t("Play"));
    this.table = element("table", { class: "retort-time" });
    this.note = element("p", { class: "retort-note", role: "status" }, t("looking…"));
    const box = element("div", { class: "retort-scroll" }, this.table);
    body.append(element("div", { class: "retort-row" }, this.player, this.slider, this.step), this.note, box);
    this.slider.addEventListener("input", () => this.show(Number(this.slider.value)));
    this.player.addEventListener("click", () => this.play(!this.timer));
    dialog.addEventListener("close", () => this.play(false));
    this.update(steps);
  }

  get open() {
    return this.dialog.open;
  }

  /** Show these steps, which are those of before and perhaps further ones. */
  async update(steps) {
    this.wanted = evenly(steps, MOST_STEPS);
    if (this.filling) return;
    this.filling = true;
    try {
      while (this.open && this.wanted.join() !== this.steps?.join()) await this.fill(this.wanted);
    } catch (error) {
      this.note.textContent = error.message;
    } finally {
      this.filling = false;
    }
  }

  async fill(steps) {
    const { sheet } = await ask(["runs", this.run, "about"]);
    // Without a layout a sheet is one picture.
    this.sheet = sheet ?? { columns: 1, prompts: [""] };
    this.steps = steps;
    this.table.ariaBusy = "true";
    this.now = this.sheet.prompts.map(() => element("canvas", { role: "img" }));
    this.cells = this.sheet.prompts.map(() => steps.map(() => element("canvas", { "aria-hidden": true })));
    const head = (text, kind) => element("th", { scope: "col", class: kind }, text);
    this.heads = steps.map((step) => head(step ? String(step) : t("before"), "retort-step"));
    this.shown = head("", "retort-now");
    const rows = this.sheet.prompts.map((prompt, i) => {
      const cells = this.cells[i].map((canvas, j) => {
        const cell = element("button", { type: "button", tabindex: -1, "aria-label": this.caption(i, j) }, canvas);
        cell.addEventListener("click", () => this.enlarge(i, j));
        return element("td", {}, cell);
      });
      return element("tr", {}, element("th", { scope: "row", title: prompt }, prompt || String(i + 1)),
        element("td", { class: "retort-now" }, this.now[i]), ...cells);
    });
    const first = element("tr", {}, head(t("prompt"), ""), this.shown, ...this.heads);
    this.table.replaceChildren(element("thead", {}, first), element("tbody", {}, ...rows));
    // One stop for keys: the large pictures are gone through by arrows.
    this.table.querySelector("td button").tabIndex = 0;
    this.slider.max = String(steps.length - 1);
    this.note.textContent = "";
    this.show(steps.length - 1);
    // The latest first: they are looked at.
    for (let j = steps.length - 1; j >= 0 && this.open; j--) {
      const image = await load(previewOf(this.run, steps[j])).catch(() => null);
      if (this.steps !== steps) return;
      if (!image) continue;
      this.cells.forEach((row, i) => cut(image, this.sheet, i, row[j], WIDE));
      if (j === this.index) this.show(j);
    }
    this.table.ariaBusy = "false";
  }

  caption(row, column) {
    return [t("step {step}", { step: this.steps[column] }), this.sheet.prompts[row]].filter(Boolean).join(": ");
  }

  /** Show a step in the column that plays. */
  show(index) {
    this.index = index;
    this.slider.value = String(index);
    this.step.textContent = this.shown.textContent = t("step {step}", { step: this.steps[index] });
    this.heads.forEach((head, j) => head.toggleAttribute("data-now", j === index));
    this.now.forEach((canvas, i) => {
      const from = this.cells[i][index];
      canvas.width = from.width;
      canvas.height = from.height;
      canvas.getContext("2d").drawImage(from, 0, 0);
      canvas.setAttribute("aria-label", this.caption(i, index));
    });
  }

  play(on) {
    clearInterval(this.timer);
    this.timer = on ? setInterval(() => this.show((this.index + 1) % this.steps.length), PAUSE) : undefined;
    this.player.textContent = on ? t("Pause") : t("Play");
    this.player.setAttribute("aria-pressed", String(on));
  }

  enlarge(row, column) {
    this.play(false);
    const pictures = this.sheet.prompts.flatMap((_, i) => this.steps.map((step, j) => ({
      text: this.caption(i, j),
      source: async () => {
        const canvas = document.createElement("canvas");
        cut(await load(previewOf(this.run, step)), this.sheet, i, canvas);
        return canvas.toDataURL();
      },
    })));
    lightbox(pictures, row * this.steps.length + column, this.steps.length);
  }
}
