"""A model's noise levels by their place in its schedule, and what an output of its network is in x0.

The papers count levels in thousandths of a schedule: t = 20 .. 979 of 1000. `Levels` turns such times into sigmas and
back, on each kind of schedule:

    flow        time = 1000 sigma, before any shift; of one that is carried as VE (Cosmos Predict2) 1000 t, see `path`
    table       the network's timestep: whole ones are the levels that it was trained on (SD1.5, SDXL, CogVideoX)
    continuous  the angle between signal and noise, atan(sigma / sigma_data), from the schedule's lowest level to its
                highest: the time of v-prediction's cosine schedule (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
                For EDM and v in continuous time (Karras et al. 2022, arXiv 2206.00364: Playground 2.5, SVD) and Stable
                Cascade, whose tables serve samplers alone

`Parametrisation` has the formulas of Karras et al. 2022, table 1 and section 5, for each kind of network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .path import NoisePath, broadcast, level_of, time_of
from .schedule import Schedule

Prediction = Literal["eps", "v", "flow", "x0", "edm"]
# An error of an eps network is magnified 14.6 times in x0 at SD's t = 999, at t = 399 1.2 times: 2/5 of a table.
ONE_STEP, ONE_STEP_NOISE = 0.4, 1.2


class Levels:
    """The levels of one model; times are in thousandths, sigmas (B,) fp32.

    tabulated: whether the network knows the table's levels alone. Raises ValueError, with the name of the schedule's
    class, where its levels do not rise from above zero.
    """

    def __init__(self, schedule: Schedule, path: NoisePath):
        self.schedule, self.path = schedule, path
        table = schedule.sigmas
        if not bool(torch.isfinite(table).all() and (table > 0).all() and (table[1:] >= table[:-1]).all()):
            # The class that defines the schedule: ComfyUI mixes it into one that is made on the fly.
            owner = next((kind for kind in type(schedule).__mro__ if "timestep" in vars(kind)), type(schedule))
            raise ValueError(
                f"{owner.__name__}: the levels of this noise schedule do not rise from above zero to "
                f"a finite sigma ({float(table[0]):g} to {float(table[-1]):g}); correct sigma_min and sigma_max, or "
                "remove the node that changes the model's sampling"
            )
        self.flow, self._rectified = path.kind == "FLOW", path.rectified
        self.tabulated, self._unit = False, 1.0
        if not path.flow and len(table) > 1:
            # The network's timesteps of the table's entries: whole and evenly apart where it was trained on these.
            self._first, second, last = (float(schedule.timestep(table[i])) for i in (0, 1, -1))
            self._stride = second - self._first
            counted = self._stride >= 1 and self._first + self._stride * (len(table) - 1) == last
            self.tabulated = counted and self._first == round(self._first) and second == round(second)
            self._unit = (last + 1) / 1000 if self.tabulated else 1.0
        self._ends = tuple(math.atan(float(table[i]) / path.sigma_data) for i in (0, -1))
        self._lowest, self._highest = float(table[0]), float(table[-1])

    @property
    def listed(self) -> bool:
        """Whether levels have timesteps that one can list, 999, 749 and so on."""
        return self.path.flow or self.tabulated

    def time(self, sigma: Tensor) -> Tensor:
        """Thousandths of the schedule at levels sigma."""
        if self.flow:
            return 1000 * sigma
        if self._rectified:
            return 1000 * time_of(sigma.float())
        if self.tabulated:
            return self.schedule.timestep(sigma).float() / self._unit
        low, high = self._ends
        return 1000 * ((sigma.float() / self.path.sigma_data).atan() - low) / (high - low)

    def level(self, time: Tensor) -> Tensor:
        """Sigmas at times 0 .. 1000; between the levels of a table by interpolation."""
        if self.flow:
            return time / 1000
        if self.tabulated:
            return self.schedule.sigma(time * self._unit)
        if self._rectified:
            return level_of(time.float() / 1000).clamp(self._lowest, self._highest)
        low, high = self._ends
        sigma = self.path.sigma_data * (low + (high - low) * time.float() / 1000).tan()
        return sigma.clamp(self._lowest, self._highest)

    def trained(self, time: Tensor) -> Tensor:
        """The same, but on a table the level of the whole timestep below, which the network was trained on."""
        return self.schedule.sigma((time * self._unit).floor()) if self.tabulated else self.level(time)

    def uniform(self, share: Tensor) -> Tensor:
        """Levels of shares in (0, 1], every level alike: entries of a table, each as often."""
        if self.flow:
            return share
        if self._rectified:
            low, high = (time_of(torch.tensor(end)) for end in (self._lowest, self._highest))
            return self.level(1000 * (low + (high - low) * share))
        if not self.tabulated:
            return self.level(1000 * share)
        index = (share * len(self.schedule.sigmas)).ceil() - 1
        return self.schedule.sigma(self._first + self._stride * index)

    def sampled(self, share: Tensor) -> Tensor:
        """Levels of shares in (0, 1], every percentage of ComfyUI's sampling alike, so that a model's shift counts."""
        if self.flow:
            return self.schedule.sigma(share * float(self.schedule.timestep(torch.ones(1))))
        if self.tabulated:
            return self.schedule.sigma(self._first + share * (self._stride * (len(self.schedule.sigmas) - 1)))
        found = [float(self.schedule.percent_to_sigma(1 - part)) for part in share.tolist()]
        return torch.tensor(found, device=share.device).clamp(self._lowest, self._highest)

    def drawn(self, uniform: Tensor, low: float = 0.0, high: float = 1.0, shift: float = 1.0) -> Tensor:
        """Levels (B,) of places drawn between low and high (0 .. 1); uniform (B,) in [0, 1).

        A table's are its entries low * N .. high * N - 1 of N (20 .. 979 of 1000 for 0.02 .. 0.98); a flow's the places
        themselves behind t' = shift t / (1 + (shift - 1) t), and `shift` has no meaning elsewhere.
        """
        if self.path.flow:
            t = low + (high - low) * uniform
            t = shift * t / (1 + (shift - 1) * t)
            return t.clamp(self._lowest, self._highest) if self.flow else self.level(1000 * t)
        if not self.tabulated:
            return self.level(1000 * (low + (high - low) * uniform))
        table = self.schedule.sigmas.to(uniform.device)
        # Rounded first: 0.29 * 1000 is 289.99999999999994.
        last = max(0, math.ceil(round(high * len(table), 6)) - 1)
        first = min(last, math.floor(round(low * len(table), 6)))
        index = first + (uniform * (last - first + 1)).long()
        return table[index.clamp(first, last)].float()

    def place(self, sigma: float, shift: float = 1.0) -> float:
        """The `high` that makes `drawn` end at level sigma, sigma included."""
        if self.path.flow:
            time = sigma if self.flow else sigma / (1 + sigma)
            return time / (shift - (shift - 1) * time)
        if not self.tabulated:
            return min(max(float(self.time(torch.tensor(sigma))) / 1000, 0.0), 1.0)
        table = self.schedule.sigmas
        below = int((table.cpu() <= sigma * (1 + 1e-6)).sum())
        return max(1, below) / len(table)

    def one_step(self) -> float:
        """Where a student of one call starts: a flow's at the top, else at 2/5 of a table.

        On a continuous schedule there is as much noise as there.
        """
        if self.path.flow:
            return self._highest
        table = self.schedule.sigmas
        if self.tabulated:
            return float(table[round(ONE_STEP * len(table)) - 1])
        return min(max(ONE_STEP_NOISE * self.path.sigma_data, self._lowest), self._highest)


@dataclass(frozen=True)
class Parametrisation:
    """What the network of a model is shown and what its output means; sigma (B,), tensors (B, ...).

    With r = sqrt(sigma^2 + sigma_data^2):
        VE    eps  x - sigma out           v    sigma_data^2 / r^2 x - sigma sigma_data / r out       edm  with plus
              flow (x - sigma out) / (1 + sigma), of a rectified flow
        VP    eps  r x - sigma out         v    x / r - sigma / r out
        FLOW  flow x - sigma out           any  x0: out
    """

    prediction: Prediction
    path: NoisePath

    def _root(self, sigma: Tensor) -> Tensor:
        return (sigma * sigma + self.path.sigma_data**2).sqrt()

    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's input: on VE x at unit variance, or a rectified flow's latent, elsewhere x itself."""
        return x / self.path.shrinking(broadcast(sigma, x)) if self.path.kind == "VE" else x

    def x0(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean latent that the network's output says."""
        if self.prediction == "x0":
            return output
        s = broadcast(sigma, x)
        if self.path.rectified:
            return (x - output * s) / (1 + s)
        root, data, ddpm = self._root(s), self.path.sigma_data, self.path.kind == "VP"
        if self.prediction in ("eps", "flow"):
            return (root * x if ddpm else x) - output * s
        if ddpm:
            return x / root - output * (s / root)
        away = output * (s * data / root)
        kept = x * data**2 / (root * root)
        return kept + away if self.prediction == "edm" else kept - away

    def scale(self, sigma: Tensor) -> Tensor:
        """How much an error of the network's output is magnified in x0: |x0 error| = scale |output error|."""
        if self.prediction == "x0":
            return torch.ones_like(sigma)
        if self.path.rectified:
            return time_of(sigma)
        if self.prediction in ("eps", "flow"):
            return sigma
        return sigma * self.path.sigma_data / self._root(sigma)

    def through(self, sigma: Tensor) -> Tensor:
        """d x0 / d x where the network's output is held."""
        if self.prediction == "x0":
            return torch.zeros_like(sigma)
        if self.path.rectified:
            return 1 / (1 + sigma)
        root = self._root(sigma)
        if self.prediction in ("v", "edm"):
            return 1 / root if self.path.kind == "VP" else self.path.sigma_data**2 * root.square().reciprocal()
        return root if self.path.kind == "VP" else torch.ones_like(sigma)
