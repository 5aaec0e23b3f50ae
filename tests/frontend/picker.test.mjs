// The picker's page without a page: what is believed, what is sent, what is drawn. Run by `node --test`.
import assert from "node:assert/strict";
import { test } from "node:test";

import { Desk, keyMeaning, markAt } from "../../extensions/comfyui/picker/desk.mjs";
import { Drawing, promptsLeft, queuedFor } from "../../extensions/comfyui/picker/drawing.mjs";
import { Mail } from "../../extensions/comfyui/picker/mail.mjs";
import { progress } from "../../extensions/comfyui/picker/progress.mjs";

const ticket = (id, count = 2) => ({ id, prompt: `prompt ${id}`, candidates: [..."abcd"].slice(0, count) });
const told = (tickets, more = {}) => ({ judged: 0, skipped: 0, waiting: tickets.length, tickets, last: null, ...more });
const desk = (tickets, more) => {
  const made = new Desk();
  made.hear(told(tickets, more), 0);
  return made;
};
const numbers = ({ judged, skipped, waiting }) => [judged, skipped, waiting];

test("keys", () => {
  const means = (key, count, more = {}) => keyMeaning({ key, ...more }, count);
  assert.deepEqual(means("1", 2), { pick: 0 });
  assert.deepEqual(means("4", 4), { pick: 3 });
  assert.equal(means("3", 2), null);
  assert.equal(means("5", 4), null);
  assert.deepEqual(means("ArrowLeft", 2), { pick: 0 });
  assert.deepEqual(means("ArrowRight", 2), { pick: 1 });
  assert.equal(means("ArrowUp", 2), null);
  assert.deepEqual(means("ArrowDown", 4), { mark: 2 });
  for (const [key, say] of [["t", "tie"], ["T", "tie"], ["0", "tie"], ["s", "skip"], ["u", "undo"], ["d", "draw"]])
    assert.deepEqual(means(key, 2), { say });
  assert.deepEqual(means("z", 2, { ctrlKey: true }), { say: "undo" });
  assert.deepEqual(means("z", 2, { metaKey: true }), { say: "undo" });
  assert.equal(means("Z", 2, { ctrlKey: true, shiftKey: true }), null);
  for (const more of [{ ctrlKey: true }, { altKey: true }, { metaKey: true }, { repeat: true }])
    for (const key of ["1", "s", "t", "ArrowLeft"]) assert.equal(means(key, 2, more), null);
  for (const key of ["x", "Tab", "Escape", "toString", "constructor", "F1", "z"]) assert.equal(means(key, 2), null);
});

test("a mark moves in rows of two and stays at the edges", () => {
  assert.equal(markAt(null, 1, 4), 0);
  assert.equal(markAt(0, 1, 4), 1);
  assert.equal(markAt(1, 1, 4), 1);
  assert.equal(markAt(2, -1, 4), 2);
  assert.equal(markAt(1, 2, 4), 3);
  assert.equal(markAt(3, 2, 4), 3);
  assert.equal(markAt(0, -2, 4), 0);
});

test("what is chosen counts at once, and the next one comes", () => {
  const it = desk([ticket("a"), ticket("b", 4), ticket("c")], { judged: 5 });
  assert.ok(it.choose(1));
  assert.equal(it.view.current.id, "b");
  assert.ok(!it.choose(4) && !it.choose(-1));
  assert.ok(it.choose("skip") && it.choose("tie"));
  assert.deepEqual(numbers(it.view), [7, 1, 0]);
  assert.equal(it.view.current, null);
  assert.ok(!it.choose(0));
  assert.deepEqual(it.unsent, [{ id: "a", choice: 1 }, { id: "b", choice: "skip" }, { id: "c", choice: "tie" }]);
});

test("what was not sent is forgotten, what was sent is taken back", () => {
  const it = desk([ticket("a"), ticket("b")]);
  assert.ok(!it.canUndo && !it.undo());
  it.choose(0);
  assert.ok(it.undo());
  assert.deepEqual([it.unsent, it.view.current.id], [[], "a"]);
  it.choose(0);
  it.sending = it.unsent[0];
  assert.ok(it.undo());
  assert.deepEqual(it.unsent.at(-1), { id: "a" });
  assert.equal(it.view.current.id, "a");
  assert.ok(!it.canUndo);
  assert.deepEqual(numbers(it.view), [0, 0, 2]);
});

