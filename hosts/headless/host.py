"""What nodes ask of the headless host."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.layouts.lora_state import alphas_of, with_alphas
from ...restoration.hidden import filled
from ...sampling.parts import Parts
from ...sampling.path import NoisePath
from ...sampling.schedule import FlowSchedule, FluxSchedule, Schedule
from ...trainers import export, sources
from ...trainers.dataset import Dataset, Entry
from ...trainers.decoder import Decoder
from .. import presets, prompted
from ..contract import LATENT, Host, Prediction
from ..methods import Method
from . import device, embedded, extra_paths, folders, job_base, pinned, residents, training, work
from .guider import Guider, cfgs
from .model import Clip, Conditioning, Lora, Model, Vae
from .noise import RandomNoise
from .outline import Outline, from_header, outlined_decoder
from .rewards import Held


def _version(package: str) -> str:
    """"" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


class Headless(Host):
    """Without ComfyUI. See `hosts.contract` for what each method promises."""

    NAME = "headless"
    VERSION = _version("diffusers")
    CANCELLED = KeyboardInterrupt

    def noise_path(self, model: Model) -> NoisePath:
        return model.path

    def schedule(self, model: Model) -> Schedule:
        return model.schedule

    def prediction(self, model: Model) -> Prediction:
        return model.prediction

    def latent_format(self, model: Model) -> tuple[int, int]:
        return model.latent.channels, model.latent.dims

    def model_kind(self, model: Model) -> str:
        return ""

    def with_shift(self, model: Model, shift: float, audio_shift: float | None = None) -> Model:
        if audio_shift is not None:
            raise ValueError(f"audio_shift {audio_shift:g} cannot be set: this model has no sound; load it in ComfyUI")
        old = model.schedule
        if isinstance(old, FlowSchedule):
            return replace(model, schedule=replace(old, shift=shift))
        if isinstance(old, FluxSchedule):
            # Flux writes the same curve with the exponential of its shift.
            return replace(model, schedule=FluxSchedule(math.log(shift)))
        raise ValueError(
            f"shift {shift:g} cannot be set: only flow models have a timestep shift, and this one predicts "
            f"{model.prediction}; load a flow model such as SD3 or Flux"
        )

    def sound_shifts(self, model: Model) -> tuple[float, float] | None:
        return None

    def with_noise_scale(self, model: Model, noise_scale: float) -> Model:
        if not isinstance(model.schedule, FlowSchedule):
            raise ValueError(
                f"noise_scale {noise_scale:g} cannot be set: this model's noise has no scale; load the flow model that "
                "the preset is for"
            )
        schedule = replace(model.schedule, noise_scale=noise_scale)
        return replace(model, schedule=schedule, path=NoisePath("FLOW", noise_scale))

    def with_x0_patch(self, model: Model, patch: Callable[[Tensor, Tensor], Tensor]) -> Model:
        return replace(model, patches=(*model.patches, patch))

    def with_lora(
        self, model: Model, name: str, strength: float, bypass: bool = False, note: Callable[[str], None] | None = None
    ) -> Model:
        if strength == 0:
            return model
        # Beside the layers in any case, where a network's weights are not our own copy.
        state = with_alphas(self.read_lora(name), alphas_of(self.lora_metadata(name)))
        return self.with_weights(model, state, name, strength)

    def with_weights(self, model: Model, lora: dict[str, Tensor], name: str, strength: float) -> Model:
        if strength == 0:
            return model
        patched = model.with_lora(Lora(name, lora, strength))
        # Loaded here, so that a LoRA that does not fit is told at once.
        return patched if patched.network is not None else model

    def embedded(self, variant: str) -> tuple[Model, Clip, Vae]:
        return embedded.load(variant)

    def picture_size(self, model: Model, latent: LATENT) -> tuple[int, int]:
        height, width = latent["samples"].shape[-2:]
        side = latent.get("downscale_ratio_spacial") or model.latent.downscale
        return width * side, height * side

    def latents_in(self, model: Model, samples: Tensor) -> Tensor:
        return work.latents_in(model, samples)

    def encode_text(self, clip: Clip, text: str) -> Conditioning:
        return clip.encode(text)

    @torch.no_grad()
    def encode_images(self, vae: Vae, images: Tensor) -> LATENT:
        return {"samples": vae.encode(filled(images))}

    @torch.no_grad()
    def decode(self, vae: Vae, samples: Tensor) -> Tensor:
        return vae.decode(samples)

    def differentiable_decoder(self, vae: Vae) -> Decoder:
        return Decoder(vae.network(), vae.decode)

    def hold(self, network: nn.Module) -> Held:
        return Held(network)

    def method_sampler(self, method: Method) -> Method:
        return method

    def block_sampler(self, frames: int) -> Method:
        raise ValueError("autoregressive video is sampled in ComfyUI alone: run the workflow there")

    def method_of(self, sampler: Method) -> Method:
        return sampler

    def random_noise(self, seed: int) -> RandomNoise:
        return RandomNoise(seed)

    def cfg_guider(
        self, model: Model, positive: Conditioning, negative: Conditioning | None, cfg: float, lowest: float = 0.0
    ) -> Guider:
        if negative is None and cfg != 1:
            raise ValueError(f"cfg {cfg:g} compares with a negative prompt: connect `negative`")
        return Guider(model, positive, negative, cfg, lowest)

    def with_guidance(self, conditioning: Conditioning, guidance: float) -> Conditioning:
        return [[embedding, {"guidance": guidance, **more}] for embedding, more in conditioning]

    def branches(self, guider: Guider, leg: bool = False) -> int:
        # The same wherever the guider stands: at cfg 0 the negative branch runs alone here.
        return sum(map(len, guider.branches()))

    def cfgs(self, guiders: Sequence[Guider]) -> tuple[float, ...] | None:
        return cfgs(guiders)

    def at_cfg(self, guider: Guider, cfg: float) -> Guider:
        return Guider(guider.model, guider.positive, guider.negative, cfg, guider.lowest)

    def sample(
        self, guider: Guider, sampler: Method, sigmas: Tensor, latent: LATENT, seed: int, noise: Tensor | None = None
    ) -> Tensor:
        start = {**latent, "samples": self.latents_of(guider, latent)}
        noise = RandomNoise(seed).generate_noise(start) if noise is None else noise
        with torch.inference_mode():
            return guider.sample(noise, start["samples"], sampler, sigmas, latent.get("noise_mask"), None, seed)

    def latents_of(self, guider: Guider, latent: LATENT) -> Tensor:
        return guider.model.latent.fitted(latent["samples"])

    def nested(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) > 1:
            raise ValueError("the latent holds several latents in one (video with sound), which only ComfyUI samples")
        return parts[0]

    def latents_out(self, guider: Guider, x0: Tensor, parts: Parts) -> Tensor:
        return guider.model.latent.process_out(x0.float())

    def trainable(self, model: Model, compute: torch.dtype | None = None) -> training.HeadlessDenoiser:
        residents.make_room()  # prompts and images are encoded by now
        return training.HeadlessDenoiser(model, compute)

    def outline(self, model: Model, compute: torch.dtype | None = None) -> Outline:
        return Outline(model, compute)

    def outlined_decoder(self, vae: Vae) -> Decoder:
        return outlined_decoder(vae)

    def from_header(
        self, path: Path, width: int, height: int, frames: int = 1, tokens: int = 0
    ) -> tuple[Model, Entry, tuple[int, ...]]:
        return from_header(path, width, height, frames, tokens)

    def training_session(self) -> AbstractContextManager[None]:
        return training.training_session()

    def empty_latent_shape(self, model: Model, samples: Tensor) -> tuple[int, ...]:
        return model.latent.channels, *samples.shape[2:]

    def output_change(self, model: Model, path: Path, dataset: Dataset) -> float:
        return training.output_change(model, path, dataset)

    def free_memory(self) -> int | None:
        where = device.device()
        if where.type == "cpu":
            return None
        module = torch.get_device_module(where)
        return module.mem_get_info(where)[0] if hasattr(module, "mem_get_info") else None

    def make_room(self) -> None:
        residents.make_room()

    def pin(self, tensor: Tensor) -> bool:
        # Half of the machine's memory at most, since what is pinned cannot be swapped out.
        return device.device().type == "cuda" and pinned.pin(tensor)

    def unpin(self, tensor: Tensor) -> None:
        pinned.unpin(tensor)

    def bf16(self) -> bool:
        return device.has_bf16()

    def statistics_folders(self) -> list[Path]:
        where = folders.current()
        own = where.own("gaussian_statistics") or [where.output / "gaussian_statistics"]
        return [*own, folders.EMBEDDED / "gaussian_statistics"]

    def rewards_folders(self) -> list[Path]:
        return folders.current().own("rewards")

    def captioners_folders(self) -> list[Path]:
        return folders.current().own("captioners")

    def presets_folders(self) -> list[Path]:
        return folders.current().own(presets.KIND)

    def input_folders(self) -> list[Path]:
        # A folder of inputs that is not there holds nothing.
        return list(folders.current().inputs) or [Path("input")]

    def loras_folder(self) -> Path:
        return folders.current().loras()[0]

    def runs_folder(self) -> Path:
        return folders.current().output / "retort"

    def search_records(self) -> None:
        """Nobody looks."""

    def lora_names(self) -> list[str]:
        return folders.current().names("loras")

    def read_lora(self, name: str) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            return export.read_lora(folders.current().model("loras", name))

    def lora_metadata(self, name: str) -> dict[str, str]:
        return export.lora_metadata(folders.current().model("loras", name))

    def lora_stamp(self, name: str) -> tuple[int, int]:
        return export.lora_stamp(folders.current().model("loras", name))

    def add_model_folders(self) -> None:
        """The headless loaders know the embedded weights already."""

    def describe_base(self, model: Model) -> sources.Base | None:
        return job_base.describe_base(model)

    def describe_vae(self, vae: Vae) -> sources.Vae | None:
        return vae.origin

    def merge_base(self, model: Model, folder: Path, file: str) -> sources.Base:
        raise ValueError(
            "model has another sampling than its file says, or a LoRA that is in no file, which a job cannot be told "
            "of: train in the node, or connect the MODEL from before that node"
        )

    def load_base(self, base: sources.Base, folder: Path) -> Model:
        return job_base.load_base(base)

    def load_vae(self, vae: sources.Vae) -> Vae:
        return job_base.load_vae(vae)

    def job_arguments(self) -> list[str]:
        where = folders.current()
        models = [part for root in where.models for part in ("--models", os.path.abspath(root))]
        configs = [part for path in where.configs for part in (extra_paths.OPTION, os.path.abspath(path))]
        return [*models, *configs, "--output", str(where.output.resolve())]

    def progress(self, total: int) -> work.Progress:
        return work.Progress(total)

    def check_cancelled(self) -> None:
        """Ctrl+C raises by itself."""

    def say(self, text: str, warn: bool = False) -> None:
        work.say(text, warn)

    def prompted(self) -> dict[str, Any] | None:
        return prompted.inputs_of(prompted.NODE.get())

    def add_routes(self, sets: Callable[[], Path]) -> None:
        """No page is served here: what waits is answered in ComfyUI, or through `preferences.tickets`."""


host = Headless()
