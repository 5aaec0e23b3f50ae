// The page's own words in the user's language: English stands where it is shown, a catalogue's section "page" has the rest.
let said = {};

/** page: {English: translated}. */
export function learn(page) {
  said = page ?? {};
}

/** A text in the user's language; {name} in it becomes values.name. */
export function t(text, values = {}) {
  return (said[text] || text).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
