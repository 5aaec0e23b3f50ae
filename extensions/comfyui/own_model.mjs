// The demo model gives way to a model of the user's own, which takes over whatever was connected to it.
import { app } from "../../scripts/app.js";
import { element, openWindow } from "./panel/page.mjs";
import { TRAINERS } from "./panel/recipes.mjs";
import { t } from "./locales/words.mjs";

const OWN = /^digits_/; // checkpoints that come with Retort
const DEMO = 64, USUAL = 1024; // pixels
const BYPASSED = 4; // a node's mode
const KEEPING = /^Retort(Train|PreferencePicker|PreferenceSet|LabelPairs|BlindTest)/, OWN_NAME = /_own(_blind_test)?$/;
const LARGE = { batch_size: 1, learning_rate: 1e-4, gradient_checkpointing: true }; // until a recipe says more
const APART = 460, BELOW = 90, LIFE = 20_000, EDGE = [80, 130];
// What is loaded, and which outputs of which nodes give MODEL, CLIP and VAE.
const WAYS = [
  [() => t("One file"), () => t("A checkpoint with text encoder and VAE: SD1.5, SDXL and what was made of them"), [["CheckpointLoaderSimple", [0, 1, 2]]]],
  [
    () => t("Three files"), () => t("Diffusion model, text encoder and VAE: Qwen-Image, Z-Image, Flux.2, Krea 2, Wan, LTX and other new models"),
    [["UNETLoader", [0]], ["CLIPLoader", [1]], ["VAELoader", [2]]],
  ],
  [
    () => t("Four files"), () => t("Diffusion model, two text encoders and VAE: Flux.1, HunyuanVideo and others"),
    [["UNETLoader", [0]], ["DualCLIPLoader", [1]], ["VAELoader", [2]]],
  ],
];
// What the file of a diffusion model is called, and the type that its text encoder is loaded as.
const TYPES = [
  [/z.?image|lumina/, "lumina2"], [/qwen.?image/, "qwen_image"], [/flux.?2|klein|ernie/, "flux2"], [/flux/, "flux"], [/wan/, "wan"], [/ltx/, "ltxv"],
  [/krea.?2/, "krea2"], [/hunyuan.?image/, "hunyuan_image"], [/hunyuan.?video.?1\.?5/, "hunyuan_video_15"], [/hunyuan.?video/, "hunyuan_video"],
  [/minimax/, "minimax"], [/longcat.?image/, "longcat_image"], [/kandinsky.?5/, "kandinsky5"],
  ...["chroma", "omnigen2", "hidream", "ovis", "lens", "pixeldit", "ideogram4", "boogu", "joyimage", "mage", "cosmos"].map((name) => [new RegExp(name), name]),
];

/** Put these loaders in the place of a node, and give them; kinds: [type, the outputs of the node that it has]. */
function replace(node, kinds) {
  const { graph } = node, [left, top] = [0, 1].map((i) => Math.min(...graph.nodes.map((one) => one.pos[i])));
  const first = kinds.length > 1 ? [left - APART, top] : [...node.pos];
  let [x, y] = first;
  const made = kinds.map(([type, slots]) => {
    const one = LiteGraph.createNode(type);
    one.pos = [x, y];
    y += one.size[1] + BELOW;
    graph.add(one);
    slots.forEach((slot, i) => {
      const links = (node.outputs[slot].links ?? []).map((id) => graph.links.get?.(id) ?? graph.links[id]);
      for (const { target_id, target_slot } of links) one.connect(i, graph.getNodeById(target_id), target_slot);
    });
    return one;
  });
  graph.remove(node);
  const { ds } = app.canvas;
  for (const i of [0, 1]) ds.offset[i] = Math.max(ds.offset[i], EDGE[i] / ds.scale - first[i]);
  app.canvas.selectNodes(made);
  return made;
}

/** Let a loader of text encoders follow the diffusion model that is chosen, as far as its file's name tells. */
function follow([model, clip]) {
  const [file, type] = [[model, "unet_name"], [clip, "type"]].map(([node, name]) => node?.widgets.find((one) => one.name === name));
  if (!file || !type) return;
  const set = () => {
    const found = TYPES.find(([pattern, name]) => pattern.test(String(file.value).toLowerCase()) && type.options.values.includes(name));
    if (!found) return;
    type.value = found[1];
    type.callback?.(found[1]);
  };
  const { callback } = file;
  file.callback = function (...given) {
    const result = callback?.apply(this, given);
    set();
    return result;
  };
  set();
}

