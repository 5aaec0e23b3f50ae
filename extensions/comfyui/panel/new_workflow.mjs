// A run's LoRA in a workflow of its own: with it and without it, from the same noise, as it says that it is sampled.
import { app } from "../../../scripts/app.js";
import { ask } from "./client.mjs";
import { known, leading, linkOf, sources } from "./source.mjs";
import { spelt } from "./spelt.mjs";
import { t } from "../locales/words.mjs";

const SEED = 1, PIXELS = 8; // of a latent's cell; nodes of empty latents count in it
// Columns that are wide enough in both renderers; below each other lie the branch with the LoRA and the one without.
const LEFT = 0, MIDDLE = 370, RIGHT = 810, END = 1150, WIDER = 100;
const APART = 440, BELOW = 70, TALL = 940; // columns of nodes that a training was connected to
const LARGE = 512 * 512; // pixels
const HALF = 300; // what lies below is the branch without the LoRA
// Pixels around the workflow and of the bar beside it; the scale below which nothing is shown; ms.
const EDGE = 40, BAR = 50, SMALLEST = 0.1, LATER = 400;
const EMPTY = { version: 0.4, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {}, extra: {} };

function widget(node, name, value) {
  const found = node.widgets?.find((each) => each.name === name);
  // A run may be a stranger's, and must press nothing.
  if (!found || found.type === "button") return;
  found.value = spelt(found.options?.values, value);
  found.callback?.(found.value);
}

/** from: [node, output]; without one the input stays open. */
function join(from, to, input) {
  if (from) from[0].connect(from[1], to, to.inputs.findIndex((each) => each.name === input));
}

const outputs = (type) => LiteGraph.registered_node_types[type]?.nodeData?.output;

/** The title, with a number after it where a workflow of that name is open: the page would empty its tab. */
function untaken(title) {
  const open = new Set(app.extensionManager?.workflow?.openWorkflows?.map(({ filename }) => filename));
  let found = title;
  for (let i = 2; open.has(found); i++) found = `${title} ${i}`;
  return found;
}

/**
 * A new workflow of this title with what a run was trained on: {run, add, model, other, clip, vae, positive, negative,
 * latent, embedded}, each [node, output] where there is one; unused: names of those that are left out. The open workflow
 * stays as it is, in its own tab.
 */
async function begin(run, title, unused = []) {
  const graph = await ask(["runs", run.name, "graph"]).catch(() => null);
  if (graph?.node) run = { ...run, prompt: run.prompt || (await firstCaption(graph)) };
  // What a training has just written may be in no list of the page yet, and would be called missing.
  await app.reloadNodeDefs?.();
  await app.loadGraphData(structuredClone(EMPTY), true, true, untaken(title));
  const add = (type, x, y, values = {}, title = "") => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    if (title) node.title = title;
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) widget(node, name, value);
    return node;
  };
  return { run, add, ...((graph?.node && again(run, graph, add, unused)) || named(run, add)) };
}

/** The first caption of the folder that a training took its texts from, "" where there is none. */
async function firstCaption({ prompt }) {
  const folder = Object.values(prompt).map((node) => node.inputs.folder).find((value) => typeof value === "string");
  const found = folder && (await ask(["data", folder]).catch(() => null));
  return found?.pictures.find((one) => one.caption)?.caption ?? "";
}

/** What the training was connected to, made again; null where a node is not installed any more. */
function again(run, { node, prompt }, add, unused) {
  const from = sources({ node, prompt }, outputs);
  for (const name of unused) delete from[name];
  const empty = (link) => prompt[link?.[0]]?.class_type.startsWith("Empty");
  if (!empty(from.latents)) delete from.latents;
  // What was typed is encoded anew.
  if (run.prompt) delete from.positive;
  if (!from.model || !known(prompt, Object.values(from), outputs)) return null;
  const type = (value) => outputs(prompt[value[0]]?.class_type)?.[value[1]];
  // Captions that come from elsewhere, one for each picture, give way to a text box.
  const encodes = (id) => Object.values(prompt[id].inputs).some((value) => linkOf(value) && type(value) === "CLIP");
  const follow = (id, name) => !(encodes(id) && type(prompt[id].inputs[name]) === "STRING");
  const ids = leading(prompt, Object.values(from), follow), made = {};
  const links = (id) => Object.entries(prompt[id].inputs).filter(([name, value]) => linkOf(value) && follow(id, name) && made[value[0]]);
  for (const id of ids) {
    made[id] = add(prompt[id].class_type, 0, 0);
    for (const [name, value] of Object.entries(prompt[id].inputs)) {
      if (!linkOf(value)) widget(made[id], name, value);
      else if (!follow(id, name)) widget(made[id], name, run.prompt ?? "");
    }
    for (const [name, value] of links(id)) join([made[value[0]], value[1]], made[id], name);
  }
  // One node has the place beside what is drawn; more stand in columns of their own, as few as there is room for.
  const nodes = ids.map((id) => made[id]), columns = [[]], room = (node) => node.size[1] + BELOW;
  for (const node of nodes) {
    if ([...columns.at(-1), node].reduce((sum, one) => sum + room(one), 0) > TALL && columns.at(-1).length) columns.push([]);
    columns.at(-1).push(node);
  }
  columns.forEach((column, i) => {
    let y = 0;
    for (const node of column) {
      node.pos = [nodes.length > 1 ? LEFT - APART * (columns.length - i) : LEFT, y];
      y += room(node);
    }
  });
  const at = (link) => link && [made[link[0]], link[1]];
  return {
    model: at(from.model), other: at(from.other_expert), clip: at(from.clip), vae: at(from.vae), positive: at(from.positive),
    negative: at(from.negative), latent: at(from.latents), embedded: prompt[from.model[0]].class_type === "RetortEmbeddedModel",
  };
}

