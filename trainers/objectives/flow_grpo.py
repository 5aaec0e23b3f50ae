"""Reinforcement learning of a flow model: samples that score above their group are made likelier, step by step.

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): the sampler's ODE becomes an SDE with the same marginals, so that each
step has a Gaussian density; the reward of the end picture, less the mean of its group over the group's deviation, is
the advantage of every step of its trajectory; PPO's clipped ratio, and the KL divergence of each step to the
adapter-off network. The reward needs no gradient.

Log-densities and KL are means over a latent's numbers, as in the released code, whose clip of 1e-4 belongs to that.
The KL is the exact one of a step's two Gaussians, |mean - mean_ref|^2 / (2 std^2) with std^2 = sigma_t^2 |dt|. The
released code divides by 2 sigma_t^2 alone, without |dt|, the length of the step: a weight of it times |dt|, about
1 / steps, is the same pull here (its 0.04 at 10 steps is 0.004).
Trajectories are drawn by the policy of fewer than `updates` steps ago; its weights are kept and saved with the run, so
that a resumed run draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...sampling.settings import changed, setting
from ...sampling.transition import Transition
from .parts.contract import Batch, Loss, Tools, TrainableDenoiser, mean_each, swapped
from .parts.registry import Method, register
from .parts.sampled import Sampled, SampledConfig, at_most, chosen_steps, noise_level

# Advantages beyond it are held; the released code's.
MOST_ADVANTAGE = 5.0


@dataclass(frozen=True)
class FlowGRPOConfig(SampledConfig):
    """Flow-GRPO's settings; the paper trains at 10 steps, and samples at 40. kl: weight of the exact divergence to the
    adapter-off network; of a released weight (0.04, 0.01 for PickScore) its product with |dt|.

    trained: steps of a trajectory, drawn anew each time (0 = all but the last, which draws no noise). updates: of the
    student for each update of the policy that draws; at 1 every ratio is 1.
    """

    shown = ("steps", "cfg", "noise_level", "group", "trained", "clip", "kl", "updates")

    steps: int = changed(SampledConfig, "steps", default=10, low=2, remedy="10 is the paper's")
    cfg: float = changed(SampledConfig, "cfg", default=4.5)
    noise_level: float = noise_level()
    group: int = setting(8, 2, 1024, help="Pictures of one prompt that are compared.", remedy="the paper's is 24")
    trained: int = setting(0, 0, 999, advanced=True, help="Steps of each picture that are learnt from; 0 for all.",
        page="Steps of each picture that are learnt from, drawn anew each time; 0 for all.", remedy="0 is all steps")
    clip: float = setting(1e-4, 1e-8, 1, advanced=True, step=1e-5, round=1e-8,
        help="How far a step's likelihood may move before its pull ends.", remedy="1e-4 is the released code's")
    kl: float = setting(0.01, 0, 1e6, advanced=True, step=0.01, help="Pull back to the model as it was; 0 for none.",
        page="Pull back to the model without the LoRA, by the exact divergence of each step; 0 for none. Weights of "
        "the released code count it without the step's length: divide them by `steps` (its 0.04 at 10 steps is 0.004 "
        "here; the default 0.01 is ten times its 0.01 for PickScore).", remedy="0.001 to 0.01 are usual")
    updates: int = setting(2, 1, 1000, advanced=True,
        help="Steps of the optimiser before the model that draws is renewed.",
        page="Steps of the optimiser before the model that draws is renewed; at 1 `clip` never acts.",
        remedy="2 is the released code's")

    def check(self) -> None:
        """See the base."""
        at_most(self, "trained", self.steps - 1, "0 is all steps, and the last one draws no noise")


def advantages(rewards: Tensor) -> Tensor:
    """(G, B) rewards of G samples of each of B prompts -> (G, B): less the group's mean, over its deviation.

    They add up to zero over a group; a group of equal rewards has none.
    """
    apart = rewards - rewards.mean(0)
    unequal = rewards.amax(0) > rewards.amin(0)
    found = torch.where(unequal, apart / (rewards.std(0) + 1e-8), torch.zeros_like(apart))
    return found.clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE)


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2) (B,), the mean over a latent's numbers; x, mean (B, ...), std (B, 1, ...) > 0."""
    return mean_each(-(x - mean).square() / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi))


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's loss (B,): its gradient ends where the ratio has moved by `clip` the way that the advantage wants."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


class Trajectory(NamedTuple):
    """A sample of each prompt: latents (B, ...) at all levels, x0 last, and log-densities (B,) of the steps between."""

    latents: list[Tensor]
    densities: list[Tensor]


