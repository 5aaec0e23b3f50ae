"""CLIP and T5 text encoders of real checkpoints, combined per model family as ComfyUI combines them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...models.layouts.lora_names import merged, pairs
from ...models.layouts.text import clip_config, from_open_clip, from_transformers, is_open_clip
from .device import dtype
from .model import Clip, Lora
from .residents import lent
from .tokenizers import Chunks

Hidden = Literal["last", "penultimate"]


@dataclass(eq=False)
class Encoder:
    """One text encoder. hidden: which layer's states are the tokens. projected: pooled state through its projection.

    lora_prefixes: what LoRA files call its layers.
    """

    module: Any
    chunks: Chunks
    hidden: Hidden = "last"
    projected: bool = False
    projection: Tensor | None = None
    lora_prefixes: tuple[str, ...] = ()
    _merged: dict[tuple[Lora, ...], Any] = field(default_factory=dict)

    def encode(self, prompt: str, loras: tuple[Lora, ...]) -> tuple[Tensor, Tensor | None]:
        """Token states (1, L, C), all rows of a long prompt in a line, and the first row's pooled state (1, C)."""
        rows = self.chunks.rows(prompt)
        weights = torch.tensor([[w for _, w in row] for row in rows])
        ids = [[i for i, _ in row] for row in rows]
        weighted = bool((weights != 1.0).any())
        if weighted:
            ids.append(self.chunks.empty(len(ids[0])))
        states, pooled = self._run(torch.tensor(ids), loras)
        if weighted:
            empty, states = states[-1:], states[:-1]
            scale = weights[..., None]
            states = torch.where(scale == 1.0, states, empty + (states - empty) * scale)
        return states.flatten(0, 1)[None], pooled

    def _run(self, ids: Tensor, loras: tuple[Lora, ...]) -> tuple[Tensor, Tensor | None]:
        module = self._with(loras)
        with lent(module) as where:
            out = module(ids.to(where), output_hidden_states=self.hidden == "penultimate")
        last = out.last_hidden_state
        states = last if self.hidden == "last" else out.hidden_states[-2]
        if self.chunks.start is None:
            return states.float().cpu(), None
        # The state at the first end token, which padding repeats.
        at = (ids[:1] == self.chunks.end).int().argmax(1)
        pooled = last[:1][torch.arange(1), at]
        if self.projected and self.projection is not None:
            pooled = pooled @ self.projection.to(pooled).T
        return states.float().cpu(), pooled.float().cpu()

    def _with(self, loras: tuple[Lora, ...]) -> Any:
        """The module, or a copy of it with the LoRAs' layers for it merged in."""
        if loras not in self._merged:
            found = [self._named(lora) for lora in loras]
            module = copy.deepcopy(self.module) if any(found) else self.module
            weights = dict(module.named_parameters())
            for lora, named in zip(loras, found, strict=True):
                for name, weight in merged(weights, named, lora.strength):
                    weights[name].data.copy_(weight)
            self._merged[loras] = module
        return self._merged[loras]

    def _named(self, lora: Lora) -> dict[str, Tensor]:
        """A LoRA's layers for this encoder as a peft state dict."""
        flat = {name.replace(".", "_"): name for name, _ in self.module.named_modules()}
        named: dict[str, Tensor] = {}
        for layer, (down, up) in pairs(lora.state).items():
            prefix = next((p for p in self.lora_prefixes if layer.startswith(p)), None)
            if prefix is None:
                continue
            name = layer.removeprefix(prefix).replace(".", "_").removeprefix("text_model_")
            name = flat.get(name, flat.get(f"text_model_{name}", ""))
            if not name:
                raise UsageError(f"{lora.name}: the text encoder has no layer {layer}; use the LoRA's own model")
            named |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        return named


