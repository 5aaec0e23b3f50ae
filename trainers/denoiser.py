"""The trainable denoiser that both hosts build on: adapters, features, precision; the host adds the network's call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..sampling.levels import Levels, Parametrisation, Prediction
from ..sampling.path import NoisePath
from . import checkpointing, features, rehearsal
from .adapters import Adapters, RowsDiffer
from .host_inputs import HostInputs
from .masters import Pin, Unpin
from .objectives.parts.contract import Asked, Cond, Schedule
from .streaming import Ring

# Where a discriminator looks: how deep into the blocks (half way, and three quarters).
DEPTHS = (0.5, 0.75)
# A call on so many places of a latent, those of a picture of 1024 px, has work enough for any device and hides the
# transfer of a streamed block: more samples in it would only take memory.
MOST_PLACES = 128 * 128


class _Left(Exception):
    """The network was left behind the last block that was wanted."""


class Denoiser:
    """See `objectives.contract.TrainableDenoiser`; a host implements `call`, `join` and `together`.

    compute: precision of the network's arithmetic (autocast); None leaves it as the network is. most_places: the
    largest call, in samples times places of a latent, that others may join; 0 lets none. keeps_graphs: whether memory
    was counted with graphs that wait, None where nobody has counted. host_inputs: keeps in host memory what autograd
    needs of a call. gains: how many times larger each part of a latent of several is carried, see `sampling.parts`;
    none where all are carried as they are.
    """

    most_places = MOST_PLACES
    keeps_graphs: bool | None = None
    host_inputs: HostInputs | None = None
    gains: tuple[float, ...] = ()

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
        self._levels, self._rehearsed = Levels(schedule, path), False
        self._seeing: set[nn.Module] | None = None  # blocks that see the whole picture, once that is known
        self._traced = False  # whether these are without the blocks that see nothing of the latents
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

    def together(self, conds: Sequence[Cond]) -> Cond | None:
        """One condition for the samples of several batches, in their order; None where one call cannot take them."""
        raise NotImplementedError

    def chosen(self, cond: Cond, rows: Sequence[int]) -> Cond:
        """See the contract."""
        raise NotImplementedError

    @property
    def levels(self) -> Levels:
        """See the contract."""
        if self._levels.schedule is not self.schedule:
            self._levels = Levels(self.schedule, self.path)
        return self._levels

    @property
    def parametrisation(self) -> Parametrisation:
        """See the contract."""
        return Parametrisation(self.prediction, self.path)

    @property
    def checkpointed(self) -> bool:
        """See the contract."""
        return checkpointing.enabled(self.network)

    def may_wait(self, calls: int = 1) -> bool:
        """See the contract."""
        return calls == 1 and self.checkpointed if self.keeps_graphs is None else self.keeps_graphs

    def to_file(self, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA under the names that a file has; here the network's own."""
        return dict(lora)

    def latents_out(self, x0: Tensor) -> Tensor:
        """Network latents as a VAE decodes them; here as they are."""
        return x0

    def predict_x0(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """See the contract."""
        keeping = self.host_inputs if torch.is_grad_enabled() else None
        with self._precision(), nullcontext() if keeping is None else keeping.watching():
            return self.call(x, sigma, cond).float()

    def _precision(self) -> AbstractContextManager:
        if self.compute is None or self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute)

    def rehearse(self, shape: Sequence[int], cond: Cond) -> None:
        """Find out, once, what cannot be differentiated as it is, and which blocks see the whole picture.

        Its blocks may compute in another way from then on, to the same numbers (`rehearsal`). Before the first step.
        shape: of one latent; cond: of one sample. `rehearsal.Untrainable` where it cannot be trained.
        """
        if self._rehearsed:
            return
        self._rehearsed = True
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        sigma = self.levels.drawn(torch.full((1,), 0.5, device=self.device))
        seeing: set[nn.Module] = set()

        def look(module: nn.Module, output: Any) -> None:
            if features.of(output, x) is not None:
                seeing.add(module)

        blocks = [module for _, module in checkpointing.blocks(self.network)]
        with self.adapter("student"), features.watching(blocks, look):
            try:
                rehearsal.rehearse(self.network, lambda: self.predict_x0(x, sigma, cond))
            except rehearsal.Untrainable as error:
                if self.device.type == "meta":  # without numbers a network may fail that does not with them
                    raise RuntimeError(str(error)) from error
                raise
        self._seeing = seeing

    def adapter(self, name: str | None) -> AbstractContextManager[None]:
        """See the contract."""
        return self.adapters.active(name)

    def fitting(self, x: Tensor) -> int:
        """See the contract."""
        return max(1, self.most_places // (len(x) * math.prod(x.shape[2:])))

    def joined(self, asked: Sequence[Asked]) -> Asked | None:
        """See the contract."""
        for one in asked:
            places = len(one.x) * math.prod(one.x.shape[2:])
            if places > self.most_places or one.x.shape[1:] != asked[0].x.shape[1:]:
                return None
        cond = self.together([one.cond for one in asked])
        if cond is None:
            return None
        return Asked(torch.cat([one.x for one in asked]), torch.cat([one.sigma for one in asked]), cond)

    def predict_each(self, asked: Sequence[Asked], adapters: Sequence[str | None] | None = None) -> list[Tensor]:
        """See the contract."""
        names = [self.adapters.current] * len(asked) if adapters is None else list(adapters)
        found: dict[int, Tensor] = {}
        waiting = list(range(len(asked)))
        while waiting:
            group, whole = self._group(asked, names, waiting)
            sizes = [len(asked[i].x) for i in group]
            try:
                with self._on([names[i] for i in group], sizes):
                    parts = self.predict_x0(*whole).split(sizes)
            except RowsDiffer:
                # This network folds its batch into another axis: its adapters run one after another for good.
                self.adapters.mixes = False
                continue
            found |= dict(zip(group, parts, strict=True))
            waiting = [i for i in waiting if i not in found]
        return [found[i] for i in range(len(asked))]

    def _group(
        self, asked: Sequence[Asked], names: Sequence[str | None], waiting: Sequence[int]
    ) -> tuple[list[int], Asked]:
        """Which of the waiting calls the first one takes along, and the call that they make together."""
        first = waiting[0]
        mixes = self.adapters.mixes and not torch.is_grad_enabled()
        able = [i for i in waiting if mixes or names[i] == names[first]]
        group, whole = [first], asked[first]
        every = self.joined([asked[i] for i in able]) if len(able) > 1 else None
        if every is not None:
            return able, every
        for i in able[1:]:
            both = self.joined([asked[j] for j in (*group, i)])
            if both is not None:
                group, whole = [*group, i], both
        return group, whole

    def _on(self, names: Sequence[str | None], sizes: Sequence[int]) -> AbstractContextManager[None]:
        if len(set(names)) == 1:
            return self.adapter(names[0])
        return self.adapters.rows([name for name, size in zip(names, sizes, strict=True) for _ in range(size)])

    def features(self, x: Tensor, sigma: Tensor, cond: Cond) -> list[Tensor]:
        """See the contract."""
        self._trace(x, sigma, cond)
        with self._watching(x) as seen, suppress(_Left):
            self.predict_x0(x, sigma, cond)
        return [part.float() for part in seen]

    def features_and_x0(self, x: Tensor, sigma: Tensor, cond: Cond) -> tuple[list[Tensor], Tensor]:
        """See the contract."""
        self._trace(x, sigma, cond)
        # The hook of the last feature ends the graph; this brings gradients back.
        with torch.set_grad_enabled(torch.is_grad_enabled()), self._watching(x, leave=False) as seen:
            x0 = self.predict_x0(x, sigma, cond)
        return [part.float() for part in seen], x0

    @torch.no_grad()
    def feature_widths(self, x: Tensor, sigma: Tensor, cond: Cond) -> list[int]:
        """See the contract."""
        return [f.shape[-1] if f.ndim == 3 else f.shape[1] for f in self.features(x, sigma, cond)]

    def _trace(self, x: Tensor, sigma: Tensor, cond: Cond) -> None:
        """Find out, once and after a rehearsal, whose blocks' outputs depend on the latents; those of a text do not."""
        if self._seeing is None or self._traced:
            return
        self._traced, leaf, found = True, x.detach().clone().requires_grad_(), set()

        def look(module: nn.Module, output: Any) -> None:
            part = features.of(output, x)
            if part is not None and part.requires_grad:
                found.add(module)

        nothing_kept = torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda kept: kept)
        # Without an adapter no weight asks for a gradient, so that whatever has one comes of the latents.
        with self.adapter(None), torch.enable_grad(), nothing_kept, features.watching(list(self._seeing), look):
            self.predict_x0(leaf.clone(), sigma, cond)
        self._seeing &= found

    @contextmanager
    def _watching(self, x: Tensor, leave: bool = True) -> Iterator[list[Tensor]]:
        """Within it the network's features come into the list; when all are there, it is left by `_Left`.

        leave: else the rest of it runs without a graph.
        """
        seen: list[Tensor] = []
        found = [m for _, m in checkpointing.blocks(self.network) if self._seeing is None or m in self._seeing]
        if not found:
            raise ValueError(
                f"{type(self.network).__name__} has no list of blocks that see the whole picture: a discriminator has "
                "no features here; choose a method without one, such as flow, dmd2 with gan_weight 0, or tdm"
            )
        chosen = sorted({min(len(found) - 1, int(depth * len(found))) for depth in DEPTHS})

        def keep(output: Any) -> None:
            part = features.of(output, x)
            if part is None or len(seen) == len(chosen):
                return
            seen.append(part)
            # Blocks are not always listed in the order in which they run.
            if len(seen) == len(chosen):
                if leave:
                    raise _Left
                torch.set_grad_enabled(False)

        with features.watching([found[i] for i in chosen], lambda _, output: keep(output)):
            yield seen
