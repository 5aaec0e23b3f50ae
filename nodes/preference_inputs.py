"""The settings of each method that learns from pairs; their order is an interface, new ones go last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..hosts.api import io


def _beta(value: float, tooltip: str) -> Any:
    return io.Float.Input("beta", default=value, min=0.0, max=1e7, step=0.1, round=1e-3, tooltip=tooltip)


def _shared() -> list:
    return [
        io.Combo.Input(
            "levels",
            options=["uniform", "logit_normal", "core"],
            default="uniform",
            advanced=True,
            tooltip="How noise levels are drawn, as Train Flow Matching draws them.",
        ),
        io.Float.Input("cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the previews."),
    ]


def _dpo() -> list:
    return [
        _beta(5000.0, "How dearly leaving the model as it was is paid; lower moves further, 5000 is the paper's."),
        io.Float.Input(
            "flipped",
            default=0.0,
            min=0.0,
            max=0.49,
            step=0.01,
            tooltip="Share of labels believed to be wrong; 0.1 for one in ten.",
        ),
        *_shared(),
    ]


def _smpo() -> list:
    return [
        _beta(2000.0, "As DPO's, times gamma: how dearly leaving the model as it was is paid."),
        io.Float.Input(
            "gamma", default=10.0, min=0.001, max=1e4, step=0.5, tooltip="Multiplies beta; 10 is the paper's code's."
        ),
        io.Combo.Input(
            "labels",
            options=["weight", "soft"],
            default="weight",
            tooltip="weight: as published, pairs count by their certainty. soft: learns the certainty, and then stops.",
        ),
        io.Float.Input(
            "temperature",
            default=1.0,
            min=1e-6,
            max=1e9,
            step=0.01,
            round=1e-6,
            tooltip="Strength that makes a pair 73 % certain: take the median that Preference Set shows.",
        ),
        io.Int.Input(
            "inversion_steps",
            default=5,
            min=0,
            max=1000,
            tooltip="Steps that find each picture's own noise; 0 takes fresh noise, as DPO does, and is much faster.",
        ),
        io.Boolean.Input(
            "renoise", default=True, advanced=True, tooltip="Two calls in each of those steps, far more exact."
        ),
        *_shared(),
    ]


def _mapo() -> list:
    return [
        _beta(0.1, "Weight of the margin between both beside fitting the winner."),
        io.Float.Input(
            "snr",
            default=0.5,
            min=0.001,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="How fast a picture's likelihood falls with its error.",
        ),
        io.Float.Input(
            "scale",
            default=1000.0,
            min=0.001,
            max=1e7,
            step=100.0,
            advanced=True,
            tooltip="How sharply the margin is judged; raise it where winners and losers differ little.",
        ),
        *_shared(),
    ]


PREFERENCE: dict[str, Callable[[], list]] = {"dpo": _dpo, "smpo": _smpo, "mapo": _mapo}
