// Pictures cut from a preview's contact sheet.

/** The sheet at an address, once it is there. */
export async function load(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

/** Draw picture `index` of a sheet on a canvas, at most `most` pixels wide; sheet: {columns, prompts}. */
export function cut(image, sheet, index, canvas, most = Infinity) {
  const rows = Math.ceil(sheet.prompts.length / sheet.columns);
  const width = Math.floor(image.naturalWidth / sheet.columns), height = Math.floor(image.naturalHeight / rows);
  const left = (index % sheet.columns) * width, top = Math.floor(index / sheet.columns) * height;
  const scale = Math.min(1, most / width);
  canvas.width = Math.max(1, Math.round(scale * width));
  canvas.height = Math.max(1, Math.round(scale * height));
  canvas.getContext("2d").drawImage(image, left, top, width, height, 0, 0, canvas.width, canvas.height);
}
