"""Prompts to weighted token ids, as ComfyUI's tokenizers do it, from vocabulary files that lie on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.errors import UsageError
from ...models.text import weighted_spans
from . import folders

Token = tuple[int, float]
# A word shorter than this is not cut in two by the end of a chunk.
_WHOLE_WORD = 8
# Where vocabularies are looked for behind the user's folders: ComfyUI's own copy, and the Hugging Face cache.
_PLACES = {
    "clip": ("comfy/sd1_tokenizer", "openai/clip-vit-large-patch14"),
    "t5": ("comfy/text_encoders/t5_tokenizer", "google/t5-v1_1-xxl"),
}
# Any one of these sets is a whole vocabulary; transformers makes an empty tokenizer of a folder without them.
_FILES = {"clip": (("tokenizer.json",), ("vocab.json", "merges.txt")), "t5": (("tokenizer.json",), ("spiece.model",))}


def find(kind: str) -> Any:
    """transformers' tokenizer of "clip" or "t5"; nothing is downloaded. UsageError says where to put its files."""
    in_comfyui, hub = _PLACES[kind]
    roots = folders.current().models
    places = [root / "tokenizers" / kind for root in roots]
    if os.environ.get("COMFYUI_PATH"):
        places.append(Path(os.environ["COMFYUI_PATH"]) / in_comfyui)
    for place in (*places, *_cached(hub, kind)):
        if _is_whole(place, kind):
            return load(place, kind)
    raise UsageError(
        f"the {kind.upper()} tokenizer's files, which no checkpoint holds, are not on this machine. Get them with "
        f"`hf download {hub} --include '*token*' '*vocab*' '*merges*' 'spiece*'`, put them into "
        f"{places[0] if roots else f'DIR/tokenizers/{kind} and pass --models DIR'}, or set COMFYUI_PATH to a ComfyUI "
        "checkout, which has them"
    )


def load(place: Path, kind: str) -> Any:
    """The tokenizer in a folder. UsageError when its files are not all there."""
    from transformers import CLIPTokenizer, T5TokenizerFast  # type: ignore[attr-defined]

    if not _is_whole(place, kind):
        raise UsageError(f"{place} holds no {kind.upper()} vocabulary ({' or '.join(_FILES[kind][1])})")
    return (CLIPTokenizer if kind == "clip" else T5TokenizerFast).from_pretrained(place, local_files_only=True)


def _is_whole(place: Path, kind: str) -> bool:
    return any(all((place / name).is_file() for name in names) for names in _FILES[kind])


def _cached(hub: str, kind: str) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(hub, name) for names in _FILES[kind] for name in names)
    return [Path(path).parent for path in found if isinstance(path, str)]


@dataclass(frozen=True)
class Chunks:
    """How prompts become rows of token ids. limit: longest row, ends included. least: shortest row.

    start: None where rows have no start token (T5).
    """

    tokenizer: Any
    start: int | None
    end: int
    pad: int
    limit: int
    least: int

    @classmethod
    def clip(cls, tokenizer: Any, pad_with_end: bool) -> Chunks:
        """Rows of 77 for a CLIP encoder; OpenCLIP's are padded with 0."""
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        return cls(tokenizer, start, end, end if pad_with_end else 0, 77, 77)

    @classmethod
    def t5(cls, tokenizer: Any, least: int) -> Chunks:
        """One row of any length."""
        return cls(tokenizer, None, tokenizer.eos_token_id, 0, 10**9, least)

    def rows(self, prompt: str) -> list[list[Token]]:
        """(id, weight) rows of a prompt; long prompts give several."""
        first = [] if self.start is None else [(self.start, 1.0)]
        rows = [list(first)]
        for text, weight in weighted_spans(prompt):
            text = text.replace("\\(", "(").replace("\\)", ")")
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            word: list[Token] = [(i, weight) for i in ids]
            while word:
                room = self.limit - 1 - len(rows[-1])
                if len(word) <= room:
                    rows[-1] += word
                    break
                if len(word) >= _WHOLE_WORD:
                    rows[-1] += word[:room]
                    word = word[room:]
                rows[-1] = self._ended(rows[-1])
                rows.append(list(first))
        rows[-1] = self._ended(rows[-1])
        return rows

    def empty(self, length: int) -> list[int]:
        """Ids of the empty prompt, which weights move away from."""
        ends = [self.end] if self.start is None else [self.start, self.end]
        return ends + [self.pad] * (length - len(ends))

    def _ended(self, row: list[Token]) -> list[Token]:
        row = [*row, (self.end, 1.0)]
        return row + [(self.pad, 1.0)] * (self.least - len(row))