test("an answer of before this page is taken back", () => {
  const it = desk([ticket("b")], { judged: 3, skipped: 1, last: { ...ticket("a"), skipped: true } });
  assert.ok(it.undo());
  assert.deepEqual(numbers(it.view), [3, 0, 2]);
  assert.equal(it.view.current.id, "a");
});

test("what the server knows already is not counted twice", () => {
  const it = new Desk([{ id: "a", choice: 0 }, { id: "gone" }]);
  it.hear(told([ticket("b")], { judged: 1, last: { ...ticket("a"), skipped: false } }), 0);
  assert.deepEqual(numbers(it.view), [1, 0, 1]);
});

test("an old look at the desk does not undo a newer answer", () => {
  const it = desk([ticket("a"), ticket("b")]);
  it.choose(0);
  const before = it.settled;
  it.settle(it.unsent[0], told([ticket("b")], { judged: 1 }));
  assert.ok(!it.hear(told([ticket("a"), ticket("b")]), before));
  assert.equal(it.view.current.id, "b");
});

function mail(it, answers) {
  const seen = { posted: [], kept: [], notices: [], timers: [] };
  const made = new Mail(it, {
    post: async (said) => {
      seen.posted.push(said);
      const answer = answers.shift();
      if (answer instanceof Error) throw answer;
      return answer;
    },
    keep: (unsent) => seen.kept.push(unsent.map((said) => said.id)),
    changed: (notice) => seen.notices.push(notice),
    later: (seconds, what) => seen.timers.push([seconds, what]),
  });
  return [made, seen];
}

test("answers are sent in order, and one that fails is kept and tried again", async () => {
  const it = desk([ticket("a"), ticket("b"), ticket("c")]);
  const down = { status: 500, body: { error: "No space left" } };
  const [made, seen] = mail(it, [new Error("network"), down, { status: 200, body: told([ticket("b"), ticket("c")], { judged: 1 }) },
    { status: 200, body: told([ticket("c")], { judged: 2 }) }]);
  it.choose(0);
  it.choose(1);
  await made.send();
  assert.match(seen.notices.at(-1), /Not saved yet \(network\).*in 1 s.*kept/);
  assert.deepEqual(seen.kept.at(-1), ["a", "b"]);
  await seen.timers[0][1]();
  assert.match(seen.notices.at(-1), /No space left.*in 2 s/);
  await seen.timers[1][1]();
  assert.deepEqual(seen.posted.map((said) => said.id), ["a", "a", "a", "b"]);
  assert.deepEqual(seen.kept.at(-1), []);
  assert.deepEqual(numbers(it.view), [2, 0, 1]);
  assert.equal(seen.notices.at(-1), "");
});

test("who comes second is told, and sees what is there now", async () => {
  const it = desk([ticket("a"), ticket("b")]);
  const taken = { status: 409, body: { ...told([ticket("b")], { judged: 1 }), error: "answered already: tie" } };
  const [made, seen] = mail(it, [taken, { status: 400, body: { error: "no ticket" } }]);
  it.choose(0);
  await made.send();
  assert.match(seen.notices.at(-1), /faster.*answered already: tie/);
  assert.deepEqual([it.unsent, numbers(it.view)], [[], [1, 0, 1]]);
  it.choose(0);
  await made.send();
  assert.match(seen.notices.at(-1), /refused: no ticket/);
  assert.deepEqual(it.unsent, []);
});

test("one answer is on its way at a time, and none when the node is gone", async () => {
  const it = desk([ticket("a"), ticket("b")]);
  const [made, seen] = mail(it, [{ status: 200, body: null }, { status: 200, body: null }]);
  it.choose(0);
  const first = made.send();
  it.choose(0);
  await Promise.all([first, made.send()]);
  assert.equal(seen.posted.length, 2);
  it.unsent.push({ id: "c", choice: 0 });
  made.stop();
  await made.send();
  assert.equal(seen.posted.length, 2);
  assert.deepEqual(seen.kept.at(-1), ["c"]);
});

test("it draws until enough wait, one run at a time", () => {
  const it = new Drawing(3);
  const at = (waiting, queued = 0, judged = 0, left = null) =>
    it.step({ queued, left, desk: { judged, skipped: 0, waiting } });
  assert.ok(!at(0));
  it.start();
  assert.ok(at(0));
  assert.ok(!at(0, 1));
  assert.ok(at(1));
  assert.ok(!at(1, 1) && at(2));
  assert.ok(!at(3));
  assert.ok(!at(4) && it.on);
  assert.ok(at(2, 0, 1));
});

