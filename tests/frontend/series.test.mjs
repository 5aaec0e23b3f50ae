// What a chart shows of a run, without a page.
import assert from "node:assert/strict";
import { test } from "node:test";

import { Series, bounds, counted, csv, differing, duration, evenly, going, nearest, short, smooth, split, spoken, standing, thin, ticks } from "../../extensions/comfyui/panel/series.mjs";

const answer = (steps, values, more = {}) =>
  ({ restart: false, steps, values, hidden: [], saves: [], pictures: [], offset: steps.length, ...more });

test("a series grows, keeps gaps, and begins anew", () => {
  const series = new Series();
  series.add(answer([1, 2], { student_loss: [3, 4], seconds: [1, 1] }, { restart: true, hidden: ["seconds"], saves: [2] }));
  series.add(answer([3], { student_loss: [null], fake_loss: [7] }, { offset: 9 }));
  assert.deepEqual(series.names, ["student_loss", "fake_loss"]);
  assert.deepEqual(series.points("student_loss"), { steps: [1, 2], values: [3, 4] });
  assert.deepEqual(series.points("fake_loss"), { steps: [3], values: [7] });
  assert.equal(series.last, 3);
  assert.equal(series.offset, 9);
  series.add(answer([1], { winner: [5] }, { restart: true }));
  assert.deepEqual(series.names, ["winner"]);
  assert.deepEqual(series.steps, [1]);
});

test("a long log is known to be thinned, and only so many numbers are kept", () => {
  const series = new Series();
  series.add(answer([1, 90], { student_loss: [3, 4] }, { restart: true, thinned: 5000 }));
  for (let i = 0; i < 200; i++) series.add(answer([91 + i], { [`k${i}`]: [1] }, { thinned: 0 }));
  assert.equal(series.thinned, true);
  assert.equal(series.values.size, 64);
  series.add(answer([1], {}, { restart: true, thinned: 0 }));
  assert.equal(series.thinned, false);
});

test("the running mean is unbiased from the first point", () => {
  assert.deepEqual(smooth([2, 2, 2], 25), [2, 2, 2]);
  const [, second] = smooth([0, 1], 2);
  assert.ok(Math.abs(second - 1 / 1.5) < 1e-12);
  assert.deepEqual(smooth([1, 5], 1), [1, 5]);
});

test("a spike flattens nothing, and a constant has room", () => {
  const values = Array.from({ length: 1000 }, (_, i) => (i === 500 ? 1e6 : i % 10));
  assert.deepEqual(bounds(values), [0, 9]);
  const [low, high] = bounds([3, 3]);
  assert.ok(low < 3 && high > 3);
  assert.ok(bounds([0, 0])[0] < 0);
});

test("thinning keeps ends and extremes", () => {
  const count = 100_000;
  const steps = Array.from({ length: count }, (_, i) => i + 1);
  const values = steps.map((step) => Math.sin(step / 500) + (step === 77_777 ? 50 : 0) - (step === 12_345 ? 50 : 0));
  // Of the processor's time, which another program beside this one does not lengthen.
  const before = process.cpuUsage();
  const some = thin(steps, values, 400);
  const used = process.cpuUsage(before);
  assert.ok(used.user + used.system < 200_000);
  assert.ok(some.steps.length <= 4 * 401);
  assert.equal(some.steps[0], 1);
  assert.equal(some.steps.at(-1), count);
  assert.ok(some.values.includes(values[77_776]) && some.values.includes(values[12_344]));
  assert.ok(some.steps.every((step, i) => !i || step > some.steps[i - 1]));
  assert.deepEqual(thin([1, 2], [3, 4], 100), { steps: [1, 2], values: [3, 4] });
});

test("the nearest step", () => {
  assert.equal(nearest([10, 20, 40], 14), 0);
  assert.equal(nearest([10, 20, 40], 16), 1);
  assert.equal(nearest([10, 20, 40], 500), 2);
  assert.equal(nearest([10, 20, 40], -5), 0);
});

