// What a training was connected to, from the part of its prompt that is kept with the run.

const ENDS = { model: "MODEL", clip: "CLIP", vae: "VAE" };

/** [id, output] where an input is connected, null where it holds a value. */
export function linkOf(value) {
  return Array.isArray(value) && value.length === 2 && typeof value[0] === "string" && Number.isInteger(value[1]) ? value : null;
}

/** Ids of the nodes that lead to these links, each after those that it is connected to. follow(id, name): an input counts. */
export function leading(prompt, links, follow = () => true) {
  const found = new Set(), begun = new Set();
  const visit = (id) => {
    if (begun.has(id) || !prompt[id]) return;
    begun.add(id);
    for (const [name, value] of Object.entries(prompt[id].inputs)) if (linkOf(value) && follow(id, name)) visit(value[0]);
    found.add(id);
  };
  for (const link of links) if (link) visit(link[0]);
  return [...found];
}

/**
 * Where the model, text encoder, VAE and the rest of a training came from: {name: [id, output]}, without what it had not.
 * graph: {node, prompt}; outputs(type): the types of a node's outputs, undefined where there is no such node.
 */
export function sources({ node, prompt }, outputs) {
  const given = prompt[node].inputs, found = {};
  for (const name of ["model", "other_expert", "clip", "vae", "positive", "negative", "latents"]) if (linkOf(given[name])) found[name] = given[name];
  // A trainer that is given encoded prompts has no text encoder of its own: the nearest one that leads to it.
  const ids = leading(prompt, [[node, 0]]).reverse();
  for (const [name, type] of Object.entries(ENDS)) {
    for (const id of ids) {
      if (found[name]) break;
      found[name] = Object.values(prompt[id].inputs).find((value) => linkOf(value) && outputs(prompt[value[0]]?.class_type)?.[value[1]] === type);
    }
    for (const id of ids) {
      if (found[name]) break;
      const at = outputs(prompt[id].class_type)?.indexOf(type) ?? -1;
      if (at >= 0 && id !== node) found[name] = [id, at];
    }
    if (!found[name]) delete found[name];
  }
  return found;
}

/** Whether every node that leads to these links is known; outputs as for `sources`. */
export function known(prompt, links, outputs) {
  return leading(prompt, links).every((id) => outputs(prompt[id].class_type));
}
