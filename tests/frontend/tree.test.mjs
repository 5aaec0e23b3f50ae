// A search's tree and curve in numbers.
import assert from "node:assert/strict";
import { test } from "node:test";

import { columns, finished, path, shares, staircase } from "../../extensions/comfyui/panel/tree.js";

// Root 0; 1 and 2 below it; leaves 3, 5 below 1 and 4 below 2.
const parent = [-1, 0, 0, 1, 2, 1];

test("leaves stand side by side, the rest above their children", () => {
  const rounded = Array.from(columns(parent), (place) => Math.round(place * 12));
  assert.deepEqual(rounded, [7, 4, 10, 2, 10, 6]);
  assert.deepEqual(Array.from(columns([-1])), [0.5]);
});

test("the way to the root", () => {
  assert.deepEqual(path(parent, 4), [4, 2, 0]);
  assert.deepEqual(path(parent, 0), [0]);
});

test("finished latents by number", () => {
  const tree = { place: [-1, 0, 0, 1, 1, 1], number: [-1, 0, 1, 7, 8, 9], stops: 2 };
  assert.deepEqual([...finished(tree)], [[7, 3], [8, 4], [9, 5]]);
});

test("values as shares", () => {
  const found = shares([0, 1, 2]);
  assert.deepEqual(found, [0, 0.5, 1]);
  assert.ok(shares([4, 4]).every((share) => share >= 0 && share <= 1));
});

test("the best is held until a better one came", () => {
  assert.deepEqual(staircase([[10, 1], [30, 2]], 50), [[10, 1], [30, 1], [30, 2], [50, 2]]);
  assert.deepEqual(staircase([], 50), []);
});
