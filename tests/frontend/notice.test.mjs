// The title of the browser's tab while a run goes on.
import assert from "node:assert/strict";
import { test } from "node:test";

globalThis.localStorage = { getItem: () => null };
const { betterTitle, wanted } = await import("../../extensions/comfyui/panel/notice.mjs");

test("a title names the run rather than the class of its node", () => {
  assert.equal(betterTitle("[25%][9%] RetortTrainDistillation", "my student"), "9 % my student");
  assert.equal(betterTitle("[9%] Train Distillation", "my student"), "9 % my student");
  assert.equal(betterTitle("[9%] KSampler", "my student"), null);
  assert.equal(betterTitle("9 % my student", "my student"), null);
  assert.equal(betterTitle("[25%][9%] RetortTrainFlow", ""), null);
});

test("nobody is notified who has not asked for it", () => {
  assert.equal(wanted(), false);
});
