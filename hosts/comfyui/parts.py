"""Latents of several parts (video with sound) in ComfyUI: what a model must be told of them, and how it takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_base import LTXAV, ACEStep15, MiniMaxH3

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


def gains(model: Any) -> tuple[float, ...]:
    """How many times larger a BaseModel carries each part of a latent than it is, see `sampling.parts`."""
    return (1.0, float(model.model_sampling.audio_scale)) if isinstance(model, MiniMaxH3) else ()


def refuse_alone(model: Any, parts: Parts) -> None:
    """ValueError for latents without the sound that a BaseModel's network cannot do without."""
    if isinstance(model, MiniMaxH3) and len(parts.shapes) < 2:
        raise ValueError(
            "latents: MiniMax-H3 makes video and sound together, and these latents are of one tensor: connect latents "
            "that hold both, as Empty MiniMax H3 AV Latent makes them"
        )


def one_at_a_time(model: Any) -> bool:
    """Whether a BaseModel's network takes no more than one latent in a call.

    ACE-Step 1.5 takes several, and gives the timbre of all of them to the first.
    """
    return isinstance(model, MiniMaxH3 | ACEStep15)


def one_level_in_a_call(model: Any, several: bool) -> bool:
    """Whether latents of several parts at different levels cannot share a call of a BaseModel's network.

    LTX-2's video and sound open to each other by the highest level of the whole batch.
    """
    return several and isinstance(model, LTXAV)
