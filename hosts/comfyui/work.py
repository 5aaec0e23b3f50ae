"""What nodes ask of ComfyUI besides the model: pictures, progress, folders, memory, and whether to stop."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...models.loader import FOLDER
from ...trainers import export
from ...trainers.decoder import Decoder
from ...trainers.sources import ENDINGS, checked_path
from ..search import files as search_files

# As large as ComfyUI shows a preview on a node.
PREVIEW = 512
STATISTICS = "gaussian_statistics"
CAPTIONERS = "captioners"
_log = logging.getLogger("retort")


def decode(vae, samples: Tensor) -> Tensor:
    """See `hosts.api`."""
    # The VAE belongs to a node, and so to inference mode.
    with torch.inference_mode():
        images = vae.decode(samples)
    images = images.reshape(-1, *images.shape[-3:])
    with torch.inference_mode(False):
        return images.float().cpu().clone().clamp(0, 1)


def encode_text(clip, text: str) -> list:
    """See `hosts.api`."""
    if clip is None:
        raise ValueError("clip is empty: the checkpoint holds no text encoder; load one with Load CLIP")
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def process_in(network, samples: Tensor) -> Tensor:
    """LATENT samples (B, C, ...) in the scale of a BaseModel, fp32 on the CPU; ValueError for other channels."""
    form = network.latent_format
    if samples.shape[1] != form.latent_channels:
        raise ValueError(
            f"the latents have {samples.shape[1]} channels and the model takes {form.latent_channels}: encode the "
            "images with the VAE that belongs to the model"
        )
    with torch.inference_mode(False):
        samples = samples.detach().clone().float().cpu()
        if form.latent_dimensions == 3 and samples.ndim == 4:
            samples = samples.unsqueeze(2)
        return network.process_latent_in(samples)


def latents_in(model, samples: Tensor) -> Tensor:
    """See `hosts.api`."""
    return process_in(model.model, samples)


def encode_images(vae, images: Tensor) -> dict[str, Tensor]:
    """See `hosts.api`."""
    with torch.inference_mode():
        return {"samples": vae.encode(images[..., :3])}


def differentiable_decoder(vae) -> Decoder:
    """See `hosts.api`."""
    if vae.patcher.cached_patcher_init is None:
        raise ValueError("vae cannot be read a second time: load it with Load VAE or Load Checkpoint")
    with torch.inference_mode(False):
        patcher = vae.patcher.clone(disable_dynamic=True, force_deepcopy=True)
        return decoder_of(vae, patcher.patch_model(vae.device, lowvram_model_memory=0).requires_grad_(False))


def decoder_of(vae, network) -> Decoder:
    """A VAE's decoder on a network of its kind."""

    def decode_with_gradients(latents: Tensor) -> Tensor:
        pixels = network.decode(latents.to(vae.device, vae.vae_dtype)).float()
        # ComfyUI maps to 0..1 in place, which the graph forbids on the network's own output.
        return vae.process_output(pixels.clone()).movedim(1, -1)[..., :3]

    return Decoder(network, decode_with_gradients)


class Progress:
    """The bar of the running node; see `hosts.api`."""

    def __init__(self, total: int):
        self.total = total
        self._bar = comfy.utils.ProgressBar(total)

    def step(self, done: int, preview: Image.Image | None = None, text: str = "") -> None:
        """`done` of `total` steps are finished; show a picture and a line on the node."""
        self._bar.update_absolute(done, self.total, None if preview is None else ("JPEG", preview, PREVIEW))
        if text:
            show(text)


def say(text: str, warn: bool = False) -> None:
    """See `hosts.api`."""
    _log.log(logging.WARNING if warn else logging.INFO, text)
    show(text)


def show(text: str) -> None:
    """A line on the running node; nothing where no server runs."""
    context = get_executing_context()
    if context is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, context.node_id)


def check_cancelled() -> None:
    """See `hosts.api`."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def free_memory() -> int | None:
    """See `hosts.api`."""
    device = comfy.model_management.get_torch_device()
    return None if device.type == "cpu" else int(comfy.model_management.get_free_memory(device))


def make_room() -> None:
    """See `hosts.api`."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache(force=True)


def pin(tensor: Tensor) -> bool:
    """See `hosts.api`; within the budget that ComfyUI keeps."""
    return bool(comfy.model_management.pin_memory(tensor))


def unpin(tensor: Tensor) -> None:
    """See `hosts.api`."""
    comfy.model_management.unpin_memory(tensor)


def bf16() -> bool:
    """See `hosts.api`."""
    return bool(comfy.model_management.should_use_bf16(comfy.model_management.get_torch_device()))


def loras_folder() -> Path:
    """See `hosts.api`."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def runs_folder() -> Path:
    """See `hosts.api`."""
    return Path(folder_paths.get_output_directory()) / "retort"


def saved_searches() -> Path:
    """Where Save Search writes."""
    return runs_folder().with_name(search_files.FOLDER)


def search_records() -> Path:
    """See `hosts.api`; ComfyUI empties the folder when it starts."""
    return Path(folder_paths.get_temp_directory()) / "retort_searches"


def add_statistics_folder() -> None:
    """Make models/gaussian_statistics known to ComfyUI, and what comes with Retort after it."""
    for root in (Path(folder_paths.models_dir), FOLDER):
        folder_paths.add_model_folder_path(STATISTICS, str(root / STATISTICS))


def statistics_folders() -> list[Path]:
    """See `hosts.api`."""
    if STATISTICS not in folder_paths.folder_names_and_paths:
        add_statistics_folder()
    return [Path(path) for path in folder_paths.get_folder_paths(STATISTICS)]


def add_captioners_folder() -> None:
    """Make models/captioners known to ComfyUI, so that extra_model_paths.yaml can add to it."""
    folder_paths.add_model_folder_path(CAPTIONERS, str(Path(folder_paths.models_dir) / CAPTIONERS))


def captioners_folders() -> list[Path]:
    """See `hosts.api`."""
    if CAPTIONERS not in folder_paths.folder_names_and_paths:
        add_captioners_folder()
    return [Path(path) for path in folder_paths.get_folder_paths(CAPTIONERS)]


def input_folders() -> list[Path]:
    """See `hosts.api`."""
    return [Path(folder_paths.get_input_directory())]


def lora_names() -> list[str]:
    """See `hosts.api`."""
    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(ENDINGS)]


def read_lora(name: str) -> dict[str, Tensor]:
    """See `hosts.api`."""
    checked_path(name, "LoRA")
    with torch.inference_mode(False):
        return export.read_lora(Path(folder_paths.get_full_path_or_raise("loras", name)))
