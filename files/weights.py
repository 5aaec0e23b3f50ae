"""Weights from safetensors files, and from nothing else: a pickle runs code when it is opened."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .errors import UsageError


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the header alone. Raises UsageError as `load` does."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, under the rest of their names.

    Raises UsageError when the file is missing, cut short or no safetensors file.
    """
    with _opened(path) as file:
        return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118


def _opened(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; put the file there") from error
    except (OSError, SafetensorError) as error:
        start = b""
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise UsageError(
                f"{path} is a pickle (.ckpt, .pt), which can run code when it is opened; get the safetensors version"
            ) from error
        raise UsageError(
            f"{path} is not a whole safetensors file ({error}); it was cut short or is of another kind: "
            "download it again"
        ) from error
