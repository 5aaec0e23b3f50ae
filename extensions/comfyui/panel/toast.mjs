// What is off the screen says that it is there: the first training of a session, a blind test that waits.
import { app } from "../../../scripts/app.js";
import { element } from "./page.mjs";
import { t } from "../locales/words.mjs";

/** run: the one that opens in the panel as soon as it is listed. */
export const wanted = { run: "" };

const LIFE = 30_000; // ms
let offered = false;

/** Say something over the page for a while, with a button that shows it; what comes back takes it away. */
export function offer(text, work) {
  const show = element("button", { type: "button" }, t("Show"));
  const close = element("button", { type: "button", "aria-label": t("Close") }, "×");
  const toast = element("div", { class: "retort-toast", role: "status" }, text, show, close);
  show.addEventListener("click", () => {
    toast.remove();
    if (document.fullscreenElement) document.exitFullscreen();
    work();
  });
  close.addEventListener("click", () => toast.remove());
  // Over what fills the screen, which hides all else.
  (document.fullscreenElement ?? document.body).append(toast);
  setTimeout(() => toast.remove(), LIFE);
  return () => toast.remove();
}

/** Offer once to show a run in the panel, unless the panel is open; what comes back takes the offer away. */
export function offerPanel(run) {
  if (offered || !run || document.querySelector(".retort-panel")) return undefined;
  offered = true;
  return offer(t("{run} is being trained.", { run }), () => {
    wanted.run = run;
    localStorage.setItem("retort.panel", "0");
    app.extensionManager.command.execute("Workspace.ToggleSidebarTab.retort");
  });
}
