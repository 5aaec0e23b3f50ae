// What one of our nodes, or a sampler of ours inside a core node, says when it fails: at once, and on the node.
// ComfyUI itself says only that the node failed, and keeps the sentence behind two clicks.
import { app } from "../../scripts/app.js";
import { element } from "./panel/page.mjs";

const WIDGET = "retort error";
const FOLDER = new URL("./", import.meta.url).pathname.split("/").filter(Boolean).pop();
const LINE = 18, LETTER = 7, MOST = 260, RIM = 40; // pixels
const LIFE = 60_000; // ms
const TOLD = 500; // letters of a message over the page; the node has all of it
let shown = [];
const told = { error: [], warn: [] }; // what takes away what is said over the page

/** Whether an error is of our making: of our node, or raised last in our files. */
function ours({ node_type, traceback = [] }) {
  const files = traceback.join("\n").match(/File "[^"]+"/g) ?? [];
  const last = decodeURIComponent(FOLDER).toLowerCase();
  return node_type?.startsWith("Retort") || files.at(-1)?.toLowerCase().split(/[\\/]/).includes(last);
}

/** The node of an execution id, whose numbers lead through subgraphs. */
export function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph, node;
  for (const number of String(id).split(":")) {
    node = graph?.getNodeById(Number(number));
    graph = node?.subgraph;
  }
  return node;
}

function show(node, text) {
  const box = element("p", { class: "retort-error", role: "alert" }, text);
  const height = () => Math.min(MOST, LINE * (1 + Math.ceil((text.length * LETTER) / (node.size[0] - RIM))));
  const widget = node.addDOMWidget(WIDGET, "retort-error", box, {
    serialize: false,
    hideInPanel: true,
    getMinHeight: height,
    getMaxHeight: height,
  });
  // Widgets are stored by place, and this one holds nothing.
  widget.serialize = false;
  shown.push({ node, widget, size: [...node.size] });
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas(true, true);
}

/** Take away what nodes say of an earlier run. */
export function clear() {
  for (const { node, widget, size } of shown) {
    node.removeWidget(widget);
    node.setSize([node.size[0], Math.max(size[1], node.computeSize()[1])]);
    node.setDirtyCanvas(true, true);
  }
  shown = [];
  forget("error");
}

/** Take away what was said over the page; severity: error or warn. */
export function forget(severity) {
  for (const away of told[severity].splice(0)) away();
}

/** Say something over the page until the next run; severity: error or warn. */
function complain(severity, summary, detail) {
  const { toast } = app.extensionManager;
  // Pages from 1.58 on give an id by which a toast goes again; older ones know it by what it is.
  if (toast.dismiss) {
    const id = toast[severity === "warn" ? "warning" : severity](summary, { description: detail, duration: LIFE, closable: true });
    told[severity].push(() => toast.dismiss(id));
    return;
  }
  const message = { severity, summary, detail, life: LIFE };
  toast.add(message);
  told[severity].push(() => toast.remove(message));
}

/** Say what a prompt does that cannot be meant. */
export function warn(text) {
  complain("warn", "Retort", text);
}

/** Say why a node failed; detail: of ComfyUI's execution_error. */
export function tell(detail) {
  if (!detail || !ours(detail)) return;
  const node = nodeOf(detail.node_id), text = detail.exception_message.trim();
  const summary = node?.title ?? detail.node_type;
  clear();
  complain("error", summary, text.length > TOLD ? `${text.slice(0, TOLD)}…` : text);
  if (node) show(node, text);
}
