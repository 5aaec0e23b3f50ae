"""Training Plan: what a training would take, before anything of it is done."""

from __future__ import annotations

from ..hosts.api import host, io, plans
from ..trainers.methods import METHODS
from .checks import CheckedNode
from .inputs import schema
from .training import ALIASES, CATEGORY


class RetortTrainingPlan(CheckedNode):
    """Says what fits on which card and how."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortTrainingPlan",
            display_name="Training Plan",
            category=CATEGORY,
            description=(
                "Says what a training of this model would take in memory on cards of several sizes: whether it fits, "
                "how many blocks of the base wait in host memory, and the peak. It is counted on the network without "
                "its weights, with the method's own step, in seconds; nothing is trained."
            ),
            search_aliases=[*ALIASES, "memory", "vram", "estimate", "fits"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train for."),
                io.Conditioning.Input("positive", tooltip="Any prompt: how long it is counts."),
                io.Latent.Input("latent", tooltip="Empty or not, of the size to train at."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="flow",
                    tooltip="With the settings that its node begins with.",
                ),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Size of the LoRA."),
                io.Int.Input("batch_size", default=1, min=1, max=1024, tooltip="Samples on the GPU at once."),
                io.Combo.Input(
                    "optimiser",
                    options=["adamw", "adamw8bit", "adafactor", "prodigy"],
                    default="adamw",
                    tooltip="What it keeps of each weight counts.",
                ),
                io.String.Input("cards", default=plans.CARDS, tooltip="Sizes of cards in GB, with commas between."),
                io.Vae.Input("vae", optional=True, tooltip="For methods that take a reward or pictures."),
                io.Custom("REWARD").Input("reward", optional=True, tooltip="For methods that take one."),
            ],
            outputs=[io.String.Output(id="text", display_name="text", tooltip="A line for each card.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("cards"):
            plans.sizes(given["cards"])
        if not given.knows("method", "rank", "batch_size", "optimiser"):
            return
        config = plans.settings(*(given[name] for name in ("method", "rank", "batch_size", "optimiser")))
        refusal = METHODS[config.method].objective.reward_refusal(config.objective)
        if refusal and not given.connected("reward"):
            raise ValueError(refusal)

    @classmethod
    def execute(cls, model, positive, latent, method, rank, batch_size, optimiser, cards, vae=None, reward=None):
        shape = host.empty_latent_shape(model, latent["samples"])
        config = plans.settings(method, rank, batch_size, optimiser)
        dataset = plans.sample(method, (positive[0][0], positive[0][1]), shape)
        text = plans.report(host, model, config, dataset, plans.sizes(cards), vae, (reward,))
        return io.NodeOutput(text, ui={"text": (text,)})
