"""The nodes' words in the languages of ComfyUI's interface: `python -m retort.nodes.locales` writes locales/ from them.

English comes from the schemas alone and has no files. Another language comes from a catalogue,
extensions/comfyui/locales/LANGUAGE.json, which gives a translation for each English text. A changed text is thus one
without a translation: none outlives what it says.
The page's own words are what its modules give to `t("...")`, and the titles and texts of recipes.json.
The command adds such texts to the catalogues with nothing beside them, and takes out those that no node says any more.

locales/LANGUAGE/nodeDefs.json holds names only. ComfyUI sends that of every language to every page; tooltips and
descriptions, three times as long, go to those who read the language, by extensions/comfyui/locales/translate.mjs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..hosts.api import io
from . import NODES

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("zh", "ja")
# Parts of categories that ComfyUI translates itself, and our name, which stays.
OF_COMFYUI = {"model", "sampling", "training", "loaders", "image", "upscaling", "conditioning", "text", "retort"}
PAGE = ROOT / "extensions" / "comfyui"
# t("...") in a module of the page; the text itself is JSON as well as JavaScript.
CALL = re.compile(r'\bt\(\s*("(?:[^"\\]|\\.)*")')
Say = Callable[[str, str, str], str]


def names_path(language: str) -> Path:
    """The file of names that ComfyUI reads."""
    return ROOT / "locales" / language / "nodeDefs.json"


def categories_path(language: str) -> Path:
    """The file of everything else that it reads."""
    return ROOT / "locales" / language / "main.json"


def catalogue_path(language: str) -> Path:
    """The file that translators write."""
    return PAGE / "locales" / f"{language}.json"


def inputs_of(schema: io.Schema) -> Iterator[tuple[str, str, Any]]:
    """(id, shown without a translation, input), those within a dynamic choice too; options may share an id."""
    part: Any
    for part in schema.inputs:
        yield part.id, part.display_name or part.id, part
        if part.get_io_type() == "COMFY_DYNAMICCOMBO_V3":
            for inside in (inside for option in part.options for inside in option.inputs):
                # The interface looks dots up as underscores, and shows the id without regard to a display name.
                yield f"{part.id}_{inside.id}", inside.id, inside


def names(nodes: Sequence[type[io.ComfyNode]], say: Say) -> dict[str, Any]:
    """nodeDefs.json: each name through say(section of the catalogue, English, place)."""
    found = {}
    for node in nodes:
        schema = node.GET_SCHEMA()
        found[schema.node_id] = {
            "display_name": say("nodes", schema.display_name or "", schema.node_id),
            "inputs": {
                id: {"name": say("names", shown, f"{schema.node_id}.{id}")} for id, shown, _ in inputs_of(schema)
            },
            # An output without a name is shown by its type, which ComfyUI translates.
            "outputs": {
                str(index): {"name": say("names", part.display_name, f"{schema.node_id}.{index}")}
                for index, part in enumerate(schema.outputs)
                if part.display_name
            },
        }
    return found


def categories(nodes: Sequence[type[io.ComfyNode]], say: Say) -> dict[str, Any]:
    """main.json: the parts of our categories that are our own."""
    parts = {part for node in nodes for part in node.GET_SCHEMA().category.split("/")}
    return {"nodeCategories": {part: say("categories", part, part) for part in sorted(parts - OF_COMFYUI)}}


def texts(nodes: Sequence[type[io.ComfyNode]]) -> Iterator[str]:
    """Every description and tooltip."""
    for node in nodes:
        schema = node.GET_SCHEMA()
        yield schema.description
        yield from (part.tooltip for _, _, part in inputs_of(schema))
        yield from (part.tooltip or "" for part in schema.outputs)


def page_texts() -> Iterator[str]:
    """Every text that the page shows in the user's language."""
    for path in sorted(PAGE.rglob("*.mjs")):
        for found in CALL.findall(path.read_text(encoding="utf-8")):
            yield json.loads(found)
    for recipe in json.loads((PAGE / "recipes.json").read_text(encoding="utf-8")):
        yield from (recipe["title"], recipe["text"])


class Catalogue:
    """Of one language: sections "nodes", "categories", "names", "texts" and "page" of {English: translated}.

    A name that means something else in one place stands there as "NodeId.input" or "NodeId.number of the output".
    """

    def __init__(self, sections: dict[str, dict[str, str]]):
        self.sections = sections
        self.used: dict[str, dict[str, str]] = {"nodes": {}, "categories": {}, "names": {}, "texts": {}, "page": {}}

    def __call__(self, section: str, text: str, place: str) -> str:
        known = self.sections.get(section, {})
        entry = place if place in known else text
        self.used[section][entry] = known.get(entry, "")
        return self.used[section][entry]

    @property
    def missing(self) -> list[str]:
        """What was asked for and has no translation."""
        return [text for section in self.used.values() for text, said in section.items() if not said]


def catalogue(language: str) -> Catalogue:
    """A language's, empty where there is no file."""
    path = catalogue_path(language)
    return Catalogue(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})


def files(nodes: Sequence[type[io.ComfyNode]], language: str) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """(what belongs into a language's files, English texts that it lacks)."""
    said = catalogue(language)
    found = {names_path(language): names(nodes, said), categories_path(language): categories(nodes, said)}
    for text in texts(nodes):
        said("texts", text, "")
    for text in page_texts():
        said("page", text, "")
    return {**found, catalogue_path(language): said.used}, said.missing


def dumped(content: dict[str, Any]) -> str:
    """The text of such a file."""
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    """Write the files of every language; what is not translated yet ends the command with a list."""
    gaps = []
    for language in LANGUAGES:
        contents, missing = files(NODES, language)
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dumped(content), encoding="utf-8")
        gaps += [f"{catalogue_path(language).name}: {text}" for text in missing]
    if gaps:
        sys.exit("\n".join(["not translated yet; write the translations beside these and run this again:", *gaps]))


if __name__ == "__main__":
    main()
