// Folders of pictures in ComfyUI's input folder, in the panel.
import { t } from "../locales/words.js";
import { List } from "./list.js";
import { button, element } from "./page.js";

export class FolderList {
  constructor(root) {
    this.list = new List(root, {
      parts: ["data"],
      label: t("Folders of pictures"),
      empty: t("No folders of pictures yet: put one into ComfyUI's input folder, with a text file of the same name for each caption."),
      row: (name) => {
        const note = element("span", { class: "retort-line" });
        const open = async () => (await import("./data.js")).openPictures(name);
        const failed = (error) => (note.textContent = error.message);
        const title = button(name, t("Pictures and captions"), open, failed);
        title.className = "retort-title";
        return { root: element("li", {}, title, note), show: () => {} };
      },
    });
  }

  close() {
    this.list.close();
  }
}
