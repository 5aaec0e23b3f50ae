// The slider of Compare Images: before on the left of the line, after on the right, moved by pointer or keys.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { element } from "./panel/page.mjs";
import { t } from "./locales/words.mjs";

const NODE = "RetortCompareImages";
const STEP = 2;
const LEAP = 10, NARROW = 15;
const shown = new Set();

const style = document.createElement("style");
style.textContent = `
.retort-compare { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: 0;
  box-sizing: border-box; font: 12px/1.35 sans-serif;
  color: color-mix(in srgb, var(--input-text, #ddd) 60%, var(--retort-far)); }
.retort-compare-view { position: relative; flex: 1 1 0; min-height: 120px; overflow: hidden; touch-action: none;
  cursor: ew-resize; background: var(--comfy-input-bg, #222); border-radius: 4px; }
.retort-compare-view span[hidden] { display: none; }
.retort-compare-empty { position: absolute; inset: 0; display: grid; place-items: center; cursor: default; }
.retort-compare-view:focus-visible { outline: 2px solid #4a9eff; outline-offset: -2px; }
.retort-compare-view img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain;
  user-select: none; pointer-events: none; }
.retort-compare-line { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 3px #000; pointer-events: none; }
.retort-compare-line::after { content: "\\2194"; position: absolute; top: 50%; left: 1px; width: 22px; height: 22px;
  margin: -11px; border-radius: 50%; background: #fff; color: #222; text-align: center; line-height: 21px; }
.retort-compare-tag { position: absolute; bottom: 4px; padding: 1px 6px; border-radius: 3px; background: #000a;
  color: #fff; pointer-events: none; }
.retort-compare-bar { display: flex; gap: 6px; align-items: center; justify-content: center; }
.retort-compare-bar button { padding: 0 8px; border: 0; border-radius: 3px; background: var(--comfy-input-bg, #333);
  color: inherit; cursor: pointer; }
.retort-compare-text { max-height: 96px; overflow: auto; white-space: pre-wrap; user-select: text; }
`;

function address(picture) {
  const query = new URLSearchParams({ filename: picture.filename, subfolder: picture.subfolder, type: picture.type });
  return api.apiURL(`/view?${query}`);
}

class Slider {
  constructor() {
    this.before = [];
    this.after = [];
    this.place = 50;
    this.pair = 0;
    this.previous = this.button("\u2039", t("Previous pair"), -1);
    this.count = element("span");
    this.next = this.button("\u203a", t("Next pair"), 1);
    this.bar = element("div", { class: "retort-compare-bar" }, this.previous, this.count, this.next);
    this.pictures = [t("After"), t("Before")].map((alt) => element("img", { alt, draggable: false }));
    this.line = element("div", { class: "retort-compare-line" });
    this.tags = [[t("before"), "left"], [t("after"), "right"]].map(([text, side]) =>
      element("span", { class: "retort-compare-tag", style: `${side}: 4px` }, text));
    this.empty = element("span", { class: "retort-compare-empty" }, t("Nothing to compare yet: queue the workflow."));
    this.view = element(
      "div",
      { class: "retort-compare-view", role: "slider", tabindex: 0, "aria-label": t("Share of the picture that shows before"), "aria-valuemin": 0, "aria-valuemax": 100 },
      ...this.pictures, this.line, ...this.tags, this.empty,
    );
    this.text = element("div", { class: "retort-compare-text" });
    this.root = element("div", { class: "retort-compare" }, this.bar, this.view, this.text);
    this.listen();
    this.draw();
  }

  button(text, label, by) {
    const made = element("button", { type: "button", title: label, "aria-label": label }, text);
    made.addEventListener("click", () => this.turn(by));
    return made;
  }

