"""Reward models from folders under models/rewards, or from the Hub where the user typed an id: safetensors only.

No code of a model's repository is ever run, and no pickle opened; a model whose weights come in no other form is
refused with what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.paths import below, dead_link, walked
from .. import model_folder

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONFIG = "config.json"
_TOKENIZERS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tokenizer.model",),
    ("spiece.model",),
)
CONVERT = (
    "get it as safetensors, or convert it once where you trust it: "
    "torch.load(FILE, weights_only=True), then safetensors.torch.save_file"
)


@dataclass(frozen=True)
class Place:
    """Where a model is: a folder on this machine, or an id on the Hub."""

    name: str
    folder: Path | None

    @property
    def source(self) -> str:
        """What transformers is told."""
        return self.name if self.folder is None else str(self.folder)

    @property
    def options(self) -> dict[str, Any]:
        """How transformers is told to read it."""
        return {"local_files_only": self.folder is not None, "trust_remote_code": False}


def names(roots: Sequence[Path]) -> list[str]:
    """Every folder that holds a model, and every safetensors file outside of these, below the roots."""
    found: dict[str, None] = {}
    for root in roots:
        for folder, inner, files in walked(root):
            if CONFIG in files and folder != root:
                found[folder.relative_to(root).as_posix()] = None
                inner.clear()  # a model's parts are no models
                continue
            lone = [folder / name for name in files if name.endswith(".safetensors")]
            found |= dict.fromkeys(path.relative_to(root).as_posix() for path in lone)
    return list(found)


def find(roots: Sequence[Path], name: str, usual: Sequence[str], what: str) -> Place:
    """The place of a model that the user named, or of one of its `usual` names where the name is empty.

    "owner/name" without such a folder is an id on the Hub; the usual names are looked for in the folders alone, so that
    nothing is downloaded which nobody typed. ValueError says where the model belongs.
    """
    dead = ""
    for candidate in [name] if name.strip() else usual:
        for spelled in dict.fromkeys((candidate, candidate.replace("\\", "/").rpartition("/")[2])):
            for root in roots:
                path = below(root, spelled)
                if path.is_dir():
                    return Place(candidate, path)
            dead = dead or dead_link(roots, spelled)
    if dead:
        raise ValueError(f"model {name!r}: {dead}")
    if name.strip():
        if name.lower().endswith(PICKLES):
            raise ValueError(f"model {name!r} is a pickle, which can run code when it is opened: {CONVERT}")
        if name.count("/") == 1 and "\\" not in name and not name.startswith((".", "/", "~")):
            return Place(name, None)
    where = _where(roots)
    wrong = f"model {name!r} is not in {where}" if name.strip() else "model is empty"
    if usual:
        folder = f"{roots[0] if roots else where}/{usual[0].rpartition('/')[2]}"
        remedy = f"type {usual[0]} to download {what}, or put its safetensors, {CONFIG} and tokenizer into {folder}"
    else:
        remedy = f"type the name of a folder in {where}, or the Hugging Face id, of {what}"
    raise ValueError(f"{wrong}: {remedy}. Found in {where}: {', '.join(names(roots)[:8]) or 'nothing'}")


def find_file(roots: Sequence[Path], name: str, usual: str, what: str) -> Path:
    """A lone safetensors file below the roots. ValueError as `find`."""
    name = name.strip() or usual
    if name.lower().endswith(PICKLES):
        raise ValueError(f"{name!r} is a pickle, which can run code when it is opened: {CONVERT}")
    for root in roots:
        path = below(root, name)
        if path.is_file():
            return path
    if dead := dead_link(roots, name):
        raise ValueError(f"{what} {name!r}: {dead}")
    raise ValueError(f"{what} {name!r} is not in {_where(roots)}: put it there as safetensors")


def _where(roots: Sequence[Path]) -> str:
    return " or ".join(str(root) for root in roots) or "models/rewards (pass --models DIR)"


def config_of(place: Place) -> Any:
    """The model's configuration, in transformers' classes. ValueError says what is wrong with the place."""
    from transformers import AutoConfig

    return loaded(place, lambda: AutoConfig.from_pretrained(place.source, **place.options))


def load_model(place: Place, kind: Any, ignored: Sequence[str] = (), precise: bool = True) -> Any:
    """A model of one of transformers' classes, for inference. ValueError when weights are missing.

    ignored: beginnings of tensors' names that may be missing. precise: in fp32, else as transformers reads it.
    """
    _refuse_pickles(place)

    def read(**how: Any):
        options = {"use_safetensors": True, "output_loading_info": True, **place.options, **how}
        return kind.from_pretrained(place.source, **options)

    # Under inference mode the weights could never give gradients to a picture.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        model, notes = loaded(place, lambda: model_folder.with_attention(read))
        missing = [name for name in notes["missing_keys"] if not name.startswith(tuple(ignored) or ("\0",))]
        if missing:
            raise ValueError(
                f"model {place.name!r} lacks {len(missing)} weights of a {type(model).__name__}, such as "
                f"{sorted(missing)[0]}: it is another kind of model, or a part of one"
            )
        model = model.float() if precise else model
        return model.eval().requires_grad_(False)


def _refuse_pickles(place: Place) -> None:
    if place.folder is None:
        model_folder.check_hub(place.name)
        return
    model_folder.check(place.folder)
    if not any(place.folder.glob("*.safetensors")):
        pickled = [path.name for path in sorted(place.folder.iterdir()) if path.suffix in PICKLES]
        if pickled:
            raise ValueError(
                f"model {place.name!r} in {place.folder} has its weights only as a pickle ({pickled[0]}), which can "
                f"run code when it is opened: {CONVERT}"
            )
        raise ValueError(f"model {place.name!r}: {place.folder} holds no safetensors file; download it again")


def loaded(place: Place, read: Any) -> Any:
    """What `read()` gives. ValueError where the model's files cannot be read."""
    try:
        return read()
    except Exception as error:  # whatever the libraries raise of a stranger's file: their own, or of what is missing
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if place.folder is None:
            remedy = "check the id, the connection, and that it has safetensors; or put it into models/rewards"
        else:
            remedy = "download the whole repository again, with its config.json"
        raise ValueError(f"model {place.name!r} cannot be read ({line[:200]}): {remedy}") from error


