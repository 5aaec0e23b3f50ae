// A search's tree and curve in numbers.
import assert from "node:assert/strict";
import { test } from "node:test";

import { beside, columns, finished, path, shares, staircase } from "../../extensions/comfyui/panel/tree.mjs";

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

test("keys go through the candidates from left to right and stay at the ends", () => {
  const spots = [{ number: 7, x: 30 }, { number: 8, x: 10 }, { number: 9, x: 20 }];
  const walk = (number, ...keys) => keys.reduce((at, key) => beside(spots, at, key).number, number);
  assert.equal(walk(null, "ArrowRight"), 8);
  assert.equal(walk(8, "ArrowRight"), 9);
  assert.equal(walk(8, "ArrowRight", "ArrowRight", "ArrowRight"), 7);
  assert.equal(walk(7, "ArrowLeft"), 9);
  assert.equal(walk(8, "ArrowLeft"), 8);
  assert.equal(walk(9, "End"), 7);
  assert.equal(walk(9, "Home"), 8);
  assert.equal(beside(spots, 9, "x"), undefined);
  assert.equal(beside([], null, "Home"), undefined);
});
