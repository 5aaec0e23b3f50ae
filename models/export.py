"""Turn finished training state into the shipped fp16 files: SD3-layout checkpoints, LoRAs under diffusers' names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from . import autoencoder, layout, loader
from .training import save_atomically

RANK = 16
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
    "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm_out.linear", "proj_out",
)  # fmt: skip


FINISHED = {"flow": "flow", "eps": "eps_refined"}


def with_lora(network: nn.Module) -> nn.Module:
    """Inject a trainable LoRA of rank 16 into a frozen network, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)), network)


def averaged(work: Path, name: str) -> dict[str, torch.Tensor]:
    """The averaged weights in a training state or snapshot of `training.train`."""
    tensors = load_file(work / f"{name}.safetensors")
    return {k.removeprefix("average/"): v for k, v in tensors.items() if k.startswith("average/")} or tensors


def lora_state(average: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA weights under the names that ComfyUI's and diffusers' SD3 LoRA loaders both read."""
    names = ((f"transformer.{k}".replace(".default.", "."), v) for k, v in average.items())
    return {k: v for k, v in names if ".lora_A." in k or ".lora_B." in k}


def write(work: Path, out: Path) -> None:
    """Write every shipped file from the training state in `work`."""
    from .build import SCHEDULES, build_decoder

    notes = {"modelspec.author": "Retort", "modelspec.license": "Apache-2.0"}
    vae = {f"{loader.VAE_PREFIX}{k}": v for k, v in autoencoder.padded(build_decoder(work)).items()}
    fixed = {k: v for k, v in layout.network().state_dict().items() if k == "pos_embed.pos_embed"}
    for kind in ("flow", "eps"):
        for variant, name in ((kind, FINISHED[kind]), (f"{kind} early", f"{kind}_{SCHEDULES[kind].keep[0]}")):
            state = layout.to_sd3_layout(fixed | averaged(work, name))
            state = {f"{loader.NETWORK_PREFIX}{k}": v for k, v in state.items()} | (vae if variant == "flow" else {})
            title = {"modelspec.title": f"Retort digits, {variant}"}
            # The latent format's two numbers stay exact: in fp16 every latent would leave the VAE a ten-thousandth off.
            small = {k: v if v.ndim == 0 else v.half() for k, v in state.items()}
            save_atomically(small, out / loader.CHECKPOINTS[variant], notes | title)
        lora = lora_state(averaged(work, f"student_{kind}"))
        title = {"modelspec.title": f"Retort digits, {kind} student"}
        save_atomically({k: v.half() for k, v in lora.items()}, out / loader.STUDENTS[kind], notes | title)
    encoder = {k.removeprefix("encoder."): v for k, v in averaged(work, "text").items() if k.startswith("encoder.")}
    save_atomically({k: v.half() for k, v in encoder.items()}, out / "digits_text.safetensors", notes)
    save_atomically({k: v.half() for k, v in averaged(work, "judge").items()}, out / "digits_judge.safetensors", notes)
