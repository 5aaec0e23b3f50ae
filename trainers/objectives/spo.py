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
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ...sampling.settings import changed, setting
from ...sampling.transition import Transition
from .parts.contract import Batch, Loss, Tools, TrainableDenoiser, mean_each
from .parts.registry import Method, register
from .parts.sampled import Sampled, SampledConfig, at_most, chosen_steps, noise_level

Step = Literal["ancestral", "sde"]


@dataclass(frozen=True)
class SPOConfig(SampledConfig):
    """SPO's settings. candidates: k. trained: steps that are drawn anew each time. skipped: the paper's is 0.25."""

    shown = ("steps", "cfg", "step", "noise_level", "candidates", "trained", "skipped", "beta")

    steps: int = changed(SampledConfig, "steps", low=2, remedy="the last one draws no noise, so it has no pair")
    step: Step = setting("ancestral", advanced=True,
        help="The random step that candidates come from; sde is for flow models.")
    noise_level: float = noise_level()
    candidates: int = setting(4, 2, 64, help="Candidates of a step; best and worst are a pair.",
        page="Candidates of a step, of which best and worst are a pair; each costs a network call and a reward.",
        remedy="4 is the paper's")
    trained: int = setting(4, 0, 1000, advanced=True, help="Steps of a run that are judged and learnt from; 0 for all.",
        page="Steps of a run that are judged and learnt from, drawn anew each time; 0 for all.",
        remedy="0 is all steps that can be judged")
    skipped: float = setting(0.25, 0, 0.99, advanced=True, step=0.05,
        help="Share of the noisiest steps that are never judged.",
        page="Share of the noisiest steps that are never judged, since nothing can be seen there.",
        remedy="0.25 is the paper's")
    beta: float = setting(10.0, 1e-6, 1e6, step=0.5, help="The higher, the nearer the model stays to itself.",
        remedy="10 is a usual one")

    def check(self) -> None:
        """See the base."""
        at_most(self, "trained", self.steps, "0 is all steps that can be judged")


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
    config: SPOConfig

    def __init__(self, config: SPOConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        self._transition = Transition(config.step, config.noise_level)
        self._transition.check(denoiser.path)

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss for each judged step, together their mean."""
        draws, last = batch.draws, len(self.sigmas) - 2
        judged = chosen_steps(draws, int(self.config.skipped * (last + 1)), last, self.config.trained)
        x = self.denoiser.path.unit_start(self.sigmas[0], draws.normal("start", batch.shape))
        ahead: Tensor | None = None
        for index in range(last):
            if index > max(judged):
                break
            sigma, following = self.level(index, len(batch)), self.level(index + 1, len(batch))
            if index not in judged:
                if ahead is None:
                    with torch.no_grad(), self.denoiser.adapter("student"):
                        ahead = self.guided_each([x], sigma, batch)[0]
                x0, ahead = ahead, None
                noise = draws.normal(f"step {index}", batch.shape)
                x = self._transition.step(self.denoiser.path, x, x0, sigma, following, noise)
                continue
            with torch.no_grad(), self.denoiser.adapter(None):
                x0 = self.guided_each([x], sigma, batch)[0]
                reference, _ = self._transition.moments(self.denoiser.path, x, x0, sigma, following)
            with self.denoiser.adapter("student"):
                x0 = self.guided(x, sigma, batch.cond, batch.uncond)
                mean, std = self._transition.moments(self.denoiser.path, x, x0, sigma, following)
            count = range(self.config.candidates)
            noises = [draws.normal(f"step {index} of {k}", batch.shape) for k in count]
            candidates = torch.stack([mean.detach() + std * noise for noise in noises])
            made = self._made(candidates, following, batch)
            with torch.no_grad():
                scores = torch.stack([self.scored()(x0, batch.prompts, batch) for x0 in made])
            rows = torch.arange(len(batch), device=x.device)
            best, worst = candidates[scores.argmax(0), rows], candidates[scores.argmin(0), rows]
            each = step_preference(mean, reference, std, best, worst, self.config.beta)
            # Equal scores prefer nothing: both are the first candidate, and the loss has no gradient.
            spread = scores.amax(0) - scores.amin(0)
            metrics: dict[str, Tensor | float] = {
                "reward": scores.mean() / len(judged), "reward_spread": spread.mean() / len(judged),
            }  # fmt: skip
            # Before the engine's backward pass, since this generator rests within it.
            onward = draws.integers(f"onward {index}", 0, self.config.candidates)
            # What the student makes of it is known: the next step is made of it, unless it is to be learnt.
            x, ahead = candidates[onward, rows], made[onward, rows]
            loss = each.mean() / len(judged)
            del x0, mean, each
            yield Loss("student", loss, metrics)
            del loss

    @torch.no_grad()
    def _made(self, candidates: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """x0 (K, B, ...) that the student makes of candidates (K, B, ...) at sigma (B,) in one step."""
        with self.denoiser.adapter("student"):
            return torch.stack(self.guided_each(list(candidates), sigma, batch))


register(Method("spo", SPOConfig, SPO, "reward"))
