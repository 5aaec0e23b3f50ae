"""Teaches a student to please a differentiable reward by back-propagation through the sampler.

AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739): every network call is checkpointed, and only the last K steps
carry a gradient, K drawn anew at each update (its randomised truncation). DRTune (Wu et al. 2024, arXiv 2405.00760)
holds the network's input as well: the gradient then passes from step to step through the sampler's own arithmetic, and
cannot explode in the network.

Where the network's blocks are checkpointed themselves, the last step's calls are not checkpointed a second time: their
backward pass is the first, so that no other step's blocks are kept beside theirs. Where there is memory for the graphs
of all steps, none is: a checkpoint of a call computes it once more.

Steps before the last K are sampled without a graph, which changes no gradient. The reward's graph (decoder and reward
model) is freed before the network's backward pass begins: only d reward / d x0 is kept. With a second reward the two
slopes are joined there, by `pareto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...sampling.path import broadcast
from ...sampling.settings import setting
from ...sampling.transition import Transition
from .parts.contract import Batch, Draws, LatentReward, Loss, Tools, TrainableDenoiser, guided, slope_of
from .parts.pareto import share
from .parts.registry import Method, register
from .parts.sampled import Sampled, SampledConfig, at_most

Truncation = Literal["uniform", "normal", "fixed"]
LossForm = Literal["maximise", "target"]
Sampler = Literal["ode", "ancestral"]
# Where the released code draws the first step with a gradient from, over the number of steps: 42 and 5 of 50.
NORMAL = (0.84, 0.1)


@dataclass(frozen=True)
class AlignPropConfig(SampledConfig):
    """AlignProp's settings.

    sampler: "ode" - Euler, DDIM with eta 0; "ancestral" - eta 1, the paper's. truncation: how K is drawn - "uniform"
    from 1 .. steps (the paper), "normal" - steps less a whole part of N(0.84, 0.1) steps (the released code), "fixed" -
    always `last`. loss: "target" is the paper's |r - 10| of the aesthetic score.
    """

    shown = ("steps", "cfg", "truncation", "last", "sampler", "stopped", "loss", "target", "checkpoint")

    sampler: Sampler = setting("ode", advanced=True, help="ode: Euler. ancestral: fresh noise a step.")
    truncation: Truncation = setting("uniform",
        help="How many of the last steps carry the gradient. uniform: drawn from 1 to all (the paper). normal: about a "
        "sixth (its code). fixed: always `last`.",
        page="*uniform*: the number of last steps with a gradient is drawn from 1 to all, as in the paper; always all "
        "of them loses variety soonest. *normal*: about a sixth of the steps, as the released code draws. *fixed*: "
        "always `last`.")
    last: int = setting(1, 1, 1000,
        help="fixed: so many steps, at most `steps`. 1 suits small cards; all of them lose variety soonest.",
        page="*fixed*: so many steps, at most `steps`. 1 needs least memory and time, and changes fine detail and "
        "colour more than layout.",
        remedy="it counts the steps with a gradient")
    stopped: bool = setting(False, advanced=True,
        help="Hold the network's input (DRTune): steadier where many steps carry the gradient.")
    loss: LossForm = setting("maximise", advanced=True,
        help="maximise: the higher the better. target: as near to `target` as can be, and no further.")
    target: float = setting(10.0, -1e6, 1e6, advanced=True, step=0.1, help="target: the score that is wished for.",
        page="The score that is enough; above it the pull turns round.",
        remedy="10 is the paper's for the aesthetic score")
    checkpoint: bool = setting(True, advanced=True,
        help="Keep only each step's latent and compute its network call again; off needs far more memory.")

    def check(self) -> None:
        """See the base."""
        at_most(self, "last", self.steps, "it counts the steps with a gradient, of `steps`")


def kept_steps(config: AlignPropConfig, draws: Draws, steps: int) -> int:
    """K of this update: how many of the last steps carry a gradient, 1 .. steps; the same for the whole batch."""
    if config.truncation == "fixed" or steps == 1:
        return min(config.last, steps)
    place = draws.common("truncation")
    if config.truncation == "uniform":
        return 1 + int(place * steps)
    # The released code draws until 1 <= s < steps; the quantile of the truncated normal is that law in one draw.
    mean, std = (share * steps for share in NORMAL)
    ends = torch.tensor([(1 - mean) / std, (steps - mean) / std], dtype=torch.float64)
    low, high = torch.special.ndtr(ends)
    first = mean + std * float(torch.special.ndtri(low + place * (high - low)))
    return steps - min(max(int(first), 1), steps - 1)


def most_kept(config: AlignPropConfig) -> int:
    """The largest K that can be drawn."""
    if config.truncation == "fixed":
        return config.last
    return max(1, config.steps - (config.truncation == "normal"))


class AlignProp(Sampled):
    """See the module; `Objective` in `contract`. second: another reward that must not lose by the first."""

    name = "AlignProp"
    rewards = "differentiable"
    two_rewards = True
    config: AlignPropConfig

    def __init__(self, config: AlignPropConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        self._transition = Transition(config.sampler)

    @classmethod
    def graphs_wait(cls, config: AlignPropConfig) -> bool:
        """See the contract: those of the steps with a gradient, where they may be several."""
        return config.checkpoint and most_kept(config) > 1

    @property
    def varies(self) -> bool:
        """See the contract."""
        several = self.config.truncation != "fixed" and self.graphs_wait(self.config)
        return several and self.denoiser.may_wait(most_kept(self.config))

    def _step(self, x: Tensor, index: int, batch: Batch, kept: int) -> Tensor:
        """x (B, ...) one level down; kept: how many steps have a graph, 0 for one that has none."""
        sigma, following = self.level(index, len(batch)), self.level(index + 1, len(batch))
        told = x.detach() if self.config.stopped else x
        last = index == len(self.sigmas) - 2
        if not kept:
            x0 = guided(self.denoiser, told, sigma, batch.cond, batch.uncond, self.cfg, joined=True)
        elif self.config.checkpoint and not (last and self.denoiser.checkpointed or self.denoiser.may_wait(kept)):
            x0 = checkpoint(self.guided, told, sigma, batch.cond, batch.uncond, use_reentrant=False)
        else:
            x0 = self.guided(told, sigma, batch.cond, batch.uncond)
        if self.config.stopped:
            slope = self.denoiser.parametrisation.through(sigma)
            x0 = x0 + broadcast(slope, x) * (x - told)
        noise = batch.draws.normal(f"step {index}", batch.shape) if self._transition.stochastic else None
        return self._transition.step(self.denoiser.path, x, x0, sigma, following, noise)

    def simulate(self, batch: Batch, kept: int) -> Tensor:
        """The student's samples (B, ...), the last `kept` steps with a graph."""
        steps = len(self.sigmas) - 1
        with self.denoiser.adapter("student"):
            with torch.no_grad():
                x = self.denoiser.path.unit_start(self.sigmas[0], batch.draws.normal("start", batch.shape))
                for index in range(steps - kept):
                    x = self._step(x, index, batch, kept=0)
            for index in range(steps - kept, steps):
                x = self._step(x, index, batch, kept)
        return x

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss, whose gradient is the reward's through the last K steps."""
        kept = most_kept(self.config) if self.heaviest else kept_steps(self.config, batch.draws, len(self.sigmas) - 1)
        x = self.simulate(batch, kept)
        metrics: dict[str, Tensor | float] = {"kept": float(kept)}
        loss, slope, metrics["reward"] = self._slope(self.scored(), x, batch)
        if self.second is not None:
            other, beside, metrics["reward_2"] = self._slope(self.second, x, batch)
            part = share(slope, beside)
            metrics["share"] = part.mean()
            loss, slope = part * loss + (1 - part) * other, beside + broadcast(part, slope) * (slope - beside)
        metrics["reward_slope"] = slope.square().mean().sqrt()
        yield Loss("student", loss.mean() + (slope * (x - x.detach())).sum(), metrics)

    def _slope(self, reward: LatentReward, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss (B,), its mean's derivative by x (B, ...), mean reward), without a graph to the network."""
        leaf = x.detach().requires_grad_()
        rewards = reward(leaf, batch.prompts, batch)
        each = (rewards - self.config.target).abs() if self.config.loss == "target" else -rewards
        slope = slope_of(each / len(each), leaf, self.name)
        return each.detach(), slope, rewards.detach().mean()


register(Method("align_prop", AlignPropConfig, AlignProp, "reward"))
