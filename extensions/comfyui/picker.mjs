// Preference Picker: shows on the node what waits beside a set, sends what is chosen, and draws ahead while one chooses.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Drawing, MOST, promptsLeft, queuedFor } from "./picker/drawing.mjs";
import { Session } from "./picker/session.mjs";
import { View } from "./picker/view.mjs";
import { ask } from "./panel/client.mjs";
import { connected, element, openWindow, upstream } from "./panel/page.mjs";
import { going, standing } from "./panel/series.mjs";
import { offer } from "./panel/toast.mjs";
import { t } from "./locales/words.mjs";

const PICKER = "RetortPreferencePicker";
const QUEUE = "RetortPromptQueue";
const BLIND = "RetortBlindTest";
const TRAINER = "RetortTrainPreference";
const SET = "RetortPreferenceSet";
const TEST = "retort_blind"; // the test that a node asked last
const KEEP = "retort_waiting";
const unqueued = () => t("The workflow could not be queued: ComfyUI says why.");
const LOOK = 3000; // ms between looks at the desk while something is drawn
const SEEN = 1500; // ms until the tickets of a run have been seen
const BUSY = 1000; // ms until a server that is busy is asked again
const HEIGHT = 420, LOW = 350;

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

class Picker {
  constructor(node) {
    this.node = node;
    this.blind = node.comfyClass === BLIND;
    this.note = "";
    this.awaits = ""; // what was said of a training that is in the queue
    this.shared = false; // whether a phone was shown the way here
    this.away = ""; // why the desk cannot be seen
    this.queued = 0;
    this.drawing = new Drawing();
    const told = (work) => () => work().catch((error) => {
      this.note = error.message;
      this.glad = false;
      this.render();
    });
    const more = [
      this.blind
        ? [t("Open LoRA"), t("The LoRA in a new workflow"), told(() => this.openLora()), "late"]
        : [t("Train now"), t("Train a LoRA on these choices"), told(() => this.train())],
      [t("Phone"), t("Pick on a phone in the same network"), told(() => this.phone())],
    ];
    this.view = new View(
      { pick: (place) => this.said(this.desk.choose(place)), say: (word) => this.say(word), keep: (n) => this.keep(n), more, blind: this.blind },
      (image) => api.apiURL(`${this.session.path}/images/${image}`),
    );
    this.open();
  }

  /** The set that this node is about: as typed, or as it came by a link when the node ran last. */
  get place() {
    const given = (name) => (connected(this.node, name) ? this.ran?.[name] : widgetOf(this.node, name)?.value) ?? "";
    return { set: given("name").trim(), by: this.blind ? (this.node.properties?.[TEST] ?? "") : given("by") };
  }

  get desk() {
    return this.session.desk;
  }

  /** Begin with a set; what an earlier page could not send is sent now. */
  open() {
    this.session?.mail.stop();
    this.opened = Session.drawer(this.place);
    this.session = new Session(this.place, (path, options) => api.fetchApi(path, options), (note) => {
      if (note) this.glad = false;
      this.note = note;
      this.render();
      this.look();
    });
  }

  /** Train on the set, and draw the blind tests of what comes of it: with what this workflow has, or with new nodes. */
  async train() {
    const trainer = app.graph.nodes.find((node) => node.comfyClass === TRAINER);
    if (trainer && !this.desk.view.judged && !(await ask(["preferences"])).some((set) => set.name === this.place.set)) {
      this.note = t("Choose some pictures first: about twenty make a first LoRA.");
      this.glad = false;
    } else if (trainer) {
      const tests = app.graph.nodes.filter((node) => node.comfyClass === BLIND && upstream(node).has(trainer));
      const wanted = [trainer, ...tests];
      const run = widgetOf(trainer, "name"), before = run?.value;
      this.nameSet(trainer);
      await this.nameRun(trainer);
      // Each training has a test of its own, so that earlier results stay; a name of the user's own is kept.
      for (const name of tests.map((node) => !connected(node, "name") && widgetOf(node, "name")))
        if (name?.value.endsWith("blind_test") && run.value !== before) name.value = `${run.value}_blind_test`;
      for (const one of wanted) for (const node of upstream(one)) node.mode = 0;
      const done = await app.queuePrompt(0, 1, { queueNodeIds: wanted.map((node) => String(node.id)) });
      const queued = tests.length ? t("The training is in the queue; then Blind Test asks which you like better.") : t("The training is in the queue.");
      this.awaits = this.note = done ? queued : "";
      this.glad = Boolean(done);
      if (done && !connected(trainer, "name")) this.follow(run.value, tests.length > 0);
      if (!done) this.note = unqueued();
    } else {
      const { build } = await import("./picker/train.mjs");
      this.note = build([...upstream(this.node)], this.place.set)
        ? t("Train Preference and Blind Test are connected: look at their settings, then press Train now again.")
        : t("Connect the model to Train Preference, then press Run.");
      this.glad = true;
    }
    this.render();
  }

