// The numbers of a run and how a chart shows them; no page is needed here.
import { t } from "../locales/words.mjs";

const MOST_NAMES = 64;

/** A run's log by columns: it grows by what the server's /log answers. */
export class Series {
  constructor() {
    this.clear();
  }

  clear() {
    this.steps = [];
    this.values = new Map();
    this.hidden = new Set();
    this.saves = [];
    this.pictures = [];
    this.phases = [];
    this.offset = 0;
    this.thinned = false;
  }

  get last() {
    return this.steps.length ? this.steps[this.steps.length - 1] : 0;
  }

  /** Names that a chart offers, the student's loss first. */
  get names() {
    const first = ["student_loss", "fake_loss"];
    const rest = [...this.values.keys()].filter((name) => !this.hidden.has(name) && !first.includes(name)).sort();
    return [...first.filter((name) => this.values.has(name)), ...rest];
  }

  add(answer) {
    if (answer.restart) this.clear();
    const before = this.steps.length;
    for (const step of answer.steps) this.steps.push(step);
    for (const name of Object.keys(answer.values)) {
      // A number that came late has gaps before, one that left has gaps after.
      if (!this.values.has(name) && this.values.size < MOST_NAMES) this.values.set(name, new Array(before).fill(null));
    }
    for (const [name, column] of this.values) {
      const more = answer.values[name];
      for (let i = 0; i < answer.steps.length; i++) column.push(more ? more[i] : null);
    }
    for (const name of answer.hidden) this.hidden.add(name);
    this.saves = answer.saves;
    this.pictures = answer.pictures;
    this.phases = answer.phases ?? [];
    this.offset = answer.offset;
    this.thinned ||= answer.thinned > 0;
  }

  /** Steps and values of a name without its gaps. */
  points(name) {
    const column = this.values.get(name) ?? [];
    const steps = [], values = [];
    for (let i = 0; i < column.length; i++) {
      if (column[i] === null) continue;
      steps.push(this.steps[i]);
      values.push(column[i]);
    }
    return { steps, values };
  }
}

/** What a number of a log is called among others: where nobody but the student learns, its loss is the loss. */
export function spoken(name, names) {
  return name === "student_loss" && !names.includes("fake_loss") ? "loss" : name.replaceAll("_", " ");
}

/** At most so many of a list, evenly, its first and last with them. */
export function evenly(list, most) {
  if (list.length <= most) return list;
  return Array.from({ length: most }, (_, i) => list[Math.round((i * (list.length - 1)) / (most - 1))]);
}

/** [{begin, end, name}]: the points of each phase that has any, as indices. phases: [{from: its first step, name}]. */
export function split(steps, phases) {
  const found = [];
  const all = phases.length ? phases : [{ from: -Infinity, name: "" }];
  all.forEach(({ name }, i) => {
    const begin = found.at(-1)?.end ?? 0;
    let end = begin;
    while (end < steps.length && steps[end] < (all[i + 1]?.from ?? Infinity)) end++;
    if (end > begin) found.push({ begin, end, name });
  });
  return found;
}

/** Runs as a table with commas: run, step and every number. runs: [{name, series}]. */
export function csv(runs) {
  const names = [...new Set(runs.flatMap(({ series }) => series.names))];
  // A program that opens the table must not take a name for a formula.
  const plain = (text) => text.replace(/^[=+\-@\t\r]/, "'$&");
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${plain(text).replaceAll('"', '""')}"` : plain(text));
  const rows = runs.flatMap(({ name, series }) => series.steps.map((step, i) =>
    [quoted(name), step, ...names.map((each) => series.values.get(each)?.[i] ?? "")].join(",")));
  return `${["run", "step", ...names.map(quoted)].join(",")}\n${rows.join("\n")}\n`;
}

/** The settings in which runs differ: [name, value of each run], undefined where a run has none. all: [settings]. */
export function differing(all) {
  const names = [...new Set(all.flatMap(Object.keys))].sort();
  return names.map((name) => [name, ...all.map((settings) => settings[name])])
    .filter(([, first, ...rest]) => rest.some((value) => value !== first));
}

/** Running mean with a memory of `window` points, unbiased at the beginning. */
export function smooth(values, window) {
  const keep = 1 - 1 / Math.max(1, window);
  const out = new Array(values.length);
  let total = 0, weight = 0;
  for (let i = 0; i < values.length; i++) {
    total = keep * total + values[i];
    weight = keep * weight + 1;
    out[i] = total / weight;
  }
  return out;
}

/** The lowest and highest that a chart shows: without the outermost half percent, so that a spike flattens nothing. */
export function bounds(values) {
  if (!values.length) return [0, 1];
  const every = Math.max(1, Math.floor(values.length / 20000));
  const sorted = values.filter((_, i) => i % every === 0 || i === values.length - 1).sort((a, b) => a - b);
  const cut = Math.floor(sorted.length / 200);
  const low = sorted[cut], high = sorted[sorted.length - 1 - cut];
  if (high > low) return [low, high];
  const room = Math.abs(low) / 10 || 0.5;
  return [low - room, high + room];
}

/** At most four points for each of `columns`: the first, lowest, highest and last of those that fall into it. */
export function thin(steps, values, columns) {
  const count = steps.length;
  if (count <= 4 * columns) return { steps, values };
  const from = steps[0], width = (steps[count - 1] - from) / columns || 1;
  const out = { steps: [], values: [] };
  let begin = 0;
  while (begin < count) {
    const column = Math.floor((steps[begin] - from) / width);
    let end = begin, low = begin, high = begin;
    while (end < count && Math.floor((steps[end] - from) / width) === column) {
      if (values[end] < values[low]) low = end;
      if (values[end] > values[high]) high = end;
      end++;
    }
    for (const i of [...new Set([begin, low, high, end - 1])].sort((a, b) => a - b)) {
      out.steps.push(steps[i]);
      out.values.push(values[i]);
    }
    begin = end;
  }
  return out;
}

/** Index of the point nearest to a step. */
export function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

/** Round numbers within a range, about `count` of them. */
export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const out = [];
  for (let i = Math.ceil(low / unit); i * unit <= high + unit * 1e-9; i++) out.push(i * unit);
  return out;
}

/** Three digits that matter. */
export function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

/** Seconds as people say them. */
export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const STATES = () => ({ running: t("running"), queued: t("queued"), finished: t("finished"), failed: t("failed"), stopped: t("stopped"), died: t("died") });

/** One line on where a run stands. */
export function standing(status) {
  if (status.state === "running" && status.phase) {
    const left = status.eta !== null && status.eta !== undefined ? t(", {time} left of it", { time: duration(status.eta) }) : "";
    return t("before the first step: {phase}, {part} of {parts}", status) + left;
  }
  const state = STATES()[status.state] ?? status.state;
  const parts = [status.steps ? t("{state}, step {step} of {steps}", { ...status, state }) : state];
  if (status.state === "running" && status.rate) parts.push(`${short(status.rate)} it/s`);
  if (status.state === "running" && status.eta !== null && status.rate) parts.push(t("{time} left", { time: duration(status.eta) }));
  return parts.join(", ");
}

/** [done, of] of what a run counts just now: a phase before its steps, or its steps. */
export function counted(status) {
  return status.phase ? [status.part, status.parts] : [status.step, status.steps];
}

/** Whether a process works on a run, or is about to. */
export function going(status) {
  return status.state === "running" || status.state === "queued";
}
