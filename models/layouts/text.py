"""CLIP text encoders: the layouts found inside checkpoints and transformers' CLIPTextModel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .renames import Layout, count

_OPEN_BLOCK = (
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)  # fmt: skip


def clip_config(state: dict[str, Tensor], act: str) -> dict[str, Any]:
    """CLIPTextConfig's arguments, read from a state dict in transformers' names; heads are 64 wide in every CLIP."""
    vocabulary, width = state["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(state, "encoder.layers."),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": state["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": act,
        "projection_dim": state["text_projection.weight"].shape[0] if "text_projection.weight" in state else width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names without the wrapper's prefix and without buffers."""
    return {
        name.removeprefix("text_model."): value for name, value in state.items() if not name.endswith("position_ids")
    }


def is_open_clip(state: dict[str, Tensor]) -> bool:
    """Whether the names are OpenCLIP's, as SDXL stores its larger encoder."""
    return "transformer.resblocks.0.ln_1.weight" in state


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names, fused projections and transposed text projection to transformers'."""
    table = Layout()
    table.add("positional_embedding", "embeddings.position_embedding.weight")
    table.add("token_embedding", "embeddings.token_embedding")
    table.add("ln_final", "final_layer_norm")
    renamed = {}
    for name, value in state.items():
        # Parameters of torch's MultiheadAttention have names of their own kind.
        name = name.replace(".in_proj_weight", ".in_proj.weight").replace(".in_proj_bias", ".in_proj.bias")
        renamed[name] = value
    for i in range(count(state, "transformer.resblocks.")):
        original, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        table.add_all(original, layer, _OPEN_BLOCK)
        table.add(f"{original}attn.in_proj", *(f"{layer}self_attn.{p}_proj" for p in "qkv"))
    out, _ = table.convert(renamed)
    if "text_projection" in state:
        out["text_projection.weight"] = state["text_projection"].T.contiguous()
    return out
