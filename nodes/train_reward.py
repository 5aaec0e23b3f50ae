"""The trainer that teaches a model to please a reward: by the reward's gradient, or by what it samples and is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..hosts.api import io
from .method_inputs import method_input
from .training import ALIASES, CATEGORY, one, outputs, train
from .training_inputs import common_inputs, offload_input, sources

REWARD = io.Custom("REWARD")


def _sampler(steps: int, cfg: float) -> list:
    return [
        io.Int.Input(
            "steps", default=steps, min=1, max=1000, tooltip="Steps of the sampler in training; few save time."
        ),
        io.Float.Input(
            "cfg", default=cfg, min=0.0, max=100.0, step=0.1, tooltip="Guidance while sampling; 1 halves the time."
        ),
    ]


def _align_prop() -> list:
    return [
        *_sampler(20, 4.0),
        io.Combo.Input(
            "truncation",
            options=["uniform", "normal", "fixed"],
            default="uniform",
            tooltip=(
                "How many of the last steps carry the gradient. uniform: drawn from 1 to all (the paper). normal: "
                "about a sixth (its code). fixed: always `last`."
            ),
        ),
        io.Int.Input(
            "last",
            default=1,
            min=1,
            max=1000,
            tooltip="fixed: so many steps, at most `steps`. 1 suits small cards; all of them lose variety soonest.",
        ),
        io.Combo.Input(
            "sampler", options=["ode", "ancestral"], default="ode", tooltip="ode: Euler. ancestral: fresh noise a step."
        ),
        io.Boolean.Input(
            "stopped",
            default=False,
            advanced=True,
            tooltip="Hold the network's input (DRTune): steadier where many steps carry the gradient.",
        ),
        io.Combo.Input(
            "loss",
            options=["maximise", "target"],
            default="maximise",
            tooltip="maximise: the higher the better. target: as near to `target` as can be, and no further.",
        ),
        io.Float.Input(
            "target", default=10.0, min=-1e6, max=1e6, step=0.1, tooltip="target: the score that is wished for."
        ),
        io.Boolean.Input(
            "checkpoint",
            default=True,
            advanced=True,
            tooltip="Keep only each step's latent and compute its network call again; off needs far more memory.",
        ),
    ]


def _noise_level() -> Any:
    return io.Float.Input(
        "noise_level",
        default=0.7,
        min=0.01,
        max=10.0,
        step=0.05,
        tooltip="sde: how much fresh noise a step adds; 0.7 is the paper's.",
    )


def _spo() -> list:
    return [
        *_sampler(20, 4.0),
        io.Combo.Input(
            "step",
            options=["ancestral", "sde"],
            default="ancestral",
            tooltip="The random step that candidates come from; sde is for flow models.",
        ),
        _noise_level(),
        io.Int.Input(
            "candidates", default=4, min=2, max=64, tooltip="Candidates of a step; best and worst are a pair."
        ),
        io.Int.Input(
            "trained", default=4, min=0, max=1000, tooltip="Steps of a run that are judged and learnt from; 0 for all."
        ),
        io.Float.Input(
            "skipped",
            default=0.25,
            min=0.0,
            max=0.99,
            step=0.05,
            tooltip="Share of the noisiest steps that are never judged.",
        ),
        io.Float.Input(
            "beta",
            default=10.0,
            min=1e-6,
            max=1e6,
            step=0.5,
            tooltip="The higher, the nearer the model stays to itself.",
        ),
    ]


def _flow_grpo() -> list:
    return [
        *_sampler(10, 4.5),
        _noise_level(),
        io.Int.Input("group", default=8, min=2, max=1024, tooltip="Pictures of one prompt that are compared."),
        io.Int.Input(
            "trained", default=0, min=0, max=1000, tooltip="Steps of each picture that are learnt from; 0 for all."
        ),
        io.Float.Input(
            "clip",
            default=1e-4,
            min=1e-8,
            max=1.0,
            step=1e-5,
            round=1e-8,
            tooltip="How far a step's likelihood may move before its pull ends.",
        ),
        io.Float.Input(
            "kl", default=0.01, min=0.0, max=1e6, step=0.01, tooltip="Pull back to the model as it was; 0 for none."
        ),
        io.Int.Input(
            "updates",
            default=2,
            min=1,
            max=1000,
            advanced=True,
            tooltip="Steps of the optimiser before the model that draws is renewed.",
        ),
    ]


METHODS: dict[str, Callable[[], list]] = {"align_prop": _align_prop, "spo": _spo, "flow_grpo": _flow_grpo}


class RetortTrainReward(io.ComfyNode):
    """Teach a model to make pictures that a reward likes."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetortTrainReward",
            display_name="Train Reward",
            category=CATEGORY,
            description=(
                "Teaches a LoRA to make pictures that a reward scores high; needs prompts only. align_prop follows the "
                "gradient of a differentiable reward through the sampler, spo compares candidates of each step, "
                "flow_grpo compares whole pictures (flow models); these two take any reward."
            ),
            search_aliases=[
                *ALIASES, "reward", "preference", "alignprop", "draft", "drtune", "spo", "grpo", "rlhf", "ddpo",
            ],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                *sources(),
                REWARD.Input("reward", tooltip="What the model learns to please; from Reward or Combine Rewards."),
                REWARD.Input(
                    "reward_2",
                    optional=True,
                    tooltip=(
                        "align_prop: another one. Neither is bought by the other: where they disagree nothing moves "
                        "(MGDA). For a weighted sum use Combine Rewards."
                    ),
                ),
                method_input(METHODS),
                *common_inputs("my_taste", 100, 1e-4, 16, fake=False),
                offload_input(),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def execute(cls, **given):
        return train(one(given["method"])["method"], given)
