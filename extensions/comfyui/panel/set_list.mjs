// Preference sets in the panel: what each holds, and its latest judgements.
import { t } from "../locales/words.mjs";
import { addNode } from "./add_node.mjs";
import { address, ask } from "./client.mjs";
import { List } from "./list.mjs";
import { button, element } from "./page.mjs";

export class SetList {
  constructor(root) {
    this.list = new List(root, {
      parts: ["preferences"],
      label: t("Preference sets"),
      empty: t("No preference sets yet: Preference Picker and Label Pairs make them."),
      row: (name) => this.row(name),
    });
  }

  close() {
    this.list.close();
  }

  row(name) {
    const title = element("button", { type: "button", class: "retort-title", "aria-expanded": "false" }, name);
    const when = element("span", { class: "retort-line" });
    const body = element("div", { class: "retort-item" });
    body.hidden = true;
    const failed = (error) => (when.textContent = error.message);
    const put = (text, type, title) => button(text, title, () => addNode(type, { name }), failed);
    const more = [
      put(t("+ Picker"), "RetortPreferencePicker", t("Add a Preference Picker for this set to the canvas: choose more pictures")),
      put(t("+ Set"), "RetortPreferenceSet", t("Add a Preference Set of this name to the canvas: what Train Preference learns from")),
    ];
    const all = button(t("All pairs"), t("Look at all pairs, and take wrong ones out"), async () => (await import("./data.mjs")).openPairs(name), failed);
    const nodes = element("div", { class: "retort-row" }, all, ...more);
    const root = element("li", {}, title, when, nodes, body);
    let shown, latest;
    const fill = async () => {
      if (body.hidden || shown === latest) return;
      const at = latest;
      const set = await ask(["preferences", name]);
      shown = at;
      body.replaceChildren(
        element("pre", { class: "retort-text" }, set.statistics), ...set.latest.map((pair) => this.pair(name, pair)),
      );
    };
    title.addEventListener("click", () => {
      body.hidden = !body.hidden;
      title.setAttribute("aria-expanded", String(!body.hidden));
      fill().catch(failed);
    });
    const show = (entry) => {
      latest = entry.when;
      const count = { count: entry.judged };
      const judged = count.count === undefined ? "" : entry.blind ? t("blind test, {count} judged", count) : t("{count} judged", count);
      const last = t("last judgement {when}", { when: new Date(1000 * entry.when).toLocaleString() });
      when.textContent = [judged, last].filter(Boolean).join(" · ");
      // Nobody trains on the answers of a test.
      for (const one of more) one.hidden = Boolean(entry.blind);
      fill().catch(failed);
    };
    return { root, show };
  }

  pair(set, { prompt, winner, loser, tie, by }) {
    const picture = (id, word) => element("img", { src: address(["picker", set, "images", id]), alt: word, loading: "lazy" });
    return element(
      "figure", { class: "retort-pair" },
      picture(winner, tie ? t("one of a tie") : t("the better one")), element("span", {}, tie ? "=" : ">"),
      picture(loser, tie ? t("one of a tie") : t("the worse one")), element("figcaption", {}, [prompt, by].filter(Boolean).join(" · ")),
    );
  }
}
