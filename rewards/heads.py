"""Five linear layers without activations, which the LAION aesthetic predictor and ImageReward both end in."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
# Places in the published Sequential; the gaps are its dropouts.
PLACES = ("0", "2", "4", "6", "7")
_NAME = re.compile(r"(?:.*\.)?layers\.([02467])\.(weight|bias)")


class LinearHead(nn.Module):
    """Features (B, width) -> scores (B,). All five layers together are one linear map, `collapsed`."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleDict()
        for place, before, after in zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False):
            self.layers[place] = nn.Linear(before, after)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B,)."""
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]

    @torch.no_grad()
    def collapsed(self) -> tuple[Tensor, Tensor]:
        """(width,) and (): the one linear map that the five layers are, in double precision."""
        weight, bias = None, None
        for layer in self.layers.values():
            assert isinstance(layer, nn.Linear)
            w, b = layer.weight.double(), layer.bias.double()
            weight, bias = (w, b) if weight is None or bias is None else (w @ weight, w @ bias + b)
        assert weight is not None and bias is not None
        return weight[0], bias[0]


def head_from(state: Mapping[str, Tensor]) -> LinearHead:
    """The head among a file's tensors, whatever stands before `layers.0`. ValueError when it is not whole."""
    found = {}
    for name, value in state.items():
        match = _NAME.fullmatch(name)
        if match is not None and "encoder." not in name:
            found[f"layers.{match[1]}.{match[2]}"] = value
    if len(found) != 2 * len(PLACES) or any(found[f"layers.{p}.weight"].ndim != 2 for p in PLACES):
        raise ValueError(
            f"it holds {len(found)} of the ten tensors of a five-layer head (layers.0, 2, 4, 6 and 7, weight and bias)"
        )
    head = LinearHead(found["layers.0.weight"].shape[1])
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    for name, shape in shapes.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(found[name].shape)}, and the published head's is {shape}")
    head.load_state_dict({name: value.float() for name, value in found.items()})
    return head.eval().requires_grad_(False)
