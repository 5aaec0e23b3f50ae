"""What a model's folder may ask of the libraries that read it: safetensors that lie in it, and nothing else.

A sharded model has an index, which names the files of its tensors. transformers and diffusers open whatever it names,
also a pickle or a file of another folder, and also where they are told to take safetensors only: so every index is read
here first. An adapter's folder names another model, which would be read unseen, so it is refused. A config may name the
code that computes attention, which transformers would fetch: what computes it is always said.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files.strangers import parse

ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
INDEX_BYTES = 1 << 26
# As torch computes it; not every model of transformers knows the first.
ATTENTION = ("sdpa", "eager")


def check(folder: Path) -> None:
    """ValueError for a folder with an index that names anything but safetensors files beside it, or of an adapter."""
    for path in sorted(folder.glob("*.json")):
        if path.name == ADAPTER:
            raise ValueError(f"{path} makes this an adapter of another model: get the whole model")
        if ".index." in path.name:
            check_index(path)


def check_index(path: Path) -> None:
    """ValueError for an index that names anything but safetensors files beside it."""
    remedy = "get the model again, as safetensors"
    try:
        with path.open("rb") as file:
            found = parse(file.read(INDEX_BYTES + 1), INDEX_BYTES)
        names = {str(name) for name in found["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no index of a model ({error}): {remedy}") from error
    for name in sorted(names):
        if name.startswith(".") or set("/\\:\0") & set(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {name!r:.140}, and only safetensors files beside it are read: other files can run code "
                f"when they are opened; {remedy}"
            )


def check_hub(name: str) -> None:
    """As `check`, of a model on the Hub, of which its index is fetched; errors of the Hub are left to who loads it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    for file in (INDEX, ADAPTER):
        try:
            path = Path(hf_hub_download(name, file))
        except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            continue
        if file == ADAPTER:
            raise ValueError(f"{name} is an adapter of another model: name the whole model")
        check_index(path)


def with_attention(read: Callable[..., Any]) -> Any:
    """`read(attn_implementation=...)`, with what computes attention named: by torch, whatever the model's config says.

    Raises what `read` does.
    """
    first, second = ATTENTION
    try:
        return read(attn_implementation=first)
    except ValueError:
        return read(attn_implementation=second)
