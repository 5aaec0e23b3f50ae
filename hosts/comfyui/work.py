"""Pictures, progress and texts in ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import comfy.model_management
import comfy.utils
import torch
from comfy.latent_formats import LatentFormat
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...trainers.decoder import Decoder

# As large as ComfyUI shows a preview on a node.
PREVIEW = 512
_log = logging.getLogger("retort")


def whole(form, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one latent (C, H, W) or with T as the network is given it, from that of a stored or an empty one.

    A picture of a video format is a frame. An empty latent has the network's channels already.
    """
    own = _framed(form, shape)
    if own[0] == form.latent_channels or own[0] != stored_channels(form):
        return own
    return tuple(form.process_in(torch.empty(1, *own, device="meta")).shape[1:])


def stored_channels(form) -> int:
    """The channels of a latent as the VAE stores it.

    They are the network's, but for HunyuanImage 2.1's refiner, whose network is given two stored frames as one.
    """
    if type(form).process_in is LatentFormat.process_in:
        return form.latent_channels
    one = torch.empty(1, form.latent_channels, *[1] * form.latent_dimensions, device="meta")
    return form.latent_channels**2 // form.process_in(one).shape[1]


def process_in(network, samples: Tensor) -> Tensor:
    """LATENT samples (B, C, ...) in the scale of a BaseModel, fp32 on the CPU; ValueError for other channels."""
    form = network.latent_format
    if samples.shape[1] != stored_channels(form):
        raise ValueError(
            f"the latents have {samples.shape[1]} channels and the model takes {stored_channels(form)}: encode the "
            "images with the VAE that belongs to the model"
        )
    with torch.inference_mode(False):
        samples = samples.detach().clone().float().cpu()
        return network.process_latent_in(samples.view(len(samples), *_framed(form, samples.shape[1:])))


def _framed(form, shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], 1, *shape[1:]) if form.latent_dimensions == 3 and len(shape) == 3 else tuple(shape)


def decoder_of(vae, network) -> Decoder:
    """A VAE's decoder on a network of its kind."""

    def decode_with_gradients(latents: Tensor) -> Tensor:
        pixels = network.decode(latents.to(vae.device, vae.vae_dtype)).float()
        # ComfyUI maps to 0..1 in place, which the graph forbids on the network's own output.
        return vae.process_output(pixels.clone()).movedim(1, -1)[..., :3]

    return Decoder(network, decode_with_gradients)


class Progress:
    """The bar of the running node; see `hosts.contract`."""

    def __init__(self, total: int):
        self.total = total
        self._bar = comfy.utils.ProgressBar(total)

    def step(self, done: int, preview: Image.Image | None = None, text: str = "") -> None:
        """`done` of `total` steps are finished; show a picture and a line on the node."""
        self._bar.update_absolute(done, self.total, None if preview is None else ("JPEG", preview, PREVIEW))
        if text:
            show(text)


def say(text: str, warn: bool = False) -> None:
    """See `hosts.contract`."""
    _log.log(logging.WARNING if warn else logging.INFO, text)
    show(text)


def show(text: str) -> None:
    """A line on the running node; nothing where no server runs."""
    context = get_executing_context()
    if context is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, context.node_id)


def bf16() -> bool:
    """See `hosts.contract`."""
    return bool(comfy.model_management.should_use_bf16(comfy.model_management.get_torch_device()))
