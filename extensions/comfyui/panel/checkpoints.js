// A run's checkpoints in the panel: all of them at several strengths on one sheet, and one of them kept as a LoRA.
import { tell } from "./client.js";
import { openGrid } from "./new_workflow.js";
import { button, element } from "./page.js";
import { t } from "../locales/words.js";

export class Checkpoints {
  /** run(): the run's entry. */
  constructor(run) {
    this.select = element("select", { "aria-label": t("Checkpoint") });
    this.name = element("input", { type: "text", maxlength: 120, "aria-label": t("Name of the LoRA") });
    this.note = element("output", { class: "retort-note" });
    const failed = (error) => (this.note.textContent = error.message);
    const keep = button(t("Keep this one"), t("Copy this checkpoint to models/loras under this name"), async () => {
      const { lora } = await tell(["runs", run().name, "keep"], { step: Number(this.select.value), name: this.name.value });
      this.note.textContent = t("kept as {lora}", { lora });
    }, failed);
    const grid = button(t("Checkpoint grid"), t("Draw the checkpoints at several strengths on one sheet"), () => openGrid(run()), failed);
    this.select.addEventListener("change", () => this.call(run().name));
    this.root = element("div", { class: "retort-row retort-menu" }, this.select, this.name, keep, grid, this.note);
  }

  /** steps: of the checkpoints that there are. */
  show(steps, run) {
    this.root.hidden = !steps.length;
    if (steps.join() === this.shown) return;
    this.shown = steps.join();
    this.select.replaceChildren(...steps.map((step) => element("option", { value: step }, t("step {step}", { step }))));
    this.select.value = String(steps.at(-1));
    this.call(run);
  }

  call(run) {
    this.name.value = `${run}_${this.select.value}`;
  }
}
