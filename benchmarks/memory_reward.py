"""What AlignProp is counted with: SDXL's VAE and a CLIP ViT-H/14 at their published sizes, without a weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..rewards import clip_models
from ..rewards.contract import Reward
from ..trainers.weightless import META
from .layouts import BF16

# As PickScore's and HPSv2's networks are published.
_VIT_H: dict[str, Any] = {
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                      "num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu"},
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                    "num_attention_heads": 16, "projection_dim": 1024, "hidden_act": "gelu"},
    "projection_dim": 1024,
}  # fmt: skip
_SDXL_VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


class _Here:
    """See `rewards.contract.Holder`."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def load(self) -> torch.device:
        """It has no other place."""
        return META

    def offload(self) -> None:
        """Nothing to free."""


def vit_h(dtype: torch.dtype = torch.float32) -> Reward:
    """A CLIP score by a ViT-H/14, which rewards load in fp32."""
    from transformers import CLIPConfig, CLIPModel

    with torch.inference_mode(False), META:
        model: Any = CLIPModel(CLIPConfig(**_VIT_H))
        model = model.to(dtype).to_empty(device="cpu")

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        shape = len(texts), clip_models.TOKENS
        return torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)

    return clip_models.clip_score(model, tokens, _Here)


def sdxl_vae() -> Any:
    """ComfyUI's autoencoder, as far as a decoder is made of it."""
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.model import AttnBlock, pytorch_attention

    with torch.inference_mode(False), META:
        network = (
            AutoencoderKL(embed_dim=4, ddconfig=_SDXL_VAE).to(BF16).to_empty(device="cpu").eval().requires_grad_(False)
        )
    for module in network.modules():
        if isinstance(module, AttnBlock):  # as on a card; without one ComfyUI asks for free memory
            module.optimized_attention = pytorch_attention
    return SimpleNamespace(
        first_stage_model=network, vae_dtype=BF16, process_output=lambda pixels: ((pixels + 1) / 2).clamp(0, 1)
    )
