"""comfy_kitchen's fused operators, which have no backward pass, as plain torch while a training runs.

Positions and norms of newer networks are computed by them (Anima, ERNIE, JoyImage). The package has each once more in
torch's own operations, which gradients pass; ComfyUI itself calls those on a processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import comfy_kitchen
from comfy_kitchen.backends.eager import adaln, rope


def _twins(module: ModuleType) -> dict[str, object]:
    """Public functions of comfy_kitchen that a module of its eager backend has under the same name."""
    return {name: vars(module)[name] for name in comfy_kitchen.__all__ if name in vars(module)}


@contextmanager
def differentiable() -> Iterator[None]:
    """Within it comfy_kitchen's positions and norms have gradients."""
    before = {name: vars(comfy_kitchen)[name] for name in (*_twins(rope), *_twins(adaln))}
    vars(comfy_kitchen).update(_twins(rope) | _twins(adaln))
    try:
        yield
    finally:
        vars(comfy_kitchen).update(before)
