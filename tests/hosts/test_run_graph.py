"""What a training was connected to is kept with its run, and read from strangers' runs without trust."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from retort.hosts.jobs import graph

PROMPT = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "z.safetensors"}, "_meta": {"title": "mine"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3:1", 0], "text": "a [cat", "pair": [1, 2]}},
    "3:1": {"class_type": "CLIPLoader", "inputs": {}},
    "4": {"class_type": "RetortTrainFlow", "inputs": {"model": ["1", 0], "positive": ["2", 0], "vae": ["9", 0]}},
    "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0]}},
}


def test_what_leads_to_the_trainer_is_kept_and_nothing_else():
    found = graph.leading_to(PROMPT, "4")
    assert set(found) == {"1", "2", "3:1", "4"} and found["1"] == {
        "class_type": "UNETLoader", "inputs": {"unet_name": "z.safetensors"}
    }  # fmt: skip
    circle = {"1": {"class_type": "A", "inputs": {"a": ["2", 0]}}, "2": {"class_type": "B", "inputs": {"b": ["1", 0]}}}
    assert set(graph.leading_to(circle, "1")) == {"1", "2"}


def test_pictures_without_a_caption_are_counted_before_they_are_trained_on(tmp_path):
    """Of each folder once; nothing of one that has all, that is not there or lies elsewhere, nor of other nodes."""
    for folder, names in {"cats": ["a.png", "a.txt", "b.jpg", "c.webp"], "dogs": ["a.png", "a.txt"]}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    loader = {"class_type": graph.CAPTIONED, "inputs": {"folder": "cats"}}
    prompt = {
        "t": {"class_type": "RetortTrainFlow", "inputs": {"images": ["1", 0], "positive": ["2", 1], "a": ["3", 0]}},
        "1": loader, "2": loader, "3": {"class_type": "M", "inputs": {"b": ["4", 0], "c": ["5", 0], "d": ["6", 0]}},
        "4": {"class_type": graph.CAPTIONED, "inputs": {"folder": "dogs"}},
        "5": {"class_type": graph.CAPTIONED, "inputs": {"folder": "../cats"}},
        "6": {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": "cats"}},
        "7": loader,
    }  # fmt: skip
    (said,) = graph.uncaptioned(SimpleNamespace(prompt=prompt, unique_id="t"), tmp_path)
    assert said.startswith("2 of 3 pictures in cats have no caption")
    assert graph.uncaptioned(SimpleNamespace(prompt=None, unique_id=None), tmp_path) == []


def test_it_is_written_for_a_run_that_has_begun(tmp_path, caplog, monkeypatch):
    hidden = SimpleNamespace(prompt=PROMPT, unique_id="4")
    graph.keep(tmp_path, hidden)
    graph.keep(tmp_path / "none", hidden)
    assert graph.of_run(tmp_path) == {} and not list(tmp_path.iterdir())
    (tmp_path / "metrics.jsonl").touch()
    for prompt, node in ((None, None), (None, "4"), (PROMPT, "7.0.1")):
        graph.keep(tmp_path, SimpleNamespace(prompt=prompt, unique_id=node))
        assert graph.of_run(tmp_path) == {}
    graph.keep(tmp_path, hidden)
    assert graph.of_run(tmp_path) == {"node": "4", "prompt": graph.leading_to(PROMPT, "4")}
    before = (tmp_path / graph.GRAPH).read_bytes()
    long = {**PROMPT, "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a" * graph.MOST}}}
    graph.keep(tmp_path, SimpleNamespace(prompt=long, unique_id="4"))
    assert (tmp_path / graph.GRAPH).read_bytes() == before

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph, "write_json", full)
    graph.keep(tmp_path, hidden)
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", json.dumps({"node": "4"}), json.dumps({"node": "4", "prompt": {}}),
        json.dumps({"node": ["4"], "prompt": PROMPT}), json.dumps({"node": "4", "prompt": {"4": []}}),
        json.dumps({"node": "4", "prompt": {"4": {"class_type": 4, "inputs": {}}}}),
        json.dumps({"node": "4", "prompt": {"4": {"class_type": "A", "inputs": []}}}), "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_one_is_none(tmp_path, text):
    (tmp_path / graph.GRAPH).write_text(text)
    assert graph.of_run(tmp_path) == {}
