// Runs side by side: their curves in one chart for each number, the settings that differ, and their previews.
import { ask, previewOf } from "./client.mjs";
import { exporters, plot } from "./curves.mjs";
import { colours } from "./drawing.mjs";
import { element, lightbox, openWindow } from "./page.mjs";
import { Series, bounds, differing, nearest, smooth, spoken } from "./series.mjs";
import { t } from "../locales/words.mjs";

const EVERY = 3000; // ms
const STROKES = ["#3b8eea", "#e89a3c", "#5fb86a", "#d16bb4", "#a08be8", "#3fb3b3", "#d9534f", "#9aa04a"];
const SMOOTHING = 25;

/** The runs that a number may be compared of, [{method, runs}]: what one method calls its loss is another's number. */
function alike(name, runs) {
  const those = runs.filter(({ series }) => series.values.has(name));
  const methods = [...new Set(those.map((run) => run.method))];
  if (methods.length < 2 || !name.endsWith("loss")) return [{ method: "", runs: those }];
  return methods.map((method) => ({ method, runs: those.filter((run) => run.method === method) }));
}

export class Compared {
  /** Opens over the page. names: of the runs. */
  constructor(names) {
    this.runs = names.map((name, i) => ({ name, stroke: STROKES[i], series: new Series(), settings: {} }));
    const { dialog, body } = openWindow(t("{count} runs compared", { count: names.length }), "retort-compared");
    this.dialog = dialog;
    this.shown = new Set(["student_loss"]);
    this.note = element("p", { class: "retort-note", role: "status" }, t("looking…"));
    this.legend = element("ul", { class: "retort-legend", "aria-label": t("Runs") });
    this.numbers = element("fieldset", { class: "retort-row" }, element("legend", {}, t("Numbers")));
    this.charts = element("div", { class: "retort-charts" });
    this.table = element("table", { class: "retort-differ" });
    this.differing = element("section", {}, element("h4", {}, t("Settings that differ")), this.table);
    this.slider = element("input", { type: "range", min: 0, "aria-label": t("Previews up to step") });
    this.step = element("output");
    this.pictures = element("div", { class: "retort-beside" });
    this.apart = element("p", { class: "retort-note" }, t("These runs drew different prompts: compare the numbers, or train both with the same ones."));
    const failed = (error) => (this.note.textContent = error.message);
    const exports = element("div", { class: "retort-row" }, ...exporters(() => (
      { name: "runs", runs: this.runs, canvases: [...this.charts.children], ground: colours(dialog)("back") }
    ), failed));
    this.beside = element("section", {}, element("h4", {}, t("Previews")),
      element("div", { class: "retort-row" }, this.slider, this.step), this.apart, this.pictures);
    body.append(this.legend, this.numbers, this.charts, exports, this.note,
      this.differing, this.beside);
    this.legend.replaceChildren(...this.runs.map(({ name, stroke }) =>
      element("li", {}, element("span", { class: "retort-key", style: `background: ${stroke}` }), name)));
    this.slider.addEventListener("input", () => this.preview());
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.charts);
    dialog.addEventListener("close", () => {
      clearTimeout(this.timer);
      this.sizes.disconnect();
    });
    this.look().catch(failed);
  }

  async look() {
    for (const run of this.runs) {
      let answer;
      do {
        answer = await ask(["runs", run.name, "log"], { offset: run.series.offset, step: run.series.last });
        if (answer.status) run.series.add(answer);
      } while (answer.more);
      run.going = ["running", "queued"].includes(answer.status?.state);
      if (!run.asked || !run.prompts) {
        const { settings, sheet } = await ask(["runs", run.name, "about"]);
        Object.assign(run, { settings, prompts: [...new Set(sheet?.prompts ?? [])].filter(Boolean).join(" · ") });
      }
      run.method = run.settings.method;
      run.asked = true;
    }
    if (!this.dialog.open) return;
    this.note.textContent = "";
    this.choices();
    this.draw();
    this.settings();
    this.steps();
    if (this.runs.some((run) => run.going)) this.timer = setTimeout(() => this.look().catch(() => {}), EVERY);
  }

  choices() {
    const names = [...new Set(this.runs.flatMap(({ series }) => series.names))];
    if (names.join() === this.offered) return;
    this.offered = names.join();
    if (!names.some((name) => this.shown.has(name)) && names.length) this.shown.add(names[0]);
    const boxes = names.map((name) => {
      const box = element("input", { type: "checkbox" });
      box.checked = this.shown.has(name);
      box.addEventListener("change", () => {
        box.checked ? this.shown.add(name) : this.shown.delete(name);
        this.draw();
      });
      return element("label", {}, box, spoken(name, names));
    });
    this.numbers.replaceChildren(this.numbers.firstChild, ...boxes);
  }

  draw() {
    const names = this.offered?.split(",").filter((name) => this.shown.has(name)) ?? [];
    const drawn = names.flatMap((name) => alike(name, this.runs).map((runs) => ({ name, ...runs })));
    const canvases = drawn.map((_, i) => this.charts.children[i] ?? element("canvas", { role: "img" }));
    if (canvases.some((one, i) => one !== this.charts.children[i]) || this.charts.children.length > drawn.length) {
      this.charts.replaceChildren(...canvases);
    }
    drawn.forEach(({ name, method, runs }, i) => {
      const lines = runs.flatMap(({ series, stroke }) => {
        const { steps, values } = series.points(name);
        return steps.length ? [{ steps, values: smooth(values, SMOOTHING), stroke, width: 2 }] : [];
      });
      const [low, high] = bounds(lines.flatMap((line) => line.values));
      const first = Math.min(...lines.map((line) => line.steps[0]));
      const last = Math.max(first + 1, ...lines.map((line) => line.steps.at(-1)));
      const axis = [spoken(name, this.offered.split(",")), method].filter(Boolean).join(" · ");
      canvases[i].setAttribute("aria-label", t("{number} of {count} runs", { number: axis, count: lines.length }));
      plot(canvases[i], colours(this.dialog), { first, last, spans: [{ name: "", low, high, lines }], logged: false, axis });
    });
  }

  settings() {
    const rows = differing(this.runs.map((run) => run.settings));
    const head = element("tr", {}, element("th", { scope: "col" }, t("setting")),
      ...this.runs.map(({ name }) => element("th", { scope: "col" }, name)));
    const said = (value) => (value === undefined ? "–" : String(value));
    this.table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows.map(([name, ...values]) =>
      element("tr", {}, element("th", { scope: "row" }, name), ...values.map((value) => element("td", {}, said(value)))))));
    this.differing.hidden = !rows.length;
    if (!rows.length) this.note.textContent = t("These runs have the same settings; what they learned from may differ.");
  }

  /** The steps that there are previews of. */
  steps() {
    const steps = [...new Set(this.runs.flatMap(({ series }) => series.pictures))].sort((a, b) => a - b);
    this.beside.hidden = !steps.length;
    if (steps.join() === this.all?.join()) return;
    this.all = steps;
    this.slider.max = String(steps.length - 1);
    this.slider.value = this.slider.max;
    this.preview();
  }

  preview() {
    const step = this.all[Number(this.slider.value)];
    this.step.textContent = t("step {step}", { step });
    const drawn = this.runs.filter(({ series }) => series.pictures.length);
    // Pictures of different prompts say nothing about which run is better.
    const mixed = new Set(drawn.map(({ prompts }) => prompts).filter(Boolean)).size > 1;
    const found = drawn.map(({ name, series, prompts }) => {
      const at = series.pictures[nearest(series.pictures, step)];
      return { source: previewOf(name, at), text: t("{run}, step {step}", { run: name, step: at }), prompts: mixed ? prompts : "" };
    });
    this.apart.hidden = !mixed;
    this.pictures.replaceChildren(...found.map(({ source, text, prompts }, i) => {
      const made = element("button", { type: "button", title: text }, element("img", { src: source, alt: text }), element("span", {}, text),
        ...(prompts ? [element("span", { class: "retort-note" }, prompts)] : []));
      made.addEventListener("click", () => lightbox(found, i));
      return made;
    }));
  }
}
