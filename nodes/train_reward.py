"""The trainer that teaches a model to please a reward: by the reward's gradient, or by what it samples and is told."""

from __future__ import annotations

from ..hosts.api import io
from ..trainers.methods import of_group
from .training import TrainingNode, train, trainer_schema
from .training_inputs import common_inputs, method_input, sources

REWARD = io.Custom("REWARD")


class RetortTrainReward(TrainingNode):
    """Teach a model to make pictures that a reward likes."""

    @classmethod
    def define_schema(cls):
        return trainer_schema(
            node_id="RetortTrainReward",
            display_name="Train Reward",
            description=(
                "Teaches a LoRA to make pictures that a reward scores high; needs prompts only. align_prop follows the "
                "gradient of a differentiable reward through the sampler, spo compares candidates of each step, "
                "flow_grpo compares whole pictures (flow models); these two take any reward."
            ),
            sound=False,
            references=False,
            aliases=[
                "reward", "preference", "alignprop", "draft", "drtune", "spo", "grpo", "rlhf", "ddpo",
            ],
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
                method_input(of_group("reward")),
                *common_inputs("my_taste", 100, 16, fake=False),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, **given):
        return train(cls, given)
