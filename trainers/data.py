"""What a run learns from: prompts, and latents where there are images, in an order that depends on the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..sampling.parts import WHOLE, Parts, Shape
from .denoiser import Denoiser
from .objectives.parts.contract import DEGRADED, Batch, Cond, Draws

# Pictures (B, H, W, 3) in [0, 1] -> latents (B, C, ...) of what becomes of them, in the network's scale.
Degrade = Callable[[Tensor, Draws], Tensor]


@dataclass
class Data:
    """Samples of a run, on the CPU: sample i has prompt i and, where there are images, latent i.

    conds: what the host's `encode` gives for each prompt. latents: each (C, H, W) or (C, T, H, W) in the network's
    own scale; shape: of the latents where there are none. unconds: the empty prompt for each shape, for models that
    are told the size; uncond for all others; own_unconds: each sample's own, where it is told more than the prompt.
    pairs: teacher pairs, see `trainers.pairs`. columns: further tensors, one for each sample, alike within a shape.
    pictures: bytes (H, W, 3) behind each latent, which `degrade` makes the column "degraded" of, anew for every
    batch. parts: of what each latent, then (1, N), is packed; none where latents are single tensors. Raises
    ValueError when the counts differ or there is no sample.
    """

    conds: Sequence[Cond]
    prompts: Sequence[str] = ()
    uncond: Cond = None
    latents: Sequence[Tensor] | None = None
    shape: tuple[int, ...] | None = None
    unconds: dict[Shape, Cond] = field(default_factory=dict)
    pairs: dict[str, list[Tensor]] = field(default_factory=dict)
    columns: dict[str, Sequence[Tensor]] = field(default_factory=dict)
    pictures: Sequence[Tensor] | None = None
    degrade: Degrade | None = None
    parts: Sequence[Parts] = ()
    own_unconds: Sequence[Cond] = ()

    def __post_init__(self) -> None:
        n = len(self.conds)
        if not n:
            raise ValueError("the data set is empty: give at least one prompt")
        if self.latents is not None and len(self.latents) != n:
            raise ValueError(
                f"there are {len(self.latents)} latents and {n} prompts; give one prompt for each, or one for all"
            )
        if self.parts and len(self.parts) != n:
            raise ValueError(f"the parts of {len(self.parts)} latents are known, and there are {n} prompts")
        if self.latents is None and self.shape is None:
            raise ValueError("without images the size of the latents must be given: connect an empty latent")
        if self.latents is not None:
            kinds = {(t.ndim, t.shape[0]) for t in self.latents}
            if len(kinds) > 1:
                raise ValueError(f"the latents differ in channels or dimensions: {sorted(kinds)}; use one VAE for all")
            for i, latent in enumerate(self.latents):
                if not bool(torch.isfinite(latent).all()):
                    raise ValueError(f"latent {i} holds NaN or infinite numbers; encode that image again")
        for name, values in self.columns.items():
            if len(values) != n:
                raise ValueError(f"there are {len(values)} of {name} and {n} prompts; give one for each")
            for i, value in enumerate(values):
                if value.ndim and not bool(torch.isfinite(value).all()):
                    raise ValueError(f"{name} {i} holds NaN or infinite numbers; encode that image again")
        self.repeat([1] * n)

    def __len__(self) -> int:
        return len(self.conds)

    def repeat(self, counts: Sequence[int]) -> None:
        """Let sample i come counts[i] times a lap."""
        self._buckets: dict[Shape, list[int]] = {}
        for i, count in enumerate(counts):
            self._buckets.setdefault(self.kind_of(i), []).extend([i] * count)

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Shape of a sample's latent."""
        if self.latents is None:
            assert self.shape is not None
            return tuple(self.shape)
        return tuple(self.latents[index].shape)

    def parts_of(self, index: int) -> Parts:
        """How a sample's latent is made up."""
        return self.parts[index] if self.parts else WHOLE

    def kind_of(self, index: int) -> Shape:
        """The shape of a sample's latent, or of its parts: samples of one kind share batches."""
        return self.parts_of(index).shapes or self.shape_of(index)

    def empty_of(self, index: int) -> Cond:
        """The empty prompt for a sample, None where there is none."""
        if self.own_unconds:
            return self.own_unconds[index]
        return self.unconds.get(self.kind_of(index), self.uncond)

    def without(self, denoiser: Denoiser, rows: Sequence[int]) -> Cond:
        """The empty prompt for samples `rows`, None where there is none."""
        return None if self.uncond is None else denoiser.join([self.empty_of(row) for row in rows])

    def start(self, rows: Sequence[int], draws: Draws, name: str) -> Tensor:
        """What samples `rows` are made from (B, C, ...): degraded latents where there are pictures, else unit noise."""
        if self.pictures is None or self.degrade is None:
            return draws.normal(name, self.shape_of(rows[0]))
        images = torch.stack([self.pictures[i] for i in rows]).float() / 255
        latents = self.degrade(images, draws)
        shape = self.shape_of(rows[0])
        if tuple(latents.shape[1:]) != shape:
            raise ValueError(
                f"a degraded picture of {tuple(images.shape[1:3])} becomes a latent {tuple(latents.shape[1:])} and the "
                f"clean one is {shape}: connect `images` alone, or the latents of just these"
            )
        # A copy: what a host encodes may have been made where no gradient can ever flow.
        return latents.float().clone().to(draws.device)

    def group(self, position: int, size: int, seed: int) -> list[int]:
        """The samples of a step: `size` of one shape; every sample comes once before any comes again.

        position: how many groups came before. The order is drawn anew each time round, from the seed.
        """
        shape, lap, chosen = self._turn(position, size, seed)
        rows, begin = self._buckets[shape], chosen * size
        mixed = self._permuted(rows, seed, lap, shape)
        # The last group of a lap is filled from the next lap's beginning of the same shape.
        while len(mixed) < begin + size:
            mixed = mixed + self._permuted(rows, seed, lap + len(mixed) // len(rows), shape)
        return mixed[begin : begin + size]

    def candidates(self, position: int, size: int, seed: int) -> list[int]:
        """All samples of the shape whose turn it is, one that is repeated as often as that."""
        return self._buckets[self._turn(position, size, seed)[0]]

    def _turn(self, position: int, size: int, seed: int) -> tuple[Shape, int, int]:
        """(shape, lap, which group of that shape in the lap) at a position."""
        counts = {shape: -(-len(rows) // size) for shape, rows in self._buckets.items()}
        each = sum(counts.values())
        lap, place = divmod(position, each)
        order = torch.randperm(each, generator=self._generator(seed, lap, "groups")).tolist()
        chosen = order[place]
        for shape, count in counts.items():
            if chosen < count:
                return shape, lap, chosen
            chosen -= count
        raise AssertionError("a group beyond the last")

    def _permuted(self, rows: list[int], seed: int, lap: int, shape: Shape) -> list[int]:
        order = torch.randperm(len(rows), generator=self._generator(seed, lap, shape)).tolist()
        return [rows[i] for i in order]

    @staticmethod
    def _generator(*parts: object) -> torch.Generator:
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def batch(
        self, denoiser: Denoiser, rows: Sequence[int], places: Sequence[int], seed: int, step: int, dropout: float
    ) -> Batch:
        """The micro-batch of samples `rows`, which stand at `places` in the step's whole batch."""
        device = denoiser.device
        draws = Draws(seed, step, tuple(places), device)
        conds = [self.conds[i] for i in rows]
        prompts = [self.prompts[i] for i in rows] if self.prompts else []
        if dropout:
            dropped = (draws.uniform("prompt dropout") < dropout).tolist()
            conds = [
                self.empty_of(row) if drop else cond for row, drop, cond in zip(rows, dropped, conds, strict=True)
            ]
            prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)] if prompts else []
        columns = {
            name: torch.stack([values[i] for i in rows]).float().to(device) for name, values in self.columns.items()
        }
        if self.pictures is not None:
            columns[DEGRADED] = self.start(rows, draws, DEGRADED)
        if self.pairs:
            each = len(self.pairs["noise"]) // len(self)
            which = draws.integers("pair", 0, each).tolist()
            chosen = [row * each + number for row, number in zip(rows, which, strict=True)]
            columns |= {
                f"pair_{name}": torch.stack([values[i] for i in chosen]).float().to(device)
                for name, values in self.pairs.items()
            }
        return Batch(
            draws=draws,
            shape=self.shape_of(rows[0]),
            cond=denoiser.join(conds),
            uncond=self.without(denoiser, rows),
            latents=None if self.latents is None else torch.stack([self.latents[i] for i in rows]).float().to(device),
            prompts=tuple(prompts),
            columns=columns,
            parts=self.parts_of(rows[0]),
        )
