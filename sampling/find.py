"""FIND: learns, for one prompt, the Gaussian that its initial noise is drawn from, by policy gradient on a reward.

Chen et al. 2024, "FIND" (arXiv 2407.19453): one-step MDP, action z ~ pi = N(mu, diag std^2), reward r of the sample
that z becomes. From the idea, not from the authors' code: log-probabilities are sums over the latent, the pull towards
N(0, 1) is the true divergence, and the baseline of a sample is the mean of the K - 1 others (leave one out), which
keeps the gradient of

    E_pi[r] - pull * D(pi, N(0, 1))

unbiased. Steps are natural gradients (the Fisher matrix of a Gaussian is diagonal: 1 / std^2 for mu, 2 for log std). A
transition without noise ("ode") makes the reward a function of z, and is the natural choice.

D is one of the f-divergences of Go et al. 2023 (arXiv 2302.08215) that a Gaussian has in closed form and as a sum over
its dimensions: KL(pi | p), KL(p | pi) and their sum. The others have none (Jensen-Shannon, total variation), or are 1
(Hellinger) or infinite (chi^2) on latents of thousands of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .path import broadcast
from .search import Run, State, candidate_seed
from .settings import Settings, setting

Divergence = Literal["reverse_kl", "forward_kl", "jeffreys"]
# log std of at most this: a policy that wide or narrow has left everything that a model was trained on.
_LIMIT = 6.0


@dataclass
class Policy:
    """A Gaussian over unit noise: mean, log_std of one latent's shape."""

    mean: Tensor
    log_std: Tensor

    def noise(self, unit: Tensor) -> Tensor:
        """mean + std * unit; unit (..., *shape)."""
        return self.mean.to(unit) + self.log_std.exp().to(unit) * unit

    def log_prob(self, z: Tensor) -> Tensor:
        """Of noise (B, *shape) -> (B,), summed over the latent."""
        unit = (z - self.mean) / self.log_std.exp()
        return (-0.5 * unit.square() - self.log_std - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def divergence(self, name: Divergence = "reverse_kl") -> Tensor:
        """From N(0, 1), in nats: reverse_kl is KL(pi | p), forward_kl KL(p | pi), jeffreys their sum."""
        variance, shift = (2 * self.log_std).exp(), self.mean.square()
        reverse = 0.5 * (shift + variance - 1 - 2 * self.log_std).sum()
        forward = 0.5 * ((1 + shift) / variance - 1 + 2 * self.log_std).sum()
        return {"reverse_kl": reverse, "forward_kl": forward, "jeffreys": reverse + forward}[name]

    def pull(self, name: Divergence) -> tuple[Tensor, Tensor]:
        """Gradients of `divergence` for mean and log_std."""
        variance = (2 * self.log_std).exp()
        reverse = self.mean, variance - 1
        forward = self.mean / variance, 1 - (1 + self.mean.square()) / variance
        if name == "jeffreys":
            return reverse[0] + forward[0], reverse[1] + forward[1]
        return reverse if name == "reverse_kl" else forward


def advantages(rewards: Tensor) -> Tensor:
    """Each reward less the mean of the others; (K,), K >= 2."""
    return (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))


