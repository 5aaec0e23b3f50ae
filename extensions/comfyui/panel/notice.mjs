// What a person sees of a run who looks elsewhere: the browser tab's title, and a notification when it ends.
import { t } from "../locales/words.mjs";

const KEY = "retort.notify";

/** Whether the person has asked for notifications, and the browser allows them. */
export function wanted() {
  return localStorage.getItem(KEY) === "yes" && globalThis.Notification?.permission === "granted";
}

/** A switch for notifications; the browser asks for leave when it is first turned on. */
export function notifySwitch(element) {
  const box = element("input", { type: "checkbox" });
  box.checked = wanted();
  box.addEventListener("change", async () => {
    if (box.checked && globalThis.Notification?.permission !== "granted") await globalThis.Notification?.requestPermission();
    localStorage.setItem(KEY, box.checked ? "yes" : "no");
    box.checked = wanted();
  });
  const title = t("The browser says so while you look at another page");
  return element("label", { class: "retort-row", title }, box, t("Notify me when a run ends"));
}

/** Tell that a run has ended, where nobody looks at the page. */
export function tellEnd(name, status) {
  if (!document.hidden || !wanted()) return;
  new Notification(`Retort: ${name} is ${status.state}`, { body: status.message || `step ${status.step} of ${status.steps}`, tag: `retort-${name}` });
}

/** The title that a page should have instead of ComfyUI's, which names a node by its class; null where it may stay. */
export function betterTitle(title, run) {
  const found = /^(?:\[\d+%\])?\[(\d+)%\] ?(?:Retort|Train)/.exec(title);
  return run && found ? `${found[1]} % ${run}` : null;
}

let running = "";

/** Name the run of the node that is being executed, "" for none: the page's title then says it. */
export function nameRun(name) {
  running = name ?? "";
}

const change = () => {
  const title = betterTitle(document.title, running);
  if (title !== null) document.title = title;
};
const title = globalThis.document?.querySelector("title");
if (title) new MutationObserver(change).observe(title, { childList: true, characterData: true, subtree: true });
