"""What nodes ask of ComfyUI."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import comfyui_version
import folder_paths
import torch
from comfy.nested_tensor import NestedTensor
from torch import Tensor, nn

from ...models.loader import FOLDER
from ...restoration.hidden import filled
from ...sampling.parts import Parts, Shape, parts_of, row, shape_of
from ...sampling.path import NoisePath
from ...trainers import export, sources
from ...trainers.dataset import Dataset, Entry
from ...trainers.decoder import Decoder
from .. import presets
from ..contract import CLIP, CONDITIONING, GUIDER, LATENT, MODEL, NOISE, SAMPLER, VAE, Host, Prediction
from ..methods import Method
from ..search import files as search_files
from . import (
    bare,
    coordinates,
    data_routes,
    embedded,
    fresh_folders,
    guard,
    help_routes,
    job_base,
    loras,
    model_files,
    phone_routes,
    picker_routes,
    preference_routes,
    refusals,
    run_routes,
    search_routes,
    template_order,
    training,
    work,
)
from .guiders import branches, cfgs, unconditional
from .outline import Outline, outlined_decoder
from .parts import packed
from .rewards import Held
from .sampler import FirstOfTwo, MethodSampler

# Folders below models that are ours, which extra_model_paths.yaml can add to.
STATISTICS, REWARDS, CAPTIONERS = "gaussian_statistics", "rewards", "captioners"


class ComfyUI(Host):
    """The ComfyUI that has imported us. See `hosts.contract` for what each method promises."""

    NAME = "comfyui"
    VERSION = comfyui_version.__version__
    CANCELLED = comfy.model_management.InterruptProcessingException

    def noise_path(self, model: MODEL) -> NoisePath:
        return coordinates.path_of(self.schedule(model))

    def schedule(self, model: MODEL) -> Any:
        return model.get_model_object("model_sampling")

    def prediction(self, model: MODEL) -> Prediction:
        return coordinates.prediction_of(self.schedule(model))

    def latent_format(self, model: MODEL) -> tuple[int, int]:
        form = model.get_model_object("latent_format")
        return form.latent_channels, form.latent_dimensions

    def model_kind(self, model: MODEL) -> str:
        return type(model.model.model_config).__name__

    def with_shift(self, model: MODEL, shift: float, audio_shift: float | None = None) -> MODEL:
        return coordinates.with_shift(model, shift, audio_shift)

    def sound_shifts(self, model: MODEL) -> tuple[float, float] | None:
        return coordinates.sound_shifts(model)

    def with_noise_scale(self, model: MODEL, noise_scale: float) -> MODEL:
        return coordinates.with_noise_scale(model, noise_scale)

    def with_x0_patch(self, model: MODEL, patch: Callable[[Tensor, Tensor], Tensor]) -> MODEL:
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(lambda args: patch(args["denoised"], args["sigma"]))
        return clone

    def with_lora(
        self, model: MODEL, name: str, strength: float, bypass: bool = False, note: Callable[[str], None] | None = None
    ) -> MODEL:
        if strength == 0:
            return model
        lora, metadata = self.read_lora(name), self.lora_metadata(name)

        def say(text: str) -> None:
            self.say(text, warn=True)
            if note is not None:
                note(text)

        return loras.applied(model, lora, metadata, strength, say, bypass, f"the LoRA {name}")

    def with_weights(self, model: MODEL, lora: dict[str, Tensor], name: str, strength: float) -> MODEL:
        if strength == 0:
            return model
        return loras.applied(model, lora, {}, strength, partial(self.say, warn=True), what=f"the LoRA {name}")

    def embedded(self, variant: str) -> tuple[MODEL, CLIP, VAE]:
        return embedded.load(variant)

    def picture_size(self, model: MODEL, latent: LATENT) -> tuple[int, int]:
        samples = latent["samples"]
        samples = samples.unbind()[0] if samples.is_nested else samples
        side = latent.get("downscale_ratio_spacial") or model.get_model_object("latent_format").spacial_downscale_ratio
        return samples.shape[-1] * side, samples.shape[-2] * side

    def latents_in(self, model: MODEL, samples: Tensor) -> Tensor:
        return work.process_in(model.model, samples)

    def encode_text(self, clip: CLIP, text: str) -> CONDITIONING:
        if clip is None:
            raise ValueError("clip is empty: the checkpoint holds no text encoder; load one with Load CLIP")
        with torch.inference_mode():
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    def encode_images(self, vae: VAE, images: Tensor) -> LATENT:
        with torch.inference_mode():
            return {"samples": vae.encode(filled(images)[..., :3])}

    def decode(self, vae: VAE, samples: Any) -> Tensor:
        # The VAE belongs to a node, and so to inference mode.
        with torch.inference_mode():
            images = vae.decode(parts_of(samples)[0])
        images = images.reshape(-1, *images.shape[-3:])
        with torch.inference_mode(False):
            return images.float().cpu().clone().clamp(0, 1)

    def differentiable_decoder(self, vae: VAE) -> Decoder:
        if vae.patcher.cached_patcher_init is None:
            raise ValueError("vae cannot be read a second time: load it with Load VAE or Load Checkpoint")
        with torch.inference_mode(False):
            patcher = vae.patcher.clone(disable_dynamic=True, force_deepcopy=True)
            network = patcher.patch_model(vae.device, lowvram_model_memory=0).requires_grad_(False)
            return work.decoder_of(vae, network)

    def hold(self, network: nn.Module) -> Held:
        return Held(network)

    def method_sampler(self, method: Method) -> MethodSampler:
        return MethodSampler(method)

    def block_sampler(self, frames: int) -> SAMPLER:
        return comfy.samplers.ksampler("ar_video", {"num_frame_per_block": frames})

    def method_of(self, sampler: SAMPLER) -> Method | None:
        return sampler.method if isinstance(sampler, MethodSampler) else None

    def random_noise(self, seed: int) -> NOISE:
        # Core reads its own nodes by file path, so this is a second copy, made when it is first needed.
        from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

        return Noise_RandomNoise(seed)

    def cfg_guider(
        self, model: MODEL, positive: CONDITIONING, negative: CONDITIONING | None, cfg: float, lowest: float = 0.0
    ) -> GUIDER:
        guider = FirstOfTwo(model, lowest) if lowest else comfy.samplers.CFGGuider(model)
        if negative is None:
            if cfg != 1:
                raise ValueError(f"cfg {cfg:g} compares with a negative prompt: connect `negative`")
            guider.inner_set_conds({"positive": positive})
        else:
            guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return guider

    def with_guidance(self, conditioning: CONDITIONING, guidance: float) -> CONDITIONING:
        return [[embedding, {"guidance": guidance, **more}] for embedding, more in conditioning]

    def branches(self, guider: GUIDER, leg: bool = False) -> int:
        if leg and unconditional(guider):
            return len(guider.original_conds["negative"])
        return branches(guider, guider.original_conds)

    def cfgs(self, guiders: Sequence[GUIDER]) -> tuple[float, ...] | None:
        return cfgs(guiders)

    def at_cfg(self, guider: GUIDER, cfg: float) -> GUIDER:
        made = copy.copy(guider)
        made.set_cfg(cfg)
        return made

    def sample(
        self, guider: GUIDER, sampler: SAMPLER, sigmas: Tensor, latent: LATENT, seed: int, noise: Any = None
    ) -> Any:
        samples = self.latents_of(guider, latent)
        if noise is None:
            noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
        found = guider.sample(
            noise, samples, sampler, sigmas, denoise_mask=latent.get("noise_mask"), callback=None,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
        )  # fmt: skip
        return found.to(comfy.model_management.intermediate_device())

    def latents_of(self, guider: GUIDER, latent: LATENT) -> Any:
        spacial, temporal = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
        return comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"], spacial, temporal)

    def nested(self, parts: Sequence[Tensor]) -> Any:
        return parts[0] if len(parts) == 1 else NestedTensor(parts)

    def latents_out(self, guider: GUIDER, x0: Tensor, parts: Parts) -> Any:
        model = guider.model_patcher.model
        with packed(model, parts):
            out = model.process_latent_out(x0.float()).to(comfy.model_management.intermediate_device())
        return self.nested(parts.unpack(out))

    def trainable(self, model: MODEL, compute: torch.dtype | None = None) -> training.ComfyDenoiser:
        return training.trainable(model, compute)

    def outline(self, model: MODEL, compute: torch.dtype | None = None) -> Outline:
        return Outline(model, compute)

    def outlined_decoder(self, vae: VAE) -> Decoder:
        return outlined_decoder(vae)

    def from_header(
        self, path: Path, width: int, height: int, frames: int = 1, tokens: int = 0
    ) -> tuple[MODEL, Entry, tuple[int, ...]]:
        model = bare.from_file(path)
        return model, bare.prompt_of(model, tokens), bare.latent_of(model, width, height, frames)

    def training_session(self) -> AbstractContextManager[None]:
        return training.training_session()

    def empty_latent_shape(self, model: MODEL, samples: Any) -> Shape:
        empty = self.nested([torch.zeros_like(part) for part in parts_of(samples)])
        return shape_of(row(comfy.sample.fix_empty_latent_channels(model, empty), 0))

    def output_change(self, model: MODEL, path: Path, dataset: Dataset) -> float:
        return training.output_change(model, path, dataset)

    def free_memory(self) -> int | None:
        device = comfy.model_management.get_torch_device()
        if device.type == "cpu":
            return None
        # What its user keeps for other programs.
        kept = comfy.cli_args.args.reserve_vram or 0.0
        return max(0, int(comfy.model_management.get_free_memory(device) - kept * 2**30))

    def make_room(self) -> None:
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache(force=True)

    def pin(self, tensor: Tensor) -> bool:
        # Within the budget that ComfyUI keeps.
        return bool(comfy.model_management.pin_memory(tensor))

    def unpin(self, tensor: Tensor) -> None:
        comfy.model_management.unpin_memory(tensor)

    def bf16(self) -> bool:
        return work.bf16()

    def statistics_folders(self) -> list[Path]:
        return _folders(STATISTICS)

    def rewards_folders(self) -> list[Path]:
        return _folders(REWARDS)

    def captioners_folders(self) -> list[Path]:
        return _folders(CAPTIONERS)

    def presets_folders(self) -> list[Path]:
        return _folders(presets.KIND)

    def input_folders(self) -> list[Path]:
        return [Path(folder_paths.get_input_directory())]

    def loras_folder(self) -> Path:
        return Path(folder_paths.get_folder_paths("loras")[0])

    def runs_folder(self) -> Path:
        return Path(folder_paths.get_output_directory()) / "retort"

    def search_records(self) -> Path:
        return self.runs_folder().with_name(search_files.FOLDER) / "records"

    def lora_names(self) -> list[str]:
        return model_files.names("loras")

    def read_lora(self, name: str) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            return export.read_lora(model_files.path_of("loras", name))

    def lora_metadata(self, name: str) -> dict[str, str]:
        return export.lora_metadata(model_files.path_of("loras", name))

    def lora_stamp(self, name: str) -> tuple[int, int]:
        return export.lora_stamp(model_files.path_of("loras", name))

    def add_model_folders(self) -> None:
        embedded.add_model_folders()
        for kind in (REWARDS, CAPTIONERS, STATISTICS, presets.KIND):
            _add_folder(kind)

    def describe_base(self, model: MODEL) -> sources.Base | None:
        return job_base.describe_base(model)

    def describe_vae(self, vae: VAE) -> sources.Vae | None:
        return job_base.describe_vae(vae)

    def merge_base(self, model: MODEL, folder: Path, file: str) -> sources.Base:
        return job_base.merge_base(model, folder, file)

    def load_base(self, base: sources.Base, folder: Path) -> MODEL:
        return job_base.load_base(base, folder)

    def load_vae(self, vae: sources.Vae) -> VAE:
        return job_base.load_vae(vae)

    def job_arguments(self) -> list[str]:
        return job_base.job_arguments()

    def progress(self, total: int) -> work.Progress:
        return work.Progress(total)

    def check_cancelled(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def say(self, text: str, warn: bool = False) -> None:
        work.say(text, warn)

    def prompted(self) -> dict[str, Any] | None:
        return refusals.prompted()

    def add_routes(self, sets: Callable[[], Path]) -> None:
        from server import PromptServer

        fresh_folders.watch(importlib.import_module("nodes").NODE_CLASS_MAPPINGS, lambda: self.input_folders()[0])
        if "instance" in vars(PromptServer):  # a server runs
            refusals.listen(PromptServer.instance, self.presets_folders)
            template_order.listen(PromptServer.instance.app)
            guard.listen_at(comfy.cli_args.args.listen.split(","))
            table = PromptServer.instance.routes
            help_routes.add(table)
            picker_routes.add(table, sets)
            args = comfy.cli_args.args
            phone_routes.add(table, lambda: (args.listen, PromptServer.instance.port, bool(args.tls_keyfile)))
            preference_routes.add(table, sets)
            data_routes.add(table, sets, lambda: self.input_folders()[0])
            run_routes.add(table, self.runs_folder, self.loras_folder)
            search_routes.add(
                table, self.search_records, lambda: self.runs_folder().with_name(search_files.FOLDER),
                lambda: self.input_folders()[0],
            )  # fmt: skip


def _add_folder(kind: str) -> None:
    """Make a folder of ours below models known to ComfyUI, and of statistics what comes with Retort after it."""
    name = presets.FOLDER if kind == presets.KIND else kind
    folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / name))
    if kind == STATISTICS:
        folder_paths.add_model_folder_path(kind, str(FOLDER / kind))


def _folders(kind: str) -> list[Path]:
    if kind not in folder_paths.folder_names_and_paths:
        _add_folder(kind)
    return [Path(path) for path in folder_paths.get_folder_paths(kind)]


host = ComfyUI()
