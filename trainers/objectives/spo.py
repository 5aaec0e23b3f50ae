"""Online preference step by step: of several candidates of one denoising step the better is made likelier.

SPO (Liang et al. 2024, arXiv 2406.04314): from one latent x_t draw k candidates of x_{t-1}, take the best and the
worst, apply Diffusion-DPO's loss to the densities of that one step with the adapter-off network as reference, and go on
from a random candidate. The paper judges noisy candidates by a preference model that it trains for that; here the
Reward looks at the clean picture that the student predicts from each candidate, so any reward will do, a gradient is
not needed, and a judged step costs one more call of the network for each candidate.

Log-densities are means over a latent's numbers, as the released code of such methods takes them; beta counts beside
that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ...sampling.transition import Transition
from .parts.contract import Batch, Loss, TrainableDenoiser, mean_each
from .parts.sampled import Sampled, check_ranges, chosen_steps

Step = Literal["ancestral", "sde"]


@dataclass(frozen=True)
class SPOConfig:
    """SPO's settings.

    steps, cfg: of the sampler; step: "ancestral", or "sde" (flow models) with noise_level. candidates: k. trained: how
    many steps of a run are judged and learnt from, drawn anew each time (0 = all that can be). skipped: share of the
    steps, from the noisy end, that are never judged, since nothing can be seen there (the paper: 0.25). beta: how close
    the student stays to the reference.
    """

    steps: int = 20
    cfg: float = 4.0
    step: Step = "ancestral"
    noise_level: float = 0.7
    candidates: int = 4
    trained: int = 4
    skipped: float = 0.25
    beta: float = 10.0

    def __post_init__(self) -> None:
        if self.step not in get_args(Step):
            raise ValueError(f"step {self.step!r} is not known; use one of {', '.join(get_args(Step))}")
        check_ranges({
            "steps": (self.steps, 2, 1000, "the last one draws no noise, so it has no pair"),
            "cfg": (self.cfg, 0, 100, "1 is no guidance"),
            "noise_level": (self.noise_level, 0.01, 10, "0.7 is the paper's"),
            "candidates": (self.candidates, 2, 64, "4 is the paper's"),
            "trained": (self.trained, 0, self.steps, "0 is all steps that can be judged"),
            "skipped": (self.skipped, 0, 0.99, "0.25 is the paper's"),
            "beta": (self.beta, 1e-6, 1e6, "10 is a usual one"),
        })  # fmt: skip


def step_preference(mean: Tensor, reference: Tensor, std: Tensor, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (log p / p_ref of the winner - of the loser)) (B,), for N(mean, std^2) and N(reference, std^2).

    mean, reference, winner, loser (B, ...); std (B, 1, ...) > 0.
    """

    def ratio(x: Tensor) -> Tensor:
        return mean_each(((x - reference).square() - (x - mean).square()) / (2 * std.square()))

    return -functional.logsigmoid(beta * (ratio(winner) - ratio(loser)))


class SPO(Sampled):
    """See the module; `Objective` in `contract`."""

    name = "SPO"

    def __init__(self, config: SPOConfig, denoiser: TrainableDenoiser):
        super().__init__(denoiser, config.steps, config.cfg)
        self.config = config
        self._transition = Transition(config.step, config.noise_level)
        self._transition.check(denoiser.path)

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss for each judged step, together their mean."""
        draws, last = batch.draws, len(self.sigmas) - 2
        judged = chosen_steps(draws, int(self.config.skipped * (last + 1)), last, self.config.trained)
        x = self.denoiser.path.unit_start(self.sigmas[0], draws.normal("start", batch.shape))
        for index in range(last):
            if index > max(judged):
                break
            sigma, following = self.level(index, len(batch)), self.level(index + 1, len(batch))
            if index not in judged:
                with torch.no_grad(), self.denoiser.adapter("student"):
                    x0 = self.guided(x, sigma, batch.cond, batch.uncond)
                noise = draws.normal(f"step {index}", batch.shape)
                x = self._transition.step(self.denoiser.path, x, x0, sigma, following, noise)
                continue
            with torch.no_grad(), self.denoiser.adapter(None):
                x0 = self.guided(x, sigma, batch.cond, batch.uncond)
                reference, _ = self._transition.law(self.denoiser.path, x, x0, sigma, following)
            with self.denoiser.adapter("student"):
                x0 = self.guided(x, sigma, batch.cond, batch.uncond)
                mean, std = self._transition.law(self.denoiser.path, x, x0, sigma, following)
            count = range(self.config.candidates)
            noises = [draws.normal(f"step {index} of {k}", batch.shape) for k in count]
            candidates = torch.stack([mean.detach() + std * noise for noise in noises])
            scores = torch.stack([self._judged(candidate, following, batch) for candidate in candidates])
            rows = torch.arange(len(batch), device=x.device)
            best, worst = candidates[scores.argmax(0), rows], candidates[scores.argmin(0), rows]
            each = step_preference(mean, reference, std, best, worst, self.config.beta)
            # Equal scores prefer nothing: both are the first candidate, and the loss has no gradient.
            spread = scores.amax(0) - scores.amin(0)
            metrics: dict[str, Tensor | float] = {
                "reward": scores.mean() / len(judged), "reward_spread": spread.mean() / len(judged),
            }  # fmt: skip
            # Before the engine's backward pass, since this generator rests within it.
            x = candidates[draws.integers(f"onward {index}", 0, self.config.candidates), rows]
            loss = each.mean() / len(judged)
            del x0, mean, each
            yield Loss("student", loss, metrics)
            del loss

    @torch.no_grad()
    def _judged(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """The reward (B,) of what the student makes of x (B, ...) at sigma (B,) in one step."""
        with self.denoiser.adapter("student"):
            x0 = self.guided(x, sigma, batch.cond, batch.uncond)
        return self.scored()(x0, batch.prompts, batch)
