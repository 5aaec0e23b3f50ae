// Lines over steps on a canvas, with axes that have names; each phase of a run has a scale of its own.
import { pen as penOf } from "./drawing.mjs";
import { button, download } from "./page.mjs";
import { csv, short, thin, ticks } from "./series.mjs";
import { t } from "../locales/words.mjs";

export const LEFT = 44, RIGHT = 8;
const TOP = 20, BOTTOM = 18, NARROW = 90;

/**
 * Draw, and return {x(step), y(value, span)}; null while the canvas is not shown. colour(name): of the theme.
 * spans: [{name, low, high, lines: [{steps, values, stroke, width, dash}]}], one after another; logged: values are
 * logarithms. axis: what the values are.
 */
export function plot(canvas, colour, { first, last, spans, logged, axis }) {
  const found = penOf(canvas);
  if (!found) return null;
  const { pen, width, height } = found;
  const columns = Math.max(1, Math.floor(width - LEFT - RIGHT));
  const x = (step) => LEFT + ((step - first) / Math.max(1, last - first)) * (width - LEFT - RIGHT);
  const share = (value, { low, high }) => Math.min(1, Math.max(0, (value - low) / (high - low)));
  const y = (value, span) => height - BOTTOM - share(value, span) * (height - TOP - BOTTOM);
  pen.fillStyle = colour("ink");
  pen.lineWidth = 1;
  spans.forEach((span, i) => {
    const from = i ? x(span.from) : LEFT, to = i + 1 < spans.length ? x(spans[i + 1].from) : width - RIGHT;
    pen.strokeStyle = colour("grid");
    pen.textBaseline = "middle";
    pen.textAlign = i ? "left" : "right";
    for (const tick of ticks(span.low, span.high, height < 130 ? 2 : 4)) {
      pen.beginPath();
      pen.moveTo(from, y(tick, span));
      pen.lineTo(to, y(tick, span));
      pen.stroke();
      // A short phase has no room for numbers.
      if (i && to - from < NARROW) continue;
      pen.fillText(short(logged ? 10 ** tick : tick), i ? from + 3 : from - 5, y(tick, span));
    }
    pen.textBaseline = "top";
    pen.textAlign = "left";
    if (i) {
      pen.strokeStyle = colour("ink");
      pen.beginPath();
      pen.moveTo(from, 0);
      pen.lineTo(from, height - BOTTOM);
      pen.stroke();
    }
    // Runs of students say so themselves; a method's name is the same everywhere.
    const name = span.name === "copies pairs" ? t("copies pairs") : span.name;
    if (name) pen.fillText(name, from + 3, 2, Math.max(1, to - from - 4));
  });
  if (axis && !spans[0]?.name) pen.fillText(axis, 2, 2);
  pen.textBaseline = "bottom";
  pen.textAlign = "right";
  pen.fillText(t("step"), width - 2, height - 2);
  pen.textAlign = "center";
  const most = width - 2 - pen.measureText(t("step")).width - 14;
  for (const tick of ticks(first, last, Math.max(1, Math.floor(width / 90)))) {
    if (x(tick) < most) pen.fillText(String(tick), Math.max(LEFT, x(tick)), height - 2);
  }
  for (const span of spans) {
    for (const { steps, values, stroke, width: thick, dash = [] } of span.lines) {
      const points = thin(steps, values, columns);
      pen.beginPath();
      points.steps.forEach((step, i) => pen.lineTo(x(step), y(points.values[i], span)));
      pen.strokeStyle = stroke;
      pen.lineWidth = thick;
      pen.setLineDash(dash);
      pen.stroke();
      pen.setLineDash([]);
      if (steps.length > 1) continue;
      // One point is no line.
      pen.fillStyle = stroke;
      pen.fillRect(x(steps[0]) - 2, y(values[0], span) - 2, 4, 4);
    }
  }
  return { pen, x, y, bottom: height - BOTTOM, top: TOP };
}

/** One picture of several canvases, below one another, on a ground: a promise of a PNG. */
function pictureOf(canvases, ground) {
  const whole = document.createElement("canvas");
  whole.width = Math.max(...canvases.map((one) => one.width));
  whole.height = canvases.reduce((sum, one) => sum + one.height, 0);
  const pen = whole.getContext("2d");
  pen.fillStyle = ground;
  pen.fillRect(0, 0, whole.width, whole.height);
  let top = 0;
  for (const one of canvases) {
    pen.drawImage(one, 0, top);
    top += one.height;
  }
  return new Promise((done) => whole.toBlob(done, "image/png"));
}

/** Buttons that give the user the numbers of runs, or their charts. given(): {name, runs, canvases, ground}. */
export function exporters(given, failed) {
  return [
    button("CSV", t("The numbers as a table"), () => {
      const { name, runs } = given();
      download(`${name}.csv`, new Blob([csv(runs)], { type: "text/csv" }));
    }, failed),
    button("PNG", t("The chart as a picture"), async () => {
      const { name, canvases, ground } = given();
      download(`${name}.png`, await pictureOf(canvases, ground));
    }, failed),
  ];
}
