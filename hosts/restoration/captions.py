"""Captioners by name: the embedded one, or a model of transformers in a folder of models/captioners.

`run(host, ...)` serves the node; `host` is a `hosts.contract.Host`. A captioner is read, asked, and let go: its
memory is the restorer's next. No code of a model's repository is ever run, and no pickle opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...files.paths import below, dead_link
from ...files.pictures import rounded
from ...restoration.captions import LONGEST, Captioner, cleaned
from ..contract import Host
from ..rewards import files
from .run import Size, pictures, tiles_of

# Tied to the word embeddings, or of no use to a captioner, and so often not saved.
_UNUSED = ("lm_head.", "decoder.lm_head.", "encoder.pooler.")
QUESTION = "Describe this image in one sentence: what it shows, the materials and the colours."


class Embedded:
    """Digit and colours of the embedded model's pictures; a word less likely than `least` is left out."""

    def __init__(self, host: Host, least: float = 0.0):
        from ...models import captioner

        with torch.inference_mode(False):
            self._network = captioner.load(least)
        self.holder = host.hold(self._network)

    def caption(self, images: Tensor) -> list[str]:
        """See Captioner."""
        return self._network.caption(images.to(self.holder.load()))


class Transformers:
    """An image-text-to-text or captioning model of transformers, read from a local folder.

    question: what it is asked; empty for a plain question where the model converses, and for none where it does not.
    Raises ValueError for a folder that is none, or holds another kind of model.
    """

    def __init__(self, host: Host, model: str = "", question: str = "", max_tokens: int = 64):
        place = folder_of(host, model)
        from transformers import AutoModelForImageTextToText

        files.config_of(place)
        network = files.load_model(place, AutoModelForImageTextToText, _UNUSED, precise=False)
        self._network = network.to(torch.bfloat16) if host.bf16() else network.float()
        self._prepare, self._read = _processing(place, question.strip())
        self._tokens = max_tokens
        self.holder = host.hold(self._network)

    @torch.no_grad()
    def caption(self, images: Tensor) -> list[str]:
        """See Captioner; images of one size at once, so that their prompts are equally long."""
        from PIL import Image

        shown = [Image.fromarray(each.numpy()) for each in rounded(images)]
        inputs = self._prepare(shown)
        device = self.holder.load()
        kind = next(self._network.parameters()).dtype
        placed = {k: v.to(device, kind) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
        said = self._network.generate(**placed, max_new_tokens=self._tokens, do_sample=False)
        asked = placed.get("input_ids")
        # Models without an encoder repeat what they were asked.
        if asked is not None and said.shape[1] >= asked.shape[1] and torch.equal(said[:, : asked.shape[1]], asked):
            said = said[:, asked.shape[1] :]
        return self._read(said.cpu())


KINDS: dict[str, Callable[..., Any]] = {"embedded": Embedded, "transformers": Transformers}


@dataclass(frozen=True)
class Captions:
    """images: a caption of each. tiles: [image][tile], or None."""

    images: list[str]
    tiles: list[list[str]] | None


def run(
    host: Host, kind: str, settings: Mapping[str, Any], images: Tensor, size: Size | None, batch: int, suffix: str = ""
) -> Captions:
    """Captions of images (B, H, W, C), and of their tiles where a size is given. ValueError as the captioners'."""
    if kind not in KINDS:
        raise ValueError(f"captioner {kind!r} is not known; use one of {', '.join(KINDS)}")
    shown = pictures(images)[..., :3].float()
    captioner = KINDS[kind](host, **settings)
    tiles = None if size is None else list(tiles_of(shown, size))
    bar, done = host.progress(len(shown) * (1 + len(tiles or ()))), 0
    try:
        found: list[list[str]] = []
        for part in (shown, *(tiles or ())):
            said: list[str] = []
            for some in part.split(batch):
                host.check_cancelled()
                said += _said(host, captioner, some, suffix)
                done += len(some)
                bar.step(done)
            found.append(said)
    finally:
        captioner.holder.offload()
    whole, *each = found
    return Captions(whole, None if tiles is None else [list(row) for row in zip(*each, strict=True)])


def _said(host: Host, captioner: Captioner, images: Tensor, suffix: str) -> list[str]:
    lines, cut = cleaned(captioner.caption(images), len(images))
    if cut:
        host.say(f"the captioner did not stop: {cut} captions were cut at {LONGEST} characters", warn=True)
    return [", ".join(filter(None, (line, suffix))) for line in lines]


def folder_of(host: Host, name: str) -> files.Place:
    """A folder of a model. ValueError says where one belongs, or that transformers is missing."""
    files.transformers_or_error()
    roots = host.captioners_folders()
    here = [found for found in files.names(roots) if not found.endswith(".safetensors")]
    where = " or ".join(str(root) for root in roots) or "models/captioners (pass --models DIR)"
    if not name.strip() and len(here) == 1:
        name = here[0]
    for root in roots if name.strip() else ():
        path = below(root, name.strip())
        if path.is_dir():
            return files.Place(name.strip(), path)
    if name.strip() and (dead := dead_link(roots, name.strip())):
        raise ValueError(f"model {name!r}: {dead}")
    raise ValueError(
        f"model {name!r}: type the name of a folder in {where} with a captioner of transformers (config.json, "
        f"safetensors, processor, tokenizer). Found there: {', '.join(here[:8]) or 'nothing'}"
    )


def _processing(place: files.Place, question: str) -> tuple[Callable[[list], dict], Callable[[Tensor], list[str]]]:
    """Functions from pictures to a model's inputs, and from its tokens to texts."""
    from transformers import AutoImageProcessor, ProcessorMixin

    take = files.processor(place)
    if not isinstance(take, ProcessorMixin):
        # Old captioners keep their two halves apart; they answer without being asked.
        words = files.tokenizer(place)
        see = files.loaded(place, lambda: AutoImageProcessor.from_pretrained(place.source, **place.options))
        return (
            lambda shown: {"pixel_values": see(images=shown, return_tensors="pt")["pixel_values"]},
            lambda said: words.batch_decode(said, skip_special_tokens=True),
        )
    template = take.chat_template or take.tokenizer.chat_template
    if template:
        content: Any = [{"type": "image"}, {"type": "text", "text": question or QUESTION}]
        text = take.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        text = question

    def prepare(shown: list) -> dict:
        if not text:
            return dict(take(images=shown, return_tensors="pt"))
        # Conversations may hold several pictures, so theirs come one list to each.
        return dict(take(images=[[s] for s in shown] if template else shown, text=[text] * len(shown),
                         return_tensors="pt"))  # fmt: skip

    return prepare, lambda said: take.batch_decode(said, skip_special_tokens=True)
