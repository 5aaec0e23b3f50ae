// A run's LoRA in a workflow of its own: with it and without it, from the same noise, as it says that it is sampled.
import { app } from "../../../scripts/app.js";
import { spelt } from "./spelt.mjs";
import { t } from "../locales/words.mjs";

const SEED = 1, PIXELS = 8; // of a latent's cell; nodes of empty latents count in it
// Columns that are wide enough in both renderers; below each other lie the branch with the LoRA and the one without.
const LEFT = 0, MIDDLE = 370, RIGHT = 810, END = 1150, WIDER = 100;

function widget(node, name, value) {
  const found = node.widgets?.find((each) => each.name === name);
  if (!found) return;
  found.value = spelt(found.options?.values, value);
  found.callback?.(found.value);
}

function join(from, output, to, input) {
  from.connect(output, to, to.inputs.findIndex((each) => each.name === input));
}

/** A new workflow with a run's model: {add, base, embedded}. The open one stays as it is, in its own tab. */
async function begin(run) {
  // What a training has just written is in no list of the page yet, and would be called missing.
  await app.refreshComboInNodes?.();
  await app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
  const add = (type, x, y, values = {}, title = "") => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    if (title) node.title = title;
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) widget(node, name, value);
    return node;
  };
  const named = run.base ?? {};
  const embedded = named.kind === "embedded";
  const base = embedded
    ? add("RetortEmbeddedModel", LEFT, 0, { variant: named.variant })
    : add("CheckpointLoaderSimple", LEFT, 0, named.kind === "checkpoint" ? { ckpt_name: named.file } : {});
  return { add, base, embedded };
}

/** The whole workflow in view. Where nodes lie is known once they have been drawn. */
async function shown() {
  for (let frames = 0; frames < 2; frames++) await new Promise(requestAnimationFrame);
  await app.extensionManager.command.execute("Comfy.Canvas.FitView");
}

/** run: an entry of /retort/runs that has a LoRA. */
export async function openLora(run) {
  const { add, base, embedded } = await begin(run);
  const restores = run.method === "instarevive";
  const student = run.student && !restores;
  const lora = add(student ? "RetortLoadStudent" : "LoraLoaderModelOnly", MIDDLE, 0, { lora_name: run.lora });
  join(base, 0, lora, "model");
  const sample = restores ? restored(run, add, base) : drawn(run, add, base, embedded, student && lora);
  const compared = add("RetortCompareImages", restores ? END + WIDER : END, 0, {}, t("Without the LoRA, and with it"));
  const row = restores ? 700 : student ? 470 : 420;
  for (const [model, y, name] of [[lora, 0, "after"], [base, row, "before"]]) join(sample(model, y), 0, compared, name);
  await shown();
}

/** The checkpoints of a run at several strengths in one sheet. run: an entry of /retort/runs. */
export async function openGrid(run) {
  const { add, base, embedded } = await begin(run);
  const latent = emptyLatent(run, add, 1);
  const { levels, sampler } = fewSteps(run, add) ?? {
    levels: add("BasicScheduler", MIDDLE, 0, embedded ? { scheduler: "simple" } : {}),
    sampler: add("KSamplerSelect", MIDDLE, 260, { sampler_name: "euler" }),
  };
  if (levels.type === "BasicScheduler") join(base, 0, levels, "model");
  const cfg = sampler.type === "KSamplerSelect" ? (embedded ? 4 : 6) : 1;
  const grid = add("RetortLoraGrid", RIGHT, 0, { run: run.name, prompt: run.prompt ?? "", cfg, seed: SEED, control_after_generate: "fixed" });
  grid.setSize([560, 860]);
  ["model", "clip", "vae"].forEach((name, i) => join(base, i, grid, name));
  join(sampler, 0, grid, "sampler");
  join(levels, 0, grid, "sigmas");
  join(latent, 0, grid, "latent");
  await shown();
}

/** An empty latent of the training's size. */
function emptyLatent(run, add, batch_size) {
  const [height, width] = run.latent?.slice(-2) ?? [];
  const size = width ? { width: PIXELS * width, height: PIXELS * height } : {};
  return add("EmptyLatentImage", LEFT, 260, { ...size, batch_size });
}

/** {levels, sampler} of a few-step student as it was trained; null for another run. */
function fewSteps(run, add) {
  if (!run.sigmas.length || run.mode === "single") return null;
  const levels = add("ManualSigmas", MIDDLE, 560, { sigmas: [...run.sigmas, 0].join(", ") });
  // What the student's noise does between its steps is the method's own.
  const mode = run.mode === "deterministic" ? "deterministic" : "re-noise";
  return { levels, sampler: add("RetortDistilledSampler", MIDDLE, 900, { preset: "custom", mode }) };
}

/** (model, y) -> the node that gives the picture of a branch: a picture is restored. */
function restored(run, add, base) {
  const picture = add("LoadImage", LEFT, 260);
  return (model, y) => {
    const restore = add("RetortRestore", RIGHT, y, { caption: run.prompt });
    join(model, 0, restore, "model");
    join(base, 1, restore, "clip");
    join(base, 2, restore, "vae");
    join(picture, 0, restore, "image");
    return restore;
  };
}

/** The same: four pictures are drawn at the size of the training, by a student's own levels where there is one. */
function drawn(run, add, base, embedded, student) {
  const latent = emptyLatent(run, add, 4);
  const positive = add("CLIPTextEncode", MIDDLE, student ? 460 : 260, { text: run.prompt ?? "" });
  join(base, 1, positive, "clip");
  const decoded = (samples, y) => {
    const decode = add("VAEDecode", RIGHT, y + 380);
    decode.collapse();
    join(samples, 0, decode, "samples");
    join(base, 2, decode, "vae");
    return decode;
  };
  if (student) {
    const noise = add("RandomNoise", LEFT, 560, { noise_seed: SEED, control_after_generate: "fixed" });
    join(positive, 0, student, "positive");
    return (model, y) => {
      const samples = add("SamplerCustomAdvanced", RIGHT, y + 160);
      join(noise, 0, samples, "noise");
      if (model === student) {
        join(student, 1, samples, "guider");
      } else {
        const guider = add("BasicGuider", RIGHT, y);
        join(model, 0, guider, "model");
        join(positive, 0, guider, "conditioning");
        join(guider, 0, samples, "guider");
      }
      join(student, 2, samples, "sampler");
      join(student, 3, samples, "sigmas");
      join(latent, 0, samples, "latent_image");
      return decoded(samples, y);
    };
  }
  const negative = add("CLIPTextEncode", MIDDLE, 620);
  join(base, 1, negative, "clip");
  const settings = { seed: SEED, control_after_generate: "fixed", ...(embedded && { cfg: 4, scheduler: "simple" }) };
  return (model, y) => {
    const samples = add("KSampler", RIGHT, y, settings);
    join(model, 0, samples, "model");
    join(positive, 0, samples, "positive");
    join(negative, 0, samples, "negative");
    join(latent, 0, samples, "latent_image");
    return decoded(samples, y);
  };
}
