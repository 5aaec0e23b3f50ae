// The Retort panel: training runs, searches, preference sets and folders of pictures, whoever started them and whenever.
import { element } from "./panel/page.mjs";
import { t } from "./locales/words.mjs";

/** A list whose module comes when it is first looked at. */
class Section {
  constructor(root, load) {
    root.replaceChildren();
    load().then((List) => this.closed || (this.list = new List(root)));
  }

  close() {
    this.closed = true;
    this.list?.close();
  }
}

const SECTIONS = [
  [() => t("Training"), async () => (await import("./panel/run_list.mjs")).RunList],
  [() => t("Searches"), async () => (await import("./panel/search_list.mjs")).SearchList],
  [() => t("Preferences"), async () => (await import("./panel/set_list.mjs")).SetList],
  [() => t("Pictures"), async () => (await import("./panel/data.mjs")).FolderList],
];

export class Panel {
  constructor(root) {
    this.tabs = element("div", { role: "tablist", class: "retort-tabs", "aria-label": "Retort" });
    this.body = element("div", { role: "tabpanel", class: "retort-body", tabindex: -1 });
    this.root = element("div", { class: "retort-panel" }, this.tabs, this.body);
    root.replaceChildren(this.root);
    SECTIONS.forEach(([title], i) => {
      const tab = element("button", { type: "button", role: "tab", id: `retort-tab-${i}` }, title());
      tab.addEventListener("click", () => this.open(i));
      this.tabs.append(tab);
    });
    this.tabs.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      const to = (this.index + move + SECTIONS.length) % SECTIONS.length;
      this.open(to);
      this.tabs.children[to].focus();
    });
    this.open(Math.min(SECTIONS.length - 1, Number(localStorage.getItem("retort.panel")) || 0));
  }

  open(index) {
    this.section?.close();
    this.index = index;
    localStorage.setItem("retort.panel", String(index));
    [...this.tabs.children].forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === index));
      tab.tabIndex = i === index ? 0 : -1;
    });
    this.body.setAttribute("aria-labelledby", `retort-tab-${index}`);
    this.section = new Section(this.body, SECTIONS[index][1]);
  }

  close() {
    this.section.close();
  }
}
