"""Which samples a step sees: in turn, or those that teach more come more often, at a weight that makes up for it.

PA&DA (Lu et al. 2023, CVPR, arXiv 2302.14772) draws sample i with p_i = tau G_i / sum G + (1 - tau) / N, G_i the norm
of the loss's gradient by the network's output; tau is our `importance`. Ours, not the paper's: each draw counts
1 / (N p_i) times, so that the mean loss and its gradient are those of the plain set, where the released code leaves
them biased; tau is fixed, where it rises from 0 to 1 with the epochs, so no weight exceeds 1 / (1 - tau); G_i, which
depends on the noise level more than on the image, is divided by its running mean at such levels; and it is a running
mean itself, where the code takes the last one and forgets images that were not drawn. Images of different sizes take
turns as ever; the draw is among those of the size whose turn it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TrainingConfig
from .data import Data
from .denoiser import Denoiser
from .objectives.parts.contract import Batch, Draws, Loss
from .processes import Reducer

BUCKETS = 8  # of noise levels, even in the network's timestep
MEMORY = 0.9


def chances(scores: Tensor, importance: float) -> Tensor:
    """p (N,), fp64, of samples whose scores G (N,) are at least 0."""
    scores = scores.double()
    total = scores.sum()
    even = torch.full_like(scores, 1 / len(scores))
    return importance * scores / total + (1 - importance) * even if total > 0 else even


def slope(loss: Loss) -> Tensor:
    """G (B,): the norm of each sample's loss's gradient by the network's output, up to a factor that is the same for
    all. Of a mean squared error e the gradient has the length 2 sqrt(e / M), M numbers in a latent."""
    assert loss.each is not None
    by = torch.autograd.grad(loss.each.sum(), loss.errors, retain_graph=True)
    return torch.stack([d.square() * e.detach() for d, e in zip(by, loss.errors, strict=True)]).sum(0).sqrt()


class Order:
    """The samples of each step of a run, drawn by name, step and place.

    rows: those of the last step, in the order of their places in its whole batch.
    """

    def __init__(self, denoiser: Denoiser, data: Data, settings: TrainingConfig, reducer: Reducer):
        self.denoiser, self.data, self.settings, self.reducer = denoiser, data, settings, reducer
        self.rows: list[int] = []
        self._seen = torch.zeros(2, 0, device="cpu")
        # On the CPU wherever the network is. Beginning as if each had been seen once, an average one.
        self.scores = torch.ones(len(data), dtype=torch.float64, device="cpu")
        self.visits = torch.ones(len(data), dtype=torch.float64, device="cpu")
        self.levels = torch.zeros(BUCKETS, dtype=torch.float64, device="cpu")
        self._top = float(denoiser.levels.time(torch.tensor(denoiser.sigma_range[1], device="cpu")))

    def batches(self, position: int, groups: int, step: int) -> list[Batch]:
        """This process's micro-batches of a step; position: how many groups came before."""
        settings, reducer = self.settings, self.reducer
        whole = settings.batch_size * settings.accumulation
        self.rows, batches = [], []
        for number in range(groups):
            places = range(whole * number, whole * (number + 1))
            rows, weights = self._chosen(position + number, places, step)
            self.rows += rows
            mine = list(zip(rows, places, strict=True))[reducer.rank :: reducer.world]
            for begin in range(0, len(mine), settings.batch_size):
                chosen, held = zip(*mine[begin : begin + settings.batch_size], strict=True)
                batch = self.data.batch(self.denoiser, chosen, held, settings.seed, step, settings.prompt_dropout)
                if weights is not None:
                    batch.weights = weights[[place - places.start for place in held]].to(self.denoiser.device)
                batches.append(batch)
        self._seen = torch.zeros(2, len(self.rows))
        return batches

    def _chosen(self, position: int, places: range, step: int) -> tuple[list[int], Tensor | None]:
        """(samples, their weights 1 / (N p)) of one group."""
        seed = self.settings.seed
        if not self.settings.importance:
            return self.data.group(position, len(places), seed), None
        rows = self.data.candidates(position, len(places), seed)
        p = chances(self.scores[rows], self.settings.importance)
        place = Draws(seed, step, tuple(places)).uniform("importance").double()
        drawn = torch.searchsorted(p.cumsum(0), place, right=True).clamp(max=len(rows) - 1)
        return [rows[i] for i in drawn.tolist()], (1 / (len(rows) * p[drawn])).float()

    def weighted(self, loss: Loss, batch: Batch) -> Tensor:
        """The loss to run backwards; what it tells of the samples is noted. ValueError where it is of none alone."""
        if batch.weights is None:
            return loss.value
        if loss.each is None:
            raise ValueError(f"importance: the loss of {loss.player} is none of single samples here; set it to 0")
        if loss.errors and loss.sigma is not None:
            share = self.denoiser.levels.time(loss.sigma) / self._top
            places = list(batch.draws.indices)
            self._seen[0, places] = slope(loss).float().cpu()
            # Counted from 1: 0 is what other processes saw.
            self._seen[1, places] = (share * BUCKETS).floor().clamp(0, BUCKETS - 1).float().cpu() + 1
        return (loss.each * batch.weights).mean()

    def learn(self) -> None:
        """Take in what was noted of a whole step; every process learns from all."""
        if not self.settings.importance:
            return
        self.reducer.sum([self._seen])
        size, bucket = self._seen[0].double(), self._seen[1].long() - 1
        for level in range(BUCKETS):
            here = size[bucket == level]
            if len(here):
                old = self.levels[level]
                self.levels[level] = MEMORY * old + (1 - MEMORY) * here.mean() if old > 0 else here.mean()
        known = (bucket >= 0) & torch.isfinite(size)
        for row, score in zip(
            [row for row, keep in zip(self.rows, known.tolist(), strict=True) if keep],
            (size[known] / self.levels[bucket[known]].clamp(min=1e-30)).tolist(),
            strict=True,
        ):
            rate = max(1 - MEMORY, float(1 / (self.visits[row] + 1)))
            self.scores[row] += rate * (score - self.scores[row])
            self.visits[row] += 1

    def saved(self) -> dict[str, Tensor]:
        """What a resumed run needs; restored in place."""
        return {"scores": self.scores, "visits": self.visits, "levels": self.levels} if self.settings.importance else {}
