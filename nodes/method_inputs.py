"""The settings of each training method as inputs; their order is an interface, new ones go last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..hosts.api import io


def _student(steps: int) -> list:
    return [
        io.Int.Input("steps", default=steps, min=1, max=50, tooltip="Calls of the network that the student makes."),
        io.String.Input(
            "timesteps",
            default="",
            tooltip=(
                "Its levels, such as 999, 749, 499, 249; empty: an even grid, and 399 for one step of eps models."
            ),
        ),
    ]


def _cfg(value: float) -> Any:
    return io.Float.Input(
        "cfg", default=value, min=1.0, max=100.0, step=0.1, tooltip="Guidance of the teacher, which the student learns."
    )


def _fake() -> list:
    """How the fake score keeps up with the student."""
    return [
        io.Int.Input(
            "ratio", default=5, min=1, max=1000, tooltip="Updates of the fake score for one update of the student."
        ),
        io.Float.Input(
            "fake_rate",
            default=1.0,
            min=0.001,
            max=1000.0,
            step=0.1,
            tooltip="Learning rate of the fake score over the student's.",
        ),
    ]


def _levels() -> list:
    """At which levels student and teacher are compared."""
    return [
        io.Float.Input(
            "low",
            default=0.02,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Lowest level at which student and teacher are compared, as a share of the schedule.",
        ),
        io.Float.Input(
            "high", default=0.98, min=0.0, max=1.0, step=0.01, advanced=True, tooltip="The highest such level."
        ),
        io.Float.Input(
            "shift",
            default=1.0,
            min=0.01,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="Flow models: above 1 compares more often at high noise.",
        ),
    ]


def _matching(cfg: float, gan: float) -> list:
    """DMD2's settings, which f-distill shares."""
    return [
        *_student(1),
        _cfg(cfg),
        *_fake(),
        io.Float.Input(
            "gan_weight",
            default=gan,
            min=0.0,
            max=100.0,
            step=0.001,
            round=1e-5,
            tooltip=("Weight of the discriminator, which needs images; 0 for none. Published runs: 0.001 to 0.03."),
        ),
        io.Combo.Input(
            "gan_on",
            options=["teacher", "fake"],
            default="teacher",
            tooltip=(
                "Whose features the discriminator sees: the frozen teacher's, or the fake score's, which "
                "it then trains."
            ),
        ),
        io.Int.Input(
            "regression_steps",
            default=0,
            min=0,
            max=1_000_000,
            tooltip=("First so many steps copy pictures of the teacher: one-step students of large models need it."),
        ),
        io.Float.Input(
            "regression_weight",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="How much of that remains afterwards; 0.25 with gan_weight 0 is DMD as first published.",
        ),
        io.Int.Input(
            "pairs", default=1000, min=1, max=1_000_000, advanced=True, tooltip="Teacher pictures made for that."
        ),
        io.Int.Input(
            "pair_steps", default=30, min=1, max=1000, advanced=True, tooltip="The teacher's steps for each of them."
        ),
        io.Boolean.Input(
            "decoupled",
            default=False,
            advanced=True,
            tooltip="Compare guidance only at levels no noisier than the student's own (Decoupled DMD).",
        ),
        io.Boolean.Input(
            "normalise", default=True, advanced=True, tooltip="Divide each sample's gradient by the teacher's distance."
        ),
        *_levels(),
    ]


def _f_distill() -> list:
    return [
        io.Combo.Input(
            "divergence",
            options=[
                "jensen_shannon",
                "forward_kl",
                "squared_hellinger",
                "jeffreys",
                "softened_reverse_kl",
                "neyman",
                "pearson",
                "reverse_kl",
            ],
            default="jensen_shannon",
            tooltip=(
                "forward_kl covers the most, reverse_kl (DMD2) the least; jensen_shannon is the paper's best on text."
            ),
        ),
        *_matching(3.0, 0.005),
        io.Float.Input(
            "ratio_ema",
            default=0.9,
            min=0.0,
            max=0.999,
            step=0.01,
            advanced=True,
            tooltip="Memory of the means that density ratios are divided by; small batches need a long one.",
        ),
        io.Float.Input(
            "ratio_low", default=0.1, min=1e-4, max=1.0, step=0.01, advanced=True, tooltip="Smallest density ratio."
        ),
        io.Float.Input(
            "ratio_high", default=20.0, min=1.0, max=1e4, step=1.0, advanced=True, tooltip="Largest density ratio."
        ),
        io.Boolean.Input(
            "ratio_normalise", default=True, advanced=True, tooltip="Divide ratios by the mean of their noise level."
        ),
    ]


