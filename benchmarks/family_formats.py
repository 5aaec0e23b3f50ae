"""A tiny model of a family whose weights are stored in bf16 or quantised: training, and what its LoRA comes to in core.

Core adds a LoRA to a quantised weight and rounds the sum again, so that a part of the LoRA is lost; beside the layers
(bypass) nothing is rounded. How much is lost depends on the LoRA's size: here it changes x0 by a tenth of the output's
deviation, as one of middling strength does. The network computes in fp32 (in bf16 where that is its format).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .family_networks import Family
from .family_trials import NONE, OK, Trial, Wrong

PRECISIONS = ("bf16", "fp8_scaled", "int8_convrot", "nvfp4")
EFFECT = 0.1  # of the output's deviation
# Column -> what it asks.
STORED = {
    "trains": "two steps of flow matching at the precision `auto`: losses are finite and the student moves",
    "resumes": "the same, stopped after the first step and continued: the same LoRA to the bit",
    "patched": "what the LoRA changes with core's loader, which rounds again: its difference from the exact change",
    "bypass": "the same beside the layers, by Load Student",
}


class StoredTrial(Trial):
    """All cells of one family in one format; see `Trial`."""

    def __init__(self, family: Family, packages: Callable[[str], Any], folder: Path, form: str):
        super().__init__(family, packages, folder, form=form)
        self._known: tuple[dict[str, Tensor], Tensor, float] | None = None

    def _trains(self) -> str:
        self._trained["flow"] = self._train("flow", "flow", {}, steps=2, precision="auto")
        return OK

    def _resumes(self) -> str:
        if "flow" not in self._trained:
            return NONE
        watch = self._ours("trainers.watch")

        class Stops(watch.Silent):  # type: ignore[name-defined]
            def commands(self) -> set[str]:
                return {"stop"}

        folder = self.folder / "stopped"
        for watcher in (Stops(), watch.Silent()):
            try:
                found = self._train_in(folder, "flow", {}, watcher=watcher, steps=2, precision="auto")
            except self._ours("trainers.loop").Stopped:
                continue
        whole = self._trained["flow"].lora
        if found.lora.keys() != whole.keys() or not all(torch.equal(found.lora[key], whole[key]) for key in whole):
            raise Wrong("the LoRA is not that of the uninterrupted run")
        return OK

    def _patched(self) -> str:
        return self._away(bypass=False)

    def _bypass(self) -> str:
        return self._away(bypass=True)

    def _away(self, bypass: bool) -> str:
        if "flow" not in self._trained:
            return NONE
        lora, change, level = self._sized()
        applied = self._ours("hosts.comfyui.loras").applied
        missed: list[str] = []
        with_it = applied(self.model, lora, {}, 1.0, missed.append, bypass)
        if missed:
            raise Wrong(f"core reads not all of the LoRA: {missed[0]}")
        found = self._cores(with_it, level) - self._cores(self.model, level)
        if not bool(found.isfinite().all()):
            raise Wrong("not finite")
        return f"{100 * float((found - change).norm() / change.norm()):.3g} %"

    def _sized(self) -> tuple[dict[str, Tensor], Tensor, float]:
        """The LoRA of `trains` in the size that is asked for, how it changes x0 exactly, and at which level."""
        if self._known is None:
            lora, level = load_file(self._trained["flow"].path), self._levels()[0]
            for _ in range(2):
                base, student = self._own(lora, level)
                share = EFFECT / float((student - base).std() / base.std())
                lora = {
                    key: tensor * share if key.endswith(("lora_B.weight", "lora_up.weight")) else tensor
                    for key, tensor in lora.items()
                }
            base, student = self._own(lora, level)
            self._known = lora, student - base, level
        return self._known
