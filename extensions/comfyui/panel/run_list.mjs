// Training runs in the panel: what goes on, what is finished, and one of them open.
import { app } from "../../../scripts/app.js";
import { address, tell } from "./client.mjs";
import { List } from "./list.mjs";
import { Checkpoints } from "./checkpoints.mjs";
import { openLora } from "./new_workflow.mjs";
import { notifySwitch } from "./notice.mjs";
import { button, element } from "./page.mjs";
import { RunView, commandsOf, renamed } from "./run_view.mjs";
import { counted, going, standing } from "./series.mjs";
import { wanted } from "./toast.mjs";
import { t } from "../locales/words.mjs";

const SHOWING = ["RetortLoraGrid", "RetortCollectJob", "RetortLossChart"];
const MOST = 8; // runs that are compared at once: as many as compared.mjs has colours
const settings = { shown: "student_loss", window: 25, log: false };
const kept = { ticked: new Set(), open: "" }; // while another tab of the panel is shown

/** Let the nodes of the open workflow that show a run show it by its new name; what they train is as it was typed. */
function follow(name, now) {
  for (const node of app.graph.nodes) {
    const shown = SHOWING.includes(node.comfyClass) && node.widgets.find((each) => each.name === "run" && each.value === name);
    if (shown) shown.value = now;
  }
  renamed(name, now);
}

export class RunList {
  constructor(root) {
    this.list = new List(root, {
      parts: ["runs"],
      label: t("Training runs"),
      empty: t("No runs yet: queue a training node, and it appears here."),
      row: (name) => this.row(name),
    });
    this.ticked = kept.ticked;
    wanted.run ||= kept.open;
    this.compare = button("", t("Curves, settings and previews side by side"), async () => new (await import("./compared.mjs")).Compared([...this.ticked]),
      (error) => this.list.say(error.message));
    this.compare.classList.add("retort-wide");
    root.prepend(this.compare);
    root.append(notifySwitch(element));
    this.offer();
  }

  /** The button that compares, where there is something to compare. */
  offer() {
    this.compare.hidden = this.ticked.size < 2;
    this.compare.textContent = t("Compare {count} runs", { count: this.ticked.size });
    for (const box of this.list.list.querySelectorAll(".retort-tick")) box.disabled = !box.checked && this.ticked.size >= MOST;
  }

  close() {
    this.list.close();
    this.view?.close();
  }

  row(name) {
    const title = element("button", { type: "button", class: "retort-title", "aria-expanded": "false" }, name);
    const state = element("span", { class: "retort-line" });
    const bar = element("progress", { "aria-label": t("Steps of {name}", { name }) });
    const trouble = element("output", { class: "retort-note" });
    const failed = (error) => (trouble.textContent = error.message);
    const commands = commandsOf(() => name, (text) => (state.textContent = text));
    let run;
    const open = button(t("Open LoRA"), t("The LoRA in a new workflow"), () => openLora(run), failed);
    const details = button(t("Details"), t("Curve, previews and checkpoints"), () => title.click(), failed);
    const more = this.menu(name, failed, () => run);
    const tick = element("input", { type: "checkbox", class: "retort-tick", title: t("Tick two or more runs to compare them"), "aria-label": t("Compare {run}", { run: name }) });
    tick.checked = this.ticked.has(name);
    tick.addEventListener("change", () => {
      tick.checked ? this.ticked.add(name) : this.ticked.delete(name);
      this.offer();
    });
    const head = element("div", { class: "retort-row retort-head" }, title, element("label", {}, tick, t("compare")));
    const root = element("li", {}, head, state, bar, commands, element("div", { class: "retort-row" }, open, details, more), trouble);
    title.addEventListener("click", () => this.toggle(name, title, root, () => run));
    const show = (now) => {
      run = now;
      if (wanted.run === name) {
        wanted.run = "";
        if (this.view?.name !== name) title.click();
      }
      const text = [standing(now), now.method, now.message].filter(Boolean).join(" · ");
      if (state.textContent !== text) state.title = state.textContent = text;
      state.dataset.state = now.state;
      const [done, of] = counted(now);
      bar.max = Math.max(1, of);
      bar.value = done;
      bar.hidden = commands.hidden = !going(now);
      more.hidden = going(now);
      open.hidden = !now.lora;
    };
    return { root, show };
  }

  /** What can be done with a run that has ended; run(): its entry. */
  menu(name, failed, run) {
    const lora = () => run()?.lora;
    const word = element("input", { type: "text", value: name, "aria-label": t("New name of {name}", { name }), maxlength: 200 });
    const rename = button(t("Rename"), t("Give the run this name; its LoRA keeps its own"), async () => {
      await tell(["runs", name, "rename"], { name: word.value });
      this.changed(name, lora() && t("Renamed. Its LoRA is still {lora} in models/loras.", { lora: lora() }));
      follow(name, word.value);
    }, failed);
    const zip = element(
      "a", { href: address(["runs", name, "export.zip"]), download: `${name}.zip`, class: "retort-button",
        title: t("LoRA, settings, log, previews and a model card in one file") }, t("Download as zip"),
    );
    let sure;
    const remove = button(t("Delete"), t("Delete checkpoints, previews and log; the LoRA in the models folder stays"), async () => {
      if (!sure) {
        // Asked on the button itself, and forgotten when nobody answers.
        remove.textContent = t("Really delete?");
        sure = setTimeout(() => ((sure = undefined), (remove.textContent = t("Delete"))), 10_000);
        return;
      }
      clearTimeout(sure);
      await tell(["runs", name, "delete"], { name });
      this.changed(name, lora() && t("Deleted. Its LoRA stays in models/loras: {lora}.", { lora: lora() }));
    }, failed);
    const rows = [element("div", { class: "retort-row" }, word, rename), element("div", { class: "retort-row" }, zip, remove)];
    const menu = element("details", { class: "retort-menu" }, element("summary", { title: t("Rename, download, delete") }, t("More")));
    menu.addEventListener("toggle", () => (menu.open ? menu.append(...rows) : rows.forEach((row) => row.remove())));
    return menu;
  }

  /** After a run has another name, or is gone; said: of its LoRA. */
  async changed(name, said) {
    if (this.view?.name === name) this.view.close();
    this.ticked.delete(name);
    this.offer();
    await this.list.look();
    if (said) this.list.keep(said);
  }

  /** run(): the run's entry. */
  toggle(name, title, root, run) {
    const same = this.view?.name === name;
    this.view?.root.remove();
    this.view?.close();
    this.view = undefined;
    kept.open = same ? "" : name;
    for (const other of this.list.list.querySelectorAll(".retort-title")) other.setAttribute("aria-expanded", "false");
    if (same) return;
    title.setAttribute("aria-expanded", "true");
    const saved = new Checkpoints(run);
    this.view = new RunView(settings, () => {}, (series) => saved.show(series.saves, name));
    // The row has these already.
    for (const part of ["buttons", "line", "bar", "opened"]) this.view[part].remove();
    this.view.root.append(saved.root);
    root.append(this.view.root);
    this.view.open(name);
  }
}
