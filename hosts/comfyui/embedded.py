"""The small model that comes with Retort, as ComfyUI's own MODEL, CLIP and VAE."""

from __future__ import annotations

import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.supported_models_base import ClipTarget

from ...models.loader import CHECKPOINTS, FOLDER
from ...models.text import TextEncoder, WordTokenizer
from . import photographs

TEXT = "digits_text.safetensors"


def load(variant: str):
    """(MODEL, CLIP, VAE) of a variant; ValueError for an unknown one, FileNotFoundError naming a missing file."""
    if variant == photographs.VARIANT:
        return photographs.load()
    if variant not in CHECKPOINTS:
        raise ValueError(f"variant {variant!r} is not known; choose one of {', '.join(CHECKPOINTS)}")
    file = _weights(CHECKPOINTS[variant])
    if variant.startswith("eps"):
        model = load_eps(file)
        # What clone(force_deepcopy=True) calls to read the weights again: training in a node depends on it.
        model.cached_patcher_init = (load_eps, (file,))
    else:
        model = comfy.sd.load_checkpoint_guess_config(file, output_vae=False, output_clip=False)[0]
    vae = comfy.sd.load_checkpoint_guess_config(_weights(CHECKPOINTS["flow"]), output_clip=False, output_model=False)[2]
    return model, load_clip(_weights(TEXT)), vae


def load_eps(file: str, disable_dynamic: bool = False):
    """MODEL of an eps twin: ComfyUI's SD3 network with Stable Diffusion's schedule in place of SD3's flow."""
    model = comfy.sd.load_checkpoint_guess_config(
        file, output_vae=False, output_clip=False, disable_dynamic=disable_dynamic
    )[0]
    eps = comfy.model_base.ModelType.EPS
    model.model.model_type = eps
    # SD3's settings hold only a shift, so the table comes out with Stable Diffusion's betas, the defaults.
    model.model.model_sampling = comfy.model_base.model_sampling(model.model.model_config, eps)
    return model


def load_clip(file: str, disable_dynamic: bool = False):
    """CLIP of the embedded text encoder, for the stock CLIPTextEncode."""
    weights = comfy.utils.load_torch_file(file, safe_load=True)
    clip = comfy.sd.CLIP(
        ClipTarget(Tokenizer, TextModel), state_dict=[weights], parameters=comfy.utils.calculate_parameters(weights),
        disable_dynamic=disable_dynamic,
    )  # fmt: skip
    clip.patcher.cached_patcher_init = (_clip_patcher, (file,))
    return clip


def add_model_folders() -> None:
    """Show the weights to the stock loaders: CheckpointLoaderSimple takes the flow twin, LoraLoader the students."""
    for kind in ("checkpoints", "loras"):
        folder_paths.add_model_folder_path(kind, str(FOLDER / kind))


class Tokenizer:
    """A word-level tokenizer in the shape that comfy.sd.CLIP calls."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        self.words = WordTokenizer()

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options):
        ids, weights = self.words.encode(text)
        if return_word_ids:
            return {"digits": [list(zip(ids, weights, range(1, len(ids) + 1), strict=True))]}
        return {"digits": [list(zip(ids, weights, strict=True))]}

    def state_dict(self):
        return {}


class TextModel(torch.nn.Module):
    """The text encoder in the shape that comfy.sd.CLIP calls; always fp32, since it is tiny."""

    # Plain Linear layers: nothing that ComfyUI could stream in pieces.
    disable_offload = True

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__()
        self.encoder = TextEncoder().to(device).requires_grad_(False)
        self.dtypes = {torch.float32}

    def set_clip_options(self, options):
        """There is nothing to set: one layer, one pooled output."""

    def reset_clip_options(self):
        """There is nothing to reset."""

    def encode_token_weights(self, tokens):
        """Token states (1, 16, 128) and pooled state (1, 128) of a weighted prompt."""
        ids, weights = zip(*(token[:2] for token in tokens["digits"][0]), strict=True)
        states, pooled = self.encoder.encode(list(ids), list(weights))
        device = comfy.model_management.intermediate_device()
        return states.to(device), pooled.to(device)

    def load_sd(self, weights):
        return self.encoder.load_state_dict(weights, strict=False)


def _weights(name: str) -> str:
    file = FOLDER / name
    if not file.is_file():
        raise FileNotFoundError(
            f"the embedded model's file {name} is missing from {FOLDER}: fetch the repository again, "
            "or make it with `python -m retort.models.build`"
        )
    return str(file)


def _clip_patcher(file: str, disable_dynamic: bool = False):
    return load_clip(file, disable_dynamic).patcher
