"""A real ComfyUI on the CPU in this process, the plugin loaded by it from its folder, and tiny random networks."""

from __future__ import annotations

import asyncio
import compileall
import importlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "second_in_comfyui", REPOSITORY / "tests" / "second_device" / "in_comfyui.py"
)
second = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(second)
second.begin()


def _module(name: str):
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def comfy(comfyui: Path) -> SimpleNamespace:
    """ComfyUI's modules by short names, the plugin's node classes in `plugin`, its module in `package`."""
    sys.path.insert(0, str(comfyui))
    _module("comfy.options")  # leaves our command line alone
    _module("comfy.cli_args").args.cpu = True
    core = SimpleNamespace(
        **{name: _module(f"comfy.{name}") for name in (
            "sd", "samplers", "sample", "utils", "model_management", "model_base", "model_sampling", "model_patcher",
            "supported_models", "patcher_extension", "lora", "ops",
        )},
        nodes=_module("nodes"),
        custom=_module("comfy_extras.nodes_custom_sampler"),
        perpneg=_module("comfy_extras.nodes_perpneg"),
        folders=_module("folder_paths"),
    )  # fmt: skip
    before = set(core.nodes.NODE_CLASS_MAPPINGS)
    _module("comfy_config.config_parser")  # ComfyUI reads the pyproject.toml of every pack with it
    _module("server")  # which is up before any pack is loaded
    for folder in ("hosts", "models", "nodes", "restoration", "rewards", "sampling", "trainers"):
        compileall.compile_dir(REPOSITORY / folder, quiet=1)  # as every start but the first finds it
    known = set(sys.modules)
    # Processor time: the machine may be busy with something else.
    started = time.process_time()
    loaded = asyncio.run(core.nodes.load_custom_node(str(REPOSITORY)))
    core.import_seconds = time.process_time() - started
    core.imported = {name for name in set(sys.modules) - known if not name.startswith(str(REPOSITORY))}
    assert loaded, "ComfyUI could not load the plugin: its log says why"
    core.plugin = {k: v for k, v in core.nodes.NODE_CLASS_MAPPINGS.items() if k not in before}
    core.package = str(REPOSITORY).replace(".", "_x_")
    return core


@pytest.fixture(scope="session")
def card() -> str:
    """The form of the second device that ComfyUI has for its card, empty where it is on the processor."""
    return second.form()


@pytest.fixture(scope="session")
def near(card):
    """near(tolerance, expected) -> the tolerance, or what rounding a network's inputs and output to bf16 comes to."""

    def limit(tolerance: float, expected: torch.Tensor) -> float:
        return max(tolerance, float(expected.abs().max()) / 200) if card == "bf16" else tolerance

    return limit


@pytest.fixture(scope="session")
def ours(comfy):
    """Import a module of the plugin as ComfyUI loaded it: ours("sampling.path")."""
    return lambda name: importlib.import_module(f"{comfy.package}.{name}")


def filled(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights for a module whose own initialisation ComfyUI skips."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, value in module.state_dict().items():
        if value.ndim >= 2:
            scale = min(0.16, value[0].numel() ** -0.5)
            weights[key] = torch.randn(value.shape, generator=generator) * scale
        else:
            weights[key] = torch.full(value.shape, float(key.endswith(("weight", "scale"))))
    return weights


@pytest.fixture(scope="session")
def sd3_weights(comfy):
    """SD3-layout network in the embedded model's shape but depth 1: context 128, pooled 128, 16 channels."""
    mmdit = _module("comfy.ldm.modules.diffusionmodules.mmdit")
    depth, width = 1, 64
    network = mmdit.OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=depth, adm_in_channels=128, num_patches=256,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 128, "out_features": width}},
        pos_embed_max_size=16, qk_norm="rms", operations=comfy.ops.disable_weight_init, dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    return filled(network)


