"""Reflection outside the maths, the same on every host: pairs that cannot be, what a run costs, and comparisons.

`compare(host, ...)` serves the node; `host` is a `hosts.contract.Host`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..files.pictures import as_image, rounded
from ..sampling.path import NoisePath
from ..sampling.prior import require_steps
from .contract import GUIDER, LATENT, SAMPLER, VAE, Host
from .methods import Reflected


def check_pair(name: str, empty: Sequence[str], formats: tuple[Any, Any], paths: tuple[NoisePath, NoisePath]) -> None:
    """ValueError unless a leg's guider can stand in a pair. empty: its branches without conditioning; (its, strong)."""
    if empty:
        raise ValueError(
            f"the {name} guider has no conditioning ({', '.join(empty)}): connect the CONDITIONING of a CLIPTextEncode "
            "node to it"
        )
    if formats[0] != formats[1]:
        raise ValueError(
            f"the {name} guider's model has latents of another format ({formats[0]}) than the strong one's "
            f"({formats[1]}), so one cannot go on where the other stops: pair models of one family"
        )
    if (paths[0].kind, paths[0].noise_scale) != (paths[1].kind, paths[1].noise_scale):
        kinds = [f"{p.kind}, noise scale {p.noise_scale:g}" if p.kind == "FLOW" else p.kind for p in paths]
        raise ValueError(
            f"the {name} guider's model samples in other coordinates ({kinds[0]}) than the strong one's ({kinds[1]}): "
            "pair two eps or v models, or two flow models"
        )


@dataclass(frozen=True)
class Spent:
    """Evaluations of a network for one latent: reflected, plain along the same schedule, and one plain step."""

    reflected: int
    plain: int
    step: int


def spent(host: Host, guider: GUIDER, method: Reflected, sigmas: Tensor) -> Spent:
    """What reflection costs with this guider along a schedule, guidance counted as it is run."""
    main = host.branches(guider)
    down = main if method.reflecting is None else host.branches(method.reflecting, leg=True)
    cost = method.config.cost(sigmas)
    whole = cost.model * main + cost.reflecting * down + cost.weak * host.branches(method.weak, leg=True)
    return Spent(whole, cost.model * main, main)


def effective_cfg(host: Host, guider: GUIDER, method: Reflected) -> float | None:
    """The cfg that reflection is to first order, on the steps that it reflects; None unless cfg is all that differs."""
    found = host.cfgs([guider, method.weak, guider if method.reflecting is None else method.reflecting])
    if found is None:
        return None
    main, weak, down = found
    return main + method.config.rounds * (down - weak)


def refined(sigmas: Tensor, steps: int) -> Tensor:
    """The same schedule in more steps: levels between its own, evenly in their logarithms; the last zero stays."""
    ends = float(sigmas[-1]) == 0
    own = sigmas[:-1] if ends else sigmas
    count = steps if ends else steps + 1
    if count == len(own) or len(own) < 2:
        return sigmas
    place = torch.linspace(0, len(own) - 1, count, dtype=torch.float64)
    low = place.floor().long().clamp_max(len(own) - 2)
    log = own.double().log()
    levels = torch.lerp(log[low], log[low + 1], place - low).exp().to(sigmas.dtype)
    return torch.cat([levels, sigmas[-1:]]) if ends else levels


@dataclass(frozen=True, eq=False)
class Compared:
    """images: (B, H, W, 3), a labelled row for each latent. latent: the reflected ones. text: the labels."""

    images: Tensor
    latent: LATENT
    text: str