def _tdm() -> list:
    return [
        *_student(4),
        _cfg(4.5),
        io.Float.Input(
            "fake_rate",
            default=5.0,
            min=0.001,
            max=1000.0,
            step=0.5,
            tooltip="Learning rate of the fake score over the student's; both move every step.",
        ),
        io.Combo.Input(
            "diffusing",
            options=["separate", "top"],
            default="separate",
            tooltip="Compare between two of the student's levels, or up to the highest.",
        ),
        io.Boolean.Input(
            "exact_score",
            default=False,
            tooltip="Match the state after every step exactly, not only the last (the gradient is noisier).",
        ),
        io.Float.Input(
            "huber",
            default=0.001,
            min=0.0,
            max=100.0,
            step=0.001,
            round=1e-6,
            advanced=True,
            tooltip="Where the pseudo-Huber loss turns from square to straight; 0 for squares.",
        ),
        io.Boolean.Input(
            "normalise", default=True, advanced=True, tooltip="Divide each sample's gradient by the teacher's distance."
        ),
        io.Boolean.Input(
            "random_mid", default=False, advanced=True, tooltip="End each step at a random level of its interval."
        ),
        io.String.Input(
            "steps_choices",
            default="",
            advanced=True,
            tooltip=("Several numbers of steps for one student, such as 1, 2, 4 (TDM-unify); empty for one number."),
        ),
        io.Boolean.Input(
            "conditioned", default=False, advanced=True, tooltip="Tell the fake score the step: an adapter for each."
        ),
    ]


def _di_star() -> list:
    return [
        *_student(1),
        _cfg(7.5),
        *_fake(),
        io.Float.Input(
            "alpha_rew",
            default=0.0,
            min=0.0,
            max=1e6,
            step=0.1,
            tooltip=(
                "Weight of the reward; connect one to `reward`. Too much of it and the student runs after the reward."
            ),
        ),
        io.Combo.Input(
            "guidance",
            options=["in", "out"],
            default="in",
            tooltip=(
                "in: the teacher is guided inside the distance (better). out: guidance pulls as a reward of its own."
            ),
        ),
        io.Combo.Input(
            "distance",
            options=["pseudo_huber", "l2", "kl"],
            default="pseudo_huber",
            tooltip="pseudo_huber is DI*'s, l2 is SIM's and cannot run away, kl is Diff-Instruct's.",
        ),
        io.Float.Input(
            "huber",
            default=0.00054,
            min=1e-8,
            max=1000.0,
            step=1e-5,
            round=1e-8,
            advanced=True,
            tooltip="Where pseudo_huber turns from square to straight.",
        ),
        io.Float.Input(
            "sid_alpha",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.1,
            advanced=True,
            tooltip="l2 only: SiD's alpha; 1 is the exact gradient.",
        ),
        io.Combo.Input(
            "space",
            options=["x0", "score"],
            default="x0",
            advanced=True,
            tooltip="Compare clean latents, every level alike, or the scores themselves.",
        ),
        io.Boolean.Input(
            "normalise", default=True, advanced=True, tooltip="Divide each sample's gradient by the teacher's distance."
        ),
        *_levels(),
    ]


def FLOW() -> list:
    """Flow matching and denoising."""
    return [
        io.Combo.Input(
            "loss_space",
            options=["native", "x0"],
            default="native",
            tooltip=(
                "native: the error of what the network predicts, as it was trained. x0: of the picture, as core does."
            ),
        ),
        io.Combo.Input(
            "levels",
            options=["uniform", "logit_normal", "core"],
            default="uniform",
            tooltip=("How noise levels are drawn; logit_normal (SD3) prefers the middle, core is the core trainer's."),
        ),
        io.Float.Input(
            "cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the previews; training has none."
        ),
        io.Float.Input(
            "mean",
            default=0.0,
            min=-10.0,
            max=10.0,
            step=0.1,
            advanced=True,
            tooltip="logit_normal: above 0 draws noisier levels.",
        ),
        io.Float.Input(
            "std",
            default=1.0,
            min=0.01,
            max=10.0,
            step=0.1,
            advanced=True,
            tooltip="logit_normal: how far they spread.",
        ),
        io.Float.Input(
            "max_weight",
            default=10_000.0,
            min=1.0,
            max=1e8,
            step=100.0,
            advanced=True,
            tooltip="The most that an error of the picture is magnified at low noise.",
        ),
        io.Float.Input(
            "aug_dim",
            default=0.0,
            min=0.0,
            max=1e12,
            step=16.0,
            advanced=True,
            tooltip=(
                "Experimental: PFGM++'s D, heavier-tailed noise; 0 is Gaussian, else at least 1/8 of a latent's size."
            ),
        ),
    ]


def FEW_SHOT() -> list:
    """Few-shot adaptation."""
    return [
        io.Float.Input(
            "consistency",
            default=1.0,
            min=0.0,
            max=1e4,
            step=0.1,
            tooltip="How strongly the model's own variety is kept; 0 is plain fine-tuning in phases.",
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=1.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance of the model's own samples that the images are compared with, and of previews.",
        ),
        io.Int.Input(
            "source_steps",
            default=4,
            min=1,
            max=100,
            tooltip="Steps for each of those samples; 4 gives rough ones, 20 good ones.",
        ),
        io.Float.Input(
            "phase",
            default=300.0,
            min=50.0,
            max=750.0,
            step=10.0,
            advanced=True,
            tooltip="Where content ends and style begins, in thousandths of the schedule.",
        ),
    ]


def method_input(methods: dict[str, Callable[[], list]]) -> Any:
    """The choice of a method with only that method's settings."""
    return io.DynamicCombo.Input(
        "method",
        options=[io.DynamicCombo.Option(name, inputs()) for name, inputs in methods.items()],
        tooltip="How the student is taught; the help page compares them.",
    )


DISTILLATION: dict[str, Callable[[], list]] = {
    "dmd2": lambda: _matching(3.0, 0.0),
    "f_distill": _f_distill,
    "tdm": _tdm,
    "di_star": _di_star,
}
