"""The interface's languages say every node, and nothing that no node says."""

from __future__ import annotations

import json
import re

import pytest

from retort.nodes import NODES, locales

SCRIPTS = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]"}
# Translated by ComfyUI itself: an output of another type needs a name of its own to be translated.
OF_COMFYUI = {"MODEL", "CLIP", "VAE", "LATENT", "IMAGE", "CONDITIONING", "GUIDER", "SAMPLER", "SIGMAS", "NOISE", "MASK"}


@pytest.fixture
def english():
    return locales.names(NODES, lambda section, text, place: text)


def keys(content, path=()):
    """Every place of a nested dictionary."""
    if not isinstance(content, dict):
        return {path}
    return {found for name, inner in content.items() for found in keys(inner, (*path, name))}


@pytest.fixture(params=locales.LANGUAGES)
def language(request):
    return request.param


@pytest.fixture
def said(language):
    return json.loads(locales.catalogue_path(language).read_text(encoding="utf-8"))


def test_files_are_what_schemas_and_catalogues_say(language):
    contents, missing = locales.files(NODES, language)
    assert not missing, f"run `python -m retort.nodes.locales`, translate what it lists, run it again: {missing}"
    for path, content in contents.items():
        assert path.read_text(encoding="utf-8") == locales.dumped(content), (
            f"{path.name} is out of date: run `python -m retort.nodes.locales`"
        )


def test_languages_have_the_same_places(language, english):
    translated = json.loads(locales.names_path(language).read_text(encoding="utf-8"))
    assert keys(translated) == keys(english)
    assert set(english) == {node.__name__ for node in NODES}


def test_a_changed_text_is_a_missing_one(language, monkeypatch):
    schema = NODES[0].GET_SCHEMA()
    before = schema.inputs[0].tooltip
    monkeypatch.setattr(NODES[0], "GET_SCHEMA", classmethod(lambda cls: schema))
    monkeypatch.setattr(schema.inputs[0], "tooltip", "Something else.")
    contents, missing = locales.files(NODES, language)
    assert missing == ["Something else."]
    assert before not in contents[locales.catalogue_path(language)]["texts"]


def test_inputs_within_a_choice_are_named_as_the_interface_looks_them_up(english):
    found = english["RetortReflectionSetup"]["inputs"]
    assert found["pair_weak_cfg"] == {"name": "weak_cfg"} and found["pair"] == {"name": "pair"}


def test_texts_are_translated_and_end_as_sentences(language, said):
    for text, translated in said["texts"].items():
        assert re.search(SCRIPTS[language], translated), text
        assert translated.endswith("。"), translated
        assert len(translated) < 2 * len(text), translated


def test_numbers_files_and_values_survive(said):
    """What a user types or looks for on a disk is the same in every language."""
    kept = r"models/\w+(?:/[\w.-]*\w)?|output/\w+|\w+\.safetensors|(?:^|(?<=\. ))\w+_\w+(?=:)|\b\d+(?:\.\d+)?\b"
    for text, translated in said["texts"].items():
        for word in re.findall(kept, text):
            assert word in translated, (word, translated)


def test_names_hold_nothing_that_the_interface_would_read_as_a_message(said):
    """vue-i18n compiles names: braces, @ and | mean something there."""
    for section in ("nodes", "names"):
        for name in said[section].values():
            assert not re.search(r"[{}@|]", name) and len(name) <= 40, name


def test_node_names_are_distinct(said):
    assert len(set(said["nodes"].values())) == len(said["nodes"]) == len(NODES)


def test_inputs_of_a_node_are_told_apart(language, english):
    nodes = json.loads(locales.names_path(language).read_text(encoding="utf-8"))
    for id, node in nodes.items():
        shown: dict[str, str] = {}
        for key, part in node["inputs"].items():
            first = shown.setdefault(part["name"], english[id]["inputs"][key]["name"])
            assert first == english[id]["inputs"][key]["name"], (id, key, part["name"])


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_an_output_of_our_own_type_has_a_name(node):
    for out in node.GET_SCHEMA().outputs:
        assert out.display_name or out.get_io_type() in OF_COMFYUI, out.get_io_type()


def test_the_page_asks_for_the_same_languages():
    page = (locales.ROOT / "extensions" / "comfyui" / "retort.js").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^const LANGUAGES = (\[.*\]);$", page, re.MULTILINE)
    assert tuple(json.loads(listed)) == locales.LANGUAGES