/** The same by the name of the file alone. */
function named(run, add) {
  const base = run.base ?? {};
  if (base.kind === "diffusion_model") {
    const part = (type, y, values = {}) => [add(type, LEFT - APART, y, values), 0];
    return { model: part("UNETLoader", 0, { unet_name: base.file }), clip: part("CLIPLoader", 190), vae: part("VAELoader", 400) };
  }
  const embedded = base.kind === "embedded";
  const whole = embedded
    ? add("RetortEmbeddedModel", LEFT, 0, { variant: base.variant })
    : add("CheckpointLoaderSimple", LEFT, 0, base.kind === "checkpoint" ? { ckpt_name: base.file } : {});
  return { model: [whole, 0], clip: [whole, 1], vae: [whole, 2], embedded };
}

/** The whole workflow in view, beside the panel. Where nodes lie is known once they have been drawn. */
async function shown() {
  for (let frames = 0; frames < 2; frames++) await new Promise(requestAnimationFrame);
  view();
  // The page fits a graph in by itself after it was loaded, on a busy machine late, and whatever covers it.
  let touched = false;
  for (const kind of ["pointerdown", "wheel", "keydown"])
    window.addEventListener(kind, () => (touched = true), { once: true, capture: true, passive: true });
  await new Promise((done) => setTimeout(done, LATER));
  if (!touched) view();
}

function view() {
  const { left, right, top, bottom } = app.canvas.canvas.getBoundingClientRect();
  const panel = document.querySelector(".retort-panel")?.getBoundingClientRect();
  const free = { left: EDGE + BAR, right: right - left - EDGE, top: 3 * EDGE, bottom: bottom - top - EDGE };
  if (panel?.width && panel.left + panel.right < left + right) free.left = Math.max(free.left, panel.right - left + EDGE);
  else if (panel?.width) free.right = Math.min(free.right, panel.left - left - EDGE);
  const boxes = app.graph.nodes.map((node) => node.getBounding());
  const low = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])));
  const size = [0, 1].map((i) => Math.max(...boxes.map((box) => box[i] + box[i + 2])) - low[i]);
  const room = [free.right - free.left, free.bottom - free.top];
  const { ds } = app.canvas;
  ds.scale = Math.max(SMALLEST, Math.min(1, room[0] / size[0], room[1] / size[1]));
  ds.offset = [free.left / ds.scale - low[0], free.top / ds.scale - low[1]];
  app.canvas.setDirty(true, true);
}

/** entry: a run of /retort/runs that has a LoRA. */
export async function openLora(entry) {
  const parts = await begin(entry, t("{run} with and without", { run: entry.name })), { run, add, model } = parts;
  const restores = run.method === "instarevive";
  const student = run.student && !restores;
  const lora = add(student ? "RetortLoadStudent" : "LoraLoaderModelOnly", MIDDLE, 0, { lora_name: run.lora });
  join(model, lora, "model");
  const sample = restores ? restored(run, parts) : drawn(run, parts, student && lora);
  const compared = add("RetortCompareImages", restores ? END + WIDER : END, 0, {}, t("Without the LoRA, and with it"));
  compared.setProperty("retort_sides", [t("without"), t("with")]);
  const row = restores ? 700 : parts.other ? 500 : student ? 470 : 420;
  for (const [from, y, name] of [[[lora, 0], 0, "after"], [model, row, "before"]]) join([sample(from, y), 0], compared, name);
  await shown();
}

/** The checkpoints of a run at several strengths in one sheet. entry: a run of /retort/runs. */
export async function openGrid(entry) {
  const { run, add, model, clip, vae, latent, embedded } = await begin(entry, t("{run} at several strengths", { run: entry.name }), ["positive", "negative"]);
  const { levels, sampler } = fewSteps(run, add) ?? {
    levels: add("BasicScheduler", MIDDLE, 0, { scheduler: "simple", steps: run.sampling?.steps ?? 20 }),
    sampler: add("KSamplerSelect", MIDDLE, 260, { sampler_name: "euler" }),
  };
  if (levels.type === "BasicScheduler") join(model, levels, "model");
  const cfg = sampler.type === "KSamplerSelect" ? (run.sampling?.cfg ?? (embedded ? 4 : 6)) : 1;
  const grid = add("RetortLoraGrid", RIGHT, 0, { run: run.name, prompt: run.prompt ?? "", cfg, seed: SEED, control_after_generate: "fixed" });
  grid.setSize([560, 860]);
  for (const [name, from] of Object.entries({ model, clip, vae })) join(from, grid, name);
  join([sampler, 0], grid, "sampler");
  join([levels, 0], grid, "sigmas");
  join(emptyLatent(run, add, latent, 1), grid, "latent");
  await shown();
}

