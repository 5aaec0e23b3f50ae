"""Gaussian statistics of latents, for Teleport Sampler: taken from latents or pictures, and loaded from files."""

from __future__ import annotations

from typing import Any

import torch

from ..files.atomic import checked_name
from ..hosts.api import host, io, statistics, ui
from ..sampling.teleport import low_rank, stationary
from .checks import Asked, CheckedNode
from .inputs import file_input, number, schema

CATEGORY = "model/sampling/retort"
ALIASES = ["retort", "gaussian", "statistics", "teleport", "covariance", "pca"]
GAUSS_STATS = io.Custom("GAUSS_STATS")
FORMS = ["this size (low rank)", "any size (stationary)"]


def _one(value: Any) -> Any:
    """The single value of a widget; a node that takes lists gets every input as one."""
    return value[0] if isinstance(value, list) else value


def _output(tooltip: str):
    return GAUSS_STATS.Output(id="statistics", display_name="statistics", tooltip=tooltip)


class RetortGaussianStatistics(CheckedNode):
    """Mean and covariance of latents."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortGaussianStatistics",
            display_name="Gaussian Statistics",
            category=CATEGORY,
            description=(
                "Mean and covariance of many latents, for Teleport Sampler: of latents, of pictures, or of a folder of "
                "either. Saved under a name, they can be loaded in other workflows."
            ),
            search_aliases=ALIASES,
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that they are for: it tells the scale of its latents."),
                io.Latent.Input("latents", optional=True, tooltip="Latents of one size, a hundred or more."),
                io.Image.Input("images", optional=True, tooltip="Or pictures, which `vae` encodes."),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE, for pictures."),
                io.Combo.Input(
                    "form",
                    options=FORMS,
                    default=FORMS[0],
                    tooltip=(
                        "low rank: exact directions, for latents of this size alone. stationary: the same statistics "
                        "everywhere in the picture, for latents of every size; enough with a few dozen."
                    ),
                ),
                number(
                    "rank", 0, 0, 4096,
                    "low rank: directions that are kept, fewer than there are latents; 0 is half as many.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Instead of latents or images: a folder in the input folder, of pictures or saved latents.",
                ),
                number(
                    "width", 512, 16, 8192, "Of a folder's pictures, in pixels: they are scaled and cut to it.", step=8
                ),
                io.Int.Input("height", default=512, min=16, max=8192, step=8, tooltip="See width."),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Save to models/gaussian_statistics under this name; empty: do not save.",
                ),
            ],
            outputs=[_output("For Teleport Sampler.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        sources = [given.connected("latents"), given.connected("images")]
        if given.knows("folder"):
            sources.append(bool(given["folder"].strip()))
            if sum(sources) != 1:
                raise ValueError(
                    f"{sum(sources) or 'none'} of latents, images and folder are given, and one is needed: connect "
                    "one, or type a folder"
                )
        if given.connected("images") and not given.connected("vae"):
            raise ValueError("images are encoded by a VAE: connect `vae`")
        if given.knows("name") and given["name"].strip():
            checked_name(given["name"])

    @classmethod
    def execute(cls, model, form, rank, folder, width, height, name, latents=None, images=None, vae=None):
        model, form, rank, folder, width, height, name, vae = map(
            _one, (model, form, rank, folder, width, height, name, vae)
        )
        cls.check(Asked({"latents": latents, "images": images, "folder": folder, "vae": vae, "name": name}))
        if folder.strip():
            stored = statistics.stored_latents(host, host.input_folders(), folder.strip(), vae, (width, height))
        elif latents:
            stored = [latent["samples"] for latent in latents]
        else:
            stored = [host.encode_images(vae, batch)["samples"] for batch in images or ()]
        rows = [host.latents_in(model, samples) for samples in stored]
        shapes = sorted({tuple(one.shape[1:]) for one in rows})
        if len(shapes) > 1:
            raise ValueError(f"the latents have several sizes, {shapes[0]} and {shapes[-1]}: cut the pictures to one")
        whole = torch.cat(rows)
        found = low_rank(whole, rank) if form == FORMS[0] else stationary(whole)
        text = f"{len(whole)} latents: {found}"
        if name.strip():
            path = statistics.save(host.statistics_folders()[0], name, found)
            text += f"; saved as {path.name}"
        return io.NodeOutput(found, ui=ui.PreviewText(text))


class RetortLoadGaussianStatistics(CheckedNode):
    """Statistics from a file."""

    @classmethod
    def define_schema(cls):
        names = statistics.names(host.statistics_folders())
        return schema(
            node_id="RetortLoadGaussianStatistics",
            display_name="Load Gaussian Statistics",
            category=CATEGORY,
            description="Statistics that Gaussian Statistics saved to models/gaussian_statistics.",
            search_aliases=[*ALIASES, "load"],
            inputs=[
                file_input(
                    "name",
                    names,
                    "A safetensors file in models/gaussian_statistics.",
                    default=names[0] if names else None,
                )
            ],
            outputs=[_output("For Teleport Sampler, with the model that they were made for.")],
        )

    @classmethod
    def execute(cls, name):
        return io.NodeOutput(statistics.load(host.statistics_folders(), name))
