// Descriptions and tooltips of our nodes in the user's language. ComfyUI's own locales hold the names; these longer texts are
// asked for in one language only, and reach what its lookup passes over: inputs inside a choice, text boxes, the help table.
import { app } from "../../scripts/app.js";
import { translate } from "./locales/translate.js";
import { learn } from "./locales/words.js";

const LANGUAGES = ["zh", "ja"];
const asked = {};
const texts = {};

app.registerExtension({
  name: "retort.translate",
  beforeRegisterNodeDef(_nodeType, def) {
    if (!def.name.startsWith("Retort")) return;
    const language = app.extensionManager.setting.get("Comfy.Locale");
    if (!LANGUAGES.includes(language)) return;
    // Once it is there the node must change before this returns: a refresh of the definitions does not wait.
    if (texts[language]) return translate(def, texts[language]);
    asked[language] ??= fetch(new URL(`./locales/${language}.json`, import.meta.url))
      .then((answer) => answer.json())
      .then((catalogue) => {
        learn(catalogue.page);
        return (texts[language] = catalogue.texts);
      });
    return asked[language].then((said) => translate(def, said));
  },
});
