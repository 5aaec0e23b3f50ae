// The run of a training node, on the node: it is there again after a reload, and follows a run that goes on elsewhere.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nameRun } from "./panel/notice.mjs";
import { connected } from "./panel/page.mjs";
import { TRAINERS, offerRecipes } from "./panel/recipes.mjs";
import { RunView } from "./panel/run_view.mjs";
import { offerPanel } from "./panel/toast.mjs";
import { t } from "./locales/words.mjs";

const RUN = "retort_run", CHART = "retort_chart";
// The widget that names the run.
const NAMES = {
  RetortTrainDistillation: "name", RetortTrainFlow: "name", RetortFewShotAdapt: "name", RetortTrainPreference: "name",
  RetortTrainReward: "name", RetortTrainRestorer: "name", RetortTrainingJob: "name", RetortCollectJob: "run",
};
const HEIGHT = 368;
// No run can be called so, and asking for one would be refused.
const IMPOSSIBLE = /[/\\:*?"<>|]|^\s*\./;

function typed(node) {
  const name = NAMES[node.comfyClass];
  // A name that another node gives is known once it has run.
  if (connected(node, name)) return undefined;
  const value = node.widgets?.find((widget) => widget.name === name)?.value;
  return IMPOSSIBLE.test(value) ? undefined : value;
}

/** Give a training node its run; it may have been configured already. */
export function attach(node) {
  if (TRAINERS.includes(node.comfyClass)) {
    const recipes = node.addWidget("button", "recipes", null, () => offerRecipes(node), { serialize: false });
    recipes.label = t("Recipes");
    recipes.serialize = false;
  }
  const settings = { shown: "student_loss", window: 25, log: false };
  let filled = false, room = false, awaited, offered;
  const view = new RunView(settings, () => {
    if (view.filled !== filled) {
      filled = view.filled;
      widget.hidden = !filled;
      const [width, height] = node.size;
      // A node that was stored with its chart has the room already.
      if (filled) node.setSize([Math.max(width, 320), Math.max(height + (room ? 0 : HEIGHT), node.computeSize()[1])]);
      else node.setSize([width, Math.max(height - HEIGHT, node.computeSize()[1])]);
      room = filled;
    }
    node.setDirtyCanvas(true, true);
  }, (series) => {
    // A run that is refused has taken no step.
    if (view.went && awaited === view.name && series.steps.length) {
      awaited = undefined;
      offered = offerPanel(view.name);
    }
    if (!view.went) offered?.();
  }, () => typed(node) ?? view.name);
  // The run has its previews: the canvas would draw the last one below it once more, as Nodes 2.0 would, see panel.css.
  Object.defineProperty(node, "imgs", { configurable: true, get: () => undefined, set: () => {} });
  const widget = node.addDOMWidget("run view", "retort-run", view.root, {
    serialize: false,
    // The panel of a selected node would take the element away from it.
    hideInPanel: true,
    getMinHeight: () => (view.filled ? HEIGHT : 0),
    getMaxHeight: () => (view.filled ? undefined : 0),
  });
  // Widgets are stored by place, and this one holds nothing.
  widget.serialize = false;
  // Without anything to show it would still take the clicks on whatever lies below the node.
  widget.hidden = true;
  const open = (name, awaited) => {
    if (!name) return;
    node.properties[RUN] = name;
    view.open(name, awaited);
  };
  view.renamed = (name) => open(name, false);
  const stored = () => {
    Object.assign(settings, node.properties[CHART]);
    node.properties[CHART] = settings;
    room = Boolean(node.properties[RUN]);
    if (room) view.open(node.properties[RUN]);
  };
  const { onConfigure, onExecuted, onRemoved } = node;
  node.onConfigure = function (...given) {
    onConfigure?.apply(this, given);
    stored();
  };
  stored();
  node.onExecuted = function (message, ...rest) {
    onExecuted?.call(this, message, ...rest);
    // What was left out or looks wrong, beside where the run stands.
    view.told = message?.[RUN] ? (message.text ?? []).slice(1).join("; ") : "";
    open(message?.[RUN]?.[0] ?? typed(this), false);
  };
  const executing = ({ detail }) => {
    const mine = detail !== null && String(detail).split(":").pop() === String(node.id);
    if (mine) {
      nameRun(typed(node));
      open(typed(node), true);
      awaited = typed(node);
    }
    else if (view.awaited) view.open(view.name);
  };
  api.addEventListener("executing", executing);
  // A node that was drawn before this came has yet to place the button.
  node.setDirtyCanvas(true, true);
  node.onRemoved = function (...given) {
    onRemoved?.apply(this, given);
    api.removeEventListener("executing", executing);
    view.close();
  };
}
