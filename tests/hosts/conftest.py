"""A headless host whose model is a small closed-form network, so that whole workflows run in milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from retort.graphs import registry, run
from retort.graphs.api import io
from retort.hosts.headless.folders import Folders, use
from retort.hosts.headless.model import Clip, LatentFormat, Model, NetworkSource, Vae
from retort.sampling.path import FLOW, VE
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule

WIDTH = 6


class TinyNetwork:
    """Mixes latent, timestep and prompt without weights; `seen` records (batch, timesteps) of every call."""

    device = torch.device("cpu")

    def __init__(self, repeats_context: bool = False):
        self.repeats_context = repeats_context
        self.seen: list[tuple[int, torch.Tensor]] = []

    def conditions(self, tokens, extra, shape):
        return {"context": tokens, "y": extra["pooled_output"]}

    def __call__(self, x, timestep, *, context, y):
        self.seen.append((x.shape[0], timestep.clone()))
        ones = (1,) * (x.ndim - 1)
        prompt = (context.mean((1, 2)) + y.mean(1)).view(-1, *ones)
        return torch.tanh(0.7 * x + prompt) + 0.1 * x.roll(1, -1) + timestep.view(-1, *ones) / 2000


@dataclass
class Tiny:
    """MODEL, CLIP and VAE around one network."""

    model: Model
    clip: Clip
    vae: Vae
    network: TinyNetwork


def words(prompt, loras=()):
    generator = torch.Generator().manual_seed(sum(prompt.encode()) + 1)
    length = 4 if len(prompt) < 20 else 8
    tokens = torch.randn(1, length, WIDTH, generator=generator)
    return tokens, {"pooled_output": torch.randn(1, WIDTH, generator=generator)}


def build(kind: str) -> Tiny:
    network = TinyNetwork(repeats_context=kind != "flow")
    source = NetworkSource(lambda loras: network)
    form = LatentFormat(4, scale=1.5, shift=0.06)
    if kind == "flow":
        model = Model(source, FlowSchedule(shift=3.0), FLOW, "flow", form)
    else:
        model = Model(source, DiscreteSchedule(), VE, {"eps": "eps", "v": "v", "x0": "x0"}[kind], form)
    grey = torch.nn.functional.avg_pool2d
    vae = Vae(
        encoder=lambda i: torch.cat([grey(i, 8), grey(i.mean(1, keepdim=True), 8)], 1),
        decoder=lambda z: torch.nn.functional.interpolate(z[:, :3], scale_factor=8.0),
        channels=4,
    )
    return Tiny(model, Clip(words), vae, network)


class TinyLoader(io.ComfyNode):
    """Stands for a checkpoint loader."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyLoader",
            inputs=[io.Combo.Input("kind", ["flow", "eps", "v"], default="flow")],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, kind):
        tiny = build(kind)
        return io.NodeOutput(tiny.model, tiny.clip, tiny.vae)


@pytest.fixture(autouse=True)
def without_comfyui(monkeypatch):
    """Workflows run on the built-in host, whatever ComfyUI the integration tests are given."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


@pytest.fixture
def tiny():
    """tiny(kind) -> Tiny, kind "flow", "eps", "v" or "x0"."""
    return build


@pytest.fixture
def known():
    """known(*classes) -> a registry of the core nodes, the plugin's, TinyLoader and further classes."""

    def make(*classes):
        from retort.graphs.core import NODES

        return registry.Registry([*NODES, *asyncio.run(registry.plugin_nodes()), TinyLoader, *classes])

    return make


@pytest.fixture
def where(tmp_path) -> Iterator[Folders]:
    """Empty folders of a run, which the headless host uses."""
    for name in ("models", "input"):
        (tmp_path / name).mkdir()
    found = Folders(models=(tmp_path / "models",), inputs=(tmp_path / "input",), output=tmp_path / "out")
    with use(found):
        yield found


@pytest.fixture
def go(known, where):
    """go(workflow, *extra node classes, **run's options) -> Outcome."""

    def start(workflow: dict | Path, *classes, **options):
        return run.run(workflow, where=where, nodes=known(*classes), **options)

    return start


@pytest.fixture
def api() -> dict:
    """Text to image in API format: TinyLoader, two prompts, KSampler, decode, save."""
    return {
        "1": {"class_type": "TinyLoader", "inputs": {"kind": "flow"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a seven", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "seed": 5, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple",
                "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "denoise": 1.0,
            },
            "_meta": {"title": "Draw"},
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "tiny"}},
    }  # fmt: skip


def _ui_node(id, kind, inputs=(), outputs=(), values=None, mode=0, title=None):
    node = {
        "id": id, "type": kind, "mode": mode, "pos": [0, 0], "size": [200, 100], "flags": {}, "order": id,
        "inputs": [{"name": n, "type": t, "link": link} for n, t, link in inputs],
        "outputs": [{"name": t, "type": t, "links": []} for t in outputs],
        "properties": {"Node name for S&R": kind},
    }  # fmt: skip
    if values is not None:
        node["widgets_values"] = values
    if title:
        node["title"] = title
    return node


@pytest.fixture
def ui() -> dict:
    """The same workflow in UI format 0.4, with a note, a reroute, a primitive and a control_after_generate value."""
    return {
        "last_node_id": 10, "last_link_id": 11, "version": 0.4,
        "nodes": [
            _ui_node(1, "TinyLoader", outputs=["MODEL", "CLIP", "VAE"], values=["flow"]),
            _ui_node(2, "CLIPTextEncode", [("clip", "CLIP", 1)], ["CONDITIONING"], ["a seven"]),
            _ui_node(3, "CLIPTextEncode", [("clip", "CLIP", 2)], ["CONDITIONING"], [""]),
            _ui_node(4, "EmptyLatentImage", outputs=["LATENT"], values=[64, 64, 1]),
            _ui_node(
                5, "KSampler",
                [("model", "MODEL", 3), ("positive", "CONDITIONING", 4), ("negative", "CONDITIONING", 5),
                 ("latent_image", "LATENT", 6), ("steps", "INT", 10)],
                ["LATENT"], [5, "randomize", 99, 4.0, "euler", "simple", 1.0], title="Draw",
            ),
            _ui_node(6, "VAEDecode", [("samples", "LATENT", 7), ("vae", "VAE", 8)], ["IMAGE"]),
            _ui_node(7, "SaveImage", [("images", "IMAGE", 9)], ["IMAGE"], ["tiny"]),
            _ui_node(8, "Reroute", [("", "*", 11)], ["MODEL"]),
            _ui_node(9, "PrimitiveNode", outputs=["INT"], values=[3, "fixed"], title="Steps"),
            _ui_node(10, "MarkdownNote", values=["# Read me"]),
        ],
        "links": [
            [1, 1, 1, 2, 0, "CLIP"], [2, 1, 1, 3, 0, "CLIP"], [3, 8, 0, 5, 0, "MODEL"], [4, 2, 0, 5, 1, "CONDITIONING"],
            [5, 3, 0, 5, 2, "CONDITIONING"], [6, 4, 0, 5, 3, "LATENT"], [7, 5, 0, 6, 0, "LATENT"],
            [8, 1, 2, 6, 1, "VAE"], [9, 6, 0, 7, 0, "IMAGE"], [10, 9, 0, 5, 4, "INT"], [11, 1, 0, 8, 0, "*"],
        ],
        "groups": [], "config": {}, "extra": {},
    }  # fmt: skip


@pytest.fixture
def ui_node():
    """ui_node(id, kind, inputs, outputs, values, mode, title) -> a node in UI format."""
    return _ui_node
