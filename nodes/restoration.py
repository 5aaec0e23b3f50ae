"""Caption-guided restoration: the restorer, and the captions that guide it."""

from __future__ import annotations

from ..hosts.api import captions, host, io, restoration
from ..restoration.captions import per_image, per_tile
from ..restoration.color_fix import METHODS
from ..restoration.one_step import OneStep
from ..restoration.tiles import WINDOWS
from .inputs import chosen, number, schema
from .restoration_inputs import ALIASES, CATEGORY, SAME, size_inputs, size_of


class RetortRestore(io.ComfyNode):
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
                number(
                    "tile_strength", 1.0, 0.0, 1.0,
                    "Share of a tile's own caption. Between 0 and 1 both captions run, mixed: two calls.", step=0.05,
                ),
                *size_inputs(),
                io.Combo.Input(
                    "window",
                    options=list(WINDOWS),
                    advanced=True,
                    default=WINDOWS[0],
                    tooltip="How tiles are blended. gaussian: softest. cosine: leaves out their rims, seen least well.",
                ),
                io.Combo.Input(
                    "colour_fix",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="Colours of the input. wavelet: its coarse part. adain: mean, contrast. none: the model's.",
                ),
                number("timestep", 400, 1, 1000, "What the restorer was trained at; 400 is InstaRevive's."),
                number(
                    "latent_scale", 0.0, 0.0, 10.0,
                    "Factor of the VAE's latents; 0: the model's own. ComfyUI needs 0.18215 for InstaRevive.",
                    step=0.00001, round=0.00001, advanced=True,
                ),
                number("batch_size", 4, 1, 256, "Tiles at once; changes memory, not the result.", advanced=True),
                io.Boolean.Input(
                    "caption_per_line",
                    default=False,
                    advanced=True,
                    tooltip="Each line of caption belongs to one image, instead of the whole text to all.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Restores only here; the rest is plainly enlarged."),
                number(
                    "feather", 8, 0, 512,
                    "Pixels of the mask, to either side, over which its edge is softened.", advanced=True,
                ),
            ],
            outputs=[io.Image.Output(tooltip="The restored pictures.")],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, image, caption="", tile_captions="", tile_strength=1.0, scale=4.0, tile=512, overlap=64,
        least_side=0, window=WINDOWS[0], colour_fix=METHODS[0], timestep=400, latent_scale=0.0, batch_size=4,
        caption_per_line=False, mask=None, feather=8,
    ):  # fmt: skip
        image = restoration.pictures(image)
        size = size_of(scale, tile, overlap, least_side, window)
        tiles = len(size.grid(*image.shape[1:3]))
        request = restoration.RestorationRequest(
            size=size,
            captions=per_image(caption, len(image), caption_per_line),
            tiles=per_tile(tile_captions, len(image), tiles) if tile_captions.strip() else None,
            strength=tile_strength,
            colour=colour_fix,
            one_step=OneStep(timestep),
            latent_scale=latent_scale,
            batch=batch_size,
            mask=mask,
            feather=feather,
        )
        return io.NodeOutput(restoration.run(host, model, clip, vae, image, request))


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


class RetortCaption(io.ComfyNode):
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
                *size_inputs(SAME),
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
    def execute(
        cls, image, captioner, per_tile=False, scale=4.0, tile=512, overlap=64, least_side=0, suffix="", batch_size=4
    ):
        settings = chosen(cls, "captioner", captioner)
        size = size_of(scale, tile, overlap, least_side) if per_tile else None
        found = captions.run(host, settings.pop("captioner"), settings, image, size, batch_size, suffix.strip())
        whole = "\n".join(found.images)
        tiles = "\n".join(line for row in found.tiles or () for line in row)
        return io.NodeOutput(whole, tiles, ui={"text": (whole,)})
