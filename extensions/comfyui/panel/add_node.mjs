// A node on the canvas, beside what is there.
import { app } from "../../../scripts/app.js";

/** Add a node with these values of widgets to the right of everything, and look at it; the node. */
export function addNode(type, values, title) {
  const node = LiteGraph.createNode(type);
  const others = app.graph.nodes;
  node.pos = [
    Math.max(0, ...others.map((other) => other.pos[0] + other.size[0])) + 40,
    others.length ? Math.min(...others.map((other) => other.pos[1])) : 0,
  ];
  if (title) node.title = title;
  app.graph.add(node);
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((each) => each.name === name);
    // A file that was written just now is not in the list yet.
    if (Array.isArray(widget.options.values) && !widget.options.values.includes(value)) widget.options.values.push(value);
    widget.value = value;
  }
  app.canvas.selectNode(node);
  app.canvas.centerOnNode(node);
  return node;
}
