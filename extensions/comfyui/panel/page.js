// Pieces of a page. Text goes in as text: nothing here reads HTML.
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

/** One of several pictures, large; arrow keys go through them, Escape closes. pictures: [{source, text}]. */
export function lightbox(pictures, index) {
  const image = element("img");
  const caption = element("p");
  const close = element("button", { type: "button", "aria-label": "Close" }, "×");
  const dialog = element("dialog", { class: "retort-lightbox" }, close, image, caption);
  const show = (to) => {
    index = Math.min(pictures.length - 1, Math.max(0, to));
    image.src = pictures[index].source;
    image.alt = caption.textContent = pictures[index].text;
  };
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(index - 1);
    if (event.key === "ArrowRight") show(index + 1);
    // The canvas behind has shortcuts of its own.
    event.stopPropagation();
  });
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  show(index);
  dialog.showModal();
}

/** Whether a node's input comes from another node; older frontends do not say so by a method. */
export function connected(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  if (slot < 0) return false;
  return node.isInputConnected?.(slot) ?? node.inputs[slot].link != null;
}
