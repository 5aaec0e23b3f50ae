"""Before and after: pictures of one size, what measures say of them, and both side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..restoration.metrics import psnr, ssim
from ..restoration.resize import region
from ..rewards.contract import Reward
from ..rewards.scoring import score
from .restoration import pictures


@dataclass(frozen=True, eq=False)
class Compared:
    """before, after: (B, H, W, 3) of one size. psnr, ssim: means over the batch, of after. text: all measures."""

    before: Tensor
    after: Tensor
    psnr: float
    ssim: float
    text: str

    @property
    def sheet(self) -> Tensor:
        """(B, H, 2 W, 3)."""
        return torch.cat([self.before, self.after], 2)


def compare(
    before: Tensor, after: Tensor, clean: Tensor | None = None, reward: Reward | None = None, prompt: str = ""
) -> Compared:
    """Measures against `clean` where there is one, else of after against before. Others are resized to after's size.

    ValueError for unequal numbers of pictures.
    """
    given = {"before": before, "after": after} | ({} if clean is None else {"clean": clean})
    shown = {name: pictures(images, name)[..., :3].float().cpu() for name, images in given.items()}
    count, size = len(after), tuple(after.shape[1:3])
    for name, images in shown.items():
        if len(images) not in (1, count):
            raise ValueError(
                f"{name} holds {len(images)} pictures and after {count}: give one for all, or one for each"
            )
        fitted = region(images, (size[0], size[1])) if tuple(images.shape[1:3]) != size else images
        shown[name] = fitted.clamp(0, 1).expand(count, -1, -1, -1)
    aim = shown["before" if clean is None else "clean"]
    rows = ["after"] if clean is None else ["before", "after"]
    lines = ["against clean" if clean is not None else "after against before"]
    measured: dict[str, tuple[float, float]] = {}
    for name in rows:
        measured[name] = (_mean(psnr(shown[name], aim)), _mean(ssim(shown[name], aim)))
        lines.append(f"{name}: PSNR {measured[name][0]:.2f} dB, SSIM {measured[name][1]:.4f}")
    if reward is not None:
        with torch.no_grad():
            scores = {name: _mean(score(reward, shown[name], prompt, 8)) for name in ("before", "after")}
        lines.append(f"{reward.name}: before {scores['before']:.5g}, after {scores['after']:.5g}")
    return Compared(shown["before"], shown["after"], *measured["after"], "\n".join(lines))


def _mean(values: Any) -> float:
    # Equal pictures have an infinite PSNR, which no table and no socket should hold.
    return float(values.clamp(max=100).mean())