  /** Say how far a training is here too, since full screen shows nothing else. */
  async follow(run, tested) {
    for (let began = false; this.awaits && this.note === this.awaits && !this.gone; ) {
      await new Promise((done) => setTimeout(done, LOOK));
      const one = (await ask(["runs"]).catch(() => [])).find((each) => each.name === run);
      began ||= Boolean(one && going(one));
      // A run that was stopped earlier says so until it goes on.
      if (this.note !== this.awaits || this.gone || !one || !(began || one.state === "finished")) continue;
      const trained = tested ? t("The LoRA is trained; Blind Test draws its pictures.") : t("The LoRA is trained.");
      this.note = going(one) ? standing(one) : one.state === "finished" ? trained : "";
      // The test's pictures are there as soon as the queue is empty.
      this.awaits = going(one) || tested ? this.note : "";
      this.glad = true;
      this.render();
      if (!going(one)) return;
    }
  }

  /** The LoRA that was tested, in a workflow of its own. */
  async openLora() {
    const trainer = [...upstream(this.node)].find((node) => node.comfyClass === TRAINER);
    const name = widgetOf(trainer ?? this.node, "name").value;
    const run = (await ask(["runs"])).find((one) => one.lora && (trainer ? one.name === name : name.startsWith(one.name)));
    if (!run) throw new Error(t("No run with a LoRA is called {name}: the Retort panel lists them.", { name }));
    await (await import("./panel/new_workflow.mjs")).openLora(run);
  }

  /** The queue is empty. */
  rested() {
    if (!this.awaits || this.note !== this.awaits) return;
    this.note = this.awaits = "";
    this.glad = false;
    this.render();
  }

  /** Let a trainer learn from this set, where the workflow names another; a run that is called like that one follows. */
  nameSet(trainer) {
    for (const node of [...upstream(trainer)].filter((one) => one.comfyClass === SET)) {
      const named = widgetOf(node, "name");
      if (!named || connected(node, "name") || named.value === this.place.set) continue;
      const run = widgetOf(trainer, "name");
      if (run?.value === named.value) run.value = this.place.set;
      named.value = this.place.set;
    }
  }

  /** Give a training another name where a finished run has it: what is asked for now is another LoRA. */
  async nameRun(trainer) {
    const run = widgetOf(trainer, "name");
    if (!run || connected(trainer, "name")) return;
    const states = new Map((await ask(["runs"])).map((one) => [one.name, one.state]));
    if (states.get(run.value) !== "finished") return;
    const stem = run.value.replace(/_\d+$/, "");
    for (let count = 2; states.has(run.value); count++) run.value = `${stem}_${count}`;
  }

  /** Say where a phone finds the page of this set. */
  async phone() {
    const { set, by } = this.place;
    const { links } = await ask(["pick", "addresses"], { set, by });
    const { body } = openWindow(t("Pick on a phone"));
    this.shared = true; // from now on somebody else may choose, too
    body.append(
      element("p", {}, links.length ? t("Open this address on a phone in the same network, or point its camera here:") : t("To reach it from a phone, start ComfyUI with --listen: add it to the command that starts ComfyUI. In ComfyUI Desktop, set the host of the server to 0.0.0.0.")),
      ...links.flatMap(({ link, code }) => [
        element("a", { href: link, target: "_blank" }, link), ...(code ? [element("img", { src: code, alt: t("The same address as a QR code"), width: 280 })] : []),
      ]),
    );
  }

  said(done) {
    if (!done) return;
    this.note = "";
    this.glad = false;
    this.render();
    this.session.mail.send();
  }

  say(word) {
    if (word === "draw") {
      this.drawing.on ? this.drawing.stop() : this.drawing.start();
      this.note = "";
      this.glad = false;
      this.render();
      this.look();
    } else this.said(word === "undo" ? this.desk.undo() : this.desk.choose(word));
  }

  keep(count) {
    if (Number.isInteger(count)) this.node.setProperty(KEEP, Math.min(Math.max(count, 1), MOST));
    this.configured();
    this.look();
  }

  /** The node's properties have come, from a file or from `keep`. */
  configured() {
    const count = this.node.properties?.[KEEP];
    if (Number.isInteger(count) && count >= 1 && count <= MOST) this.drawing.keep = count;
    this.render();
  }

  /** See how things stand, and draw where that is wished; one look at a time. */
  async look() {
    this.again = true;
    if (this.looking) return;
    this.looking = true;
    try {
      while (this.again && !this.gone) {
        this.again = false;
        await this.see();
      }
    } finally {
      this.looking = false;
      this.render();
    }
  }