@pytest.fixture(scope="session")
def stand_ins(ours, sd3_weights):
    """stand_ins(folder) writes random weights under the embedded files' names that `folder` lacks, and returns it."""

    def write(folder: Path) -> Path:
        loader = ours("models.loader")
        taesd = filled(_module("comfy.taesd.taesd").TAESD(latent_channels=16))
        network = {f"{loader.NETWORK_PREFIX}{k}": v for k, v in sd3_weights.items()}
        autoencoder = {f"{loader.VAE_PREFIX}{k}": v for k, v in taesd.items()}
        files = {name: {**network, **autoencoder} for name in loader.CHECKPOINTS.values()}
        text = ours("models.text").TextEncoder().state_dict()
        files["digits_text.safetensors"] = {k: v.half() for k, v in text.items()}
        for name, tensors in files.items():
            if not (folder / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                safetensors.torch.save_file(tensors, folder / name)
        return folder

    return write


@pytest.fixture(scope="session")
def networks(comfy, sd3_weights):
    """networks(kind) -> a fresh MODEL of random weights: flow (SD3), eps (SD1.5), eps16 (SD3 layout), wan, cog, v."""

    def sd15():
        unet = _module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1], channel_mult=[1],
            transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=-2, context_dim=768,
            num_heads=8, num_head_channels=-1, use_spatial_transformer=True, legacy=False,
            operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu",
        )  # fmt: skip
        return filled(unet)

    def wan():
        network = _module("comfy.ldm.wan.model").WanModel(
            model_type="t2v", patch_size=(1, 2, 2), in_dim=16, dim=128, ffn_dim=256, freq_dim=256, out_dim=16,
            num_heads=1, num_layers=1, image_model="wan2.1", operations=comfy.ops.disable_weight_init,
            dtype=torch.float32, device="cpu",
        )  # fmt: skip
        return filled(network)

    def cog():
        network = _module("comfy.ldm.cogvideo.model").CogVideoXTransformer3DModel(
            num_attention_heads=1, num_layers=1, time_embed_dim=64, text_embed_dim=32,
            use_rotary_positional_embeddings=True, operations=comfy.ops.disable_weight_init, dtype=torch.float32,
            device="cpu",
        )  # fmt: skip
        return filled(network)

    weights = {
        "flow": lambda: sd3_weights,
        "eps16": lambda: sd3_weights,
        "eps": sd15,
        "v": sd15,
        "wan": wan,
        "cog": cog,
    }
    made: dict[str, dict] = {}

    def make(kind: str):
        source = "eps" if kind == "v" else kind
        if source not in made:
            made[source] = weights[source]()
        model = comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in made[source].items()})
        swap = {"eps16": "EPS", "v": "V_PREDICTION"}
        if kind in swap:
            kind_of_model = comfy.model_base.ModelType[swap[kind]]
            model.model.model_sampling = comfy.model_base.model_sampling(model.model.model_config, kind_of_model)
        return model

    return make


SHAPES = {
    "flow": (1, 16, 8, 8), "eps16": (1, 16, 8, 8), "eps": (1, 4, 8, 8), "v": (1, 4, 8, 8), "wan": (1, 16, 2, 8, 8),
    "cog": (1, 16, 2, 8, 8),
}  # fmt: skip
CONTEXTS = {"flow": (8, 128), "eps16": (8, 128), "eps": (77, 768), "v": (77, 768), "wan": (8, 4096), "cog": (226, 32)}


@pytest.fixture(scope="session")
def tiny(networks):
    """tiny(kind, batch) -> MODEL, positive, negative, empty LATENT; one shared MODEL per kind."""
    models: dict[str, object] = {}

    def make(kind: str, batch: int = 1, fresh: bool = False):
        if kind not in models:
            models[kind] = networks(kind)
        generator = torch.Generator().manual_seed(5)

        def condition():
            pooled = {"pooled_output": torch.randn(1, 128, generator=generator)}
            return [[torch.randn(1, *CONTEXTS[kind], generator=generator), pooled]]

        latent = {"samples": torch.zeros(batch, *SHAPES[kind][1:])}
        return models[kind], condition(), condition(), latent

    return make


@pytest.fixture
def node(comfy):
    """node(kind, **inputs) -> the outputs of a node of ours, run as ComfyUI runs nodes."""

    def run(kind, /, **inputs):
        with torch.inference_mode():
            return comfy.plugin[kind].execute(**inputs).args

    return run


@pytest.fixture(scope="session")
def sample(comfy):
    """sample(guider, sampler, sigmas, latent, seed) through SamplerCustomAdvanced and RandomNoise: a sampled tensor."""

    def run(guider, sampler, sigmas, latent, seed=7):
        noise = comfy.custom.Noise_RandomNoise(seed)
        with torch.inference_mode():
            return comfy.custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)[0]["samples"]

    return run


@pytest.fixture
def guided(comfy):
    """guided(model, positive, negative, cfg) -> core's CFGGuider."""

    def make(model, positive, negative, cfg=1.0):
        return comfy.custom.CFGGuider.execute(model, positive, negative, cfg)[0]

    return make


