// A KSampler gives way to what samples a few-step student as it was trained, with all that it was connected to.
import { app } from "../../scripts/app.js";
import { t } from "./locales/words.mjs";

const BELOW = 60, SAID = 70, LIFE = 20_000; // pixels, those that the setup's text takes; ms

const linkOf = (graph, id) => graph.links.get?.(id) ?? graph.links[id];

/** What is connected to an input of a node, [node, output]; undefined where nothing is. */
function before(node, name) {
  const link = linkOf(node.graph, node.inputs.find((one) => one.name === name)?.link);
  return link && [node.graph.getNodeById(link.origin_id), link.origin_slot];
}

function set(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((one) => one.name === name);
    if (widget && value !== undefined) widget.value = value;
  }
}

/** Put Distilled Setup, RandomNoise and SamplerCustomAdvanced in a KSampler's place. */
export function replace(node) {
  const { graph } = node, valueOf = (name) => node.widgets.find((one) => one.name === name)?.value;
  const given = Object.fromEntries(["model", "positive", "negative", "latent_image", "seed", "denoise"].map((name) => [name, before(node, name)]));
  const targets = (node.outputs[0].links ?? []).map((id) => linkOf(graph, id)).map((link) => [graph.getNodeById(link.target_id), link.target_slot]);
  // A subgraph's own inputs and outputs are no nodes.
  if ([...Object.values(given).filter(Boolean), ...targets].some(([one]) => !one)) {
    const detail = t("This KSampler is connected to the inputs or outputs of its subgraph: unpack the subgraph first.");
    app.extensionManager.toast.add({ severity: "warn", summary: node.title, detail, life: LIFE });
    return;
  }
  graph.beforeChange?.();
  let [x, y] = node.pos;
  const [setup, noise, sampler] = ["RetortDistilledSetup", "RandomNoise", "SamplerCustomAdvanced"].map((type) => {
    const made = LiteGraph.createNode(type);
    made.pos = [x, y];
    y += made.size[1] + BELOW + (type === "RetortDistilledSetup" ? SAID : 0);
    graph.add(made);
    return made;
  });
  set(setup, { preset: "auto", steps: 0, denoise: valueOf("denoise") });
  set(noise, { noise_seed: valueOf("seed"), control_after_generate: valueOf("control_after_generate") });
  const join = (from, to, name) => from && from[0].connect(from[1], to, to.inputs.findIndex((one) => one.name === name));
  for (const name of ["model", "positive", "negative", "denoise"]) join(given[name], setup, name);
  join(given.latent_image, setup, "latent");
  join(given.latent_image, sampler, "latent_image");
  join(given.seed, noise, "noise_seed");
  join([noise, 0], sampler, "noise");
  ["guider", "sampler", "sigmas"].forEach((name, i) => join([setup, i + 1], sampler, name));
  for (const [target, slot] of targets) sampler.connect(0, target, slot);
  graph.remove(node);
  graph.afterChange?.();
  app.canvas.selectNodes([setup, noise, sampler]);
  const detail = t("Distilled Setup finds the student by its files and says after a run at which levels it was sampled; another preset can be chosen there.");
  app.extensionManager.toast.add({ severity: "info", summary: setup.title, detail, life: LIFE });
}
