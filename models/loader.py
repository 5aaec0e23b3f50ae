"""Load the embedded weights: networks as plain torch modules, checked files only."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from . import layout
from .autoencoder import Autoencoder, cut
from .judge import Judge
from .layouts.lora_names import Note, for_network, merged
from .photo_eye import Eye
from .photo_network import PhotoNetwork, PhotoText
from .text import TextEncoder

# Stock loaders list whole folders, so only what they load rightly lies in `checkpoints` and `loras`: an eps twin, whose
# layout they would take for a flow model, does not.
FOLDER = Path(__file__).resolve().parent
CHECKPOINTS = {
    "flow": "checkpoints/digits_flow.safetensors",
    "eps": "digits_eps.safetensors",
    "flow early": "checkpoints/digits_flow_early.safetensors",
    "eps early": "digits_eps_early.safetensors",
}
# Twin, method, calls; made by `python -m retort.benchmarks.distillation --train --ship`.
STUDENTS = {
    name: f"loras/digits_{name}.safetensors"
    for name in (
        "flow_dmd2_1step", "flow_dmd2_4step", "flow_js_1step", "flow_fkl_1step", "flow_tdm_4step", "flow_di_star_1step",
        "eps_dmd2_1step", "eps_tdm_4step",
    )
}  # fmt: skip
# The photograph restorer and its words; made by `python -m retort.models.build_photos`.
PHOTOGRAPHS, PHOTO_EYE = "photographs.safetensors", "photo_eye.safetensors"
JUDGE, CAPTIONER = "digits_judge.safetensors", "digits_captioner.safetensors"
# Made by `python -m retort.benchmarks.restoration --train --ship`.
RESTORERS = {"flow_restorer": "loras/digits_flow_restorer.safetensors"}
STATISTICS = "gaussian_statistics/digits.safetensors"
# Made by `python -m retort.benchmarks.style --ship`.
STYLES = {"flow_bold": "loras/digits_flow_bold.safetensors"}
NETWORK_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors; ValueError when it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); if it came with Retort, reinstall it") from error


def _read(name: str) -> dict[str, torch.Tensor]:
    return read_state(FOLDER / name)


def _part(name: str, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v.float() for k, v in _read(name).items() if k.startswith(prefix)}


def network_state(variant: str) -> dict[str, torch.Tensor]:
    """The SD3-layout state dict (fp32) of a variant of CHECKPOINTS."""
    if variant not in CHECKPOINTS:
        raise ValueError(f'variant is "{variant}"; use one of {", ".join(CHECKPOINTS)}')
    return _part(CHECKPOINTS[variant], NETWORK_PREFIX)


class Transformer(nn.Module):
    """diffusers' SD3 transformer behind ComfyUI's argument names."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        self.network = layout.network()
        self.network.load_state_dict(layout.from_sd3_layout(state))
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x (B, 16, h, w), timesteps (B,) in 0..1000, context (B, L, 128), y (B, 128) -> (B, 16, h, w)."""
        return self.network(x, context, y, timesteps, return_dict=False)[0]


def merge_lora(
    state: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], strength: float, note: Note | None = None
) -> dict[str, torch.Tensor]:
    """An SD3-layout state dict with a LoRA merged in: W + strength * alpha / rank * B A.

    Accepts diffusers' names (`transformer.*`), ComfyUI's (`diffusion_model.*`) and kohya's (`lora_unet_*`). Raises
    ValueError where no layer is the network's, naming one; of some that are not, `note`, or the log, is told.
    """
    converted = layout.from_sd3_layout(state)
    modules = {name.rpartition(".")[0] for name in converted}
    named = for_network(lora, layout.TABLE, modules, note)
    return layout.to_sd3_layout({**converted, **dict(merged(converted, named, strength))})


def load_transformer(
    variant: str, loras: tuple[tuple[dict[str, torch.Tensor], float], ...] = (), note: Note | None = None
) -> Transformer:
    """The network of a variant in fp32, with LoRA state dicts merged at their strengths."""
    state = network_state(variant)
    for lora, strength in loras:
        state = merge_lora(state, lora, strength, note)
    return Transformer(state)


def load_autoencoder() -> Autoencoder:
    """The autoencoder in fp32."""
    return cut(_part(CHECKPOINTS["flow"], VAE_PREFIX)).eval().requires_grad_(False)


def load_text_encoder() -> TextEncoder:
    """The text encoder in fp32."""
    model = TextEncoder()
    model.load_state_dict({k: v.float() for k, v in _read("digits_text.safetensors").items()})
    return model.eval().requires_grad_(False)


def load_judge(file: str = JUDGE) -> Judge:
    """The judge in fp32; CAPTIONER is the one that reads damaged digits."""
    model = Judge()
    model.load_state_dict({k: v.float() for k, v in _read(file).items()})
    return model.eval().requires_grad_(False)


def load_photographs() -> tuple[PhotoNetwork, PhotoText]:
    """The photograph restorer and its text encoder, in fp32."""
    network, words = PhotoNetwork(), PhotoText()
    network.load_state_dict(_part(PHOTOGRAPHS, "network."))
    words.load_state_dict(_part(PHOTOGRAPHS, "text."))
    return network.eval().requires_grad_(False), words.eval().requires_grad_(False)


def load_photo_eye() -> Eye:
    """What compares photographs, in fp32."""
    state = {k: v.float() for k, v in _read(PHOTO_EYE).items()}
    eye = Eye(len(state["which.bias"]))
    eye.load_state_dict(state)
    return eye.eval().requires_grad_(False)


def load_restorer(name: str) -> dict[str, torch.Tensor]:
    """The LoRA of a restorer of RESTORERS."""
    return _read(RESTORERS[name])


def load_student(name: str) -> dict[str, torch.Tensor]:
    """The LoRA of a student of STUDENTS."""
    return _read(STUDENTS[name])