def compare(
    host: Host, guider: GUIDER, sampler: SAMPLER, sigmas: Tensor, latent: LATENT, vae: VAE, seed: int
) -> Compared:
    """The same noise four times: plain, at the effective cfg (where there is one), at equal calls, and reflected.

    ValueError for a SAMPLER that does not reflect and for a schedule without a step.
    """
    require_steps(sigmas, "compare")
    method = host.method_of(sampler)
    if not isinstance(method, Reflected):
        raise ValueError("sampler is not from a reflection node: connect Reflection Sampler or Reflection Setup")
    cost, config = spent(host, guider, method, sigmas), method.config
    cfg = effective_cfg(host, guider, method)
    steps = len(sigmas) - 1
    per_step = cost.step * (2 if config.base == "heun" else 1)
    equal = max(steps, round(cost.reflected / per_step))
    plain = host.method_sampler(Reflected(method.weak, replace(config, begin=0.0, end=0.0)))
    runs: list[tuple[str, Any, Any, Tensor, int]] = [(f"plain, {steps} steps", guider, plain, sigmas, cost.plain)]
    if cfg is not None:
        at = host.at_cfg(guider, cfg)
        runs.append((f"cfg {cfg:g}, {steps} steps", at, plain, sigmas, config.cost(sigmas).model * host.branches(at)))
    longer = refined(sigmas, equal)
    made = replace(config, begin=0.0, end=0.0).cost(longer).model * cost.step
    runs.append((f"equal calls, {equal} steps", guider, plain, longer, made))
    runs.append(("reflected", guider, sampler, sigmas, cost.reflected))
    columns, labels, out = [], [], None
    bar = host.progress(len(runs))
    for i, (name, who, how, levels, calls) in enumerate(runs):
        host.check_cancelled()
        out = host.sample(who, how, levels, latent, seed)
        images = host.decode(vae, out)
        columns.append(images.view(out.shape[0], -1, *images.shape[1:])[:, 0])
        labels.append(f"{name}: {calls} calls")
        bar.step(i + 1)
    assert out is not None
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return Compared(_rows(columns, labels), {**kept, "samples": out}, "\n".join(labels))


LABEL, GAP, LEAST = 18, 6, 192
PAPER, INK = (24, 26, 30), (205, 210, 218)


def _rows(columns: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """(B, H, W, 3): a picture (B, h, w, 3) of each column side by side, its label above."""
    from PIL import Image, ImageDraw

    height, width = columns[0].shape[1:3]
    # Small pictures are enlarged until a label fits above them.
    times = max(1, -(-LEAST // width))
    wide, high = width * times, height * times
    rows = []
    for b in range(len(columns[0])):
        sheet = Image.new("RGB", (GAP + len(columns) * (wide + GAP), LABEL + high + GAP), PAPER)
        pen = ImageDraw.Draw(sheet)
        for k, (column, label) in enumerate(zip(columns, labels, strict=True)):
            left = GAP + k * (wide + GAP)
            picture = Image.fromarray(rounded(column[b]).numpy())
            sheet.paste(picture.resize((wide, high), Image.Resampling.NEAREST), (left, LABEL))
            pen.text((left, 3), label, fill=INK)
        rows.append(as_image(sheet))
    return torch.cat(rows)


def told(host: Host, guider: GUIDER, method: Reflected, sigmas: Tensor | None) -> str:
    """What a set-up does and costs, for a user: calls along `sigmas`, or of 50 steps where there are none yet."""
    if sigmas is not None and len(sigmas) < 2:
        return (
            "sigmas: the schedule has no steps, so nothing is sampled and the latent stays as it is; raise denoise "
            "above 0 on the node that makes the sigmas"
        )
    levels = torch.linspace(1, 0, 51) if sigmas is None else sigmas
    cost, calls = spent(host, guider, method, levels), method.config.cost(levels)
    cfg = effective_cfg(host, guider, method)
    lines = [
        f"{len(levels) - 1} steps, {calls.reflecting} reflections: {calls.total} model calls, {calls.model} plain",
        f"each latent takes {cost.reflected} network calls against {cost.plain} plain, guidance counted: "
        f"{cost.reflected / max(cost.plain, 1):.2f} times the cost",
    ]
    if cfg is not None:
        lines.append(
            f"to first order this is cfg {cfg:g} on the reflected steps: compare with that, and at equal calls"
        )
    if sigmas is None:
        lines.append("connect sigmas for the cost along your own schedule")
    return "\n".join(lines)
