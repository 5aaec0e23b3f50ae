// The one script that comes with ComfyUI's page. What a node, a list or a message needs comes when it is wanted.
// It imports nothing: ComfyUI's page waits for each import of it, and scripts/app.js gives what is taken here.
const { app } = window.comfyAPI.app;
const { api } = window.comfyAPI.api;
const LANGUAGES = ["zh", "ja"];
const LATER = 300; // ms
const FEW_STEPS = "Sample as a few-step student (Retort)";

/** A module that is asked for once; `here` is what it exports, as soon as it is there. */
class Part {
  constructor(load) {
    this.load = load;
  }

  wait() {
    return (this.asked ??= this.load().then((found) => (this.here = found)));
  }
}

const training = new Part(() => import("./training.mjs"));
const picker = new Part(() => import("./picker.mjs"));
// What nodes have beside their settings: each module exports attach(node).
const ATTACHED = {
  RetortTrainDistillation: training, RetortTrainFlow: training, RetortFewShotAdapt: training, RetortTrainPreference: training,
  RetortTrainReward: training, RetortTrainRestorer: training, RetortTrainingJob: training, RetortCollectJob: training,
  RetortPreferencePicker: picker, RetortBlindTest: picker, RetortCompareImages: new Part(() => import("./compare.mjs")),
  RetortEmbeddedModel: new Part(() => import("./own_model.mjs")),
};
const errors = new Part(() => import("./errors.mjs"));
const fewSteps = new Part(() => import("./few_steps.mjs"));
const said = new Part(() => import("./said.mjs"));
const translations = new Part(() => import("./locales/translate.mjs"));

/** Fold the advanced settings of a node on the canvas, as Nodes 2.0 does; "Show Advanced" is in the node's menu. */
function fold(node) {
  if (!node.comfyClass.startsWith("Retort") || !node.isWidgetVisible || !node.getLayoutWidgets) return;
  if (!node.widgets?.some((widget) => widget.options?.advanced)) return;
  const mark = (widget) => {
    if (widget.options?.advanced) widget.advanced = true;
  };
  const { getLayoutWidgets } = node;
  // A method's settings come and go with the choice, so they are marked whenever they are looked at: frontends from
  // 1.58 measure and draw what has a row, and ask what is visible only where the pointer is.
  for (const name of ["isWidgetVisible", "isWidgetRowVisible"]) {
    const look = node[name];
    if (!look) continue;
    node[name] = function (widget) {
      mark(widget);
      return look.call(this, widget);
    };
  }
  // Without this the canvas keeps room for what it does not draw.
  node.getLayoutWidgets = function () {
    this.widgets?.forEach(mark);
    return getLayoutWidgets.call(this).filter((widget) => !widget.advanced || this.showAdvanced);
  };
  node.showAdvanced ??= Boolean(app.extensionManager.setting.get("Comfy.Node.AlwaysShowAdvancedWidgets"));
  node.setSize([node.size[0], node.computeSize()[1]]);
}

/** Show a template of ours where its note begins, at full size; ComfyUI would shrink it until nothing can be read. */
function openReadable() {
  const { extra } = app.rootGraph ?? app.graph;
  if (extra?.retort?.opens !== "extra.ds" || !extra.ds) return;
  // Once: what is saved or left open has a view of its own.
  delete extra.retort;
  const { scale, offset } = extra.ds;
  const show = () => {
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [...offset];
    app.canvas.setDirty(true, true);
  };
  // The page fits the whole graph in after this, some of it a frame later, and on a busy machine later still.
  requestAnimationFrame(() => requestAnimationFrame(show));
  let touched = false;
  for (const kind of ["pointerdown", "wheel", "keydown"])
    window.addEventListener(kind, () => (touched = true), { once: true, capture: true, passive: true });
  setTimeout(() => touched || show(), LATER);
}

function addPanel() {
  let panel;
  const close = () => {
    panel?.then((one) => one.close());
    panel = undefined;
  };
  app.extensionManager.registerSidebarTab({
    id: "retort",
    icon: "pi pi-chart-line",
    title: "Retort",
    tooltip: "Retort: training runs, searches, preferences, pictures",
    type: "custom",
    render: (root) => {
      close();
      panel = import("./panel.mjs").then(({ Panel }) => new Panel(root));
    },
    destroy: close,
  });
}

app.registerExtension({
  name: "retort",
  setup() {
    addPanel();
    api.addEventListener("retort.notice", ({ detail }) => errors.wait().then((found) => found.warn(detail.text)));
    api.addEventListener("execution_start", () => errors.here?.clear());
    // Also where what is queued is refused; its own notices come later.
    api.addEventListener("promptQueueing", () => {
      errors.here?.clear();
      errors.here?.forget("warn");
      said.wait().then((found) => found.queue());
    });
    api.addEventListener("progress_text", ({ detail }) => said.wait().then((found) => found.hear(detail)));
    api.addEventListener("execution_success", () => said.here?.again());
    api.addEventListener("execution_error", ({ detail }) => errors.wait().then((found) => found.tell(detail)));
  },
  // Descriptions and tooltips, which ComfyUI's own locales do not hold.
  beforeRegisterNodeDef(_nodeType, def) {
    if (!def.name.startsWith("Retort")) return;
    const language = app.extensionManager.setting.get("Comfy.Locale");
    if (!LANGUAGES.includes(language)) return;
    return translations.here ? translations.here.inLanguage(def, language) : translations.wait().then((found) => found.inLanguage(def, language));
  },
  // A stored node is configured as soon as it is made, so what belongs to it must be there before.
  async beforeConfigureGraph(graph) {
    const parts = [graph, ...(graph?.definitions?.subgraphs ?? [])];
    const wanted = parts.flatMap((one) => one?.nodes ?? []).map((node) => ATTACHED[node.type]);
    await Promise.all(wanted.map((part) => part?.wait()));
  },
  getNodeMenuItems(node) {
    if (node.comfyClass !== "KSampler") return [];
    return [{ content: FEW_STEPS, callback: () => fewSteps.wait().then((found) => found.replace(node)) }];
  },
  nodeCreated(node) {
    if (!node.comfyClass) return;
    fold(node);
    const part = ATTACHED[node.comfyClass];
    if (part?.here) part.here.attach(node);
    // A node that is only made to be copied is in no graph.
    else part?.wait().then(({ attach }) => node.graph && attach(node));
  },
  afterConfigureGraph: openReadable,
});