class Recorder:
    """What entered a network: `inputs` and `timesteps` of every call, and its outputs."""

    def __init__(self, model):
        self.inputs: list[torch.Tensor] = []
        self.timesteps: list[torch.Tensor] = []
        self._handle = model.model.diffusion_model.register_forward_pre_hook(self._saw)

    def _saw(self, module, args):
        self.inputs.append(args[0].detach().cpu().clone())
        self.timesteps.append(args[1].detach().cpu().clone())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._handle.remove()


@pytest.fixture
def recording():
    """with recording(model) as seen: ... ; seen.inputs, seen.timesteps."""
    return Recorder


# A route that lists all routes, ours among them.
ROUTER = """
from aiohttp import web
from server import PromptServer
NODE_CLASS_MAPPINGS = {}

@PromptServer.instance.routes.get("/every_route")
async def every(request):
    found = PromptServer.instance.app.router.routes()
    return web.json_response([[one.method, one.resource.canonical] for one in found if one.method != "HEAD"])
"""


class Server:
    """A ComfyUI server process on a free port, and the few requests that the tests need."""

    def __init__(self, comfyui: Path, base: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.base, self.log = base, base / "log.txt"
        self._command = [
            sys.executable, str(comfyui / "main.py"), "--cpu", "--port", str(port), "--base-directory", str(base),
            "--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
        ]  # fmt: skip
        if frontend := os.environ.get("COMFYUI_FRONTEND"):
            # The folder `static` of another comfyui-frontend-package.
            self._command += ["--front-end-root", frontend]
        self.start()

    def start(self) -> None:
        """Start the process, again after `stop`."""
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT, cwd=self.base)

    def stop(self) -> None:
        """End the process, as a user who closes its window."""
        self.process.terminate()
        self.process.wait(30)

    def wait(self, seconds: float = 240) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            assert self.process.poll() is None, self.text()[-3000:]
            try:
                self.get("/system_stats")
                return
            except urllib.error.URLError:
                time.sleep(0.5)
        pytest.fail(f"the server did not answer in {seconds} s: {self.text()[-3000:]}")

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def run(self, prompt: dict, client: str = "", seconds: float = 240) -> dict:
        """The history entry of a finished prompt. client: whose socket is told how it goes."""
        data = json.dumps({"prompt": prompt, **({"client_id": client} if client else {})}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + "/prompt", data), timeout=60) as answer:
                queued = json.load(answer)
        except urllib.error.HTTPError as error:
            queued = json.load(error)
        refused = [(node["class_type"], error) for node in queued["node_errors"].values() for error in node["errors"]]
        if refused and all(kind.startswith("Retort") and "exception" in error["type"] for kind, error in refused):
            # What our nodes say before anything runs, as they would say it when they run.
            said = [
                ("execution_error", {"node_type": kind, "exception_message": error["details"]})
                for kind, error in refused
            ]
            return {"status": {"status_str": "error", "completed": False, "messages": said}, "outputs": {}}
        # A part of a prompt whose inputs are refused is left out, and the rest runs.
        assert not queued["node_errors"] and not queued.get("error"), queued
        key = queued["prompt_id"]
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            history = json.loads(self.get(f"/history/{key}"))
            if key in history:
                return history[key]
            time.sleep(0.1)
        pytest.fail(f"the prompt did not finish in {seconds} s")


@pytest.fixture(scope="session")
def started(comfyui):
    """started(base) -> a Server on a folder of its own, which the caller stops."""
    return lambda base: Server(comfyui, base)


@pytest.fixture(scope="session")
def browser_python() -> str:
    """A Python that has playwright, which starts a browser."""
    python = os.environ.get("PLAYWRIGHT_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", "import playwright.sync_api"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"{python} has no playwright: install it there, or name another Python in PLAYWRIGHT_PYTHON")
    return python


@pytest.fixture(scope="session")
def server(comfyui, stand_ins, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    plugin = base / "custom_nodes" / "retort"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "build")
    shutil.copytree(REPOSITORY, plugin, ignore=ignored)
    stand_ins(plugin / "models")
    (base / "custom_nodes" / "router.py").write_text(ROUTER, encoding="utf-8")
    running = Server(comfyui, base)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def embedded(comfy, ours):
    """embedded(variant, headless) -> host, model, clip, vae: the embedded model with its weights, loaded once."""
    made = {}

    def load(variant="flow", headless=False):
        if (variant, headless) not in made:
            host = ours(f"hosts.{'headless' if headless else 'comfyui'}.host").host
            with torch.inference_mode():
                made[variant, headless] = host, *host.embedded(variant)
        return made[variant, headless]

    return load
