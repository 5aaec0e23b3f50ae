// The demo model gives way to a model of the user's own, which takes over whatever was connected to it.
import { app } from "../../scripts/app.js";
import { element, openWindow } from "./panel/page.mjs";
import { t } from "./locales/words.mjs";

const DEMO = 64, USUAL = 1024; // pixels
const APART = 460, BELOW = 90, LIFE = 20_000, EDGE = [80, 130];
// What is loaded, and which outputs of which nodes give MODEL, CLIP and VAE.
const WAYS = [
  [() => t("One file"), () => t("A checkpoint with text encoder and VAE: SD1.5, SDXL and what was made of them"), [["CheckpointLoaderSimple", [0, 1, 2]]]],
  [
    () => t("Three files"), () => t("Diffusion model, text encoder and VAE: Qwen-Image, Z-Image, Flux, Krea 2, Wan, LTX and other new models"),
    [["UNETLoader", [0]], ["CLIPLoader", [1]], ["VAELoader", [2]]],
  ],
];

/** Put these loaders in the place of a node; kinds: [type, the outputs of the node that it has]. */
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
      replace(node, kinds);
      const sized = enlarge(graph) ? t("Empty latents are 1024 x 1024 now; for SD1.5 set 512.") : "";
      const detail = [t("Choose your files, and for Load CLIP the type; then prompts, steps and cfg that suit the model."), sized].filter(Boolean).join(" ");
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
