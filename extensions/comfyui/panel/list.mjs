// A list in the panel that is asked for again and again while it is open, and keeps its rows.
import { ask } from "./client.mjs";
import { element } from "./page.mjs";
import { t } from "../locales/words.mjs";

const EVERY = 2000, AGAIN = 5000, KEPT = 15_000; // ms

export class List {
  /**
   * parts: of the address that is asked. label: of the list. empty: said where there is nothing.
   * entries(answer) -> [{name, ...}]; row(name) -> {root, show(entry)}; after(answer): further work, may be async.
   */
  constructor(root, { parts, label, empty, entries = (answer) => answer, row, after = () => {} }) {
    Object.assign(this, { parts, empty, entries, row, after });
    this.rows = new Map();
    this.note = element("p", { class: "retort-note", role: "status" }, t("looking…"));
    this.list = element("ul", { class: "retort-list", "aria-label": label });
    root.replaceChildren(this.note, this.list);
    this.seen = () => document.hidden || this.look();
    document.addEventListener("visibilitychange", this.seen);
    this.look();
  }

  close() {
    clearTimeout(this.timer);
    this.closed = true;
    document.removeEventListener("visibilitychange", this.seen);
  }

  say(text) {
    if (!this.held) this.note.textContent = text;
  }

  /** Say something that the next looks do not take away. */
  keep(text) {
    clearTimeout(this.held);
    this.note.textContent = text;
    this.held = setTimeout(() => (this.held = undefined), KEPT);
  }

  async look() {
    clearTimeout(this.timer);
    let wait = EVERY;
    try {
      const answer = await ask(this.parts);
      if (this.closed) return;
      this.show(this.entries(answer));
      await this.after(answer);
    } catch (error) {
      this.say(error.status ? error.message : t("ComfyUI does not answer; looking again"));
      wait = AGAIN;
    }
    if (!this.closed && !document.hidden) this.timer = setTimeout(() => this.look(), wait);
  }

  show(entries) {
    this.say(entries.length ? "" : this.empty);
    const names = new Set(entries.map((entry) => entry.name));
    for (const [name, row] of this.rows) {
      if (names.has(name)) continue;
      row.root.remove();
      this.rows.delete(name);
    }
    entries.forEach((entry, i) => {
      if (!this.rows.has(entry.name)) this.rows.set(entry.name, this.row(entry.name));
      const row = this.rows.get(entry.name);
      row.show(entry);
      if (this.list.children[i] !== row.root) this.list.insertBefore(row.root, this.list.children[i] ?? null);
    });
  }
}
