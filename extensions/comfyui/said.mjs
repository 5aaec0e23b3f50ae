// What one of our nodes said last stays on it: pages from 1.58 on take it away as soon as the job is over.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nodeOf } from "./errors.mjs";

const LATER = 50; // ms in which the page takes it away
// Of nodes that show a run of their own, which says where it stands.
const SHOWING = /^Retort(Train|FewShotAdapt|CollectJob)/;
const TEXT = 62, TITLE = 30; // pixels
const texts = new Map(); // of an execution's id: {node, text}
const queued = new Set(); // workflows of which something waits or is executed
let idle = true;

api.addEventListener("status", ({ detail }) => (idle = !detail?.exec_info?.queue_remaining));

const workflow = () => app.extensionManager.workflow?.activeWorkflow;

/** Something is queued from the workflow that is open: in another one a node of the same number is another node. */
export function queue() {
  if (idle) queued.clear();
  queued.add(workflow());
}

/** Keep a text; detail: of ComfyUI's progress_text. */
export function hear({ nodeId, text }) {
  if (queued.size !== 1 || !queued.has(workflow())) return;
  const node = nodeOf(nodeId);
  if (node?.comfyClass?.startsWith("Retort") && !SHOWING.test(node.comfyClass)) texts.set(String(nodeId), { node, text });
}

/** Whether a text finds room on a node above what lies below it. */
function fits(node) {
  const end = node.pos[1] + Math.max(node.size[1], node.computeSize()[1] + TEXT);
  const beside = (one) => one.pos[0] < node.pos[0] + node.size[0] && one.pos[0] + one.size[0] > node.pos[0];
  return !node.graph.nodes.some((one) => one !== node && beside(one) && one.pos[1] > node.pos[1] && one.pos[1] - TITLE < end);
}

/** Show again what nodes of the open workflow said. */
export function again() {
  setTimeout(() => {
    for (const [nodeId, { node, text }] of texts) {
      if (node.graph && nodeOf(nodeId) === node && fits(node)) api.dispatchCustomEvent("progress_text", { nodeId, text });
    }
  }, LATER);
}
