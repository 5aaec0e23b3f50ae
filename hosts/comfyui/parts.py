"""Latents of several parts (video with sound) in ComfyUI: what a model must be told of them, and how it takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_base import MiniMaxH3

from ...sampling.parts import Parts


@contextmanager
def packed(model: Any, parts: Parts) -> Iterator[None]:
    """Within it a BaseModel takes latents to be packed of these parts, by which some scale one of them."""
    before, model.latent_shapes = model.latent_shapes, shapes_of(parts)
    try:
        yield
    finally:
        model.latent_shapes = before


def shapes_of(parts: Parts) -> list[torch.Size] | None:
    """The parts' shapes with a batch of 1, as core tells a model of them; None for a latent of one tensor."""
    return [torch.Size((1, *shape)) for shape in parts.shapes] or None


def one_at_a_time(model: Any) -> bool:
    """Whether a BaseModel's network takes no more than one latent in a call."""
    return isinstance(model, MiniMaxH3)
