"""The trainer that makes a one-step restorer: good pictures and captions in, a LoRA out that undoes their damage."""

from __future__ import annotations

from ..trainers.methods import METHODS
from .inputs import inputs_of
from .training import TrainingNode, train, trainer_schema
from .training_inputs import common_inputs, sources


class RetortTrainRestorer(TrainingNode):
    """Teach a model to restore pictures in one call."""

    method = "instarevive"

    @classmethod
    def define_schema(cls):
        return trainer_schema(
            node_id="RetortTrainRestorer",
            display_name="Train Restorer",
            description=(
                "Teaches a LoRA to restore damaged pictures in one network call, by their captions (InstaRevive). "
                "Needs good pictures: it damages and encodes them itself. The model that comes in is the teacher; "
                "begin at its one-step student with `start_from`, if there is one. Use the LoRA in Restore."
            ),
            sound=False,
            references=False,
            aliases=["instarevive", "restoration", "super resolution", "upscale", "deblur", "denoise"],
            inputs=[
                *(one for one in sources() if one.id != "latents"),
                *inputs_of(METHODS["instarevive"].config),
                *common_inputs("my_restorer", 1000, 64),
            ],
        )

    @classmethod
    def execute(cls, **given):
        return train(cls, given, cls.method)
