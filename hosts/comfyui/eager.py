"""comfy_kitchen's fused operators, which have no backward pass, as plain torch while a training runs.

Positions and norms of newer networks are computed by them (Anima, ERNIE, JoyImage). The package has each once more in
torch's own operations, which gradients pass; ComfyUI itself calls those on a processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import comfy_kitchen


def _twins(*modules: str) -> dict[str, object]:
    """Public functions of comfy_kitchen that modules of its eager backend have under the same name."""
    # By import_module, since the backend has a function of the name of its module adaln.
    found = [vars(import_module(f"comfy_kitchen.backends.eager.{name}")) for name in modules]
    return {name: each[name] for each in found for name in comfy_kitchen.__all__ if name in each}


@contextmanager
def differentiable() -> Iterator[None]:
    """Within it comfy_kitchen's positions and norms have gradients."""
    twins = _twins("rope", "adaln")
    before = {name: vars(comfy_kitchen)[name] for name in twins}
    vars(comfy_kitchen).update(twins)
    try:
        yield
    finally:
        vars(comfy_kitchen).update(before)
