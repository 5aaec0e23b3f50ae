"""ImageReward: what people prefer, read from picture and prompt together (Xu et al. 2023, arXiv 2304.05977).

BLIP's ViT-L sees the picture, its text encoder reads the prompt with cross-attention to the picture, and a linear head
scores the state of [CLS]. The published file keeps BLIP's own names; `vision_names` and `text_names` turn them into
those of transformers' Blip classes, whose arithmetic is the same: pre-norm ViT with eps 1e-6, BERT with eps 1e-12,
bidirectional, exact GELU, no token types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .clip_models import Hold
from .heads import LinearHead, head_from
from .network import NetworkReward, Tokenize
from .preprocess import IMAGE_REWARD, Preprocess

TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
HEAD_SIZE = 64  # numbers of an attention head, in BLIP's ViT-L and BERT alike
# In the order of replacement.
_VISION = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("blocks.", "encoder.layers."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
# What BLIP's pretraining leaves behind and scoring does not use.
_UNUSED = ("vision_proj.", "text_proj.", "itm_head.", "text_decoder.", "visual_encoder_m.", "text_encoder_m.")


@dataclass(frozen=True)
class Parts:
    """The published file, sorted: tensors under transformers' names, the head, and the sizes that they imply."""

    vision: dict[str, Tensor]
    text: dict[str, Tensor]
    head: LinearHead
    vision_sizes: dict[str, Any]
    text_sizes: dict[str, Any]


def parts(state: Mapping[str, Tensor]) -> Parts:
    """Sort the tensors of ImageReward's file. ValueError names what is missing or unknown."""
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    for name, value in state.items():
        _, found, rest = name.partition("visual_encoder.")
        if found:
            vision[_vision_name(rest)] = value.float()
            continue
        _, found, rest = name.partition("text_encoder.")
        if found:
            if not rest.endswith("position_ids") and not rest.startswith("pooler."):
                text[rest] = value.float()
            continue
        if "mlp.layers." not in name and not any(part in name for part in _UNUSED):
            raise ValueError(f"ImageReward's file has no tensor {name}: this is another model's")
    if not vision or not text:
        raise ValueError(
            f"it has {len(vision)} tensors of a picture encoder and {len(text)} of a text encoder: not ImageReward's"
        )
    head = head_from({n: v for n, v in state.items() if "mlp.layers." in n})
    try:
        return Parts(vision, text, head, _vision_sizes(vision), _text_sizes(text))
    except KeyError as error:
        raise ValueError(
            f"ImageReward's file lacks {error.args[0]}: it was cut short, or is another model's"
        ) from error


def _vision_name(name: str) -> str:
    if name.startswith("norm."):
        return f"post_layernorm.{name.removeprefix('norm.')}"
    for old, new in _VISION:
        name = name.replace(old, new)
    return name


def _vision_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    patch = state["embeddings.patch_embedding.weight"].shape
    places = state["embeddings.position_embedding"].shape[1] - 1
    return {
        "hidden_size": patch[0],
        "patch_size": patch[-1],
        "image_size": patch[-1] * round(places**0.5),
        "num_hidden_layers": _layers(state, "encoder.layers."),
        "num_attention_heads": max(1, patch[0] // HEAD_SIZE),
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }


def _text_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "intermediate_size": state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _layers(state, "encoder.layer."),
        "num_attention_heads": max(1, width // HEAD_SIZE),
        "max_position_embeddings": state["embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        # To transformers this means only that the layers have cross-attention; the call says that none is causal.
        "is_decoder": True,
    }


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(n.removeprefix(prefix).partition(".")[0]) for n in state if n.startswith(prefix))


class Preference(nn.Module):
    """The whole network. vision, text: transformers' BlipVisionModel and BlipTextModel."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: LinearHead):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        """See `network.NetworkReward`."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=ids[index],
            attention_mask=mask[index],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,
        )
        return (self.head(read.last_hidden_state[:, 0]) - MEAN) / STD


def image_reward(vision: Any, text: Any, head: LinearHead, tokenize: Tokenize, hold: Hold) -> NetworkReward:
    """Standardised: 0 is the mean of its training pictures, 1 a deviation; usual values -2 to 2."""
    network = Preference(vision, text, head).eval().requires_grad_(False)
    fit = Preprocess(int(vision.config.image_size), IMAGE_REWARD.fit)
    return NetworkReward("ImageReward", hold(network), fit, (-float("inf"), float("inf")), tokenize)
