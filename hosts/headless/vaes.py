"""VAEs of real checkpoints: Stable Diffusion's AutoencoderKL in either layout, and TAESD's 16-channel layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...files.errors import UsageError
from ...models.autoencoder import CHANNELS, Autoencoder
from ...models.layouts import vae as layout_vae
from .model import LatentFormat, Vae
from .residents import lent


def from_state(state: dict[str, Tensor]) -> Vae:
    """VAE of a state dict without prefixes. UsageError for one of another kind."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if "taesd_decoder.1.weight" in shapes:
        return _taesd(state)
    if not layout_vae.is_vae(shapes):
        raise UsageError("this is no VAE of SD1.5, SDXL, SD3 or Flux; other VAEs need ComfyUI")
    from diffusers import AutoencoderKL

    config = layout_vae.config(shapes)
    converted, _ = layout_vae.layout(config).convert(state)
    module: Any = AutoencoderKL(**config)
    missing, _ = module.load_state_dict({k: v.float() for k, v in converted.items()}, strict=False)
    if missing:
        raise UsageError(f"the VAE lacks {len(missing)} tensors, such as {missing[0]}; download the file again")
    return from_module(module)


def from_module(module: Any) -> Vae:
    """VAE of diffusers' AutoencoderKL; latents are the raw ones, as ComfyUI stores them."""
    module = module.eval().requires_grad_(False)

    def encode(images: Tensor) -> Tensor:
        with lent(module) as where:
            return module.encode(images.to(where) * 2.0 - 1.0).latent_dist.mode().cpu()

    def decode(latents: Tensor) -> Tensor:
        with lent(module) as where:
            return decodes(module, latents.to(where)).cpu()

    def decodes(made: Any, latents: Tensor) -> Tensor:
        return (made.decode(latents, return_dict=False)[0] + 1.0) / 2.0

    downscale = 2 ** (len(module.config["block_out_channels"]) - 1)
    channels = module.config["latent_channels"]
    return Vae(encode, decode, channels, downscale, batch=4, network=lambda: module, decodes=decodes)


def _taesd(state: dict[str, Tensor]) -> Vae:
    channels = state["taesd_decoder.1.weight"].shape[1]
    if channels != CHANNELS:
        raise UsageError(f"this TAESD has {channels} channels; the headless host reads those of {CHANNELS}")
    scale, shift = (float(state.get(f"vae_{name}", default)) for name, default in (("scale", 1.0), ("shift", 0.0)))
    module = Autoencoder()
    module.load_state_dict({k: v.float() for k, v in state.items() if k not in ("vae_scale", "vae_shift")})
    module.eval().requires_grad_(False)
    form = LatentFormat(channels, scale=scale, shift=shift)

    def encode(images: Tensor) -> Tensor:
        with lent(module) as where:
            return form.process_out(module.encode(images.to(where))).cpu()

    def decode(latents: Tensor) -> Tensor:
        with lent(module) as where:
            return decodes(module, latents.to(where)).cpu()

    def decodes(made: Any, latents: Tensor) -> Tensor:
        return made.decode(form.process_in(latents))

    return Vae(
        encode,
        decode,
        channels=channels,
        network=lambda: module,
        decodes=decodes,
    )
