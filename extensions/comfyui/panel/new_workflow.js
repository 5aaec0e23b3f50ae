// A finished LoRA in a workflow of its own: base, LoRA, prompt, sampler, picture.
import { app } from "../../../scripts/app.js";

const DISTILLED = new Set(["dmd2", "f_distill", "tdm", "di_star"]);

function widget(node, name, value) {
  const found = node.widgets?.find((each) => each.name === name);
  if (!found) return;
  found.value = value;
  found.callback?.(value);
}

function join(from, output, to, input) {
  from.connect(output, to, to.inputs.findIndex((each) => each.name === input));
}

/** run: an entry of /retort/runs that is finished. The open workflow stays as it is, in its own tab. */
export async function openLora(run) {
  await app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
  const add = (type, x, y, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) widget(node, name, value);
    return node;
  };
  const named = run.base ?? {};
  const base = named.kind === "embedded"
    ? add("RetortEmbeddedModel", 0, 0, { variant: named.variant })
    : add("CheckpointLoaderSimple", 0, 0, named.kind === "checkpoint" ? { ckpt_name: named.file } : {});
  const size = named.kind === "embedded" ? { width: 64, height: 64 } : {};
  const lora = add("LoraLoaderModelOnly", 340, 0, { lora_name: run.lora });
  const positive = add("CLIPTextEncode", 340, 130);
  const negative = add("CLIPTextEncode", 340, 350);
  const latent = add("EmptyLatentImage", 0, 160, size);
  const decode = add("VAEDecode", 1180, 0);
  const show = add("PreviewImage", 1180, 90);
  join(base, 0, lora, "model");
  for (const text of [positive, negative]) join(base, 1, text, "clip");
  join(base, 2, decode, "vae");
  join(decode, 0, show, "images");
  if (DISTILLED.has(run.method) && run.timesteps.length) {
    const setup = add("RetortDistilledSetup", 780, 0, {
      preset: "custom", steps: run.timesteps.length, timesteps: run.timesteps.join(", "),
    });
    const noise = add("RandomNoise", 780, 240);
    const sampler = add("SamplerCustomAdvanced", 780, 370);
    join(lora, 0, setup, "model");
    join(positive, 0, setup, "positive");
    join(noise, 0, sampler, "noise");
    join(setup, 1, sampler, "guider");
    join(setup, 2, sampler, "sampler");
    join(setup, 3, sampler, "sigmas");
    join(latent, 0, sampler, "latent_image");
    join(sampler, 0, decode, "samples");
    app.graph.remove(negative);
  } else {
    const sampler = add("KSampler", 780, 0);
    join(lora, 0, sampler, "model");
    join(positive, 0, sampler, "positive");
    join(negative, 0, sampler, "negative");
    join(latent, 0, sampler, "latent_image");
    join(sampler, 0, decode, "samples");
  }
}
