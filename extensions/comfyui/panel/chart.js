// A chart of one number of a run: raw values pale, their running mean strong, save points on the axis.
import { bounds, nearest, short, smooth, thin, ticks } from "./series.js";
import { colours, pen as penOf } from "./drawing.js";
import { element } from "./page.js";

const LEFT = 44, RIGHT = 8, TOP = 6, BOTTOM = 18;

export class Chart {
  /** settings: {shown, window, log}, kept by whoever owns the chart; changed() is called when the user changed them. */
  constructor(settings, changed) {
    this.settings = settings;
    this.changed = changed;
    this.cursor = null;
    this.select = element("select", { "aria-label": "Number shown" });
    this.slider = element("input", { type: "range", min: 0, max: 100, "aria-label": "Smoothing, in steps" });
    this.slider.value = String(Math.round(25 * Math.log10(settings.window)));
    this.log = element("input", { type: "checkbox" });
    this.log.checked = settings.log;
    this.canvas = element("canvas", { tabindex: 0, role: "img" });
    this.note = element("output", { class: "retort-note" });
    const smoothing = element("label", { title: "Steps that the strong line averages" }, "smooth ", this.slider);
    const scale = element("label", { title: "Logarithmic, where all values are positive" }, this.log, " log");
    this.root = element(
      "div", { class: "retort-chart" },
      element("div", { class: "retort-row" }, this.select, smoothing, scale), this.canvas, this.note,
    );
    this.select.addEventListener("change", () => this.set("shown", this.select.value));
    this.slider.addEventListener("input", () => this.set("window", 10 ** (Number(this.slider.value) / 25)));
    this.log.addEventListener("change", () => this.set("log", this.log.checked));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.sizes = new ResizeObserver(() => this.redraw());
    this.sizes.observe(this.canvas);
  }

  set(name, value) {
    this.settings[name] = value;
    this.changed();
    this.prepare();
  }

  /** Take what the series holds now. */
  show(series) {
    this.series = series;
    const names = series.names;
    if (names.join() !== [...this.select.options].map((option) => option.value).join()) {
      this.select.replaceChildren(...names.map((name) => element("option", { value: name }, name.replaceAll("_", " "))));
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
    const mean = smooth(values, this.settings.window);
    const scaled = (list) => (this.logged ? list.map(Math.log10) : list);
    this.data = { name, steps, values, mean, raw: scaled(values), line: scaled(mean) };
    this.range = bounds(this.data.raw);
    this.canvas.title = this.series.thinned ? "A long log: of its older part, some of the steps are shown" : "";
    this.thinned = null;
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
    const found = penOf(this.canvas);
    if (!found) return;
    const { pen, width, height } = found;
    const colour = colours(this.root);
    const { steps, raw, line } = this.data;
    const columns = Math.max(1, Math.floor(width - LEFT - RIGHT));
    if (this.thinned?.columns !== columns) {
      this.thinned = { columns, raw: thin(steps, raw, columns), line: thin(steps, line, columns) };
    }
    const first = steps[0], last = Math.max(steps[steps.length - 1], first + 1);
    const [low, high] = this.range;
    const x = (step) => LEFT + ((step - first) / (last - first)) * (width - LEFT - RIGHT);
    const y = (value) => height - BOTTOM - Math.min(1, Math.max(0, (value - low) / (high - low))) * (height - TOP - BOTTOM);

    pen.lineWidth = 1;
    pen.fillStyle = colour("ink");
    pen.strokeStyle = colour("grid");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const tick of ticks(low, high, height < 130 ? 2 : 4)) {
      pen.beginPath();
      pen.moveTo(LEFT, y(tick));
      pen.lineTo(width - RIGHT, y(tick));
      pen.stroke();
      pen.fillText(short(this.logged ? 10 ** tick : tick), LEFT - 5, y(tick));
    }
    pen.textBaseline = "bottom";
    pen.textAlign = "center";
    for (const tick of ticks(first, last, Math.max(1, Math.floor(width / 90)))) {
      pen.fillText(String(tick), Math.min(width - 14, Math.max(LEFT, x(tick))), height - 2);
    }
    const trace = (points, stroke, thickness) => {
      pen.beginPath();
      points.steps.forEach((step, i) => pen.lineTo(x(step), y(points.values[i])));
      pen.strokeStyle = stroke;
      pen.lineWidth = thickness;
      pen.stroke();
    };
    trace(this.thinned.raw, colour("pale"), 1);
    trace(this.thinned.line, colour("line"), 2);
    pen.fillStyle = colour("mark");
    for (const step of this.series.saves) {
      if (step < first || step > last) continue;
      pen.beginPath();
      pen.moveTo(x(step), height - BOTTOM - 6);
      pen.lineTo(x(step) - 4, height - BOTTOM);
      pen.lineTo(x(step) + 4, height - BOTTOM);
      pen.fill();
    }
    if (this.cursor !== null) {
      const i = Math.min(this.cursor, steps.length - 1);
      pen.strokeStyle = colour("ink");
      pen.lineWidth = 1;
      pen.beginPath();
      pen.moveTo(x(steps[i]), TOP);
      pen.lineTo(x(steps[i]), height - BOTTOM);
      pen.stroke();
      pen.fillStyle = colour("line");
      pen.beginPath();
      pen.arc(x(steps[i]), y(line[i]), 3, 0, 7);
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
