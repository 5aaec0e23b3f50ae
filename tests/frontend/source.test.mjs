// What a training was connected to.
import assert from "node:assert/strict";
import { test } from "node:test";

import { known, leading, sources } from "../../extensions/comfyui/panel/source.mjs";

const TYPES = {
  UNETLoader: ["MODEL"], ModelSamplingAuraFlow: ["MODEL"], CLIPLoader: ["CLIP"], VAELoader: ["VAE"], LoadImage: ["IMAGE", "MASK"],
  CLIPTextEncode: ["CONDITIONING"], CheckpointLoaderSimple: ["MODEL", "CLIP", "VAE"], EmptyLatentImage: ["LATENT"], RetortTrainFlow: ["LORA_MODEL"],
};
const outputs = (type) => TYPES[type];
const node = (class_type, inputs = {}) => ({ class_type, inputs });

test("loaders of their own, and the text encoder of the prompts", () => {
  const prompt = {
    1: node("UNETLoader", { unet_name: "z.safetensors" }), 2: node("ModelSamplingAuraFlow", { model: ["1", 0], shift: 3 }), 3: node("CLIPLoader"), 4: node("VAELoader"),
    5: node("CLIPTextEncode", { clip: ["3", 0], text: "a cat" }), 6: node("LoadImage"),
    "7:2": node("RetortTrainFlow", { model: ["2", 0], positive: ["5", 0], images: ["6", 0], vae: ["4", 0], name: "cats" }),
  };
  const found = sources({ node: "7:2", prompt }, outputs);
  assert.deepEqual(found, { model: ["2", 0], vae: ["4", 0], positive: ["5", 0], clip: ["3", 0] });
  assert.deepEqual(leading(prompt, [found.model, found.positive]), ["1", "2", "3", "5"]);
  assert.deepEqual(leading(prompt, [found.model, found.positive], (id, name) => name !== "clip"), ["1", "2", "5"]);
  assert.ok(known(prompt, Object.values(found), outputs));
  assert.ok(!known(prompt, Object.values(found), (type) => type !== "ModelSamplingAuraFlow" && outputs(type)));
});

test("what a checkpoint holds counts where nothing was connected to it", () => {
  const prompt = { 1: node("CheckpointLoaderSimple"), 2: node("EmptyLatentImage"), 3: node("RetortTrainFlow", { model: ["1", 0], latents: ["2", 0] }) };
  assert.deepEqual(sources({ node: "3", prompt }, outputs), { model: ["1", 0], latents: ["2", 0], clip: ["1", 1], vae: ["1", 2] });
});

test("a circle, and a link to nowhere, end", () => {
  const prompt = { 1: node("ModelSamplingAuraFlow", { model: ["2", 0] }), 2: node("ModelSamplingAuraFlow", { model: ["1", 0], shift: [5, 0] }), 3: node("RetortTrainFlow", { model: ["1", 0], vae: ["9", 0] }) };
  assert.deepEqual(leading(prompt, [["3", 0]]), ["2", "1", "3"]);
  assert.ok(known(prompt, [["1", 0]], outputs));
});
