"""Before and after: pictures of one size, what measures say of them, and both side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...restoration.metrics import psnr, ssim
from ...restoration.perceptual import feature_distance
from ...restoration.resize import region
from ...rewards.contract import Reward
from ...rewards.scoring import score
from ..contract import Host
from ..rewards import kinds as rewards
from .run import pictures

# Pixels a side of what VGG16 sees at once: its first features are 64 numbers a pixel.
PIECE, LEAST = 512, 16


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


class Lpips:
    """LPIPS of pictures (B, H, W, 3) in [0, 1] by the user's VGG16; learnt: whether with LPIPS's own weights."""

    def __init__(self, host: Host):
        network = rewards.perceptual_network(host, "vgg16")
        self._weights = rewards.lpips_weights(host)
        self._network, self._holder = network, host.hold(network)

    @property
    def name(self) -> str:
        """What the number is."""
        return "LPIPS (VGG16)" if self._weights is not None else "LPIPS (VGG16, all channels alike)"

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,): the mean over pieces of at most PIECE pixels a side, by their area."""
        device = self._holder.load()
        total, area = torch.zeros(len(a)), 0
        for top, bottom in _spans(a.shape[1]):
            for left, right in _spans(a.shape[2]):
                pieces = (_large_enough(x[:, top:bottom, left:right]).to(device) for x in (a, b))
                apart = [feature_distance(self._network(one[None]), self._network(other[None]), self._weights)
                         for one, other in zip(*pieces, strict=True)]  # fmt: skip
                total += torch.cat(apart).cpu() * (bottom - top) * (right - left)
                area += (bottom - top) * (right - left)
        return total / area


def _spans(length: int) -> list[tuple[int, int]]:
    count = -(-length // PIECE)
    return [(length * i // count, length * (i + 1) // count) for i in range(count)]


def _large_enough(images: Tensor) -> Tensor:
    down, across = (max(0, LEAST - side) for side in images.shape[1:3])
    return torch.nn.functional.pad(images.movedim(-1, 1), (0, across, 0, down), mode="replicate").movedim(1, -1)


def lpips(host: Host) -> Lpips | None:
    """None where the user has no VGG16."""
    return Lpips(host) if rewards.has_vgg16(host) else None


def compare(
    before: Tensor, after: Tensor, clean: Tensor | None = None, reward: Reward | None = None, prompt: str = "",
    distance: Lpips | None = None,
) -> Compared:  # fmt: skip
    """Measures against `clean` where there is one, else of after against before. Others are resized to after's size.

    ValueError for unequal numbers of pictures, and for a clean picture of another shape, which is another picture.
    """
    given = {"before": before, "after": after} | ({} if clean is None else {"clean": clean})
    shown = {name: pictures(images, name)[..., :3].float().cpu() for name, images in given.items()}
    count, size = len(after), tuple(after.shape[1:3])
    for name, images in shown.items():
        if clean is None or _same_shape(images, shown["clean"]):
            continue
        (height, width), (tall, wide) = images.shape[1:3], shown["clean"].shape[1:3]
        raise ValueError(
            f"clean: it has {wide} x {tall} pixels and {name} {width} x {height}, so that it is another picture: "
            "connect the original of what was restored, or nothing"
        )
    for name, images in shown.items():
        if len(images) not in (1, count):
            raise ValueError(
                f"{name} holds {len(images)} pictures and after {count}: give one for all, or one for each"
            )
        fitted = region(images, (size[0], size[1])) if tuple(images.shape[1:3]) != size else images
        shown[name] = fitted.clamp(0, 1).expand(count, -1, -1, -1)
    aim = shown["before" if clean is None else "clean"]
    rows = ["after"] if clean is None else ["before", "after"]
    apart = "how far after is from before, not how good it is: no clean picture is connected"
    lines = [apart if clean is None else "against clean"]
    measured: dict[str, tuple[float, float]] = {}
    for name in rows:
        measured[name] = (_mean(psnr(shown[name], aim)), _mean(ssim(shown[name], aim)))
        line = f"{name}: PSNR {measured[name][0]:.2f} dB, SSIM {measured[name][1]:.4f}"
        if distance is not None:
            line += f", {distance.name} {_mean(distance(shown[name], aim)):.4f}"
        lines.append(line)
    if reward is not None:
        with torch.no_grad():
            scores = {name: _mean(score(reward, shown[name], prompt, 8)) for name in ("before", "after")}
        lines.append(f"{reward.name}: before {scores['before']:.5g}, after {scores['after']:.5g}")
    return Compared(shown["before"], shown["after"], *measured["after"], "\n".join(lines))


def _same_shape(images: Tensor, others: Tensor) -> bool:
    """Whether pictures are as wide for their height as others, but for what cropping to multiples of 64 leaves."""
    ratio, other = (float(each.shape[2] / each.shape[1]) for each in (images, others))
    return abs(ratio / other - 1) < 0.2


def _mean(values: Any) -> float:
    # Equal pictures have an infinite PSNR, which no table and no socket should hold.
    return float(values.clamp(max=100).mean())
