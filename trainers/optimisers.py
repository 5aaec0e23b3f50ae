"""The optimisers by name, from the packages that keep them well, and how many bytes each keeps of a weight."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Optimiser = Literal["adamw", "adamw8bit", "adafactor", "prodigy"]
# Below it both packages keep their state in fp32; the scale that so many numbers share.
LEAST_8_BIT, BLOCK = 4096, 256
# Of how many numbers Prodigy's estimate looks at one: its authors' way to keep less.
PRODIGY_SLICE = 11
# What Prodigy has learnt of the rate; it stands in the optimiser's group, not beside a weight.
LEARNT = ("d", "d_max", "d_numerator", "k")


def make(
    name: Optimiser, weights: Sequence[Tensor], rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser of these weights. ImportError names the package that it needs.

    rate: a learning rate as AdamW's for all but "prodigy", whose own estimate it multiplies. betas: "adafactor" has
    none.
    """
    if name == "adamw":
        # One kernel for all, which the meta device of a dry run does not have.
        fused = not weights[0].is_meta
        return torch.optim.AdamW(weights, lr=rate, betas=betas, weight_decay=weight_decay, fused=fused)
    if name == "adamw8bit":
        return _adamw8bit(weights, rate, betas, weight_decay)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            weights, lr=rate, weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False
        )
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ImportError(
            "optimiser prodigy needs prodigyopt (python -m pip install prodigyopt), or choose adamw"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it tells on the console which weight decay it takes
        return Prodigy(
            weights, lr=rate, betas=betas, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True,
            slice_p=PRODIGY_SLICE,
        )  # fmt: skip


def _adamw8bit(
    weights: Sequence[Tensor], rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    with contextlib.suppress(ImportError):
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(weights, lr=rate, betas=betas, weight_decay=weight_decay)
    try:
        from torchao.optim import AdamW8bit as Portable
    except ImportError as error:
        raise ImportError(
            "optimiser adamw8bit needs bitsandbytes (python -m pip install bitsandbytes) or, where that does not know "
            "the device, torchao (python -m pip install torchao); or choose adamw or adafactor"
        ) from error

    class Uncompiled(Portable):
        # A compiled step needs a compiler or Triton, and need not round alike in a resumed run.
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Uncompiled(weights, lr=rate, betas=betas, weight_decay=weight_decay)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group a learning rate."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_bytes(name: str, weight: Tensor) -> int:
    """Bytes that an optimiser keeps of one fp32 weight, apart from its gradient."""
    count, fp32 = weight.numel(), 4
    if name == "adafactor":
        if weight.ndim < 2:
            return fp32 * count
        return fp32 * (count // weight.shape[-1] + count // weight.shape[-2])
    if name == "prodigy":
        return 2 * fp32 * (count + math.ceil(count / PRODIGY_SLICE))
    if name == "adamw8bit" and count >= LEAST_8_BIT:
        return 2 * (count + fp32 * math.ceil(count / BLOCK))
    return 2 * fp32 * count


# Entries of a state that are as large as their weight, whoever keeps them.
WHOLE = ("exp_avg", "exp_avg_sq", "state1", "state2")


def expected_state(optimiser: torch.optim.Optimizer) -> str:
    """The entry without which a saved state is not this optimiser's, "" where any may be."""
    if type(optimiser).__module__.startswith("bitsandbytes"):
        return "state1"
    return "exp_avg" if isinstance(optimiser, torch.optim.AdamW) or type(optimiser).__name__ == "Uncompiled" else ""


def rebuilt(entry: str, parts: dict[str, Tensor], weight: Tensor) -> Tensor:
    """torchao's 8-bit tensor from its parts. ValueError for parts that do not make one of the weight's shape."""
    try:
        from torchao.optim.subclass_8bit import OptimState8bit

        made = OptimState8bit(parts["codes"], parts["scale"], parts["qmap"], entry == "exp_avg", weight.dtype)
    except (ImportError, KeyError, TypeError) as error:
        raise ValueError(
            f"the saved optimiser's {entry} is torchao's ({type(error).__name__}: {error}): install torchao, or start "
            "anew under another name"
        ) from error
    if made.shape != weight.shape or parts["scale"].numel() * BLOCK != weight.numel():
        raise ValueError(f"the saved optimiser's {entry} has another shape; start anew under another name")
    return made
