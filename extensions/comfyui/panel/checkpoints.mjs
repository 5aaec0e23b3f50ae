// A run's checkpoints in the panel: all of them at several strengths on one sheet, and one of them kept as a LoRA.
import { tell } from "./client.mjs";
import { openGrid } from "./new_workflow.mjs";
import { button, element } from "./page.mjs";
import { t } from "../locales/words.mjs";

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
    const grid = button(t("LoRA grid"), t("Draw the checkpoints at several strengths on one sheet"), () => openGrid(run()), failed);
    this.chosen = this.named = false; // by the user; else both follow the newest checkpoint
    this.select.addEventListener("change", () => {
      this.chosen = true;
      this.call();
    });
    this.name.addEventListener("input", () => (this.named = true));
    this.root = element("div", { class: "retort-row retort-menu" }, this.select, this.name, keep, grid, this.note);
  }

  /** steps: of the checkpoints that there are. */
  show(steps, run) {
    this.root.hidden = !steps.length;
    const shown = [run, ...steps].join("/");
    if (shown === this.shown) return;
    this.shown = shown;
    if (run !== this.run) this.chosen = this.named = false;
    this.run = run;
    const before = this.select.value;
    this.select.replaceChildren(...steps.map((step) => element("option", { value: step }, t("step {step}", { step }))));
    this.select.value = this.chosen && steps.includes(Number(before)) ? before : String(steps.at(-1));
    this.call();
  }

  call() {
    if (!this.named) this.name.value = `${this.run}_${this.select.value}`;
  }
}
