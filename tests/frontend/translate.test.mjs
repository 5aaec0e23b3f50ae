// A node's definition in another language. Run by `node --test`.
import assert from "node:assert/strict";
import { test } from "node:test";

import { translate } from "../../extensions/comfyui/locales/translate.mjs";

const SAID = { "Draws.": "画。", "A model.": "模型。", "How.": "方法。", "Inner.": "内部。", "Out.": "输出。" };
const node = () => ({
  name: "RetortX",
  description: "Draws.",
  output_tooltips: ["Out.", "Unknown."],
  input_order: { required: ["model"] },
  input: {
    required: {
      model: ["MODEL", { tooltip: "A model." }],
      bare: ["INT"],
      plain: ["COMBO", { tooltip: "Unknown.", options: ["A model.", "b"] }],
      method: [
        "COMFY_DYNAMICCOMBO_V3",
        {
          tooltip: "How.",
          options: [
            { key: "none", inputs: {} },
            { key: "one", inputs: { required: { beta: ["FLOAT", { tooltip: "Inner.", default: 1 }] } } },
          ],
        },
      ],
    },
    optional: { vae: ["VAE", { tooltip: "A model." }] },
    hidden: ["UNIQUE_ID"],
  },
});

test("every text of a node, also within a choice", () => {
  const def = node();
  translate(def, SAID);
  assert.equal(def.description, "画。");
  assert.deepEqual(def.output_tooltips, ["输出。", "Unknown."]);
  const { required, optional } = def.input;
  assert.equal(required.model[1].tooltip, "模型。");
  assert.equal(optional.vae[1].tooltip, "模型。");
  assert.equal(required.method[1].tooltip, "方法。");
  assert.deepEqual(required.method[1].options[1].inputs.required.beta, ["FLOAT", { tooltip: "内部。", default: 1 }]);
});

test("values and unknown texts stay", () => {
  const def = node();
  translate(def, SAID);
  assert.deepEqual(def.input.required.plain[1], { tooltip: "Unknown.", options: ["A model.", "b"] });
  assert.deepEqual(def.input.required.bare, ["INT"]);
  assert.deepEqual(def.input_order, { required: ["model"] });
});

test("again changes nothing, and a node of little stays whole", () => {
  const def = node();
  translate(def, SAID);
  const before = JSON.stringify(def);
  translate(def, SAID);
  assert.equal(JSON.stringify(def), before);
  const bare = { name: "RetortY" };
  translate(bare, SAID);
  assert.equal(bare.description, undefined);
});
