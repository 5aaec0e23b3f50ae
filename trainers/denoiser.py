"""The trainable denoiser that both hosts build on: adapters, features, precision; the host adds the network's call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..sampling.path import NoisePath
from . import checkpointing
from .adapters import Adapters
from .masters import Pin, Unpin
from .objectives.contract import Cond, Prediction, Schedule
from .streaming import Ring

# Where a discriminator looks: how deep into the blocks (half way, and three quarters).
DEPTHS = (0.5, 0.75)
# Sides of a transformer's patches: how many tokens a latent makes.
PATCHES = (1, 2, 4)


class Denoiser:
    """See `objectives.contract.TrainableDenoiser`; a host implements `call` and `join`.

    compute: precision of the network's arithmetic (autocast); None leaves it as the network is.
    """

    def __init__(
        self,
        network: nn.Module,
        path: NoisePath,
        schedule: Schedule,
        prediction: Prediction,
        device: torch.device,
        compute: torch.dtype | None = None,
        linear: Sequence[type[nn.Module]] = (),
    ):
        self.network, self.path, self.schedule, self.prediction = network.eval(), path, schedule, prediction
        self.device, self.compute = device, compute
        self.adapters = Adapters(network, linear)
        self.ring: Ring | None = None
        sigmas = schedule.sigmas
        self.sigma_range = (float(sigmas[0]), float(sigmas[-1]))

    def place(self, count: int, pin: Pin | None = None, unpin: Unpin | None = None) -> None:
        """Bring the network to its device, but for `count` of its blocks, which are streamed from now on; see `Ring`.

        Once, when the adapters are there and before a first call.
        """
        self.ring = Ring(self.network, self.device, count, pin=pin, unpin=unpin)

    def end_streaming(self) -> None:
        """Put streamed weights back where they came from, in host memory; nothing without any."""
        if self.ring is not None:
            self.ring.close()
            self.ring = None

    def call(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x0 of x (B, C, ...) at sigma (B,), fp32; the host's own way to run the network."""
        raise NotImplementedError

    def join(self, conds: Sequence[Cond]) -> Cond:
        """One condition for a batch from those of its samples, on the training device."""
        raise NotImplementedError

    def to_file(self, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA under the names that a file has; here the network's own."""
        return dict(lora)

    def latents_out(self, x0: Tensor) -> Tensor:
        """Network latents as a VAE decodes them; here as they are."""
        return x0

    def predict_x0(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """See the contract."""
        with self._precision():
            return self.call(x, sigma, cond).float()

    def _precision(self) -> AbstractContextManager:
        if self.compute is None or self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute)

    def adapter(self, name: str | None) -> AbstractContextManager[None]:
        """See the contract."""
        return self.adapters.active(name)

    def predict_with_features(self, x: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor]]:
        """See the contract."""
        with self._watching(x) as seen:
            x0 = self.predict_x0(x, sigma, cond)
        return x0, [part.float() for part in seen]

    @torch.no_grad()
    def feature_widths(self, x: Tensor, sigma: Tensor, cond: Cond) -> list[int]:
        """See the contract."""
        features = self.predict_with_features(x, sigma, cond)[1]
        return [f.shape[-1] if f.ndim == 3 else f.shape[1] for f in features]

    @contextmanager
    def _watching(self, x: Tensor) -> Iterator[list[Tensor]]:
        seen: list[Tensor] = []
        found = [module for _, module in checkpointing.blocks(self.network)]
        if not found:
            raise ValueError(
                f"{type(self.network).__name__} has no list of blocks: a discriminator has no features here"
            )
        counts = {math.prod([*x.shape[2:-2], *(-(-side // patch) for side in x.shape[-2:])]) for patch in PATCHES}
        chosen = sorted({min(len(found) - 1, int(depth * len(found))) for depth in DEPTHS})

        def keep(module, args, output):
            parts = [p for p in (output if isinstance(output, tuple | list) else (output,)) if isinstance(p, Tensor)]
            parts = [p for p in parts if p.ndim >= 3]
            # A block of a joint transformer returns text and image. At few pixels the text is the longer, so that the
            # count of tokens tells first; else the image is the larger, or comes last.
            image = [p for p in parts if p.ndim > 3 or p.shape[1] in counts]
            seen.append(max(reversed(image or parts), key=Tensor.numel))

        hooks = [found[i].register_forward_hook(keep) for i in chosen]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