test("ticks are round and inside", () => {
  assert.deepEqual(ticks(0, 10, 5), [0, 2, 4, 6, 8, 10]);
  assert.ok(ticks(0.123, 0.131, 4).every((tick) => tick >= 0.123 && tick <= 0.1311));
});

test("words", () => {
  assert.equal(short(0.0123456), "0.0123");
  assert.equal(short(0), "0");
  assert.equal(short(1234567), "1.2e+6");
  assert.equal(duration(30), "30 s");
  assert.equal(duration(600), "10 min");
  assert.equal(duration(9000), "2.5 h");
  const status = { state: "running", step: 5, steps: 10, rate: 2, eta: 2.5 };
  assert.equal(standing(status), "running, step 5 of 10, 2 it/s, 3 s left");
  assert.equal(standing({ state: "finished", step: 10, steps: 10, rate: 2, eta: null }), "finished, step 10 of 10");
  const drawing = { ...status, step: 0, phase: "the model draws pairs to copy", part: 48, parts: 280, eta: 120 };
  assert.equal(standing(drawing), "before the first step: the model draws pairs to copy, 48 of 280, 2 min left of it");
  assert.deepEqual(counted(drawing), [48, 280]);
  assert.deepEqual(counted(status), [5, 10]);
  assert.ok(going(status) && going({ state: "queued" }) && !going({ state: "died" }));
});

test("of a long list its first, its last and as many as wanted are taken", () => {
  const list = Array.from({ length: 1000 }, (_, i) => i);
  const some = evenly(list, 48);
  assert.equal(some.length, 48);
  assert.deepEqual([some[0], some.at(-1)], [0, 999]);
  assert.ok(some.every((one, i) => !i || one > some[i - 1]));
  assert.deepEqual(evenly([1, 2], 48), [1, 2]);
});

test("phases split a run's points where they begin, and those without a point are none", () => {
  const phases = [{ from: 0, name: "copies pairs" }, { from: 4, name: "dmd2" }];
  assert.deepEqual(split([1, 2, 3, 4, 6], phases), [
    { begin: 0, end: 3, name: "copies pairs" }, { begin: 3, end: 5, name: "dmd2" },
  ]);
  assert.deepEqual(split([4, 6], phases), [{ begin: 0, end: 2, name: "dmd2" }]);
  assert.deepEqual(split([1, 2], []), [{ begin: 0, end: 2, name: "" }]);
  assert.deepEqual(split([], phases), []);
});

test("a table has a row for each step of each run, gaps for what a run lacks, and no formula", () => {
  const [one, two] = [new Series(), new Series()];
  one.add(answer([1, 2], { student_loss: [3, 4] }, { restart: true }));
  two.add(answer([1], { winner: [5] }, { restart: true }));
  const text = csv([{ name: "=A1, \"x\"", series: one }, { name: "b", series: two }]);
  assert.deepEqual(text.split("\n"), [
    "run,step,student_loss,winner", "\"'=A1, \"\"x\"\"\",1,3,", "\"'=A1, \"\"x\"\"\",2,4,", "b,1,,5", "",
  ]);
});

test("only settings that differ are listed, with what a run lacks", () => {
  assert.deepEqual(differing([{ a: 1, b: 2, c: 3 }, { a: 1, b: 3 }]), [["b", 2, 3], ["c", 3, undefined]]);
  assert.deepEqual(differing([{ a: 1 }, { a: 1 }]), []);
});

test("where nobody but the student learns, its loss is the loss", () => {
  assert.equal(spoken("student_loss", ["student_loss", "grad_norm"]), "loss");
  assert.equal(spoken("student_loss", ["student_loss", "fake_loss"]), "student loss");
  assert.equal(spoken("fake_loss", ["fake_loss"]), "fake loss");
});