test("it stops by itself: nothing new, no prompts, a failure", () => {
  const nothing = { queued: 0, left: null, desk: { judged: 1, skipped: 0, waiting: 0 } };
  const it = new Drawing();
  it.start();
  assert.ok(it.step(nothing));
  assert.ok(it.step(nothing));
  assert.ok(it.step({ ...nothing, desk: { ...nothing.desk, judged: 2 } }));
  assert.ok(it.step({ ...nothing, desk: { ...nothing.desk, judged: 2 } }));
  assert.ok(!it.step({ ...nothing, desk: { ...nothing.desk, judged: 2 } }) && !it.on);
  assert.match(it.why, /nothing new/);
  it.start();
  assert.ok(!it.step({ ...nothing, left: 0 }) && !it.on);
  assert.match(it.why, /All prompts/);
  it.start();
  assert.ok(it.step({ ...nothing, left: 1 }));
  it.failed("out of memory");
  assert.ok(!it.on && it.why === "out of memory");
  it.failed("other");
  assert.equal(it.why, "out of memory");
});

test("prompts that are left", () => {
  assert.equal(promptsLeft({ prompts: "a\n\n b \r\nc\n", index: 1, begin_again: false }), 2);
  assert.equal(promptsLeft({ prompts: "a", index: 5, begin_again: false }), 0);
  assert.equal(promptsLeft({ prompts: "a", index: 5, begin_again: true }), null);
  assert.equal(promptsLeft({ prompts: ["3", 0], index: 5 }), null);
});

test("runs of this set are counted, whichever page queued them", () => {
  const run = (inputs, outputs = ["9"], type = "Picker") => [0, "id", { 9: { class_type: type, inputs } }, {}, outputs];
  const mine = { name: "s", by: "pick" };
  const queue = {
    queue_running: [run(mine)],
    queue_pending: [run(mine), run({ ...mine, name: "other" }), run(mine, ["4"]), run({ ...mine, name: ["1", 0] }),
      run({ ...mine, by: "you" }), run(mine, ["9"], "SaveImage")],
  };
  assert.equal(queuedFor(queue, "Picker", { set: "s", by: "pick" }), 3);
  assert.equal(queuedFor({}, "Picker", { set: "s", by: "pick" }), 0);
});

test("how far one is", () => {
  const plain = { judged: 7, waiting: 2, skipped: 1, blind: false, result: null };
  assert.deepEqual(progress(plain), { value: 7, max: 20, text: "7 of about 20 choices for a first LoRA" });
  assert.equal(progress({ ...plain, judged: 20 }).text, "20 choices, enough for a first LoRA");
  const blind = { ...plain, blind: true };
  assert.deepEqual(progress(blind), { value: 8, max: 10, text: "8 of 10: which is which is said after the last" });
  assert.equal(progress({ judged: 0, waiting: 0, skipped: 0, blind: true, result: null }).text, "");
  const result = { wins: 14, of: 20, ties: 0, low: 0.4572, high: 0.8811 };
  const said = (more) => progress({ ...blind, waiting: 0, result: { ...result, ...more } }).text;
  assert.equal(said({}), "Yours against the base: 14 of 20 (95 % interval 46 to 88 %): not clear, it may be chance");
  assert.ok(said({ wins: 18, low: 0.683, high: 0.9877 }).endsWith("68 to 99 %): yours is clearly better"));
  assert.ok(said({ wins: 2, low: 0.0123, high: 0.317 }).endsWith("1 to 32 %): the base is clearly better"));
  assert.ok(progress({ ...blind, waiting: 0, result: { ...result, ties: 2 } }).text.startsWith("Yours against the base: 14 of 20, 2 ties"));
});

test("a blind test's result is not shown while an answer is on its way", () => {
  const result = { wins: 1, of: 1, ties: 0, low: 0.025, high: 1 };
  const it = desk([], { judged: 1, last: ticket("a"), blind: true, result });
  assert.deepEqual(it.view.result, result);
  it.undo();
  assert.deepEqual([it.view.result, it.view.waiting], [null, 1]);
});
