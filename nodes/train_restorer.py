"""The trainer that makes a one-step restorer: good pictures and captions in, a LoRA out that undoes their damage."""

from __future__ import annotations

from ..hosts.api import io
from .training import ALIASES, CATEGORY, outputs, train
from .training_inputs import common_inputs, offload_input, sources


def RESTORER() -> list:
    """InstaRevive."""
    return [
        io.Combo.Input(
            "degradation",
            options=["real_world", "face", "infrared"],
            default="real_world",
            tooltip="How the pictures are damaged, anew in every step; Degrade shows each kind.",
        ),
        io.Float.Input(
            "weakest",
            default=0.3,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="real_world: the least strength that is drawn, of the published one.",
        ),
        io.Float.Input(
            "strongest", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="real_world: the greatest such strength."
        ),
        io.Float.Input(
            "least", default=2.0, min=1.0, max=64.0, step=0.5, tooltip="Least factor by which pictures are shrunk."
        ),
        io.Float.Input(
            "most", default=4.0, min=1.0, max=64.0, step=0.5, tooltip="Greatest such factor; what you will restore."
        ),
        io.Int.Input(
            "timestep",
            default=400,
            min=1,
            max=1000,
            tooltip="The network's timestep at which it is called, and will be when it restores.",
        ),
        io.Float.Input(
            "cfg", default=3.0, min=1.0, max=100.0, step=0.1, tooltip="Guidance of the teacher; 1 needs no `negative`."
        ),
        io.Float.Input(
            "matching_weight",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.05,
            tooltip="Pull towards what good pictures look like; 0 is regression alone, smooth and three times as fast.",
        ),
        io.Float.Input(
            "regression_weight",
            default=1.0,
            min=0.0,
            max=10_000.0,
            step=0.1,
            tooltip="Pull towards the very picture: more is truer to it, less is sharper.",
        ),
        io.Float.Input(
            "feature_weight",
            default=0.0,
            min=0.0,
            max=10_000.0,
            step=0.1,
            tooltip="Pull towards what a frozen network sees in the picture, after decoding; 0 for none.",
        ),
        io.Combo.Input(
            "features",
            options=["vgg16", "judge"],
            default="vgg16",
            tooltip="That network: models/rewards/vgg16.safetensors, or the one of the embedded digits.",
        ),
        io.Int.Input(
            "regression_steps", default=0, min=0, max=1_000_000, tooltip="First so many steps are regression alone."
        ),
        io.Boolean.Input(
            "dynamic",
            default=True,
            tooltip="Compare over fewer noise levels, and regress less, the nearer the output is to the picture.",
        ),
        io.Int.Input(
            "ratio", default=1, min=1, max=1000, tooltip="Updates of the fake score for one update of the student."
        ),
        io.Float.Input(
            "fake_rate",
            default=1.0,
            min=0.001,
            max=1000.0,
            step=0.1,
            tooltip="Learning rate of the fake score over the student's.",
        ),
        io.Float.Input(
            "gan_weight",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.001,
            round=1e-5,
            tooltip="Weight of a discriminator beside the matching; 0 for none.",
        ),
        io.Combo.Input(
            "gan_on",
            options=["teacher", "fake"],
            default="teacher",
            advanced=True,
            tooltip="Whose features the discriminator sees.",
        ),
        io.Float.Input(
            "narrow",
            default=0.3,
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
            tooltip="dynamic: the highest level that is compared once the output is as good as the picture.",
        ),
        io.Float.Input(
            "floor",
            default=0.25,
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
            tooltip="dynamic: share of the regression that is left then.",
        ),
        io.Float.Input(
            "memory",
            default=0.98,
            min=0.0,
            max=0.99999,
            step=0.005,
            round=1e-5,
            advanced=True,
            tooltip="dynamic: how much of the running distance a step keeps.",
        ),
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
        io.Boolean.Input(
            "normalise",
            default=True,
            advanced=True,
            tooltip="Divide each sample's pull by the teacher's distance from it.",
        ),
    ]


class RetortTrainRestorer(io.ComfyNode):
    """Teach a model to restore pictures in one call."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetortTrainRestorer",
            display_name="Train Restorer",
            category=CATEGORY,
            description=(
                "Teaches a LoRA to restore damaged pictures in one network call, by their captions (InstaRevive). "
                "Needs good pictures: it damages and encodes them itself. The model that comes in is the teacher; "
                "begin at its one-step student with `start_from`, if there is one. Use the LoRA in Restore."
            ),
            search_aliases=[*ALIASES, "instarevive", "restoration", "super resolution", "upscale", "deblur", "denoise"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                *(one for one in sources() if one.id != "latents"),
                *RESTORER(),
                *common_inputs("my_restorer", 1000, 1e-4, 64),
                offload_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, **given):
        names = [i.id for i in RESTORER()]
        return train("instarevive", {**given, "objective": {n: given.pop(n) for n in names}})
