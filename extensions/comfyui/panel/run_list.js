// Training runs in the panel: what goes on, what is finished, and one of them open.
import { tell } from "./client.js";
import { List } from "./list.js";
import { openLora } from "./new_workflow.js";
import { button, element } from "./page.js";
import { RunView } from "./run_view.js";
import { going, standing } from "./series.js";

const settings = { shown: "student_loss", window: 25, log: false };

export class RunList {
  constructor(root) {
    this.list = new List(root, {
      parts: ["runs"],
      label: "Training runs",
      empty: "No runs yet: queue a training node, and it appears here.",
      row: (name) => this.row(name),
    });
  }

  close() {
    this.list.close();
    this.view?.close();
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
    for (const other of this.list.list.querySelectorAll(".retort-title")) other.setAttribute("aria-expanded", "false");
    if (same) return;
    title.setAttribute("aria-expanded", "true");
    this.view = new RunView(settings);
    // The row has these already.
    for (const part of ["buttons", "line", "bar"]) this.view[part].remove();
    root.append(this.view.root);
    this.view.open(name);
  }
}
