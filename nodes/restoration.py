"""Caption-guided restoration: the restorer, and the captions that guide it."""

from __future__ import annotations

from typing import Any

from ..hosts.api import captions, host, io, restoration
from ..restoration.one_step import OneStep
from ..sampling.settings import declared
from .checks import CheckedNode, at
from .inputs import chosen, input_of, number, schema
from .restoration_inputs import ALIASES, CATEGORY, SIZE, check_size, size_inputs, size_of

SETTINGS = {**SIZE, **declared(OneStep), **declared(restoration.RestorationRequest)}


def _settings(*names: str) -> list[Any]:
    return [input_of(SETTINGS[name]) for name in names]


class RetortRestore(CheckedNode):
    """Restores and enlarges with a one-step model, in tiles, guided by captions."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortRestore",
            display_name="Restore",
            category=CATEGORY,
            description=(
                "Restores degraded pictures, of any size, with a one-step restorer such as InstaRevive: the encoded "
                "picture goes through the model once, without noise, guided by a caption of the whole or of each tile."
            ),
            search_aliases=[*ALIASES, "tiled", "supir", "diffbir", "one step", "tile caption"],
            inputs=[
                io.Model.Input("model", tooltip="A one-step restorer: its file, or the base model with its LoRA."),
                io.Clip.Input("clip", tooltip="Text encoder of the captions."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("image", tooltip="One picture, a batch, or the frames of a video; an alpha is kept."),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    tooltip="What the picture shows. Type it, or connect Caption, Generate Text or another captioner.",
                ),
                io.String.Input(
                    "tile_captions",
                    default="",
                    multiline=True,
                    tooltip="One line for each tile, row by row, from Caption; empty: the caption serves all tiles.",
                ),
                *_settings("tile_strength"),
                *size_inputs(),
                *_settings("window", "colour_fix", "timestep", "latent_scale", "batch_size", "caption_per_line"),
                io.Mask.Input("mask", optional=True, tooltip="Restores only here; the rest is plainly enlarged."),
                *_settings("feather"),
            ],
            outputs=[io.Image.Output(tooltip="The restored pictures.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        check_size(given)

    @classmethod
    def execute(
        cls, model, clip, vae, image, scale=4.0, tile=512, overlap=64, least_side=0, window="gaussian", timestep=400,
        **request,
    ):  # fmt: skip
        size = size_of(scale, tile, overlap, least_side, window)
        wanted = restoration.RestorationRequest(size, one_step=OneStep(timestep), **request)
        return io.NodeOutput(restoration.run(host, model, clip, vae, image, wanted))


def _captioners() -> list:
    return [
        io.DynamicCombo.Option(
            "embedded",
            [
                number("least", 0.0, 0.0, 0.99, "Words less likely than this are left out; 0 keeps all.", step=0.05)
            ],
        ),
        io.DynamicCombo.Option(
            "transformers",
            [
                io.String.Input(
                    "model", default="", tooltip="A folder in models/captioners; empty: the only one that is there."
                ),
                io.String.Input(
                    "question",
                    default="",
                    multiline=True,
                    tooltip="What it is asked, such as <CAPTION> for Florence-2; empty: the model's usual way.",
                ),
                io.Int.Input("max_tokens", default=64, min=1, max=1024, tooltip="Longest answer, in its tokens."),
            ],
        ),
    ]


class RetortCaption(CheckedNode):
    """Captions of pictures, and of their tiles."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortCaption",
            display_name="Caption",
            category=CATEGORY,
            description=(
                "Captions pictures, and each tile of them if wished, with the embedded captioner or any captioning "
                "model of transformers in models/captioners. The model leaves memory when it is done."
            ),
            search_aliases=[
                *ALIASES,
                "caption",
                "captioner",
                "describe",
                "blip",
                "florence",
                "llava",
                "qwen",
                "tagger",
            ],
            inputs=[
                io.Image.Input("image", tooltip="What is captioned; each picture of a batch by itself."),
                io.DynamicCombo.Input(
                    "captioner",
                    options=_captioners(),
                    tooltip="embedded: digits of the embedded model. transformers: a model in models/captioners.",
                ),
                io.Boolean.Input("per_tile", default=False, tooltip="Captions each tile of Restore as well."),
                *size_inputs(tooltip="The same as at Restore, so that the tiles are the same."),
                io.String.Input(
                    "suffix", default="", tooltip="Added to every caption, such as: photograph, highly detailed."
                ),
                number("batch_size", 4, 1, 256, "Pictures at once; changes memory, not the captions.", advanced=True),
            ],
            outputs=[
                io.String.Output(
                    id="captions", display_name="captions", tooltip="A line for each picture, for Restore's caption."
                ),
                io.String.Output(
                    id="tile_captions",
                    display_name="tile_captions",
                    tooltip="A line for each tile, picture after picture, for Restore; empty without per_tile.",
                ),
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if given["per_tile"]:
            check_size(given)
        if given.knows("captioner.model") and given["captioner"]["captioner"] == "transformers":
            with at("captioner.model"):
                captions.folder_of(host, given["captioner"]["model"])

    @classmethod
    def execute(
        cls, image, captioner, per_tile=False, scale=4.0, tile=512, overlap=64, least_side=0, suffix="", batch_size=4
    ):
        settings = chosen(cls, "captioner", captioner)
        size = size_of(scale, tile, overlap, least_side) if per_tile else None
        found = captions.run(host, settings.pop("captioner"), settings, image, size, batch_size, suffix.strip())
        whole = "\n".join(found.images)
        tiles = "\n".join(line for row in found.tiles or () for line in row)
        return io.NodeOutput(whole, tiles, ui={"text": (whole,)})
