// The first training of a session says where it can be watched: its view on the node may be off the screen.
import { app } from "../../../scripts/app.js";
import { element } from "./page.js";
import { t } from "../locales/words.js";

/** run: the one that opens in the panel as soon as it is listed. */
export const wanted = { run: "" };

const LIFE = 30_000; // ms
let offered = false;

/** Offer once to show a run in the panel, unless the panel is open. */
export function offerPanel(run) {
  if (offered || !run || document.querySelector(".retort-panel")) return;
  offered = true;
  const show = element("button", { type: "button" }, t("Show"));
  const close = element("button", { type: "button", "aria-label": t("Close") }, "×");
  const toast = element("div", { class: "retort-toast", role: "status" }, t("{run} is being trained.", { run }), show, close);
  show.addEventListener("click", () => {
    toast.remove();
    wanted.run = run;
    localStorage.setItem("retort.panel", "0");
    app.extensionManager.command.execute("Workspace.ToggleSidebarTab.retort");
  });
  close.addEventListener("click", () => toast.remove());
  document.body.append(toast);
  setTimeout(() => toast.remove(), LIFE);
}
