// Training runs in the panel: what goes on, what is finished, and one of them open.
import { ask, tell } from "./client.js";
import { openLora } from "./new_workflow.js";
import { button, element } from "./page.js";
import { RunView } from "./run_view.js";
import { going, standing } from "./series.js";

const EVERY = 2000, AGAIN = 5000;
const settings = { shown: "student_loss", window: 25, log: false };

export class RunList {
  constructor(root) {
    this.root = root;
    this.rows = new Map();
    this.note = element("p", { class: "retort-note", role: "status" }, "looking…");
    this.list = element("ul", { class: "retort-list", "aria-label": "Training runs" });
    root.replaceChildren(this.note, this.list);
    this.seen = () => document.hidden || this.look();
    document.addEventListener("visibilitychange", this.seen);
    this.look();
  }

  close() {
    clearTimeout(this.timer);
    this.closed = true;
    document.removeEventListener("visibilitychange", this.seen);
    this.view?.close();
  }

  async look() {
    clearTimeout(this.timer);
    let wait = EVERY;
    try {
      const runs = await ask(["runs"]);
      if (this.closed) return;
      this.show(runs);
    } catch (error) {
      this.note.textContent = error.status ? error.message : "ComfyUI does not answer; looking again";
      wait = AGAIN;
    }
    if (!this.closed && !document.hidden) this.timer = setTimeout(() => this.look(), wait);
  }

  show(runs) {
    this.note.textContent = runs.length ? "" : "No runs yet: queue a training node, and it appears here.";
    const names = new Set(runs.map((run) => run.name));
    for (const [name, row] of this.rows) {
      if (names.has(name)) continue;
      row.root.remove();
      this.rows.delete(name);
    }
    runs.forEach((run, i) => {
      if (!this.rows.has(run.name)) this.rows.set(run.name, this.row(run.name));
      const row = this.rows.get(run.name);
      row.show(run);
      if (this.list.children[i] !== row.root) this.list.insertBefore(row.root, this.list.children[i] ?? null);
    });
  }

  row(name) {
    const title = element("button", { type: "button", class: "retort-title", "aria-expanded": "false" }, name);
    const state = element("span", { class: "retort-line" });
    const bar = element("progress", { "aria-label": `Steps of ${name}` });
    const failed = (error) => (state.textContent = error.message);
    const command = (wish, text, tip) => button(text, tip, () => tell(["runs", name, "command"], { command: wish }), failed);
    const commands = element(
      "div", { class: "retort-row" },
      command("stop", "Stop", "Save, then end the run"),
      command("save", "Save now", "Write a checkpoint after this step"),
      command("sample", "Sample now", "Draw previews after this step"),
    );
    let run;
    const open = button("Open LoRA", "The LoRA in a new workflow", () => openLora(run), failed);
    const root = element("li", {}, title, state, bar, commands, open);
    title.addEventListener("click", () => this.toggle(name, title, root));
    const show = (now) => {
      run = now;
      const text = [standing(now), now.method, now.message].filter(Boolean).join(" · ");
      if (state.textContent !== text) state.textContent = text;
      state.dataset.state = now.state;
      bar.max = Math.max(1, now.steps);
      bar.value = now.step;
      bar.hidden = commands.hidden = !going(now);
      open.hidden = !now.lora;
    };
    return { root, show };
  }

  toggle(name, title, root) {
    const same = this.view?.name === name;
    this.view?.root.remove();
    this.view?.close();
    this.view = undefined;
    for (const other of this.list.querySelectorAll(".retort-title")) other.setAttribute("aria-expanded", "false");
    if (same) return;
    title.setAttribute("aria-expanded", "true");
    this.view = new RunView(settings);
    this.view.buttons.remove();
    this.view.line.remove();
    root.append(this.view.root);
    this.view.open(name);
  }
}
