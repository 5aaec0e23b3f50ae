"""The embedded text encoders in the shapes that comfy.sd.CLIP calls."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor


def clip_of(tokenizer: type[Tokenizer], text: type[TextModel], weights: dict[str, Tensor], disable_dynamic: bool):
    """A CLIP of `text` with these weights, for the stock CLIPTextEncode."""
    return comfy.sd.CLIP(
        ClipTarget(tokenizer, text), state_dict=[weights], parameters=comfy.utils.calculate_parameters(weights),
        disable_dynamic=disable_dynamic,
    )  # fmt: skip


class Tokenizer:
    """A word-level tokenizer. A subclass says the key of its tokens and makes `words`."""

    key: str
    words: Any

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options):
        """{key: [[(id, weight), ..]]}, with the number of its word behind each where that is asked for."""
        ids, weights = self.words.encode(text)
        rows = (ids, weights, range(1, len(ids) + 1)) if return_word_ids else (ids, weights)
        return {self.key: [list(zip(*rows, strict=True))]}

    def state_dict(self):
        """There is nothing to save."""
        return {}


class TextModel(torch.nn.Module):
    """A text encoder; always fp32, since it is tiny. A subclass says the key of its tokens and its encoder."""

    key: str
    Encoder: type[torch.nn.Module]
    encoder: Any
    # Plain layers: nothing that ComfyUI could stream in pieces.
    disable_offload = True

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__()
        self.encoder: Any = self.Encoder().to(device).requires_grad_(False)
        self.dtypes = {torch.float32}

    def set_clip_options(self, options):
        """There is nothing to set: one layer, one pooled output."""

    def reset_clip_options(self):
        """There is nothing to reset."""

    def encode_token_weights(self, tokens):
        """Token states (1, length, 128) and pooled state (1, 128) of a weighted prompt."""
        ids, weights = zip(*(token[:2] for token in tokens[self.key][0]), strict=True)
        states, pooled = self.encoder.encode(list(ids), list(weights))
        device = comfy.model_management.intermediate_device()
        return states.to(device), pooled.to(device)

    def load_sd(self, weights):
        """Missing and unknown names."""
        return self.encoder.load_state_dict(weights, strict=False)
