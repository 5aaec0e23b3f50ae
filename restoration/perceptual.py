"""How far two pictures are apart to a frozen network: normalised features of several depths, as LPIPS compares them.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924), equation
1; without their learnt weights every channel weighs the same (their unlearnt variant). VGG16: Simonyan & Zisserman 2014
(arXiv 1409.1556), table 1, column D, with the layers that LPIPS taps; its weights are the user's own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY = 1e-10


def feature_distance(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """(B,) sum over depths of the mean over places of w . (a / |a| - b / |b|)^2, features (B, C, h, w).

    weights: (C,) of each depth, at least 0; None for 1.
    """
    total = torch.zeros(len(ours[0]), device=ours[0].device)
    for depth, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = (f / (f.square().sum(1, keepdim=True) + TINY).sqrt() for f in (a.float(), b.float()))
        apart = (a - b).square()
        if weights is not None:
            apart = apart * weights[depth].to(apart).view(-1, 1, 1)
        total = total + apart.sum(1).flatten(1).mean(1)
    return total


def lpips_weights_from(state: Mapping[str, Tensor], where: str) -> list[Tensor]:
    """LPIPS's learnt weights for VGG16 under their own names "lin0.model.1.weight", ..; where: the file.

    ValueError when it holds something else.
    """
    found = []
    for depth, channels in enumerate((64, 128, 256, 512, 512)):
        name = f"lin{depth}.model.1.weight"
        if name not in state or state[name].numel() != channels:
            raise ValueError(
                f"{where} does not hold LPIPS's weights for VGG16: {name} is "
                f"{'missing' if name not in state else 'of another size'}"
            )
        found.append(state[name].float().flatten())
    return found


class VGG16(nn.Module):
    """The convolutions of VGG16 under torchvision's names; its features before each pooling, and the last."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _WIDTHS:
            if isinstance(width, int):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, H, W, 3) in [0, 1], 16 pixels a side or more -> five features (B, C, h, w)."""
        x, seen = (images.movedim(-1, 1) - self.mean) / self.std, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                seen.append(x)
            x = layer(x)
        return [*seen, x]


def vgg16_from(state: Mapping[str, Tensor], where: str) -> VGG16:
    """The network of torchvision's names "features.0.weight", ..; what else the file holds is left out.

    where: the file, for the message. ValueError when it is another network's.
    """
    network = VGG16()
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(
                f"{where} is not torchvision's VGG16: {name} is {'missing' if name not in state else 'of another size'}"
            )
    network.load_state_dict({name: state[name].float() for name in wanted})
    return network.eval()
