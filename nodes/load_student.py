"""A few-step student from its LoRA alone: the file, or its published name, says how it is sampled."""

from __future__ import annotations

import time

from ..hosts.api import host, io, recognise, students
from ..sampling import presets
from ..sampling.students.preset import MOST_STEPS
from .checks import CheckedNode, at
from .distilled import ALIASES, CATEGORY, check_of, known, latent_input, set_up, set_up_outputs
from .inputs import file_input, number, schema


class RetortLoadStudent(CheckedNode):
    """LoRA, model, guider, sampler and sigmas, with nothing to type."""

    @classmethod
    def define_schema(cls):
        names = host.lora_names()
        return schema(
            node_id="RetortLoadStudent",
            display_name="Load Student",
            category=CATEGORY,
            description=(
                "Loads the LoRA of a few-step student and sets up all that SamplerCustomAdvanced needs to sample "
                "it: by the recipe in the file, which Retort's trainers write, or by the name of a published file."
            ),
            search_aliases=[*ALIASES, "load lora", "student", "recipe", "bypass"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the student was made for, without its LoRA."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Only used by students with a cfg above 1; most have guidance built in.",
                ),
                latent_input(),
                file_input(
                    "lora_name",
                    names,
                    "The student's LoRA, in models/loras. Its layers are found under any published names; what has no "
                    "place in the model is named.",
                    default=names[0] if names else None,
                ),
                number(
                    "strength", 1.0, -10.0, 10.0,
                    "How strongly the LoRA acts, over what its maker advises; 1 is the student.",
                    step=0.01,
                ),
                number(
                    "steps", 0, 0, MOST_STEPS,
                    "Calls of the network. 0 takes the student's own number; any other must be one it was made for.",
                ),
                io.Boolean.Input(
                    "bypass",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Computes the LoRA beside the layers and leaves their weights as they are: for quantised "
                        "models, whose weights would be rounded again. Takes a little more time per call."
                    ),
                ),
            ],
            outputs=set_up_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name=None, **given):
        """The file, and what a published name may mean; always another one where the name is connected, and not known
        here."""
        if not isinstance(lora_name, str):
            return time.time()
        return f"{students.fingerprint(students.AUTO, host.presets_folders())} {host.lora_stamp(lora_name)}"

    @classmethod
    def check(cls, given):
        """See the base."""
        if not given.knows("lora_name"):
            return
        with at("lora_name"):
            found = recognise.lora_candidates(host, known(), given["lora_name"])
        if len(found) == 1 and given.knows("steps"):
            presets.count(found[0].preset, given["steps"] or None)

    @classmethod
    def execute(
        cls, model, positive, lora_name, strength=1.0, steps=0, bypass=False, negative=None, latent=None
    ):
        found = recognise.of_lora(host, known(), lora_name, host.model_kind(model), check_of(model))
        # All in one text: a node shows the last that was said.
        said: list[str] = []
        model = host.with_lora(model, lora_name, strength * found.preset.lora_strength, bypass, said.append)
        said.append(found.how)
        return set_up(model, found.preset, positive, negative, steps, 1.0, latent, said=said)

