// Descriptions and tooltips of our nodes in the user's language. ComfyUI's own locales hold the names; these longer texts are
// asked for in one language only, and reach what its lookup passes over: inputs inside a choice, text boxes, the help table.
import { learn } from "./words.mjs";

const asked = {};
const texts = {};

function translateInputs(groups, said) {
  for (const inputs of Object.values(groups ?? {})) {
    if (Array.isArray(inputs) || typeof inputs !== "object") continue;
    for (const spec of Object.values(inputs ?? {})) {
      const options = spec?.[1];
      if (!options) continue;
      options.tooltip = said[options.tooltip] ?? options.tooltip;
      // The options of a dynamic choice hold inputs, those of a plain one are words.
      for (const option of options.options ?? []) translateInputs(option?.inputs, said);
    }
  }
}

/** def: as /object_info gives it, changed in place; said: {English: translated}. What is not in `said` stays as it is. */
export function translate(def, said) {
  def.description = said[def.description] ?? def.description;
  def.output_tooltips = def.output_tooltips?.map((text) => said[text] ?? text);
  translateInputs(def.input, said);
}

/** Translate a node's definition, at once where the language is there, and otherwise by the end of what is returned. */
export function inLanguage(def, language) {
  // A refresh of the definitions does not wait.
  if (texts[language]) return translate(def, texts[language]);
  asked[language] ??= fetch(new URL(`./${language}.json`, import.meta.url))
    .then((answer) => answer.json())
    .then((catalogue) => {
      learn(catalogue.page);
      return (texts[language] = catalogue.texts);
    });
  return asked[language].then((said) => translate(def, said));
}
