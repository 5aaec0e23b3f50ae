"""A ComfyUI server with tiny networks and the nodes that tests of training need, and prompts for it in API format."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import urllib.request

import pytest
import tiny_training as tiny
from safetensors.torch import load_file

files = tiny.files

PROMPTS = "a bold blue seven on yellow paper\na thin red two\n\n  a green nine  "
# What a test needs and core has no node for: prompts for networks without a text encoder, numbers that are none.
PACK = """
import torch
from comfy_api.latest import ComfyExtension, io

class TinyPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        ints = [io.Int.Input(n, default=1, max=9999) for n in ("count", "length", "width", "pooled", "seed")]
        return io.Schema("TinyPrompts", inputs=ints, outputs=[io.Conditioning.Output(is_output_list=True)])

    @classmethod
    def execute(cls, count, length, width, pooled, seed):
        g = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(1, *shape, generator=g)
        return io.NodeOutput([[[random(length, width), {"pooled_output": random(pooled)}]] for _ in range(count)])

class TinyPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        ints = [io.Int.Input(n, default=1, max=9999) for n in ("count", "width", "seed")]
        return io.Schema("TinyPictures", inputs=ints, outputs=[
            io.Image.Output(is_output_list=True), io.String.Output(is_output_list=True)])

    @classmethod
    def execute(cls, count, width, seed):
        g = torch.Generator().manual_seed(seed)
        sizes = [(64, width if i % 2 else 64) for i in range(count)]
        return io.NodeOutput([torch.rand(1, *s, 3, generator=g) for s in sizes], [f"a {n} seven" for n in range(count)])

class TinyLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("TinyLatents", inputs=[
            io.Int.Input("batch", optional=True), io.Int.Input("channels", optional=True),
            io.Int.Input("seed", optional=True), io.Boolean.Input("broken", optional=True),
        ], outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, batch=2, channels=16, seed=0, broken=False):
        samples = torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
        if broken:
            samples[-1, 0, 0, 0] = float("nan")
        return io.NodeOutput({"samples": samples})

class RandomText:
    def __init__(self, length, width, pooled):
        self.sizes = length, width, pooled

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        g = torch.Generator().manual_seed(sum(text.encode()))
        length, width, pooled = self.sizes
        random = lambda *shape: torch.randn(1, *shape, generator=g)
        return [[random(length, width), {"pooled_output": random(pooled)}]]

class TinyText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        ints = [io.Int.Input(n, default=1, max=9999) for n in ("length", "width", "pooled")]
        return io.Schema("TinyText", inputs=ints, outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls, length, width, pooled):
        return io.NodeOutput(RandomText(length, width, pooled))

class Pack(ComfyExtension):
    async def get_node_list(self):
        return [TinyPrompts, TinyPictures, TinyLatents, TinyText]

async def comfy_entrypoint():
    return Pack()
"""


def _conftest():
    """The fixtures' module, whose classes are not fixtures."""
    return next(m for name, m in sys.modules.items() if name.endswith("conftest") and hasattr(m, "Server"))


@pytest.fixture(scope="module")
def app(comfyui, files, tmp_path_factory):
    """A server with the plugin, the tests' nodes and two networks as files."""
    base = tmp_path_factory.mktemp("training")
    for kind in ("sd3", "sd15"):
        (base / "models" / "diffusion_models").mkdir(parents=True, exist_ok=True)
        (base / "models" / "diffusion_models" / f"{kind}.safetensors").symlink_to(files(kind))
    (base / "models" / "loras").mkdir()
    (base / "custom_nodes" / "tiny").mkdir(parents=True)
    (base / "custom_nodes" / "tiny" / "__init__.py").write_text(PACK)
    (base / "custom_nodes" / "retort").symlink_to(_conftest().REPOSITORY)
    running = _conftest().Server(comfyui, base)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def post(app, path, data=None):
    body = json.dumps(data or {}).encode()
    with urllib.request.urlopen(urllib.request.Request(app.url + path, body), timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


class Listener:
    """A page's socket: every message that a client of the server gets."""

    def __init__(self, app, client="listener"):
        self.said, self.texts, self.pictures = [], [], []
        self._url, self._stop = f"{app.url.replace('http', 'ws')}/ws?clientId={client}", threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True)

    async def _listen(self):
        import aiohttp

        async with aiohttp.ClientSession() as session, session.ws_connect(self._url, max_msg_size=0) as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            self._ready.set()
            while not self._stop.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    message = await socket.receive(timeout=0.2)
                    if message.type == aiohttp.WSMsgType.TEXT:
                        self.said.append(json.loads(message.data))
                    elif message.type == aiohttp.WSMsgType.BINARY:
                        kind = int.from_bytes(message.data[:4], "big")
                        (self.texts if kind == 3 else self.pictures).append(message.data[4:])

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join(10)


