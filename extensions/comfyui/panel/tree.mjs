// A search tree in numbers: where its nodes stand, and which of them lie on a path; no page is needed here.

export const ROOT = 0;

/** For each node the share of the width at which it stands: leaves side by side in the order of a walk. */
export function columns(parent) {
  const count = parent.length;
  const children = Array.from({ length: count }, () => []);
  for (let node = 1; node < count; node++) children[parent[node]].push(node);
  const place = new Float64Array(count);
  const waiting = [ROOT];
  let leaves = 0;
  while (waiting.length) {
    const node = waiting.pop();
    if (children[node].length) for (let i = children[node].length - 1; i >= 0; i--) waiting.push(children[node][i]);
    else place[node] = leaves++;
  }
  // A node's number is above its parent's, so children are placed first.
  for (let node = count - 1; node >= 0; node--) {
    const kids = children[node];
    place[node] = kids.length ? (place[kids[0]] + place[kids[kids.length - 1]]) / 2 : (place[node] + 0.5) / Math.max(1, leaves);
  }
  return place;
}

/** The node and all above it. */
export function path(parent, node) {
  const out = [];
  for (; node !== ROOT && node >= 0; node = parent[node]) out.push(node);
  return [...out, ROOT];
}

/** The finished latents: node by candidate's number. */
export function finished(tree) {
  const found = new Map();
  tree.place.forEach((place, node) => place === tree.stops - 1 && found.set(tree.number[node], node));
  return found;
}

/** The spot that a key leads to from a candidate's, left to right and not beyond the ends; the first where there is none. */
export function beside(spots, number, key) {
  const sorted = [...spots].sort((a, b) => a.x - b.x);
  const at = sorted.findIndex((spot) => spot.number === number);
  const last = sorted.length - 1;
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[key];
  return to === undefined ? undefined : sorted[Math.min(last, Math.max(0, to))];
}

/** Share (0 .. 1) of each value between the outer two percent of all. */
export function shares(values) {
  const sorted = Array.from(values).sort((a, b) => a - b);
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))] ?? 0;
  const low = at(0.02), high = at(0.98);
  return Array.from(values, (value) => Math.min(1, Math.max(0, (value - low) / (high - low || 1))));
}

/** The staircase of a search's best: points [calls, reward], held until a better one came. */
export function staircase(history, calls) {
  const out = [];
  for (const [spent, reward] of history) {
    if (out.length) out.push([spent, out[out.length - 1][1]]);
    out.push([spent, reward]);
  }
  if (out.length) out.push([Math.max(calls, out[out.length - 1][0]), out[out.length - 1][1]]);
  return out;
}
