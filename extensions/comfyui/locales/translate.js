// Puts translated texts into a node's definition, in place: its description, and tooltips wherever they stand.

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

// def: as /object_info gives it; said: {English: translated}. What is not in `said` stays as it is.
export function translate(def, said) {
  def.description = said[def.description] ?? def.description;
  def.output_tooltips = def.output_tooltips?.map((text) => said[text] ?? text);
  translateInputs(def.input, said);
}
