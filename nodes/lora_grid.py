"""Which save point, and how strong? A run's checkpoints at several strengths in one sheet."""

from __future__ import annotations

import time

from ..files.atomic import checked_name
from ..files.folder import inside
from ..hosts.api import compare, host, io, lora_grid, ui
from ..trainers.loop import STATE
from .checks import CheckedNode
from .inputs import schema, seed_input
from .jobs import folder_of
from .training import ALIASES, CATEGORY


class RetortLoraGrid(CheckedNode):
    """Checkpoints by strengths."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortLoraGrid",
            display_name="LoRA Grid (Checkpoints x Strengths)",
            category=CATEGORY,
            description=(
                "Draws one prompt from the same noise with the checkpoints that a run has kept, each at several "
                "strengths, and puts all pictures on one sheet: a row for each checkpoint, a column for each strength."
            ),
            search_aliases=[*ALIASES, "xy plot", "checkpoint", "strength", "compare lora", "grid", "sweep"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the run trained, without its LoRA."),
                io.Clip.Input("clip", tooltip="Text encoder of the prompt."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                io.Sampler.Input("sampler", tooltip="For a few-step student Distilled Sampler, else KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="The schedule, down to 0."),
                io.Latent.Input("latent", tooltip="An empty latent, for the size of the pictures."),
                io.String.Input("run", default="my_student", tooltip="Name of the run, or a trainer's output."),
                io.String.Input("prompt", default="", multiline=True, tooltip="What is drawn."),
                io.String.Input("negative", default="", multiline=True, tooltip="What guidance compares with."),
                io.String.Input("strengths", default="0.5, 0.75, 1", tooltip="Of the LoRA, with commas between."),
                io.Int.Input(
                    "points", default=5, min=1, max=100, tooltip="Checkpoints at most: evenly, the last with them."
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance; 1 is none, as few-step students want it.",
                ),
                seed_input("Of the noise, which is the same for all pictures."),
            ],
            outputs=[
                io.Image.Output(id="sheet", display_name="sheet", tooltip="All pictures, with step and strength."),
                io.Image.Output(id="images", display_name="images", tooltip="The pictures alone, row by row."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, run="", **given):
        """Again whenever the run has saved; always where the name is connected, which is not known here."""
        if not isinstance(run, str):
            return time.time()
        return (inside(host.runs_folder() / checked_name(run)) / STATE).changed() if run else 0

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("run"):
            checked_name(given["run"])
        if given.knows("strengths"):
            lora_grid.strengths_of(given["strengths"])

    @classmethod
    def execute(
        cls, model, clip, vae, sampler, sigmas, latent, run, prompt="", negative="", strengths="0.5, 0.75, 1", points=5,
        cfg=1.0, seed=0,
    ):  # fmt: skip
        kept = lora_grid.chosen(folder_of(run), points)
        how = compare.Sampling(sampler, sigmas, cfg, latent)
        made = lora_grid.draw(
            host, model, clip, vae, kept, lora_grid.strengths_of(strengths), prompt, negative, how, seed
        )
        return io.NodeOutput(made.sheet, made.images, ui=ui.PreviewImage(made.sheet, cls=cls))