/** Choose a file of the user's where one of ours stands first in the list. */
function prefer(made) {
  for (const widget of made.flatMap((node) => node.widgets)) {
    const own = OWN.test(widget.value) && widget.options.values?.find((name) => !OWN.test(name));
    if (own) widget.value = own;
  }
}

/** What is to be done now: files chosen, and what there is none of. */
function next(made, sized, graph) {
  const files = made.flatMap((node) => node.widgets.filter((one) => /_name\d?$/.test(one.name)).map((one) => [node, one.options.values ?? []]));
  const lacking = files.find(([, names]) => !names.some((name) => !OWN.test(name)));
  const several = made.length > 1 ? t("Choose your files, and for the text encoder the type; then prompts, steps and cfg that suit the model.")
    : t("Choose your checkpoint, then prompts, steps and cfg that suit it.");
  const none = lacking && t("{node} has no file of yours yet: put one into ComfyUI's folder models.", { node: lacking[0].title });
  const trains = begin(graph) && t("Trainers take one picture at once now, and other names: press Recipes on them for the rest.");
  const judge = graph.nodes.some((one) => one.comfyClass === "RetortReward" && one.widgets[0].value === "embedded_judge")
    && t("Reward judges digits alone: choose another kind there.");
  const students = unlearn(graph) && t("The LoRAs of digits suit no other model: choose your own instead, and switch bypassed loaders on again.");
  return [none, several, trains, judge, students, sized && t("Empty latents are 1024 x 1024 now; for SD1.5 set 512.")].filter(Boolean).join(" ");
}

/**
 * Let trainers have what a model of the user's size needs, and all that keeps choices or a run another name: what the
 * demo model drew or learned is no use to it. Whether anything trains here.
 */
function begin(graph) {
  const named = graph.nodes.filter((one) => KEEPING.test(one.comfyClass)).map((one) => one.widgets.find(({ name }) => name === "name"));
  for (const widget of named) {
    if (!widget || OWN_NAME.test(widget.value)) continue;
    // The end tells the picker that it may name the test after the training.
    widget.value = widget.value.replace(/(_blind_test)?$/, "_own$1");
    widget.callback?.(widget.value);
  }
  const trainers = graph.nodes.filter((one) => TRAINERS.includes(one.comfyClass));
  for (const widget of trainers.flatMap((one) => one.widgets)) if (widget.name in LARGE) widget.value = LARGE[widget.name];
  return trainers.length > 0;
}

/** Switch off LoRAs that were made for the demo model where that goes, and let no sampler take another model for its students; how many. */
function unlearn(graph) {
  let found = 0;
  for (const one of graph.nodes) {
    const valueOf = (name) => one.widgets?.find((each) => each.name === name);
    const lora = valueOf("lora_name") ?? valueOf("lora"), preset = valueOf("preset");
    if (OWN.test(lora?.value)) {
      found += 1;
      // What gives more than a model cannot be passed by.
      if (one.outputs.every(({ type }) => ["MODEL", "CLIP"].includes(type))) one.mode = BYPASSED;
    }
    if (one.comfyClass === "RetortDistilledSetup" && OWN.test(preset?.value)) preset.value = "auto";
  }
  return found;
}

/** Let empty pictures have the size that models of today draw; how many there were. */
function enlarge(graph) {
  const sides = graph.nodes.filter((one) => /^Empty.*Latent/.test(one.type)).map((one) => one.widgets.filter(({ name }) => /^(width|height)$/.test(name)));
  const small = sides.filter((pair) => pair.length === 2 && pair.every(({ value }) => value === DEMO));
  for (const widget of small.flat()) {
    widget.value = USUAL;
    widget.callback?.(USUAL);
  }
  return small.length;
}

function offer(node) {
  const { dialog, body } = openWindow(t("Use my own model"), "retort-recipes");
  body.append(...WAYS.map(([title, text, kinds]) => {
    const made = element("button", { type: "button" }, element("b", {}, title()), element("span", {}, text()));
    made.addEventListener("click", () => {
      const { graph } = node;
      const loaders = replace(node, kinds);
      prefer(loaders);
      follow(loaders);
      const detail = next(loaders, enlarge(graph), graph);
      app.extensionManager.toast.add({ severity: "info", summary: t("Use my own model"), detail, life: LIFE });
      dialog.close();
    });
    return made;
  }));
}

/** Give the demo model a button that puts another model in its place. */
export function attach(node) {
  const button = node.addWidget("button", "own_model", null, () => offer(node), { serialize: false });
  button.label = t("Use my own model");
  button.serialize = false;
  node.setDirtyCanvas(true, true);
}
