// Opens our templates where their note begins, at full size; ComfyUI would shrink them until nothing can be read.
import { app } from "../../scripts/app.js";

const LATER = 300; // ms

app.registerExtension({
  name: "retort.templates",
  afterConfigureGraph() {
    const { extra } = app.rootGraph ?? app.graph;
    if (extra?.retort?.opens !== "extra.ds" || !extra.ds) return;
    // Once: what is saved or left open has a view of its own.
    delete extra.retort;
    const { scale, offset } = extra.ds;
    const show = () => {
      app.canvas.ds.scale = scale;
      app.canvas.ds.offset = [...offset];
      app.canvas.setDirty(true, true);
    };
    // The page fits the whole graph in after this, some of it a frame later, and on a busy machine later still.
    requestAnimationFrame(() => requestAnimationFrame(show));
    let touched = false;
    for (const kind of ["pointerdown", "wheel", "keydown"])
      window.addEventListener(kind, () => (touched = true), { once: true, capture: true, passive: true });
    setTimeout(() => touched || show(), LATER);
  },
});
