"""Turn finished training state into the shipped fp16 files: SD3-layout checkpoints, text encoder, judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..files import atomic as files
from . import autoencoder, layout, loader

FINISHED = {"flow": "flow", "eps": "eps_refined"}


def averaged(work: Path, name: str) -> dict[str, torch.Tensor]:
    """The averaged weights in a training state or snapshot of `training.train`."""
    tensors = load_file(work / f"{name}.safetensors")
    return {k.removeprefix("average/"): v for k, v in tensors.items() if k.startswith("average/")} or tensors


def write(work: Path, out: Path, decoder: autoencoder.Autoencoder, early: Mapping[str, int]) -> None:
    """Write every shipped file from the training state in `work`; early: step of each twin's first snapshot."""
    notes = {"modelspec.author": "Retort", "modelspec.license": "Apache-2.0"}
    vae = {f"{loader.VAE_PREFIX}{k}": v for k, v in autoencoder.padded(decoder).items()}
    fixed = {k: v for k, v in layout.network().state_dict().items() if k == "pos_embed.pos_embed"}
    for kind in ("flow", "eps"):
        for variant, name in ((kind, FINISHED[kind]), (f"{kind} early", f"{kind}_{early[kind]}")):
            state = layout.to_sd3_layout(fixed | averaged(work, name))
            state = {f"{loader.NETWORK_PREFIX}{k}": v for k, v in state.items()} | (vae if variant == "flow" else {})
            title = {"modelspec.title": f"Retort digits, {variant}"}
            # The latent format's two numbers stay exact: in fp16 every latent would leave the VAE a ten-thousandth off.
            small = {k: v if v.ndim == 0 else v.half() for k, v in state.items()}
            files.write_atomically(out / loader.CHECKPOINTS[variant], files.tensors(small, notes | title))
    encoder = {k.removeprefix("encoder."): v for k, v in averaged(work, "text").items() if k.startswith("encoder.")}
    files.write_atomically(
        out / "digits_text.safetensors", files.tensors({k: v.half() for k, v in encoder.items()}, notes)
    )
    files.write_atomically(
        out / "digits_judge.safetensors",
        files.tensors({k: v.half() for k, v in averaged(work, "judge").items()}, notes),
    )
