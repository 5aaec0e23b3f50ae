"""Warns of a few-step student that is sampled with guidance: it has its teacher's built in, and pictures fall apart."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import folder_paths
from safetensors import SafetensorError, safe_open

from ...trainers.methods import of_group

_FURTHEST = 64  # nodes between a sampler and the model's loader
_log = logging.getLogger("retort")


def warnings(prompt: Mapping[str, Any]) -> list[str]:
    """A sentence for each LoRA of a student that a prompt samples at a cfg above 1."""
    found = []
    for node in prompt.values():
        cfg, model = (node.get("inputs", {}).get(name) for name in ("cfg", "model"))
        if isinstance(cfg, int | float) and cfg > 1:
            for name in _loras(prompt, model):
                if _is_student(name):
                    found.append(
                        f"cfg is {cfg:g}, and {name} makes a few-step student, which has guidance built in: set cfg to "
                        "1, or sample with Distilled Setup"
                    )
    return list(dict.fromkeys(found))


def _loras(prompt: Mapping[str, Any], link: Any) -> Iterator[str]:
    """The LoRA files on the way from a sampler to its model's loader."""
    for _ in range(_FURTHEST):
        if not (isinstance(link, list) and len(link) == 2 and str(link[0]) in prompt):
            return
        inputs = prompt[str(link[0])].get("inputs", {})
        name, strength = inputs.get("lora_name"), inputs.get("strength_model", 1)
        if isinstance(name, str) and strength != 0:
            yield name
        link = inputs.get("model")


def _is_student(name: str) -> bool:
    path = folder_paths.get_full_path("loras", name)
    if path is None or not path.endswith(".safetensors"):
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("retort.method") in of_group("distillation")
    except (OSError, SafetensorError) as error:
        _log.debug("%s cannot be read: %s", path, error)  # whoever loads it says so
        return False