def transformers_or_error() -> None:
    """ValueError naming the extra where transformers is missing."""
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise ValueError('this model needs transformers: pip install "retort[rewards]"')


def tokenizer(place: Place) -> Any:
    """The model's tokenizer. ValueError when its files are not all there."""
    from transformers import AutoTokenizer

    if place.folder is not None and not any(all((place.folder / f).is_file() for f in s) for s in _TOKENIZERS):
        raise ValueError(
            f"model {place.name!r}: {place.folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt); "
            "copy it from the model's repository"
        )
    found = loaded(place, lambda: AutoTokenizer.from_pretrained(place.source, **place.options))
    # transformers makes an empty tokenizer of files that it does not understand.
    if found("red")["input_ids"] == found("blue")["input_ids"]:
        raise ValueError(
            f"model {place.name!r}: its tokenizer reads all words alike; copy it again from the repository"
        )
    return found


def tokenize_with(words: Any, length: int) -> Any:
    """A function from texts to ids and mask (N, length), cut and padded to it."""

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        out = words(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return out["input_ids"], out["attention_mask"]

    return tokenize


def image_settings(place: Place) -> dict[str, Any]:
    """The settings of a model's image processor."""
    from transformers import AutoImageProcessor

    return loaded(place, lambda: AutoImageProcessor.from_pretrained(place.source, **place.options)).to_dict()


def processor(place: Place) -> Any:
    """The whole processor of a vision-language model."""
    from transformers import AutoProcessor

    return loaded(place, lambda: AutoProcessor.from_pretrained(place.source, **place.options))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. ValueError when it is none, or cut short."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with torch.inference_mode(False):
            return load_file(path)
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK" or start[:1] == b"\x80":
            raise ValueError(f"{path} is a pickle, which can run code when it is opened: {CONVERT}") from error
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again") from error
