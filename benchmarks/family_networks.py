"""Every diffusion model of ComfyUI as a tiny network of its real class with random weights, and prompts for it.

`families.json` has a row for each family and for each variant that behaves in a way of its own: `class` is its name in
comfy.supported_models (by default the row's own), `settings` what its network is made with, `latent` the shape of one
latent, `encoded` that of one which a VAE made, where it is another, `tokens` (length, width) of a prompt, and `with`
what else a CONDITIONING of it holds, where a plain list is the shape of random numbers. A row may be `like` another:
what it says itself then comes on top of that row, and what stands under "-" is left out of it.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..trainers import checkpointing
from .stored_formats import FORMATS, divides, quantised

ROWS = Path(__file__).with_name("families.json")
# The families that most people use, which are asked more than the others.
MOST_USED = (
    "SDXL", "Flux", "Flux2", "ZImage", "QwenImage", "WAN22_T2V", "LTXAV", "LTXAV_video_only", "Krea2", "Anima",
    "Chroma",
)  # fmt: skip
# Classes of comfy.supported_models that make no pictures, video or sound by denoising.
NO_DIFFUSION = {"RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3"}
# Weights that a family is recognised by, beside those of its network: what `get_model` is told of the file.
_MARKS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "sd20": lambda: {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.randn(320)},
    "vpred": lambda: {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)},
    "edm": lambda: {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},
    "zero123": lambda: {
        "cc_projection.weight": torch.randn(768, 772) * 0.03,
        "cc_projection.bias": torch.zeros(768),
    },
    "sa1": lambda: _numbers_of_sound(("seconds_start", "seconds_total"), max_val=512),
    "sa3": lambda: {
        **_numbers_of_sound(("seconds_total",), max_val=384, fourier_features_type="expo"),
        "conditioner.conditioners.prompt.padding_embedding": torch.randn(768),
    },
}


def _numbers_of_sound(names: tuple[str, ...], **settings: Any) -> dict[str, Tensor]:
    embedder: Any = importlib.import_module("comfy.ldm.audio.embedders").NumberConditioner(768, min_val=0, **settings)
    return {
        f"conditioner.conditioners.{name}.{key}": torch.randn(value.shape) * 0.03
        for name in names
        for key, value in embedder.state_dict().items()
    }


@dataclass(frozen=True)
class Family:
    """One row. sound: shape of the sound beside the video; one_length: all its prompts have as many tokens.

    encoded: the shape of a latent that a VAE made, where it is not `latent`, as empty ones and the network have it.
    frames: a batch is the frames of one video. too_large: why no tiny network of it can be made.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    latent: tuple[int, ...]
    tokens: tuple[int, int] = (0, 0)
    encoded: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    sound: tuple[int, ...] = ()
    one_length: bool = False
    frames: bool = False
    state: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    too_large: str = ""

    def model(self, form: str = "fp32") -> Any:
        """A MODEL of it, always with the same weights. form: what they are stored as: fp32, bf16, or one of `FORMATS`.

        A quantised network computes in fp32, so that nothing but its weights is rounded.
        """
        model = self._made("bf16" if form == "bf16" else "fp32")
        _fill(model.diffusion_model)
        if form in FORMATS:
            weights, chosen = model.diffusion_model.state_dict(), _within_blocks(model.diffusion_model)
            model = self._made(form)
            model.load_model_weights(quantised(weights, form, chosen)[0], "")
        patchers: Any = importlib.import_module("comfy.model_patcher")
        cpu = torch.device("cpu")
        patcher = patchers.CoreModelPatcher(model, load_device=cpu, offload_device=cpu)
        patcher.cached_patcher_init = (self.model, (form,))
        return patcher

    def _made(self, form: str) -> Any:
        config: Any = getattr(importlib.import_module("comfy.supported_models"), self.kind)(
            copy.deepcopy(self.settings)
        )
        config.unet_config.update(self.fixed)
        config.quant_config = {"mixed_ops": True} if form in FORMATS else None
        dtype = torch.bfloat16 if form == "bf16" else torch.float32
        # Quantised weights are multiplied out to the dtype that is cast to.
        config.set_inference_dtype(dtype, dtype if form in FORMATS else None)
        torch.manual_seed(0)
        return config.get_model(_MARKS[self.state]() if self.state else {})

    def prompt(self, seed: int, more: int = 0) -> list[Any]:
        """A CONDITIONING; more: tokens beyond the usual number."""
        generator = torch.Generator().manual_seed(seed)
        length, width = self.tokens
        length += 0 if self.one_length else more
        tokens = torch.randn(1, length, width, generator=generator)
        return [[tokens, {key: _made(value, generator, length) for key, value in self.extra.items()}]]

    def noise(self, seed: int, batch: int = 1) -> Tensor:
        """Random numbers of a latent's shape, (batch, C, ...)."""
        return torch.randn(batch, *self.latent, generator=torch.Generator().manual_seed(seed))

    def start(self, seed: int, batch: int = 1) -> Any:
        """Noise as a guider takes it: of video with sound, both."""
        video = self.noise(seed, batch)
        return self._with_sound(video, self._sound_of(seed, batch)) if self.sound else video

    def stored(self, seed: int) -> Tensor | tuple[Tensor, ...]:
        """One latent as a VAE makes it, (C, ...), or of video with sound both."""
        shape = self.encoded or self.latent
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5
        return (made, self._sound_of(seed, 1)[0] * 0.5) if self.sound else made

    def empty(self, filled: Tensor | None = None) -> dict[str, Any]:
        """A LATENT: empty, or with these samples."""
        samples = torch.zeros(2 if self.frames else 1, *self.latent) if filled is None else filled
        if self.sound:
            samples = self._with_sound(samples, torch.zeros(len(samples), *self.sound))
        return {"samples": samples}

    def _sound_of(self, seed: int, batch: int) -> Tensor:
        return torch.randn(batch, *self.sound, generator=torch.Generator().manual_seed(1000 + seed))

    def _with_sound(self, video: Tensor, sound: Tensor) -> Any:
        nested: Any = importlib.import_module("comfy.nested_tensor")
        return nested.NestedTensor((video, sound))


