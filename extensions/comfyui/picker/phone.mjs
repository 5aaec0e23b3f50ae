// The picker as a page of its own, for a phone; ComfyUI's page does not load it.
import { Drawing } from "./drawing.mjs";
import { Session } from "./session.mjs";
import { View } from "./view.mjs";
import { learn } from "../locales/words.mjs";

const LOOK = 3000; // ms
const asked = new URLSearchParams(location.search);
const place = { set: asked.get("set") ?? "", by: asked.get("by") ?? "" };
const language = navigator.language.slice(0, 2);
if (["zh", "ja"].includes(language)) {
  const answer = await fetch(new URL(`../locales/${language}.json`, import.meta.url)).catch(() => null);
  if (answer?.ok) learn((await answer.json()).page);
}

let note = "";
const drawing = new Drawing();
const session = new Session(place, (path, options) => fetch(path, options), (said) => {
  note = said;
  render();
});
const { desk } = session;
const said = (done) => {
  if (!done) return;
  render();
  session.mail.send();
};
const view = new View(
  { pick: (at) => said(desk.choose(at)), say: (word) => said(word === "undo" ? desk.undo() : word !== "draw" && desk.choose(word)), keep() {}, more: [], blind: false, away: true },
  (image) => `${session.path}/images/${image}`,
);
document.body.append(view.root);
document.title = place.set;

function render() {
  view.render({ desk: desk.view, canUndo: desk.canUndo, drawing, drawn: false, note });
}

async function look() {
  const settled = desk.settled;
  try {
    const { status, body } = await session.ask("tickets");
    if (status === 200) desk.hear(body, settled);
    else if (status !== 503) note = body?.error ?? String(status);
  } catch (error) {
    note = error.message;
  }
  render();
}

render();
look();
setInterval(() => document.hidden || look(), LOOK);
document.addEventListener("visibilitychange", () => document.hidden || look());