  listen() {
    const { view } = this;
    const follow = (event) => {
      // By the drawn picture, since the canvas scales what lies on it.
      const { left, width } = view.getBoundingClientRect();
      if (width) this.move(((event.clientX - left) / width) * 100);
    };
    view.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.stopPropagation();
      view.setPointerCapture(event.pointerId);
      view.focus({ preventScroll: true });
      follow(event);
    });
    view.addEventListener("pointermove", (event) => {
      if (view.hasPointerCapture(event.pointerId)) follow(event);
    });
    view.addEventListener("keydown", (event) => {
      const by = event.shiftKey ? LEAP : STEP;
      const moves = {
        ArrowLeft: () => this.move(this.place - by), ArrowDown: () => this.move(this.place - by),
        ArrowRight: () => this.move(this.place + by), ArrowUp: () => this.move(this.place + by),
        Home: () => this.move(0), End: () => this.move(100),
        PageUp: () => this.turn(-1), PageDown: () => this.turn(1),
      };
      if (!moves[event.key]) return;
      // The page has uses of its own for these keys.
      event.preventDefault();
      event.stopPropagation();
      moves[event.key]();
    });
  }

  move(place) {
    this.place = Math.min(100, Math.max(0, place));
    this.draw();
  }

  turn(by) {
    this.pair = Math.min(Math.max(0, this.pair + by), Math.max(0, this.after.length - 1));
    this.draw();
  }

  /** What the two sides are called; without names before and after. */
  call(names) {
    [t("before"), t("after")].forEach((word, i) => (this.tags[i].textContent = names?.[i] ?? word));
  }

  show(output) {
    this.before = output.retort_before;
    this.after = output.retort_after;
    this.text.textContent = (output.text ?? []).join("\n");
    this.turn(0);
  }

  draw() {
    const there = this.after.length > 0;
    const sources = there ? [this.after, this.before].map((all) => address(all[this.pair])) : ["", ""];
    this.pictures.forEach((picture, i) => {
      picture.hidden = !there;
      // The same address again would flicker.
      if (there && picture.getAttribute("src") !== sources[i]) picture.src = sources[i];
    });
    this.pictures[1].style.clipPath = `inset(0 ${100 - this.place}% 0 0)`;
    this.line.style.left = `${this.place}%`;
    this.line.hidden = !there;
    // A tag lies on its own picture.
    this.tags.forEach((tag, i) => (tag.hidden = !there || (i ? this.place > 100 - NARROW : this.place < NARROW)));
    this.empty.hidden = there;
    this.view.setAttribute("aria-valuenow", String(Math.round(this.place)));
    this.view.setAttribute("aria-valuetext", t("{share} % before, pair {pair}", { share: Math.round(this.place), pair: this.pair + 1 }));
    this.bar.style.display = this.after.length > 1 ? "" : "none";
    this.count.textContent = `${this.pair + 1} / ${this.after.length}`;
    this.previous.disabled = this.pair === 0;
    this.next.disabled = this.pair >= this.after.length - 1;
  }
}

document.head.append(style);

app.registerExtension({
  name: "retort.compare",
  // A workflow that is opened again has its results, and nobody executes it.
  onNodeOutputsUpdated(outputs) {
    for (const { node, slider } of shown) {
      const output = outputs[node.id] ?? outputs[`${node.graph?.id}:${node.id}`];
      if (output?.retort_after) slider.show(output);
    }
  },
});

/** Give Compare Images its slider. */
export function attach(node) {
  const slider = new Slider();
  const widget = node.addDOMWidget("compare", "retort_compare", slider.root, {
    serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight: () => 260,
  });
  // Widgets are stored by place, and this one holds nothing.
  widget.serialize = false;
  const { onConfigure, onExecuted, onRemoved } = node;
  node.onConfigure = function (...given) {
    onConfigure?.apply(this, given);
    slider.call(this.properties?.retort_sides);
  };
  node.onPropertyChanged = (name) => name === "retort_sides" && slider.call(node.properties.retort_sides);
  slider.call(node.properties?.retort_sides);
  const entry = { node, slider };
  shown.add(entry);
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    if (output?.retort_after) slider.show(output);
  };
  node.onRemoved = function () {
    shown.delete(entry);
    onRemoved?.call(this);
  };
  node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], 560)]);
}
