// Searches in the panel: the best so far, how the reward rose, the tree, and latents to take from it.
import { t } from "../locales/words.mjs";
import { addNode } from "./add_node.mjs";
import { address, ask, interrupt, tell } from "./client.mjs";
import { colours, pen as penOf } from "./drawing.mjs";
import { List } from "./list.mjs";
import { button, element, lightbox } from "./page.mjs";
import { short } from "./series.mjs";
import { beside, columns, finished, path, shares, staircase } from "./tree.mjs";

const SHOWN = 12, NEAR = 14;

/** When a search began, as its name tells: "20261128-094530-…" is 09:45:30 of that day, in the server's time. */
function begun(name) {
  const [, hours, minutes, seconds] = /^\d{8}-(\d\d)(\d\d)(\d\d)-/.exec(name) ?? [];
  return hours ? `${hours}:${minutes}:${seconds} · ` : "";
}

/** One item of a search: curve, tree, the best as buttons. */
class Item {
  constructor(search, index, failed) {
    this.search = search;
    this.index = index;
    this.failed = failed;
    this.line = element("div", { class: "retort-line" });
    this.curve = element("canvas", { class: "retort-curve", role: "img" });
    this.canvas = element("canvas", { class: "retort-tree", role: "application", tabindex: 0, "aria-label": "Search tree" });
    // What the keys have come to, read out.
    this.said = element("output", { class: "retort-line" });
    this.hint = element("img", { class: "retort-hint", alt: "" });
    this.hint.hidden = true;
    this.tree = element("div", { class: "retort-treebox" }, this.canvas, this.hint, this.said);
    this.best = element("div", { class: "retort-grid", role: "group", "aria-label": t("The best; click one to see it large") });
    this.root = element("div", { class: "retort-item" }, this.line, this.curve, this.tree, this.best);
    this.canvas.addEventListener("pointermove", (event) => this.hover(this.at(event)));
    this.canvas.addEventListener("pointerleave", () => this.hover(null));
    this.canvas.addEventListener("blur", () => this.hover(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("click", (event) => {
      const number = this.at(event);
      if (number !== null) this.enlarge(number);
    });
  }

  /** Arrows, Home and End go through the candidates of the tree; Enter shows one large. */
  key(event) {
    const spot = beside(this.spots ?? [], this.marked, event.key);
    const chosen = event.key === "Enter" && this.marked != null;
    if (!spot && !chosen) return;
    // The canvas behind has shortcuts of its own.
    event.preventDefault();
    event.stopPropagation();
    if (chosen) return this.enlarge(this.marked);
    this.hover(spot.number);
    const reward = this.view.kept.find(([number]) => number === spot.number)[1];
    this.said.textContent = t("candidate {number}, reward {reward}: Enter shows it large", { number: spot.number, reward: short(reward) });
  }

  source(number) {
    return address(["searches", this.search, String(this.index), `${number}.jpg`]);
  }

  /** A candidate large, with the others beside it; its latent can be taken from there. */
  enlarge(number) {
    const { kept } = this.view;
    const pictures = kept.map(([each, reward], i) => (
      { source: this.source(each), text: t("{rank} of {count}, reward {reward}", { rank: i + 1, count: kept.length, reward: short(reward) }) }
    ));
    lightbox(pictures, kept.findIndex(([each]) => each === number), undefined, {
      text: t("Use its latent"), title: t("Put Load Latent with this candidate on the canvas"), work: (at) => this.take(kept[at][0]),
    });
  }

  async take(number) {
    const { file } = await tell(["searches", this.search, "take"], { item: this.index, number });
    const rank = 1 + this.view.kept.findIndex(([each]) => each === number);
    addNode("LoadLatent", { latent: file }, `Load Latent: ${rank} of ${this.view.kept.length}`);
  }

  show(view) {
    this.view = view;
    const best = view.best[0];
    this.line.textContent =
      `${view.method}: ${best ? `best ${short(best[1])}, ` : ""}${view.calls} calls, rewards: ${view.rewards}, ${view.seconds} s`;
    this.curve.setAttribute("aria-label", `Best reward against calls: ${staircase(view.history, view.calls).slice(-1).map(([, r]) => short(r))}`);
    this.tree.hidden = !view.tree;
    const kept = view.kept.slice(0, SHOWN);
    const shown = kept.join();
    if (shown !== this.shown) {
      this.shown = shown;
      this.best.replaceChildren(...kept.map(([number, reward], i) => this.thumb(number, reward, i)));
    }
    requestAnimationFrame(() => this.draw());
  }

  thumb(number, reward, rank) {
    const image = element("img", { src: this.source(number), alt: "", loading: "lazy" });
    const label = `${rank + 1}. ${short(reward)}`;
    const made = button("", t("Candidate {number}, reward {reward}: show it large", { number, reward: short(reward) }), () => this.enlarge(number), this.failed);
    made.append(image, element("span", {}, label));
    for (const kind of ["pointerenter", "focus"]) made.addEventListener(kind, () => this.hover(number, false));
    for (const kind of ["pointerleave", "blur"]) made.addEventListener(kind, () => this.hover(null));
    return made;
  }

  draw() {
    this.drawCurve();
    if (this.view.tree) this.drawTree();
  }

  drawCurve() {
    const found = penOf(this.curve);
    const points = staircase(this.view.history, this.view.calls);
    if (!found || !points.length) return;
    const { pen, width, height } = found;
    const colour = colours(this.root);
    const low = points[0][1], high = points[points.length - 1][1];
    const x = (calls) => 44 + (calls / Math.max(1, this.view.calls)) * (width - 52);
    const y = (reward) => height - 16 - ((reward - low) / (high - low || 1)) * (height - 24);
    pen.fillStyle = colour("ink");
    pen.textAlign = "right";
    pen.fillText(short(high), 40, y(high) + 3);
    if (high > low) pen.fillText(short(low), 40, y(low) + 3);
    pen.fillText(`${this.view.calls} calls`, width - 4, height - 3);
    pen.strokeStyle = colour("line");
    pen.lineWidth = 2;
    pen.beginPath();
    for (const [calls, reward] of points) pen.lineTo(x(calls), y(reward));
    pen.stroke();
  }

  drawTree() {
    const found = penOf(this.canvas);
    if (!found) return;
    const { pen, width, height } = found;
    const { tree } = this.view;
    const colour = colours(this.root);
    const across = columns(tree.parent);
    const bright = shares(tree.value);
    const levels = tree.stops + 1;
    const x = (node) => 36 + across[node] * (width - 46);
    const y = (node) => 12 + ((tree.place[node] + 1) / levels) * (height - 24);
    this.spots = [];
    pen.fillStyle = colour("ink");
    tree.sigmas.forEach((sigma, i) => pen.fillText(short(sigma), 2, 15 + ((i + 1) / levels) * (height - 24)));
    pen.fillText("σ", 2, 15);
    const order = Array.from(bright.keys()).slice(1).sort((a, b) => bright[a] - bright[b]);
    for (const node of order) {
      pen.strokeStyle = `color-mix(in srgb, ${colour("warm")} ${Math.round(100 * bright[node])}%, ${colour("cold")})`;
      pen.beginPath();
      pen.moveTo(x(tree.parent[node]), y(tree.parent[node]));
      pen.lineTo(x(node), y(node));
      pen.stroke();
    }
    const leaves = finished(tree);
    const numbers = new Set(this.view.kept.map(([number]) => number));
    const mark = (number, stroke) => {
      const node = leaves.get(number);
      if (node === undefined) return;
      pen.strokeStyle = stroke;
      pen.lineWidth = 2;
      pen.beginPath();
      for (const each of path(tree.parent, node)) pen.lineTo(x(each), y(each));
      pen.stroke();
      pen.lineWidth = 1;
    };
    if (this.view.best.length) mark(this.view.best[0][0], colour("best"));
    if (this.marked !== undefined && this.marked !== null) mark(this.marked, colour("ink"));
    pen.fillStyle = colour("line");
    for (const [number, node] of leaves) {
      if (!numbers.has(number)) continue;
      pen.beginPath();
      pen.arc(x(node), y(node), 3, 0, 7);
      pen.fill();
      this.spots.push({ number, x: x(node), y: y(node) });
    }
    const cut = tree.size > tree.parent.length ? `, the first ${tree.parent.length} drawn` : "";
    this.canvas.setAttribute("aria-label", `Search tree: ${tree.size - 1} latents${cut}, ${leaves.size} finished`);
  }

  /** The candidate with a picture that is nearest to the pointer, null where none is near. */
  at(event) {
    let best = null, least = NEAR;
    for (const spot of this.spots ?? []) {
      const away = Math.hypot(spot.x - event.offsetX, spot.y - event.offsetY);
      if (away < least) [best, least] = [spot, away];
    }
    return best ? best.number : null;
  }

  hover(number, picture = true) {
    if (number === this.marked) return;
    this.marked = number;
    this.hint.hidden = number === null || !picture;
    this.canvas.style.cursor = number === null ? "" : "pointer";
    if (!this.hint.hidden) {
      const spot = this.spots.find((each) => each.number === number);
      this.hint.src = this.source(number);
      this.hint.style.left = `${Math.min(spot.x, this.canvas.clientWidth - 100)}px`;
    }
    if (this.view.tree) this.drawTree();
  }
}

export class SearchList {
  constructor(root) {
    this.files = element("div", { class: "retort-files" });
    this.list = new List(root, {
      parts: ["searches"],
      label: t("Searches"),
      empty: t("No searches yet: queue Tree Search or Learn Noise for a Prompt."),
      entries: ({ searches }) => {
        // One that has begun since opens by itself.
        const newest = searches[0];
        if (newest && newest.name !== this.newest && (newest.going || !this.newest)) this.open = newest.name;
        this.newest = newest?.name;
        return searches;
      },
      row: (name) => this.row(name),
      after: ({ searches, saved }) => this.after(searches, saved),
    });
    root.append(this.files);
  }

  close() {
    this.list.close();
  }

  async after(searches, saved) {
    const open = searches.find((search) => search.name === this.open);
    if (open && (open.going || !this.list.rows.get(open.name).whole)) await this.fill(open.name);
    if (saved.join() === this.saved) return;
    this.saved = saved.join();
    const failed = (error) => this.list.say(error.message);
    this.files.replaceChildren(
      ...(saved.length ? [element("h4", {}, t("Saved"))] : []),
      ...saved.map((file) => button(file, t("Put Load Search on the canvas"), () => addNode("RetortLoadSearch", { file }), failed)),
    );
  }

  row(name) {
    const title = element("button", { type: "button", class: "retort-title" });
    const state = element("span", { class: "retort-line" });
    const body = element("div");
    const failed = (error) => (state.textContent = error.message);
    // The one that goes on is what ComfyUI executes.
    const stop = button(t("Stop"), t("End the search; the best so far is handed out, and the workflow goes on"), interrupt, failed);
    const root = element("li", {}, title, state, stop, body);
    const row = { root, body, items: [], failed, whole: false };
    title.addEventListener("click", () => {
      this.open = this.open === name ? null : name;
      for (const [other, each] of this.list.rows) each.body.hidden = other !== this.open;
      this.list.look();
    });
    row.show = (search) => {
      title.textContent = search.prompt || t("search without a prompt");
      title.setAttribute("aria-expanded", String(this.open === name));
      body.hidden = this.open !== name;
      const found = search.items.filter((item) => item?.best.length).map((item) => short(item.best[0][1]));
      const stands = search.going ? t("running") : search.cancelled ? t("cancelled; queued again it begins anew, unless Save Search has kept it") : t("ended");
      const most = search.most === null || search.most === undefined ? "" : t(" (at most {most})", { most: short(search.most) });
      const text = `${begun(name)}${stands} · ${search.reward}: best ${found.join(", ") || "none yet"}${most}`;
      if (state.textContent !== text) state.textContent = text;
      // One that has ended is read whole once more.
      if (!search.going && row.going) row.whole = false;
      row.going = search.going;
      stop.hidden = !search.going;
    };
    return row;
  }

  async fill(name) {
    const search = await ask(["searches", name]);
    const row = this.list.rows.get(name);
    if (!row) return;
    search.items.forEach((view, i) => {
      if (!view) return;
      if (!row.items[i]) {
        row.items[i] = new Item(name, i, row.failed);
        row.body.append(row.items[i].root);
      }
      row.items[i].show(view);
    });
    row.whole = !search.going;
  }
}