  async see() {
    if (this.opened !== Session.drawer(this.place)) this.open();
    const { place, desk, session } = this;
    if (!place.set || (this.blind && !place.by)) return;
    const settled = desk.settled;
    try {
      // The queue first: a run that has left it has left its tickets on the desk.
      const queue = await (await api.fetchApi("/queue", { cache: "no-store" })).json();
      const { status, body } = await session.ask("tickets");
      this.away = status === 200 ? "" : body?.error || `ComfyUI answered ${status}`;
      if (status === 503) {
        // A large set is being read.
        setTimeout(() => this.look(), BUSY);
        return;
      }
      if (this.away) {
        this.drawing.failed(this.away);
        return;
      }
      this.queued = queuedFor(queue, PICKER, place);
      if (!desk.hear(body, settled)) this.again = true;
      else if (this.drawing.step({ queued: this.queued, desk: desk.view, left: this.left() })) await this.draw();
    } catch (error) {
      this.away = t("ComfyUI does not answer ({why}). What you choose is kept until it does.", { why: error.message });
    }
  }

  /** Prompts that are still to come, null where no Next Prompt of a List tells. */
  left() {
    const queue = [...upstream(this.node)].find((node) => node.comfyClass === QUEUE);
    if (!queue) return null;
    const names = ["prompts", "index", "begin_again"];
    return promptsLeft(
      Object.fromEntries(names.map((name) => [name, connected(queue, name) ? null : widgetOf(queue, name)?.value])),
    );
  }

  /** Queue what this node needs and nothing else, and let seeds and the like change as after any other run. */
  async draw() {
    const inside = this.node.graph !== app.rootGraph;
    const controls = inside ? [] : [...upstream(this.node)].flatMap((node) => node.widgets ?? []);
    this.queued = 1;
    this.render();
    const before = controls.map((widget) => widget.value);
    const done = await app.queuePrompt(0, 1, inside ? {} : { queueNodeIds: [String(this.node.id)] });
    if (!done) {
      this.drawing.failed(unqueued());
      return;
    }
    // Older pages leave seeds as they are when a part of a workflow is queued, newer ones do not.
    if (controls.every((widget, i) => widget.value === before[i]))
      for (const when of ["beforeQueued", "afterQueued"])
        for (const widget of controls) widget[when]?.({ isPartialExecution: false });
    this.again = true;
  }

  render() {
    if (this.gone) return;
    const { desk, drawing } = this;
    const note = this.note || this.away;
    // Good news is no trouble.
    const glad = this.glad && Boolean(this.note);
    this.view.render({ desk: desk.view, canUndo: desk.canUndo, drawing, drawn: this.queued > 0, note, glad });
  }

  remove() {
    this.gone = true;
    this.session.mail.stop();
    this.drawing.stop();
  }
}

const pickers = new Set();
const failed = ({ detail }) => {
  const said = detail?.exception_message ? t("The run failed: {why}", { why: detail.exception_message }) : t("The run was cancelled.");
  for (const picker of pickers) picker.drawing.failed(said.trim());
};

const look = () => pickers.forEach((picker) => picker.look());
api.addEventListener("execution_error", failed);
api.addEventListener("execution_interrupted", failed);
for (const event of ["status", "execution_success", "execution_error", "execution_interrupted", "reconnected"])
  api.addEventListener(event, look);
// What was said to be in the queue is there no longer.
api.addEventListener("status", ({ detail }) => detail?.exec_info?.queue_remaining === 0 && pickers.forEach((picker) => picker.rested()));
setInterval(() => pickers.forEach((picker) => (picker.drawing.on || (picker.shared && !document.hidden)) && picker.look()), LOOK);
// Another tab may have judged in the meantime.
document.addEventListener("visibilitychange", () => document.hidden || look());

/** Give a Preference Picker or a Blind Test what one chooses by; it may have been configured already. */
export function attach(node) {
  const picker = new Picker(node);
  pickers.add(picker);
  const shown = node.addDOMWidget("picker", "retort_picker", picker.view.root, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    getMinHeight: () => (picker.blind ? LOW : HEIGHT),
  });
  // Widgets are stored by place, and this one holds nothing.
  shown.serialize = false;
  for (const widget of ["name", "by"].map((name) => widgetOf(node, name)).filter(Boolean)) {
    const { callback } = widget;
    widget.callback = function (...given) {
      const result = callback?.apply(this, given);
      picker.look();
      return result;
    };
  }
  const { onExecuted, onConfigure, onRemoved } = node;
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    picker.ran = { name: output?.set?.[0], by: output?.by?.[0] };
    if (picker.blind && picker.ran.by) {
      node.setProperty(TEST, picker.ran.by);
      // What was judged before is not asked again.
      setTimeout(() => picker.desk.view.current && offer(t("The blind test is ready."), () => app.canvas.centerOnNode(node)), SEEN);
    }
    picker.look();
  };
  node.onConfigure = function (...given) {
    onConfigure?.apply(this, given);
    picker.configured();
    picker.look();
  };
  node.onRemoved = function () {
    onRemoved?.call(this);
    picker.remove();
    pickers.delete(picker);
  };
  node.setSize([Math.max(node.size[0], 520), Math.max(node.size[1], 600)]);
  picker.configured();
  picker.look();
}