def _fill(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if not weight.is_floating_point():
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise * min(0.16, weight[0].numel() ** -0.5))
            else:
                weight.copy_(noise * 0.02 + float(name.endswith(("weight", "scale", "gamma"))))
        stored = network.state_dict()
        for name, buffer in network.named_buffers():
            # Tables that files bring along; others are computed when a network is made.
            if name in stored and name.endswith("inv_freq"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator))
            elif name.endswith(("_conditioning", "pos_embed")):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


def _within_blocks(network: torch.nn.Module) -> set[str]:
    """Names of the matrices in a network's repeated blocks that every format takes."""
    return {
        name
        for block, module in checkpointing.blocks(network)
        for inner, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and divides(layer.weight)
        for name in [f"{block}.{inner}.weight" if inner else f"{block}.weight"]
    }


def _made(value: Any, generator: torch.Generator, length: int) -> Any:
    if isinstance(value, list):
        return torch.randn(*value, generator=generator)
    if not isinstance(value, dict):
        return value
    ((how, given),) = value.items()
    if how == "mask of the tokens":
        return torch.ones(1, length, dtype=torch.long)
    if how == "ones":
        return torch.ones(*given, dtype=torch.long if len(given) > 1 else torch.float32)
    if how == "zeros":
        return torch.zeros(*given)
    if how == "mask":
        return torch.randn(*given, generator=generator).gt(0).float()
    if how == "count":
        return (torch.arange(given[-1]) + 3).expand(given).clone()
    if how == "ids":
        return torch.tensor([given])
    if how == "list":
        return [torch.randn(*shape, generator=generator) for shape in given]
    assert how == "vision", how
    states = torch.randn(*given, generator=generator)
    return SimpleNamespace(penultimate_hidden_states=states, last_hidden_state=states)


_FIELDS = {"class": "kind", "with": "extra", "one length": "one_length", "frames are the batch": "frames",
           "fixed settings": "fixed", "too large": "too_large"}  # fmt: skip


def families() -> dict[str, Family]:
    """All rows of the file by their names."""
    rows = json.loads(ROWS.read_text(encoding="utf-8"))

    def whole(name: str) -> dict[str, Any]:
        row = dict(rows[name])
        base = whole(row.pop("like")) if "like" in row else {}
        without = {"class", *row.pop("-", ())}
        settings, own = dict(base.get("settings", {})), dict(row.get("settings", {}))
        left_out = own.pop("-", ())
        settings = {key: value for key, value in (settings | own).items() if key not in left_out}
        kept = {key: value for key, value in base.items() if key not in without}
        return {"class": name, **kept, **row, "settings": settings}

    found = {}
    for name in rows:
        given = {_FIELDS.get(key, key): value for key, value in whole(name).items()}
        for key in ("latent", "encoded", "tokens", "sound"):
            if key in given:
                given[key] = tuple(given[key])
        found[name] = Family(name, **given)
    return found


def models() -> list[Any]:
    """The classes of ComfyUI's models that denoise."""
    every: list[Any] = importlib.import_module("comfy.supported_models").models
    return [kind for kind in every if kind.__name__ not in NO_DIFFUSION]


def unknown() -> Iterator[str]:
    """Names of the models of this ComfyUI that no row is of."""
    known = {family.kind for family in families().values()}
    yield from (kind.__name__ for kind in models() if kind.__name__ not in known)
