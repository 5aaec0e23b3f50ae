"""The small model that comes with Retort, as ComfyUI's own MODEL, CLIP and VAE."""

from __future__ import annotations

import comfy.model_base
import comfy.sd
import comfy.utils
import folder_paths

from ...models import layout
from ...models.loader import CHECKPOINTS, FOLDER
from ...models.text import TextEncoder, WordTokenizer
from . import photographs, words

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
    model.model.diffusion_model.register_forward_pre_hook(refuse_large)
    vae = comfy.sd.load_checkpoint_guess_config(_weights(CHECKPOINTS["flow"]), output_clip=False, output_model=False)[2]
    return model, load_clip(_weights(TEXT)), vae


def refuse_large(network, inputs) -> None:
    """See `models.layout`; core's own network ends with an assertion."""
    layout.refuse_large(*inputs[0].shape[-2:])


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
    clip = words.clip_of(Tokenizer, TextModel, weights, disable_dynamic)
    clip.patcher.cached_patcher_init = (_clip_patcher, (file,))
    return clip


def add_model_folders() -> None:
    """Show the weights to the stock loaders: CheckpointLoaderSimple takes the flow twin, LoraLoader the students."""
    for kind in ("checkpoints", "loras"):
        folder_paths.add_model_folder_path(kind, str(FOLDER / kind))


class Tokenizer(words.Tokenizer):
    """Words of the digits' prompts."""

    key = "digits"

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        self.words = WordTokenizer()


class TextModel(words.TextModel):
    """The digits' text encoder."""

    key, Encoder = "digits", TextEncoder


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
