"""The model and the photographs that come with Retort."""

from __future__ import annotations

from ..hosts.api import demo_photographs, host, io
from .checks import CheckedNode
from .inputs import schema


class RetortEmbeddedModel(CheckedNode):
    """A small text-to-image model that runs on any machine."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortEmbeddedModel",
            display_name="Retort Demo Model",
            category="model/loaders/retort",
            description=(
                "A small text-to-image model that comes with Retort: handwritten digits at 64x64 from captions such as "
                '"a bold blue seven on yellow paper, leaning left". Every method can be tried on it in seconds, on a '
                "CPU, without any download."
            ),
            search_aliases=["retort", "digits", "tiny model", "demo model", "test model", "built-in checkpoint"],
            inputs=[
                io.Combo.Input(
                    "variant",
                    options=["flow", "eps", "flow early", "eps early", "photographs"],
                    default="flow",
                    tooltip=(
                        "flow: flow matching, as SD3 and Flux. eps: noise prediction with Stable Diffusion's schedule, "
                        "as SD1.5 and SDXL. early: a checkpoint from the beginning of training, a natural weak model. "
                        "photographs: a one-step restorer of photographs, for Restore."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model. Give it an empty latent of 64 x 64 pixels."),
                io.Clip.Output(tooltip="Its text encoder, for CLIP Text Encode; it knows about forty words."),
                io.Vae.Output(tooltip="Its autoencoder: 64x64 pixels to 8x8 latents."),
            ],
        )

    @classmethod
    def execute(cls, variant):
        return io.NodeOutput(*host.embedded(variant))


class RetortDemoPhotograph(CheckedNode):
    """A photograph to try restoration on."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortDemoPhotograph",
            display_name="Retort Demo Photograph",
            category="image/restoration/retort",
            description=(
                "A photograph that comes with Retort, to try restoration on without a file of your own. None of them "
                "was used in training."
            ),
            search_aliases=["retort", "test image", "sample image", "example photo", "demo picture"],
            inputs=[
                io.Combo.Input(
                    "photograph",
                    options=list(demo_photographs.NAMES),
                    default="cat",
                    tooltip="cat: the face of a cat, 451 x 300 pixels. coffee: a cup on a table, 600 x 400 pixels.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The photograph.")],
        )

    @classmethod
    def execute(cls, photograph="cat"):
        return io.NodeOutput(demo_photographs.photograph(photograph))
