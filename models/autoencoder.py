"""A tiny autoencoder in TAESD's layout (8x, 16 channels), so that stock loaders read it as a checkpoint's VAE.

The layout fixes 64 channels everywhere. Training a narrower net and padding it with zeros gives exactly the same
function: a zero filter outputs zero, ReLU keeps it, and zero columns ignore it.
"""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = 16
WIDTH = 64
NARROW = {"widths": (16, 32, 48, 64), "active": (0, 1, 1, 2)}  # the one that was trained
# SD3's latent format: stored latent = model latent / scale + shift. TAESD's output is the model latent itself.
SCALE, SHIFT = 1.5305, 0.0609


def _conv(n_in: int, n_out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


class Block(nn.Module):
    """Three convolutions beside an identity, as in TAESD; inactive, the identity alone (it exports as zeros)."""

    def __init__(self, width: int, active: bool = True):
        super().__init__()
        self.active = active
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return torch.relu(self.conv(x) + x if self.active else x)


class Clamp(nn.Module):
    """TAESD's soft clamp of latents to +-3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return torch.tanh(x / 3) * 3


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to model latents (B, 16, H/8, W/8) of about unit variance, and back.

    `widths` and `active` give the channels and the number of working blocks at 1/1, 1/2, 1/4 and 1/8 resolution.
    """

    def __init__(self, widths=(WIDTH,) * 4, active=(1, 3, 3, 3)):
        super().__init__()
        a, b, c, d = widths
        one, two, four, eight = ([i < n for i in range(3)] for n in active)
        self.taesd_encoder = nn.Sequential(
            _conv(3, a), Block(a, one[0]),
            _conv(a, b, stride=2, bias=False), *(Block(b, on) for on in two),
            _conv(b, c, stride=2, bias=False), *(Block(c, on) for on in four),
            _conv(c, d, stride=2, bias=False), *(Block(d, on) for on in eight),
            _conv(d, CHANNELS),
        )  # fmt: skip
        self.taesd_decoder = nn.Sequential(
            Clamp(), _conv(CHANNELS, d), nn.ReLU(),
            *(Block(d, on) for on in eight), nn.Upsample(scale_factor=2), _conv(d, c, bias=False),
            *(Block(c, on) for on in four), nn.Upsample(scale_factor=2), _conv(c, b, bias=False),
            *(Block(b, on) for on in two), nn.Upsample(scale_factor=2), _conv(b, a, bias=False),
            Block(a, one[0]), _conv(a, 3),
        )  # fmt: skip

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> latents (B, 16, H/8, W/8)."""
        return self.taesd_encoder(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 16, h, w) -> images (B, 3, 8h, 8w), not yet clipped to [0, 1]."""
        return self.taesd_decoder(latents)


def cut(full: dict[str, torch.Tensor]) -> Autoencoder:
    """The narrow autoencoder inside a state dict of `padded`: the same function at a fifth of the cost."""
    narrow = Autoencoder(**NARROW)
    state = {k: full[k][tuple(slice(n) for n in v.shape)] for k, v in narrow.state_dict().items()}
    narrow.load_state_dict(state)
    return narrow


def padded(narrow: Autoencoder) -> dict[str, torch.Tensor]:
    """The full 64-channel state dict that computes the same function, with TAESD's `vae_scale` and `vae_shift`."""
    full = {name: torch.zeros_like(value) for name, value in Autoencoder().state_dict().items()}
    inactive = tuple(
        f"{name}." for name, module in narrow.named_modules() if isinstance(module, Block) and not module.active
    )
    for name, value in narrow.state_dict().items():
        if not name.startswith(inactive):
            full[name][tuple(slice(n) for n in value.shape)] = value
    return {**full, "vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}
