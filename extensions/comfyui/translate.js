// Descriptions and tooltips of our nodes in the user's language. ComfyUI's own locales hold the names; these longer texts are
// asked for in one language only, and reach what its lookup passes over: inputs inside a choice, text boxes, the help table.
import { app } from "../../scripts/app.js";

const LANGUAGES = ["zh", "ja"];
const asked = {};
const texts = {};

function translateInputs(groups, said) {
  for (const inputs of Object.values(groups ?? {})) {
    if (Array.isArray(inputs) || typeof inputs !== "object") continue;
    for (const spec of Object.values(inputs ?? {})) {
      const options = spec?.[1];
      if (!options) continue;
      if (options.tooltip in said) options.tooltip = said[options.tooltip];
      for (const option of options.options ?? []) translateInputs(option?.inputs, said);
    }
  }
}

function translate(def, said) {
  if (def.description in said) def.description = said[def.description];
  def.output_tooltips = def.output_tooltips?.map((text) => said[text] ?? text);
  translateInputs(def.input, said);
}

app.registerExtension({
  name: "retort.translate",
  beforeRegisterNodeDef(_nodeType, def) {
    const language = app.extensionManager.setting.get("Comfy.Locale");
    if (!def.name.startsWith("Retort") || !LANGUAGES.includes(language)) return;
    // Once it is there the node must change before this returns: a refresh of the definitions does not wait.
    if (texts[language]) return translate(def, texts[language]);
    asked[language] ??= fetch(new URL(`./locales/${language}.json`, import.meta.url))
      .then((answer) => answer.json())
      .then((catalogue) => (texts[language] = catalogue.texts));
    return asked[language].then((said) => translate(def, said));
  },
});
