"""The photograph restorer that comes with Retort, as ComfyUI's own MODEL, CLIP and VAE; its latents are pixels."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch

from ...models import photo_network
from ...models.loader import FOLDER, PHOTOGRAPHS
from . import words

VARIANT = "photographs"
NETWORK, TEXT = "network.", "text."


class Pixels(comfy.latent_formats.LatentFormat):
    """RGB in -1 .. 1."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class Config(comfy.supported_models_base.BASE):
    """What ComfyUI asks of a model family."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings = {"shift": 1.0}
    latent_format = Pixels
    memory_usage_factor = 0.2


class Network(photo_network.PhotoNetwork):
    """Takes what ComfyUI gives every network, and leaves what it does not know."""

    def forward(self, x, timesteps, context=None, y=None, **others):  # type: ignore[override]  # ComfyUI's order
        """x (B, 3, H, W), timesteps (B,), y (B, 128)."""
        return super().forward(x, timesteps, y)


class PhotoModel(comfy.model_base.BaseModel):
    """Flow matching, told the pooled caption."""

    def __init__(self, config, device=None):
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=Network)

    def extra_conds(self, **given):
        """The pooled caption alone."""
        found = super().extra_conds(**given)
        pooled = given.get("pooled_output")
        if pooled is None or pooled.shape[-1] != photo_network.WIDTH:
            raise ValueError(
                "this CONDITIONING comes from another text encoder; use the CLIP of RetortEmbeddedModel, variant "
                "photographs"
            )
        found["y"] = comfy.conds.CONDRegular(pooled)
        return found


def load():
    """(MODEL, CLIP, VAE); FileNotFoundError naming a missing file."""
    file = _weights()
    model = load_network(file)
    model.cached_patcher_init = (load_network, (file,))
    return model, load_clip(file), load_vae()


def load_network(file: str, disable_dynamic: bool = False):
    """MODEL of the file's network."""
    management = comfy.model_management
    state = comfy.utils.load_torch_file(file, safe_load=True)
    weights = {k.removeprefix(NETWORK): v for k, v in state.items() if k.startswith(NETWORK)}
    config, device = Config({}), management.get_torch_device()
    kinds = config.supported_inference_dtypes
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights), supported_dtypes=kinds, device=device
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, kinds), device=device)
    offload = management.unet_offload_device()
    model = PhotoModel(config, device=offload)
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    made = patcher(model, load_device=device, offload_device=offload)
    model.load_model_weights({k: v.to(dtype) for k, v in weights.items()}, assign=made.is_dynamic())
    return made


def load_clip(file: str, disable_dynamic: bool = False):
    """CLIP of the file's text encoder."""
    state = comfy.utils.load_torch_file(file, safe_load=True)
    weights = {k.removeprefix(TEXT): v.float() for k, v in state.items() if k.startswith(TEXT)}
    clip = words.clip_of(Tokenizer, TextModel, weights, disable_dynamic)
    clip.patcher.cached_patcher_init = (_clip_patcher, (file,))
    return clip


def load_vae():
    """ComfyUI's VAE of models that work on pixels: it changes their scale and nothing else."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


class Tokenizer(words.Tokenizer):
    """Words of the captions."""

    key = "photographs"

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        self.words = photo_network.PhotoTokenizer()


class TextModel(words.TextModel):
    """The captions' embedding."""

    key, Encoder = "photographs", photo_network.PhotoText


def _weights() -> str:
    file = FOLDER / PHOTOGRAPHS
    if not file.is_file():
        raise FileNotFoundError(
            f"the photograph restorer's file {PHOTOGRAPHS} is missing from {FOLDER}: fetch the repository again, or "
            "make it with `python -m retort.models.build_photos`"
        )
    return str(file)


def _clip_patcher(file: str, disable_dynamic: bool = False):
    return load_clip(file, disable_dynamic).patcher