class FlowGRPO(Sampled):
    """See the module; `Objective` in `contract`."""

    name = "Flow-GRPO"
    config: FlowGRPOConfig

    def __init__(self, config: FlowGRPOConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        if denoiser.path.kind != "FLOW":
            raise ValueError(
                f"Flow-GRPO draws a flow model's SDE and this model predicts {denoiser.prediction}: choose spo or "
                "align_prop, or connect a flow model"
            )
        self._transition = Transition("sde", config.noise_level)
        self._policy: dict[str, Tensor] = {}

    def _weights(self) -> dict[str, Tensor]:
        with self.denoiser.adapter("student"):
            return {name: p for name, p in self.denoiser.network.named_parameters() if p.requires_grad}

    def prepare(self, samples: Iterable[Batch]) -> None:
        """Keeps the first policy. ValueError where there is no reward."""
        super().prepare(samples)
        if self.config.updates > 1:
            self._policy = {name: weight.detach().clone() for name, weight in self._weights().items()}

    def buffers(self) -> dict[str, Tensor]:
        """The policy that draws, where it is not the student as it stands."""
        return self._policy

    def after_step(self, metrics: Mapping[str, float], step: int) -> None:
        """Every `updates` steps the student becomes the policy that draws."""
        if self._policy and (step + 1) % self.config.updates == 0:
            for name, weight in self._weights().items():
                self._policy[name].copy_(weight.detach())

    @torch.no_grad()
    def trajectories(self, batch: Batch) -> list[Trajectory]:
        """The group's samples of each prompt, by the policy that draws."""
        draws, members = batch.draws, range(self.config.group)
        starts = [draws.normal(f"start of {member}", batch.shape) for member in members]
        drawn = [Trajectory([self.denoiser.path.unit_start(self.sigmas[0], start)], []) for start in starts]
        with self.denoiser.adapter("student"), swapped(self._weights(), self._policy):
            for index in range(len(self.sigmas) - 1):
                steps = self.moments([latents[-1] for latents, _ in drawn], index, batch, "student")
                for member, (mean, std) in enumerate(steps):
                    x = mean + std * draws.normal(f"step {index} of {member}", batch.shape)
                    drawn[member].latents.append(x)
                    drawn[member].densities.append(log_density(x, mean, std))
        return drawn

    def moments(
        self, xs: Sequence[Tensor], index: int, batch: Batch, adapter: str | None
    ) -> list[tuple[Tensor, Tensor]]:
        """(mean, deviation) of the steps from several x (B, ...) at the grid's level `index`."""
        sigma, following = self.level(index, len(batch)), self.level(index + 1, len(batch))
        with self.denoiser.adapter(adapter):
            found = self.guided_each(xs, sigma, batch)
        path = self.denoiser.path
        return [self._transition.moments(path, x, x0, sigma, following) for x, x0 in zip(xs, found, strict=True)]

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss for each learnt step of the trajectories that go into one call, together their mean.

        Without checkpoints a graph is large, and each trajectory learns by itself.
        """
        reward, config = self.scored(), self.config
        drawn = self.trajectories(batch)
        with torch.no_grad():
            rewards = torch.stack([reward(one.latents[-1], batch.prompts, batch) for one in drawn])
        gains = advantages(rewards)
        count = self.together(drawn[0].latents[0]) if self.denoiser.checkpointed else 1
        learnt = chosen_steps(batch.draws, 0, len(self.sigmas) - 2, config.trained)
        share = 1 / (len(learnt) * config.group)
        first: dict[str, Tensor | float] = {
            "reward": rewards.mean(), "reward_spread": (rewards.amax(0) - rewards.amin(0)).mean(),
        }  # fmt: skip
        for start in range(0, config.group, count):
            group, gain = drawn[start : start + count], gains[start : start + count].flatten()
            for index in learnt:
                xs = [one.latents[index] for one in group]
                with torch.no_grad():
                    references = self.moments(xs, index, batch, None) if config.kl else []
                steps = self.moments(xs, index, batch, "student")
                mean, std = (torch.cat(parts) for parts in zip(*steps, strict=True))
                density = log_density(torch.cat([one.latents[index + 1] for one in group]), mean, std)
                ratio = (density - torch.cat([one.densities[index] for one in group])).exp()
                each = clipped(ratio, gain, config.clip)
                part = share * len(group)
                metrics = {**first, "moved": part * (ratio.detach() - 1).abs().mean()}
                if references:
                    reference = torch.cat([mean for mean, _ in references])
                    divergence = mean_each((mean - reference).square() / (2 * std.square()))
                    each = each + config.kl * divergence
                    metrics["kl"] = part * divergence.detach().mean()
                first = {}
                loss = part * each.mean()
                del steps, mean, density, ratio, each
                yield Loss("student", loss, metrics)
                del loss


register(Method("flow_grpo", FlowGRPOConfig, FlowGRPO, "reward"))
