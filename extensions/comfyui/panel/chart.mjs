// A chart of one number of a run: raw values pale, their running mean strong, phases apart, save points on the axis.
import { LEFT, RIGHT, exporters, plot } from "./curves.mjs";
import { colours, follow } from "./drawing.mjs";
import { element } from "./page.mjs";
import { bounds, nearest, short, smooth, split, spoken } from "./series.mjs";
import { t } from "../locales/words.mjs";

export class Chart {
  /** settings: {shown, window, log}, kept by whoever owns the chart; changed() is called when the user changed them. */
  constructor(settings, changed) {
    this.settings = settings;
    this.changed = changed;
    this.cursor = null;
    this.select = element("select", { "aria-label": t("Number shown") });
    this.slider = element("input", { type: "range", min: 0, max: 100, "aria-label": t("Smoothing, in steps") });
    this.slider.value = String(Math.round(25 * Math.log10(settings.window)));
    this.log = element("input", { type: "checkbox" });
    this.log.checked = settings.log;
    this.canvas = element("canvas", { tabindex: 0, role: "img" });
    this.note = element("output", { class: "retort-note" });
    const smoothing = element("label", { title: t("Steps that the strong line averages") }, `${t("smooth")} `, this.slider);
    const scale = element("label", { title: t("Logarithmic, where all values are positive") }, this.log, " log");
    const failed = (error) => (this.note.textContent = error.message);
    const exports = exporters(() => {
      const name = this.run ?? "run";
      return { name, runs: [{ name, series: this.series }], canvases: [this.canvas], ground: colours(this.root)("back") };
    }, failed);
    this.root = element(
      "div", { class: "retort-chart" },
      element("div", { class: "retort-row" }, this.select, smoothing, scale, element("span", { class: "retort-row retort-apart" }, ...exports)), this.canvas, this.note,
    );
    this.select.addEventListener("change", () => this.set("shown", this.select.value));
    this.slider.addEventListener("input", () => this.set("window", 10 ** (Number(this.slider.value) / 25)));
    this.log.addEventListener("change", () => this.set("log", this.log.checked));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.sizes = new ResizeObserver(() => this.redraw());
    this.sizes.observe(this.canvas);
    this.unfollow = follow(() => this.redraw());
  }

  close() {
    this.sizes.disconnect();
    this.unfollow();
  }

  set(name, value) {
    this.settings[name] = value;
    this.changed();
    this.prepare();
  }

  /** Take what the series holds now; run: whose it is. */
  show(series, run) {
    this.series = series;
    this.run = run;
    const names = series.names;
    if (names.join() !== [...this.select.options].map((option) => option.value).join()) {
      this.select.replaceChildren(...names.map((name) => element("option", { value: name }, spoken(name, names))));
    }
    this.prepare();
  }

  prepare() {
    if (!this.series?.steps.length) return;
    const names = this.series.names;
    const name = names.includes(this.settings.shown) ? this.settings.shown : names[0];
    if (!name) return;
    this.select.value = name;
    const { steps, values } = this.series.points(name);
    this.logged = this.settings.log && values.every((value) => value > 0);
    const parts = split(steps, this.series.phases);
    // What one phase calls its loss is another number than the next one's.
    const mean = parts.flatMap(({ begin, end }) => smooth(values.slice(begin, end), this.settings.window));
    const scaled = (list) => (this.logged ? list.map(Math.log10) : list);
    const raw = scaled(values);
    for (const part of parts) part.range = bounds(raw.slice(part.begin, part.end));
    this.data = { name, steps, values, mean, raw, line: scaled(mean), parts };
    this.canvas.title = this.series.thinned ? "A long log: of its older part, some of the steps are shown" : "";
    const last = values.length - 1;
    this.canvas.setAttribute(
      "aria-label",
      `${name}: ${short(values[last])} at step ${steps[last]}, running mean ${short(mean[last])}, ` +
        `from ${short(Math.min(values[0], values[last]))}; arrow keys read values`,
    );
    this.redraw();
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }

  draw() {
    if (!this.data?.steps.length) return;
    const colour = colours(this.root);
    const { name, steps, values, raw, line, parts } = this.data;
    const first = steps[0], last = Math.max(steps[steps.length - 1], first + 1);
    const spans = parts.map((part) => {
      const [low, high] = part.range;
      const of = (list, stroke, width) =>
        ({ steps: steps.slice(part.begin, part.end), values: list.slice(part.begin, part.end), stroke, width });
      const lines = [of(raw, colour("pale"), 1), of(line, colour("line"), 2)];
      return { name: part.name, from: steps[part.begin], low, high, lines };
    });
    const drawn = plot(this.canvas, colour, { first, last, spans, logged: this.logged, axis: spoken(name, this.series.names) });
    if (!drawn) return;
    const { pen, x, y, bottom, top } = drawn;
    pen.fillStyle = colour("mark");
    for (const step of this.series.saves) {
      if (step < first || step > last) continue;
      pen.beginPath();
      pen.moveTo(x(step), bottom - 6);
      pen.lineTo(x(step) - 4, bottom);
      pen.lineTo(x(step) + 4, bottom);
      pen.fill();
    }
    if (this.cursor !== null) {
      const i = Math.min(this.cursor, steps.length - 1);
      pen.strokeStyle = colour("ink");
      pen.lineWidth = 1;
      pen.beginPath();
      pen.moveTo(x(steps[i]), top);
      pen.lineTo(x(steps[i]), bottom);
      pen.stroke();
      pen.fillStyle = colour("line");
      pen.beginPath();
      pen.arc(x(steps[i]), y(line[i], spans[parts.findIndex((part) => i < part.end)]), 3, 0, 7);
      pen.fill();
    }
  }

  point(event) {
    if (!this.data?.steps.length) return;
    // The page may have scaled the node, so the width on screen counts.
    const box = this.canvas.getBoundingClientRect();
    const place = (event.clientX - box.left) * (this.canvas.clientWidth / (box.width || 1)) - LEFT;
    const { steps } = this.data;
    const share = place / Math.max(1, this.canvas.clientWidth - LEFT - RIGHT);
    this.move(nearest(steps, steps[0] + share * (steps[steps.length - 1] - steps[0])));
  }

  key(event) {
    if (!this.data?.steps.length) return;
    const end = this.data.steps.length - 1, now = this.cursor ?? end;
    const page = Math.max(1, Math.round(end / 20));
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now + page, PageDown: now - page, Home: 0, End: end };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    this.move(Math.min(end, Math.max(0, moves[event.key])));
  }

  move(index) {
    this.cursor = index;
    if (index === null) {
      this.note.textContent = "";
    } else {
      const { steps, values, mean } = this.data;
      const saved = this.series.saves.includes(steps[index]) ? ", saved" : "";
      this.note.textContent = `step ${steps[index]}: ${short(values[index])}, mean ${short(mean[index])}${saved}`;
    }
    this.redraw();
  }
}
