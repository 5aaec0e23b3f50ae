// Canvases that stay sharp, and colours of the page's theme.

/** The pen of a canvas as large as it is shown, cleared; null while it is not shown. Units are the page's pixels. */
export function pen(canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width || !height) return null;
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  const made = canvas.getContext("2d");
  made.setTransform(scale, 0, 0, scale, 0, 0);
  made.clearRect(0, 0, width, height);
  made.font = "10px sans-serif";
  return { pen: made, width, height };
}

const drawn = new Set();
const themes = new MutationObserver(() => drawn.forEach((draw) => draw()));
for (const root of [document.documentElement, document.body])
  themes.observe(root, { attributes: true, attributeFilter: ["style", "class"] });

/** Draw again whenever the page's theme may have changed; the answer ends that. */
export function follow(draw) {
  drawn.add(draw);
  return () => drawn.delete(draw);
}

/** Looks up colours that panel.css names. */
export function colours(element) {
  const style = getComputedStyle(element);
  return (name) => style.getPropertyValue(`--retort-${name}`).trim();
}
