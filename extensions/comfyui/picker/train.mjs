// Nodes that train a LoRA on a set and test it blindly, connected to what draws for the picker. Loaded when it is asked for.
import { addNode } from "../panel/add_node.mjs";
import { app } from "../../../scripts/app.js";

// Nodes 2.0 draws nodes up to seventy pixels taller than they say before.
const APART = 90;

/** Where the first of these nodes that has an input of a type gets it from: [node, slot], or null. */
function feeder(nodes, type) {
  for (const node of nodes) {
    const slot = node.inputs?.findIndex((input) => input.type === type && input.link != null) ?? -1;
    const link = slot < 0 ? null : node.getInputLink?.(slot) ?? app.graph.links.get(node.inputs[slot].link);
    const origin = link && node.getInputNode(slot);
    if (origin) return [origin, link.origin_slot];
  }
  return null;
}

const valueOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)?.value;

function below(above, type, values = {}, title) {
  const node = addNode(type, values, title);
  node.pos = [above.pos[0], above.pos[1] + above.size[1] + APART];
  return node;
}

function join([origin, slot], node, name) {
  origin.connect(slot, node, node.inputs.findIndex((input) => input.name === name));
}

/** drawn: the nodes that draw for the picker, the nearest first. Whether all inputs of the trainer found a place. */
export function build(drawn, name) {
  const set = addNode("RetortPreferenceSet", { name });
  const trainer = addNode("RetortTrainPreference", { name: `${name}_lora` });
  trainer.pos = [set.pos[0] + set.size[0] + APART, trainer.pos[1]];
  join([set, 0], trainer, "pairs");
  const [model, clip, vae, latent] = ["MODEL", "CLIP", "VAE", "LATENT"].map((type) => feeder(drawn, type));
  if (!model || !clip || !vae) return false;
  for (const [from, to] of [[model, "model"], [clip, "clip"], [vae, "vae"]]) join(from, trainer, to);
  const how = drawn.find((node) => node.comfyClass === "KSampler");
  const size = how ? feeder([how], "LATENT") : latent;
  if (!size) return true;
  const lora = addNode("LoraModelLoader", {}, "With your LoRA");
  join(model, lora, "model");
  join([trainer, 0], lora, "lora");
  const sampler = below(lora, "KSamplerSelect", how ? { sampler_name: valueOf(how, "sampler_name") } : {});
  const steps = how ? { scheduler: valueOf(how, "scheduler"), steps: valueOf(how, "steps") } : {};
  const sigmas = below(sampler, "BasicScheduler", steps);
  join(model, sigmas, "model");
  const list = drawn.find((node) => node.comfyClass === "RetortPromptQueue");
  const prompts = valueOf(list, "prompts") ?? valueOf(drawn.find((node) => node.comfyClass === "CLIPTextEncode"), "text") ?? "";
  const lines = prompts.split("\n").filter((line) => line.trim()).slice(0, 10);
  const given = { prompts: lines.join("\n"), name: `${name}_blind_test`, ...(how ? { cfg: valueOf(how, "cfg") } : {}) };
  const test = addNode("RetortBlindTest", given);
  test.pos = [lora.pos[0] + lora.size[0] + APART, test.pos[1]];
  for (const [from, to] of [[model, "base"], [[lora, 0], "tuned"], [clip, "clip"], [vae, "vae"], [[sampler, 0], "sampler"], [[sigmas, 0], "sigmas"], [size, "latent"]])
    join(from, test, to);
  app.canvas.centerOnNode(trainer);
  return true;
}