def policy_gradient(policy: Policy, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the samples of weight * grad log pi(z), for mean and log_std; z (K, *shape), weights (K,)."""
    unit = (z - policy.mean) / policy.log_std.exp()
    w = broadcast(weights.to(z), z) / len(z)
    return (w * unit).sum(0) / policy.log_std.exp(), (w * (unit.square() - 1)).sum(0)


@dataclass(frozen=True)
class FindConfig(Settings):
    """samples: K per step. rate: of the natural gradient; decay: divides it by 1 + decay * step. pull, divergence: see
    the module. normalise: rewards over the root of their mean variance, so that rate and pull suit any reward. epochs,
    clip: each step's samples serve so often, each time at rate / epochs, with the probability ratio clipped as in PPO
    (Schulman et al. 2017, arXiv 1707.06347, eq. 7). The ratio is the geometric mean over a latent's numbers: that of
    the whole latent leaves any clip after one step of thousands of numbers, so that later epochs would do nothing.
    """

    shown = ("samples", "rate", "pull", "divergence", "epochs")

    samples: int = setting(8, 2, 1024, help="Pictures for each step of the policy.",
        page="Pictures for each step of the policy; the others are the baseline of each (leave one out).",
        remedy="the others of a step are the baseline of each")
    rate: float = setting(0.05, 1e-9, 10, advanced=True, step=0.05, round=1e-6,
        help="Length of a step; higher learns faster and less surely.",
        page="Length of a step of the natural gradient; higher learns faster and less surely.", remedy="0.05 is usual")
    decay: float = setting(0.0, 0, 1e6, remedy="0 keeps the rate")
    pull: float = setting(0.01, 0, 1e3, advanced=True, step=0.05, round=1e-6,
        help="Pull towards plain noise, in standard deviations of the reward.",
        page="Strength of the pull towards plain noise, in standard deviations of the reward per nat. 0: none.",
        remedy="0.01 is usual")
    divergence: Divergence = setting("reverse_kl", advanced=True,
        help="What the pull makes small: KL(policy | plain), KL(plain | policy), or their sum.",
        page="What the pull makes small: the Kullback-Leibler divergence from plain noise, that of plain noise from "
        "the policy, or their sum. A Gaussian has them in closed form, summed over the latent.")
    normalise: bool = setting(True)
    epochs: int = setting(1, 1, 64, advanced=True, help="How often a step's pictures serve, clipped as in PPO.",
        page="How often each step's pictures serve, with the probability ratio clipped as in PPO; the ratio is a mean "
        "over a latent's numbers, as in Flow-GRPO.")
    clip: float = setting(0.2, 1e-9, 1e6, remedy="0.2 is usual")

    def fresh(self, setting: Mapping[str, Any], keep: int = 4) -> Find:
        """A policy that is N(0, 1). ValueError where the settings do not fit the run."""
        return Find(setting, self, keep)


class Find(State):
    """The policy, how many steps it took, the mean variance of the rewards, and (calls, mean reward) of each step."""

    method = "find"

    config: FindConfig

    def __init__(self, setting: Mapping[str, Any], config: FindConfig, keep: int = 4):
        super().__init__(setting, config, keep)
        shape = tuple(self.setting["shape"])
        self.policy = Policy(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
        self.step, self.variance = 0, 0.0
        self.means: list[tuple[int, float]] = []

    def round(self, run: Run) -> str | None:
        """K samples and a step of the policy."""
        k = self.config.samples
        if not run.affordable(k * run.steps):
            return "calls"
        z = torch.stack([self.policy.noise(run.unit(self.drawn + i)) for i in range(k)])
        trajectories = [run.trajectory(self.drawn + i, noise) for i, noise in enumerate(z)]
        run.finish(trajectories)
        rewards: list[float] = []
        for _, some in run.scored(trajectories):
            rewards += some
        self.learn(z.cpu().double(), torch.tensor(rewards, dtype=torch.float64))
        self.means.append((run.ledger.calls, sum(rewards) / k))
        self.drawn += k
        return None

    def learn(self, z: Tensor, rewards: Tensor) -> None:
        """One step of the policy from noise (K, *shape) that it drew, and rewards (K,)."""
        config, policy = self.config, self.policy
        self.variance += (float(rewards.var()) - self.variance) / (self.step + 1)
        gain = advantages(rewards)
        if config.normalise and self.variance > 0:
            gain = gain / math.sqrt(self.variance)
        before = policy.log_prob(z)
        rate = config.rate / (1 + config.decay * self.step) / config.epochs
        for _ in range(config.epochs):
            ratio = ((policy.log_prob(z) - before) / z[0].numel()).exp()
            # Beyond the clip, in the direction that the advantage pushes to, PPO's objective is flat.
            flat = torch.where(gain > 0, ratio > 1 + config.clip, ratio < 1 - config.clip)
            d_mean, d_log_std = policy_gradient(policy, z, torch.where(flat, 0.0, ratio * gain))
            pull_mean, pull_log_std = policy.pull(config.divergence)
            variance = (2 * policy.log_std).exp()
            mean = policy.mean + rate * variance * (d_mean - config.pull * pull_mean)
            log_std = policy.log_std + rate * 0.5 * (d_log_std - config.pull * pull_log_std)
            policy = Policy(mean, log_std.clamp(-_LIMIT, _LIMIT))
        self.policy, self.step = policy, self.step + 1

    def noise(self, seed: int, number: int = 0) -> Tensor:
        """A draw of the policy, fp32: the plain noise of that seed and candidate, moved and scaled."""
        generator = torch.Generator().manual_seed(candidate_seed(seed % (1 << 64), number))
        return self.policy.noise(torch.randn(tuple(self.setting["shape"]), generator=generator))

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `State.to_file`."""
        tensors, header = super().to_file()
        tensors |= {"mean": self.policy.mean, "log_std": self.policy.log_std}
        return tensors, {**header, "step": self.step, "variance": self.variance, "means": [list(m) for m in self.means]}

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """See `State.restore`."""
        super().restore(tensors, header)
        shape = tuple(self.setting["shape"])
        mean, log_std = tensors["mean"].double(), tensors["log_std"].double()
        step, variance = int(header["step"]), float(header["variance"])
        if not (tuple(mean.shape) == tuple(log_std.shape) == shape and math.isfinite(variance) and step >= 0):
            raise ValueError(f"the policy does not fit latents of shape {shape}")
        if not bool(torch.isfinite(mean).all() and (log_std.abs() <= _LIMIT).all()):
            raise ValueError("the policy holds numbers that none has")
        self.policy, self.step, self.variance = Policy(mean, log_std), step, variance
        self.means = [(int(calls), float(mean)) for calls, mean in header["means"]]
        if not all(math.isfinite(mean) for _, mean in self.means):
            raise ValueError("a mean reward is no number")
