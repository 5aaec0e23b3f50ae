// Settings that go together for a model and a card; a button on trainers fills them in, and says first what they cost.
import { app } from "../../../scripts/app.js";
import { element, openWindow } from "./page.mjs";
import { duration } from "./series.mjs";
import { t } from "../locales/words.mjs";

export const TRAINERS = ["RetortTrainFlow", "RetortTrainDistillation", "RetortTrainPreference"];
const FILE = new URL("../recipes.json", import.meta.url);
const LIFE = 8000; // ms that what was filled in is said
const SPEED = 50; // TFLOP/s that a card is taken to reach

function cost({ values, gb, host, tflop }) {
  if (!gb) return "";
  const work = tflop * values.steps * values.batch_size * values.accumulation;
  const time = duration(work / SPEED);
  return t("{gb} GB on the card, {host} GB of host memory; at most {time} at {speed} TFLOP/s", { gb, host, time, speed: SPEED });
}

function fill(node, { title, values }) {
  const changed = [];
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((each) => each.name === name);
    if (!widget) continue;
    if (widget.value !== value) changed.push(`${name.split(".").at(-1)} ${value}`);
    widget.value = value;
    widget.callback?.(value);
  }
  node.setDirtyCanvas(true, true);
  const detail = changed.length ? changed.join(", ") : t("The node had these settings already.");
  app.extensionManager.toast.add({ severity: "success", summary: t(title), detail, life: LIFE });
}

/** Let the user choose one for a node. */
export async function offerRecipes(node) {
  const all = await (await fetch(FILE, { cache: "no-cache" })).json();
  const { dialog, body } = openWindow(t("Recipes"), "retort-recipes");
  body.append(...all.filter((one) => one.node === node.comfyClass).map((one) => {
    const made = element("button", { type: "button" }, element("b", {}, t(one.title)), element("span", {}, t(one.text)), element("small", {}, cost(one)));
    made.addEventListener("click", () => {
      fill(node, one);
      dialog.close();
    });
    return made;
  }));
}