@pytest.fixture(scope="module")
def spelled(app):
    """spelled(node, **inputs) -> an API node with every widget's default, as a page sends it; dots choose settings."""
    listed = json.loads(app.get("/object_info"))

    def widgets(inputs, prefix=""):
        values = {}
        for group in ("required", "optional"):
            for name, (kind, *rest) in inputs.get(group, {}).items():
                options = rest[0] if rest else {}
                if kind == "COMFY_DYNAMICCOMBO_V3":
                    values[prefix + name] = options["options"][0]["key"]
                elif isinstance(kind, list) or kind == "COMBO" or "default" in options:
                    choices = kind if isinstance(kind, list) else options.get("options")
                    values[prefix + name] = options.get("default", (choices or [None])[0])
        return values

    def make(node, **inputs):
        values = widgets(listed[node]["input"])
        for group in ("required", "optional"):
            for name, (kind, *rest) in listed[node]["input"].get(group, {}).items():
                if kind == "COMFY_DYNAMICCOMBO_V3":
                    chosen = inputs.get(name, values[name])
                    settings = next(o for o in rest[0]["options"] if o["key"] == chosen)
                    values |= widgets(settings["inputs"], f"{name}.")
        unknown = set(inputs) - set(values) - set(
            n for group in ("required", "optional") for n in listed[node]["input"].get(group, {})
        )  # fmt: skip
        assert not unknown, unknown
        return {"class_type": node, "inputs": {**values, **inputs}}

    return make


QUICK = {"steps": 2, "batch_size": 2, "rank": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0, "seed": 3}


@pytest.fixture
def base(spelled):
    """base(kind) -> nodes that load a model ("m"), its prompts ("p") and sample it; what connects them."""

    def make(kind):
        if kind.startswith("digits"):
            nodes = {
                "m": spelled("RetortEmbeddedModel", variant=kind.split(" ", 1)[1]),
                "p": spelled("CLIPTextEncode", clip=["m", 1], text="a thin red two"),
                "size": spelled("EmptySD3LatentImage", width=64, height=64, batch_size=1),
            }
            return nodes, {"model": ["m", 0], "clip": ["m", 1], "prompts": PROMPTS, "latents": ["size", 0]}
        sizes = {"sd3": (8, 64, 48), "sd15": (77, 768, 48)}[kind]
        nodes = {
            "m": spelled("UNETLoader", unet_name=f"{kind}.safetensors"),
            "p": {"class_type": "TinyPrompts", "inputs": dict(
                zip(("count", "length", "width", "pooled", "seed"), (1, *sizes, 7), strict=True))},
            "ps": {"class_type": "TinyPrompts", "inputs": dict(
                zip(("count", "length", "width", "pooled", "seed"), (3, *sizes, 8), strict=True))},
            "size": spelled("EmptyLatentImage", width=64, height=64, batch_size=1),
        }  # fmt: skip
        return nodes, {"model": ["m", 0], "positive": ["ps", 0], "negative": ["p", 0], "latents": ["size", 0]}

    return make


@pytest.fixture
def drawn(app, spelled):
    """drawn(nodes, {prefix: model link}) -> prompt nodes that sample each MODEL and save its latents."""

    def add(nodes, models):
        for name, link in models.items():
            nodes[f"k {name}"] = spelled(
                "KSampler", model=link, seed=5, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple",
                positive=["p", 0], negative=["p", 0], latent_image=["size", 0], denoise=1.0,
            )  # fmt: skip
            nodes[f"s {name}"] = spelled("SaveLatent", samples=[f"k {name}", 0], filename_prefix=f"lat/{name}")
        return nodes

    def read(done, name):
        (entry,) = done["outputs"][f"s {name}"]["latents"]
        return load_file(app.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]

    add.read = read
    return add


def succeeded(done):
    assert done["status"]["status_str"] == "success", error_of(done)
    return done


def error_of(done):
    found = [data for name, data in done["status"]["messages"] if name == "execution_error"]
    return (
        f"{found[0]['node_type']}: {found[0]['exception_message']}" if found else str(done["status"]["messages"][-1:])
    )
