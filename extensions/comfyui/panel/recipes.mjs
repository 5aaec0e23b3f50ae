// Settings that go together for a model and a card; a button on trainers fills them in, and says first what they cost.
import { app } from "../../../scripts/app.js";
import { element, openWindow, upstream } from "./page.mjs";
import { duration } from "./series.mjs";
import { t } from "../locales/words.mjs";

export const TRAINERS = ["RetortTrainFlow", "RetortTrainDistillation", "RetortTrainPreference"];
const FILE = new URL("../recipes.json", import.meta.url);
const LIFE = 8000; // ms that what was filled in is said
const KEPT = /^(name|prompts?|seed|control_after_generate|start_from|trigger)$/; // the user's own, whatever the recipe
const OTHERS = /turbo|lightning|schnell|hyper|edit|fill|kontext/; // of which a recipe for the plain model is none
const SPEED = 50; // TFLOP/s that a card is taken to reach

function cost({ values, gb, host, tflop }) {
  if (!gb) return "";
  const work = tflop * values.steps * values.batch_size * values.accumulation;
  const time = duration(work / SPEED);
  return t("{gb} GB on the card, {host} GB of host memory; about {time} on a card that reaches {speed} TFLOP/s", { gb, host, time, speed: SPEED });
}

/** A model's or file's name in small letters and digits alone. */
const plain = (name) => String(name).toLowerCase().replace(/[^a-z0-9]/g, "");

const settingsOf = (node) => node.widgets.filter(({ name, type }) => name && !KEPT.test(name) && type !== "button" && type !== "customtext");
const valuesOf = (node) => new Map(settingsOf(node).map(({ name, value }) => [name, value]));

function put(node, values) {
  for (const [name, value] of values) {
    const widget = node.widgets.find((each) => each.name === name);
    if (!widget || widget.value === value) continue;
    widget.value = value;
    widget.callback?.(value);
  }
}

/** All of a recipe: what it does not name is as on a new node, since an earlier workflow's settings do not go with it. */
function fill(node, { title, values }) {
  const before = valuesOf(node), fresh = LiteGraph.createNode(node.type), own = Object.entries(values);
  // The method first, which brings its own settings.
  put(fresh, own);
  put(node, own);
  put(node, valuesOf(fresh));
  put(node, own);
  node.setDirtyCanvas(true, true);
  const changed = settingsOf(node).filter(({ name, value }) => before.get(name) !== value && value !== "")
    .map(({ name, label, value }) => `${label ?? name.split(".").at(-1)} ${value}`);
  const sampled = sampleAlike(node);
  const detail = [changed.join(", ") || t("The node had these settings already."), sampled].filter(Boolean).join(". ");
  app.extensionManager.toast.add({ severity: "success", summary: t(title), detail, life: LIFE });
}

/** Let what samples this node's student with typed timesteps take the student's own; a sentence where something does. */
function sampleAlike(node) {
  const setups = node.graph.nodes.filter((one) => one.comfyClass === "RetortDistilledSetup" && one.widgets[0].value === "custom"
    && upstream(one).has(node));
  for (const one of setups) put(one, [["preset", "auto"], ["steps", 0], ["timesteps", ""]]);
  return setups.length ? t("Distilled Setup has the preset auto now, which samples the student as it is trained.") : "";
}

/** Let the user choose one for a node. */
export async function offerRecipes(node) {
  const all = await (await fetch(FILE, { cache: "no-cache" })).json();
  const { dialog, body } = openWindow(t("Recipes"), "retort-recipes");
  // Those of the model that is trained first, which the names of files tell.
  const before = [...upstream(node)], demo = before.some((one) => one.comfyClass === "RetortEmbeddedModel");
  const files = before.flatMap((one) => (one.widgets ?? []).filter(({ name }) => /^(unet|ckpt)_name$/.test(name)).map(({ value }) => plain(value)));
  const meant = ({ gb, title }) => (gb ? files.some((file) => !OTHERS.test(file) && file.includes(plain(title.split(",")[0]))) : demo);
  const own = all.filter((one) => one.node === node.comfyClass).sort((a, b) => Number(meant(b)) - Number(meant(a)));
  body.append(...own.map((one) => {
    const text = [t(one.text), meant(one) && one.gb ? t("For the model that is loaded.") : ""].filter(Boolean).join(" ");
    const made = element("button", { type: "button" }, element("b", {}, t(one.title)), element("span", {}, text), element("small", {}, cost(one)));
    made.addEventListener("click", () => {
      fill(node, one);
      dialog.close();
    });
    return made;
  }));
}