def clip_encoder(state: dict[str, Tensor], tokenizer: Any, act: str, **options: Any) -> Encoder:
    """An Encoder from a CLIP state dict in either layout. act: "quick_gelu" for CLIP-L, "gelu" for OpenCLIP G."""
    from transformers import CLIPTextConfig, CLIPTextModel

    names = from_open_clip(state) if is_open_clip(state) else from_transformers(state)
    projection = names.pop("text_projection.weight", None)
    module = CLIPTextModel(CLIPTextConfig(**clip_config(names, act)))
    own = next(iter(module.state_dict()))
    prefix = "text_model." if own.startswith("text_model.") else ""  # older transformers wrap it once more
    _fill(module, {f"{prefix}{name}": value for name, value in names.items() if name != "logit_scale"})
    chunks = Chunks.clip(tokenizer, pad_with_end=act == "quick_gelu")
    return Encoder(module, chunks, projection=None if projection is None else projection.float(), **options)


def t5_encoder(state: dict[str, Tensor], tokenizer: Any, least: int) -> Encoder:
    """An Encoder from a T5 v1.1 state dict in transformers' names."""
    from transformers import T5Config, T5EncoderModel

    from ...models.layouts.renames import count

    query = state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape
    buckets, heads = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
    vocabulary, width = state["shared.weight"].shape
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=query[0] // heads,
        d_ff=state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        num_layers=count(state, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    module = T5EncoderModel(config)
    named = dict(state)
    named.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
    _fill(module, named, dtype(torch.bfloat16))
    return Encoder(module, Chunks.t5(tokenizer, least), lora_prefixes=("lora_te3_",))


def _fill(module: Any, state: dict[str, Tensor], precision: torch.dtype = torch.float32) -> None:
    missing, unexpected = module.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    if missing or unexpected:
        name = (missing or unexpected)[0]
        raise UsageError(
            f"the text encoder in this file has {'no' if missing else 'an unknown'} tensor {name}; the headless host "
            "knows CLIP-L, OpenCLIP G and T5 v1.1: run the workflow in ComfyUI"
        )
    module.to(precision).eval().requires_grad_(False)


def sd15(clip_l: Encoder) -> Clip:
    """CLIP-L's last layer."""

    def encode(prompt: str, loras: tuple[Lora, ...]) -> tuple[Tensor, dict[str, Any]]:
        tokens, pooled = clip_l.encode(prompt, loras)
        return tokens, {"pooled_output": pooled}

    return Clip(encode)


def _side_by_side(clip_l: Encoder, clip_g: Encoder, prompt: str, loras: tuple[Lora, ...]):
    tokens_l, pooled_l = clip_l.encode(prompt, loras)
    tokens_g, pooled_g = clip_g.encode(prompt, loras)
    length = min(tokens_l.shape[1], tokens_g.shape[1])
    return torch.cat([tokens_l[:, :length], tokens_g[:, :length]], dim=-1), pooled_l, pooled_g


def sdxl(clip_l: Encoder, clip_g: Encoder) -> Clip:
    """Both encoders' layers before the last, side by side; the larger one's projected pooled state."""

    def encode(prompt: str, loras: tuple[Lora, ...]) -> tuple[Tensor, dict[str, Any]]:
        tokens, _, pooled = _side_by_side(clip_l, clip_g, prompt, loras)
        return tokens, {"pooled_output": pooled}

    return Clip(encode)


def sd3(clip_l: Encoder, clip_g: Encoder, t5: Encoder | None, width: int) -> Clip:
    """Both CLIPs side by side and widened with zeros, T5's tokens behind them; both pooled states."""

    def encode(prompt: str, loras: tuple[Lora, ...]) -> tuple[Tensor, dict[str, Any]]:
        tokens, pooled_l, pooled_g = _side_by_side(clip_l, clip_g, prompt, loras)
        tokens = torch.nn.functional.pad(tokens, (0, width - tokens.shape[-1]))
        if t5 is not None:
            tokens = torch.cat([tokens, t5.encode(prompt, loras)[0]], dim=1)
        return tokens, {"pooled_output": torch.cat([pooled_l, pooled_g], dim=-1)}

    return Clip(encode)


def flux(clip_l: Encoder, t5: Encoder) -> Clip:
    """T5's tokens and CLIP-L's pooled state."""

    def encode(prompt: str, loras: tuple[Lora, ...]) -> tuple[Tensor, dict[str, Any]]:
        return t5.encode(prompt, loras)[0], {"pooled_output": clip_l.encode(prompt, loras)[1]}

    return Clip(encode)
