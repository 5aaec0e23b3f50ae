"""A stand-in for the web UI: a folder of its modules, its way to load a script, and a model whose answers are known."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.sampling.path import FLOW, VE
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "extensions" / "webui" / "scripts" / "retort.py"
STAND_INS = Path(__file__).parent / "host"


def load_script(path: Path = SCRIPT) -> ModuleType:
    """As the host does it: called by its file's name, in no list of modules."""
    spec = importlib.util.spec_from_file_location(path.name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host(monkeypatch) -> Any:
    """The host's modules, new for each test."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    names = ("scripts", "sd_samplers", "sd_samplers_common", "sd_samplers_kdiffusion", "shared")
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("modules", "gradio")}
    for name in kept:
        del sys.modules[name]
    yield SimpleNamespace(
        gradio=importlib.import_module("gradio"), **{name: importlib.import_module(f"modules.{name}") for name in names}
    )
    for name in [name for name in sys.modules if name.split(".")[0] in ("modules", "gradio")]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def script(host) -> ModuleType:
    return load_script()


class Predictor:
    """A noise schedule with the host's names for prediction and noising."""

    def __init__(self, prediction_type: str) -> None:
        self.prediction_type = prediction_type
        self.schedule = FlowSchedule(shift=3.0) if prediction_type == "const" else DiscreteSchedule()
        self.path = FLOW if prediction_type == "const" else VE

    def __getattr__(self, name: str) -> Any:
        return getattr(self.schedule, name)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        if self.path is FLOW:
            return sigma * noise + (1 - sigma) * latent
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent


class Model:
    """Guided exact denoisers of two Gaussians, mean 0.5 with the prompt and -0.2 without, both of deviation 0.3."""

    MEANS, DEVIATION = (0.5, -0.2), 0.3

    def __init__(self, prediction_type: str = "epsilon") -> None:
        self.predictor = Predictor(prediction_type)

    def x0(self, x: Tensor, sigma: Tensor, mean: float) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        a, s2 = (1 - s if self.predictor.path is FLOW else torch.ones_like(s)), self.DEVIATION**2
        return mean + a * s2 * (x - a * mean) / (a**2 * s2 + s**2)

    def guided(self, x: Tensor, sigma: Tensor, cfg: float) -> Tensor:
        cond, uncond = (self.x0(x, sigma, mean) for mean in self.MEANS)
        return uncond + cfg * (cond - uncond)


class Rng:
    """The host's generators: one per image, each going on from its own seed."""

    def __init__(self, seeds: list[int], shape: tuple[int, ...]) -> None:
        self.shape, self.generators = shape, [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


@dataclass
class Processing:
    """What a generation carries, as far as samplers read it."""

    steps: int = 4
    cfg_scale: float = 1.0
    seeds: tuple[int, ...] = (1,)
    shape: tuple[int, ...] = (4, 6, 5)
    denoising_strength: float = 0.5
    is_hr_pass: bool = False
    hr_cfg: float = 1.0
    refiner_checkpoint_info: Any = None
    extra_generation_params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = Rng(list(self.seeds), self.shape)