/** An empty latent of the training's size: the one that it had, or one of as many pixels. */
function emptyLatent(run, add, latent, batch_size) {
  if (latent) {
    widget(latent[0], "batch_size", batch_size);
    return latent;
  }
  const cells = run.latent?.slice(-2) ?? [];
  const [width, height] = run.size?.length === 2 ? run.size : [cells[1] * PIXELS, cells[0] * PIXELS];
  const size = width ? { width, height } : {};
  const frames = run.latent?.length > 3 ? run.latent[1] : 1;
  if (frames > 1) return [add("EmptyHunyuanLatentVideo", LEFT, 260, { ...size, length: 4 * frames - 3, batch_size: 1 }), 0];
  return [add("EmptyLatentImage", LEFT, 260, { ...size, batch_size }), 0];
}

/** Whether one picture at a time takes long enough. */
const large = ({ size }) => size?.length === 2 && size[0] * size[1] > LARGE;

/** {levels, sampler} of a few-step student as it was trained; null for another run. */
function fewSteps(run, add) {
  if (!run.sigmas.length || run.mode === "single") return null;
  const levels = add("ManualSigmas", MIDDLE, 560, { sigmas: [...run.sigmas, 0].join(", ") });
  // What the student's noise does between its steps is the method's own.
  const mode = run.mode === "deterministic" ? "deterministic" : "re-noise";
  return { levels, sampler: add("RetortDistilledSampler", MIDDLE, 900, { preset: "custom", mode }) };
}

/** (model, y) -> the node that gives the picture of a branch: a picture is restored. */
function restored(run, { add, clip, vae }) {
  const picture = add("LoadImage", LEFT, 260);
  return (model, y) => {
    const restore = add("RetortRestore", RIGHT, y, { caption: run.prompt });
    for (const [name, from] of Object.entries({ model, clip, vae, image: [picture, 0] })) join(from, restore, name);
    return restore;
  };
}

/** The same: pictures are drawn at the size of the training, by a student's own levels where there is one. */
function drawn(run, { add, other, clip, vae, positive, negative, latent, embedded }, student) {
  const encoded = (y, text) => {
    const made = add("CLIPTextEncode", MIDDLE, y, { text });
    join(clip, made, "clip");
    return [made, 0];
  };
  const empty = emptyLatent(run, add, latent, run.latent?.length > 3 || large(run) ? 1 : 4);
  positive ??= encoded(student ? 460 : 260, run.prompt ?? "");
  const decoded = (samples, y) => {
    const decode = add("VAEDecode", RIGHT, y + 380);
    decode.collapse();
    join([samples, 0], decode, "samples");
    join(vae, decode, "vae");
    return decode;
  };
  if (student) {
    const noise = add("RandomNoise", LEFT, 560, { noise_seed: SEED, control_after_generate: "fixed" });
    join(positive, student, "positive");
    return (model, y) => {
      const samples = add("SamplerCustomAdvanced", RIGHT, y + 160);
      join([noise, 0], samples, "noise");
      if (model[0] === student) {
        join([student, 1], samples, "guider");
      } else {
        const guider = add("BasicGuider", RIGHT, y);
        join(model, guider, "model");
        join(positive, guider, "conditioning");
        join([guider, 0], samples, "guider");
      }
      join([student, 2], samples, "sampler");
      join([student, 3], samples, "sigmas");
      join(empty, samples, "latent_image");
      return decoded(samples, y);
    };
  }
  // As the previews were drawn; without anything to compare with there was no guidance.
  const { steps = 20, cfg = embedded ? 4 : 6 } = run.sampling ?? {};
  const settings = { control_after_generate: "fixed", steps, cfg: negative || clip ? cfg : 1, sampler_name: "euler", scheduler: "simple" };
  negative ??= clip ? encoded(620, "") : positive;
  const sampled = (type, model, y, values, from) => {
    const samples = add(type, RIGHT, y, { ...settings, ...values }, y < HALF ? t("With the LoRA") : t("Without the LoRA"));
    for (const [name, part] of Object.entries({ model, positive, negative, latent_image: from })) join(part, samples, name);
    return samples;
  };
  if (!other) return (model, y) => decoded(sampled("KSampler", model, y, { seed: SEED }, empty), y);
  // One of two networks was trained: the first samples the noisier half, as it does for the previews.
  const trained = run.sampling?.expert === "low noise" ? 1 : 0, half = Math.round(steps / 2);
  return (model, y) => {
    const pair = trained ? [other, model] : [model, other];
    const first = sampled("KSamplerAdvanced", pair[0], y, { noise_seed: SEED, end_at_step: half, return_with_leftover_noise: "enable" }, empty);
    const second = sampled("KSamplerAdvanced", pair[1], y + 60, { add_noise: "disable", noise_seed: SEED, start_at_step: half }, [first, 0]);
    first.collapse();
    return decoded(second, y + 60);
  };
}
