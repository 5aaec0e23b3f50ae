// A file's name as a widget offers it: servers on Windows list \ between folders, files of ours hold /.

const slashes = (name) => name.replaceAll("\\", "/");

/** options: what the widget offers, where that is a list. A name that is none of them stays as it is. */
export function spelt(options, name) {
  if (!Array.isArray(options) || typeof name !== "string" || options.includes(name)) return name;
  return options.find((each) => typeof each === "string" && slashes(each) === slashes(name)) ?? name;
}
