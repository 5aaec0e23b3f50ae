"""How sure an image classifier is of a class, or the number that a regressor gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .clip_models import Hold
from .network import NetworkReward
from .preprocess import Preprocess

MEASURES = ("log probability", "probability", "logit")
_RANGES = {"log probability": (-float("inf"), 0.0), "probability": (0.0, 1.0)}


class ClassScore(nn.Module):
    """One output of transformers' classifiers."""

    def __init__(self, model: nn.Module, index: int, measure: str):
        super().__init__()
        self.model, self.index, self.measure = model, index, measure

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B,)."""
        logits = self.model(pixel_values=pixels).logits.float()
        if self.measure == "log probability":
            logits = logits.log_softmax(-1)
        elif self.measure == "probability":
            logits = logits.softmax(-1)
        return logits[:, self.index]


def class_index(label: str, names: dict[int, str]) -> int:
    """The class of this name (any case) or number. ValueError lists what there is."""
    by_name = {name.strip().lower(): index for index, name in names.items()}
    wanted = label.strip().lower()
    if wanted in by_name:
        return by_name[wanted]
    if wanted.isdigit() and int(wanted) in names:
        return int(wanted)
    shown = ", ".join(list(names.values())[:12]) + (", ..." if len(names) > 12 else "")
    raise ValueError(f"label {label!r} is not one of this classifier's {len(names)}: {shown}")


def classifier(model: Any, preprocess: Preprocess, label: str, measure: str, hold: Hold) -> NetworkReward:
    """measure: one of MEASURES; a model with one output (a regressor) gives it as it is and takes no label."""
    names = {int(i): str(n) for i, n in model.config.id2label.items()}
    if measure not in MEASURES:
        raise ValueError(f"measure {measure!r} is not known; use one of {', '.join(MEASURES)}")
    if len(names) == 1:
        index, measure = 0, "logit"
    else:
        index = class_index(label, names)
    network = ClassScore(model, index, measure)
    span = _RANGES.get(measure, (-float("inf"), float("inf")))
    return NetworkReward(f"classifier: {names[index]}", hold(network), preprocess, span)
