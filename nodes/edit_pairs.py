"""Pictures before and after an edit, from a folder, in the order in which they belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import PurePosixPath

from ..files import texts
from ..files.atomic import checked_name
from ..files.folder import Inside, inside
from ..hosts.api import host, io
from ..preferences import store as preferences
from .checks import CheckedNode, at
from .inputs import schema
from .training import ALIASES, CATEGORY

BEFORE, AFTER = "before", "after"
CAPTION_BYTES = 65_536


class RetortEditPairs(CheckedNode):
    """What an edit model learns from: pictures, what is to become of them, and what is asked for."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortEditPairs",
            display_name="Load Edit Pairs",
            category=CATEGORY,
            description=(
                "Loads pictures before and after an edit, for training an edit model (Qwen-Image-Edit, Flux Kontext): "
                "from the folders `before` and `after` of a folder, whose pictures have the same names. The lists are "
                "in the same order."
            ),
            search_aliases=[
                *ALIASES, "edit", "before after", "kontext", "qwen image edit", "control", "instruction", "dataset",
            ],
            inputs=[
                io.String.Input(
                    "folder",
                    default="edits",
                    tooltip="A folder in ComfyUI's input folder, in which the folders `before` and `after` are.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip=(
                        "What is asked for, of pairs without a text of their own; NAME.txt in `after` is that of NAME."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    id="before", display_name="before", is_output_list=True,
                    tooltip="The pictures before; VAE Encode makes the trainer's `references` of them.",
                ),
                io.Image.Output(
                    id="after", display_name="after", is_output_list=True,
                    tooltip="The pictures after; VAE Encode makes the trainer's `latents` of them.",
                ),
                io.String.Output(
                    id="prompts", display_name="prompts", is_output_list=True,
                    tooltip="What is asked for, for the model's text encoder.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder="edits", **given):
        """Again whenever a picture or a text has changed."""
        found = hashlib.blake2b()
        if isinstance(folder, str):
            with_texts = (path for paths in _pairs(folder) for path in (*paths, _text(paths[1])))
            for path in with_texts:
                found.update(repr((path.path.name, path.changed() if path.is_file() else 0)).encode())
        return found.hexdigest()

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("folder"):
            with at("folder"):
                pairs = list(_pairs(given["folder"]))
            if given.knows("prompt") and not given["prompt"].strip():
                bare = next((after for _, after in pairs if not _text(after).is_file()), None)
                if bare is not None:
                    raise ValueError(
                        f"prompt is empty, and {bare.path.name} has no text of its own: write what is asked for, or "
                        f"put {_text(bare).path.name} beside it"
                    )

    @classmethod
    def execute(cls, folder="edits", prompt=""):
        before, after, prompts = [], [], []
        for first, second in _pairs(folder):
            host.check_cancelled()
            before.append(preferences.load_image(first)[None])
            after.append(preferences.load_image(second)[None])
            own = _text(second)
            prompts.append(texts.clean(texts.decode(own.read(CAPTION_BYTES))) if own.is_file() else prompt)
        return io.NodeOutput(before, after, prompts)


def _text(picture: Inside) -> Inside:
    """Where a picture's own prompt stands."""
    return inside(picture.path.parent) / f"{picture.path.stem}.txt"


def _pairs(folder: str) -> Iterator[tuple[Inside, Inside]]:
    """(before, after) by their names. ValueError for a folder that is missing or empty, and for a single picture."""
    place = inside(host.input_folders()[0]) / checked_name(folder)
    both = []
    for name in (BEFORE, AFTER):
        if not (place / name).is_dir():
            raise ValueError(
                f"{folder!r:.140} has no folder {name!r} ({place / name} is not there): put the pictures before and "
                "after the edit into the folders `before` and `after` of it, under the same names"
            )
        files = [file for file in (place / name).files() if PurePosixPath(file).suffix.lower() in preferences.FORMATS]
        found = {PurePosixPath(file).stem: place / name / file for file in sorted(files)}
        if len(found) < len(files):
            raise ValueError(f"{place / name} holds two pictures that differ by their ending alone: remove one of them")
        both.append(found)
    before, after = both
    if single := sorted(before.keys() ^ after.keys()):
        has, lacks = (BEFORE, AFTER) if single[0] in before else (AFTER, BEFORE)
        raise ValueError(
            f"{len(single)} pictures of {folder!r:.140} are there once: {single[0]!r:.140}, for one, is in {has!r} and "
            f"not in {lacks!r}; add the other one, or remove it"
        )
    if not before:
        raise ValueError(f"{folder!r:.140} holds no pictures (PNG, JPEG or WebP): put some into `before` and `after`")
    for name in sorted(before):
        yield before[name], after[name]
