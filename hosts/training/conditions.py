"""Conditions of a batch in groups that one call of the network can take: prompts differ in length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...sampling import parts
from ...trainers.dataset import Dataset


@dataclass(frozen=True)
class Joined:
    """groups: (which samples of the batch, keyword arguments of their call); each sample stands in one of them.

    parts: the samples' own conditions, on the CPU.
    """

    groups: tuple[tuple[tuple[int, ...], dict[str, Any]], ...]
    parts: tuple[Any, ...]


def join(
    conds: Sequence[Any], fits: Callable[[Any, Any], bool], merge: Callable[[Sequence[Any]], dict[str, Any]]
) -> Joined:
    """Groups of conditions that fit each other, merged; the first group holds the first condition."""
    groups: list[list[int]] = []
    for i, cond in enumerate(conds):
        home = next((group for group in groups if all(fits(conds[j], cond) for j in group)), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    merged = tuple((tuple(group), merge([conds[i] for i in group])) for group in groups)
    return Joined(merged, tuple(conds))


def run(call: Callable[..., Tensor], x: Tensor, sigma: Tensor, joined: Joined) -> Tensor:
    """`call(x, sigma, **keywords)` for every group, put together in the batch's order. x (B, ...), sigma (B,)."""
    if len(joined.groups) == 1:
        return call(x, sigma, **joined.groups[0][1])
    return in_order([call(x[list(rows)], sigma[list(rows)], **keywords) for rows, keywords in joined.groups], joined)


def in_order(parts: Sequence[Tensor], joined: Joined) -> Tensor:
    """What each group's call gave (rows, ...) as one tensor (B, ...) in the batch's order.

    ValueError where rows of two calls differ in shape, as features do of prompts that differ in length.
    """
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[1:] for part in parts}) > 1:
        counts = " and ".join(str(len(rows)) for rows, _ in joined.groups)
        raise ValueError(
            f"the batch's prompts have different lengths ({counts} samples each), and a discriminator compares their "
            "features: set batch_size to 1 and raise accumulation instead, or use prompts of one length"
        )
    order = torch.tensor([row for rows, _ in joined.groups for row in rows]).argsort()
    return torch.cat(list(parts))[order.to(parts[0].device)]


# What belongs to an area, a span of levels or another network: no part of a prompt that a network could learn from.
_LIMITED = ("area", "mask", "control", "gligen", "hooks", "default")
_SPANS = {"start_percent": 0.0, "end_percent": 1.0, "clip_start_percent": 0.0, "clip_end_percent": 1.0, "strength": 1.0}


def single(conditioning: Any, input: str) -> tuple[Any, dict[str, Any]]:
    """(tokens, extra) of a CONDITIONING that is one plain prompt; ValueError names the node's input and the remedy."""
    if not conditioning:
        raise ValueError(f"{input} is empty: connect the CONDITIONING of a CLIPTextEncode node")
    if len(conditioning) > 1:
        raise ValueError(
            f"{input} has {len(conditioning)} entries combined into one CONDITIONING: training takes one prompt at a "
            "time, so connect a list of prompts instead of ConditioningCombine"
        )
    tokens, extra = conditioning[0]
    bad = [key for key in _LIMITED if key in extra]
    bad += [key for key, whole in _SPANS.items() if extra.get(key, whole) != whole]
    if bad:
        raise ValueError(
            f"{input} carries {bad[0]!r} = {_short(extra[bad[0]])}: training takes plain prompts; connect the "
            "CONDITIONING from before the node that sets it"
        )
    if torch.is_tensor(tokens) and tokens.shape[0] != 1:
        raise ValueError(f"{input} holds {tokens.shape[0]} prompts in one tensor: give them as a list of CONDITIONING")
    return tokens, extra


def _short(value: Any) -> str:
    text = type(value).__name__ if torch.is_tensor(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shape_of(dataset: Dataset) -> parts.Shape:
    """Shape (C, H, W) or (C, T, H, W) of a data set's first latent, or of those to be made; or of their parts."""
    if dataset.latents is not None:
        return parts.shape_of(dataset.latents[0])
    assert dataset.shape is not None
    return dataset.shape
