"""Latents of several parts, such as video with sound, which samplers and trainings see packed into one row of numbers.

ComfyUI samples the parts (B, C, ...) of a nested latent as one tensor (B, 1, N), their numbers one after another, so
that whatever acts on every number alike needs to know of no parts. What is a mean over a latent, or is weighed by its
level, is a matter of each part.

A part may be carried larger than it is: g times. MiniMax-H3 noises its sound on a schedule with a shift of its own, and
ComfyUI carries it as g x0 on the video's schedule, g being the quotient of both shifts. For (1 - s) g x0 + s n is, but
for a factor, (1 - s') x0 + s' n at the level s' = s / (s + g (1 - s)), which is `own_level`. An error of the network's
output there is g s' times larger in what is carried, as an error of a flow is s times larger in x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .path import broadcast

# A latent of one sample: a tensor, or its parts; and its shape, or theirs.
Latent: TypeAlias = "Tensor | tuple[Tensor, ...]"
Shape: TypeAlias = "tuple[int, ...] | tuple[tuple[int, ...], ...]"


def parts_of(samples: Any) -> tuple[Tensor, ...]:
    """The parts (B, C, ...) of a LATENT's samples; a plain tensor is its own only part."""
    return tuple(samples.unbind()) if samples.is_nested else (samples,)


def shape_of(latent: Latent) -> Shape:
    """The shape of one latent (C, ...), or of its parts."""
    return tuple(latent.shape) if isinstance(latent, Tensor) else tuple(tuple(part.shape) for part in latent)


def several(shape: Shape) -> tuple[tuple[int, ...], ...]:
    """The shapes of the parts of a latent of several, none of one that is a tensor."""
    return tuple(part for part in shape if isinstance(part, tuple))


def first_of(shape: Shape) -> tuple[int, ...]:
    """The shape of a latent's first part: of video with sound, the video's."""
    parts = several(shape)
    return parts[0] if parts else tuple(n for n in shape if isinstance(n, int))


def each_of(latent: Latent) -> tuple[Tensor, ...]:
    """The parts (C, ...) of one latent, which a tensor is itself."""
    return (latent,) if isinstance(latent, Tensor) else latent


def row(samples: Any, number: int) -> Latent:
    """One latent of a LATENT's samples (B, C, ...), fp32, in memory of its own."""
    parts = tuple(part[number].float().clone() for part in parts_of(samples))
    return parts if len(parts) > 1 else parts[0]


def own_level(sigma: Tensor, gain: float) -> Tensor:
    """The level (B,) of a part that is carried `gain` times larger on a flow's level sigma (B,)."""
    return sigma if gain == 1 else sigma / (sigma + gain * (1 - sigma))


@dataclass(frozen=True)
class Parts:
    """How a latent is made up. shapes: of its parts, without batch; none for a latent that is one tensor.

    weights: of the parts in a loss; gains: how many times larger each is carried than it is. Empty: 1 for each.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    weights: tuple[float, ...] = ()
    gains: tuple[float, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Parts:
        """The making of tensors (B, C, ...)."""
        return cls(tuple(tuple(part.shape[1:]) for part in parts) if len(parts) > 1 else ())

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts (B, C, ...) as one tensor (B, 1, N), in ComfyUI's order; a single one as it is."""
        if not self.shapes:
            (only,) = parts
            return only
        return torch.cat([part.reshape(len(part), 1, -1) for part in parts], -1)

    def split(self, x: Tensor) -> list[Tensor]:
        """Each part's numbers (B, 1, n) of a packed latent; a latent of one tensor as it is."""
        return list(x.split([math.prod(shape) for shape in self.shapes], -1)) if self.shapes else [x]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """The parts (B, C, ...) of a packed latent; the inverse of `pack`."""
        if not self.shapes:
            return [x]
        return [part.reshape(len(x), *shape) for part, shape in zip(self.split(x), self.shapes, strict=True)]

    def first(self, x: Tensor) -> Tensor:
        """The first part (B, C, ...): of video with sound, the video."""
        return self.unpack(x)[0]

    def sum(self, loss: Callable[..., Tensor], *latents: Tensor) -> Tensor:
        """The sum over parts of weight times loss(gain, that part of each of the latents).

        A part of weight 0 is left out, so that the others' losses are what they were without it.
        """
        split = [self.split(x) for x in latents]
        rows = zip(self._each(self.weights), self._each(self.gains), *split, strict=True)
        values = [
            (value if weight == 1 else weight * value)
            for weight, gain, *parts in rows if weight
            for value in [loss(gain, *parts)]
        ]  # fmt: skip
        if not values:
            raise ValueError("every part of the latent has the weight 0, so there is nothing to learn: raise one")
        return sum(values[1:], values[0])

    def map(self, change: Callable[..., Tensor], *latents: Tensor) -> Tensor:
        """A latent of change(gain, that part of each of the latents), packed as they are."""
        split = [self.split(x) for x in latents]
        made = [change(gain, *parts) for gain, *parts in zip(self._each(self.gains), *split, strict=True)]
        return torch.cat(made, -1) if self.shapes else made[0]

    def own(self, x: Tensor) -> Tensor:
        """What is carried, or a difference of it, in the parts' own sizes."""
        return x if all(gain == 1 for gain in self.gains) else self.map(lambda gain, part: part / gain, x)

    def scaled(self, scale: Callable[[Tensor], Tensor], sigma: Tensor, error: Tensor) -> Tensor:
        """An error (B, ...) of x0 as one of the network's own output. scale: how much larger it is in x0, by level."""
        return self.map(lambda gain, e: e / broadcast(gain * scale(own_level(sigma, gain)), e), error)

    def _each(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return values or (1.0,) * max(1, len(self.shapes))


WHOLE = Parts()  # a latent of one tensor
