// Names of files that another system wrote.
import assert from "node:assert/strict";
import { test } from "node:test";

import { spelt } from "../../extensions/comfyui/panel/spelt.mjs";

test("a name is found with either separator, and only in its own case", () => {
  const windows = ["none", "Style\\Bold.safetensors", "a\\b\\c.safetensors"];
  assert.equal(spelt(windows, "Style/Bold.safetensors"), "Style\\Bold.safetensors");
  assert.equal(spelt(windows, "a/b\\c.safetensors"), "a\\b\\c.safetensors");
  assert.equal(spelt(["x/y.safetensors"], "x\\y.safetensors"), "x/y.safetensors");
  assert.equal(spelt(windows, "style/bold.safetensors"), "style/bold.safetensors");
});

test("what is no name, or is offered as it is, stays", () => {
  assert.equal(spelt(["a\\b", "a/b"], "a/b"), "a/b");
  assert.equal(spelt(undefined, "a/b"), "a/b");
  assert.equal(spelt(() => [], "a/b"), "a/b");
  assert.equal(spelt([1, "3"], 3), 3);
});
