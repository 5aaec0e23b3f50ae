// Pieces of a page. Text goes in as text: nothing here reads HTML.
import { t } from "../locales/words.mjs";

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./panel.css", import.meta.url).href;
document.head.append(style);

/** An element with attributes and children; strings become text. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

/** A button; `work` may be async, and the button waits for it. What it throws is shown by `failed`. */
export function button(text, title, work, failed) {
  const made = element("button", { type: "button", title }, text);
  made.addEventListener("click", async () => {
    made.disabled = true;
    try {
      await work();
    } catch (error) {
      failed(error);
    } finally {
      made.disabled = false;
    }
  });
  return made;
}

/** A dialog over the page, open; Escape, its cross and a click beside it close it. */
function modal(kind, ...children) {
  const close = element("button", { type: "button", class: "retort-close", "aria-label": t("Close") }, "×");
  const dialog = element("dialog", { class: kind }, close, ...children);
  // The canvas behind has shortcuts of its own.
  dialog.addEventListener("keydown", (event) => event.stopPropagation());
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** A window over the page: {dialog, body}. */
export function openWindow(title, kind = "") {
  const body = element("div", { class: "retort-window-body" });
  const dialog = modal(`retort-window ${kind}`, element("h3", {}, title), body);
  dialog.setAttribute("aria-label", title);
  return { dialog, body };
}

/**
 * One of several pictures, large; arrow keys go through them, Escape closes. pictures: [{source, text}], a source being
 * an address or a function that promises one; in rows of `across`, which up and down go through. act: {text, title,
 * work(index)}: what a button does with the picture that is shown, which ends it.
 */
export function lightbox(pictures, index, across = pictures.length, act = null) {
  const image = element("img");
  const caption = element("p");
  const dialog = modal("retort-lightbox", image, caption);
  if (act) {
    const work = async () => {
      await act.work(index);
      dialog.close();
    };
    const made = button(act.text, act.title, work, (error) => (caption.textContent = error.message));
    dialog.append(made);
    // Enter puts what the keys have come to.
    made.focus();
  }
  const show = async (to) => {
    if (to < 0 || to >= pictures.length) return;
    index = to;
    const { source, text } = pictures[to];
    const found = typeof source === "string" ? source : await source();
    if (index !== to) return;
    image.src = found;
    image.alt = caption.textContent = text;
  };
  dialog.addEventListener("keydown", (event) => {
    const place = index % across;
    if (event.key === "ArrowLeft" && place > 0) show(index - 1);
    if (event.key === "ArrowRight" && place < across - 1) show(index + 1);
    if (event.key === "ArrowUp") show(index - across);
    if (event.key === "ArrowDown") show(index + across);
  });
  show(index);
}

/** Give the user a file. */
export function download(name, blob) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Whether a node's input comes from another node; older frontends do not say so by a method. */
export function connected(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  if (slot < 0) return false;
  return node.isInputConnected?.(slot) ?? node.inputs[slot].link != null;
}

/** The nodes that a node's inputs come from, itself included. */
export function upstream(node, seen = new Set()) {
  if (!node || seen.has(node)) return seen;
  seen.add(node);
  for (let slot = 0; slot < (node.inputs?.length ?? 0); slot++) upstream(node.getInputNode(slot), seen);
  return seen;
}
