"""Distils a student by the distance between score functions, and aligns it with a reward on the way.

DI* (Luo et al., "David and Goliath", ICML 2025; arXiv 2410.20898) and SIM (Luo et al. 2024, arXiv 2410.16794):
    min  E[-alpha_rew r(x0)] + D,   D = int w(t) E d(y_t) dt,   y_t = s_fake(x_t) - s_ref(x_t).
The expectation of D is over the student's samples, but they are held: only the score is differentiated (SIM, theorem
3.1). That gradient is the one of the surrogate -w d'(y_t)^T (s_fake(x_t) - grad log q(x_t | x0)) with the networks'
weights held and x_t in the graph. In x0, with u = x_fake - x_ref and y = (a / s^2) u, it is -W d'(u)^T (x_fake - x0):
the form of SiD (Zhou et al. 2024, arXiv 2404.04057, eq. 23; its alpha is `sid_alpha`).

The surrogate's graph runs through the fake score and the teacher. Its partial derivatives are closed forms of x0,
x_fake and x_ref, so each network needs one vector-Jacobian product, one after another. Without them (networks under
no_grad) the gradient is silently that of another loss, Diff-Instruct's with a normaliser.

With the pseudo-Huber distance the pull back to the teacher is bounded: where alpha_rew |grad r| exceeds it, the student
has no fixed point and runs after the reward. "l2" has no such bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...sampling.path import broadcast
from ...sampling.settings import changed, setting
from .parts.contract import Asked, Batch, Cond, Tools, TrainableDenoiser, alpha_sigma, mean_each, slope_of
from .parts.grids import student_sigmas
from .parts.registry import Method, register
from .parts.score_matching import MatchingConfig, ScoreMatching, StudentConfig

Distance = Literal["pseudo_huber", "l2", "kl"]
Guidance = Literal["in", "out"]
Space = Literal["x0", "score"]


@dataclass(frozen=True)
class DIStarConfig(MatchingConfig, StudentConfig):
    """DI*'s settings; more than one step by DMD2's backward simulation. cfg 1 is no guidance either way.

    distance: "pseudo_huber" - sqrt(mean y^2 + huber^2) - huber, whose huber is the paper's c over the square root of
    the latent's size; "l2" - y^2 / 2 (SIM, SiD); "kl" - Diff-Instruct's integral KL (with a reward: DI++).
    space: "x0" compares clean latents, every level alike; "score" the scores themselves, w(t) = 1.
    guidance: "in" - s_ref is guided inside the distance (the better one); "out" - the guidance is a reward of its own,
    (cfg - 1) (s_cond - s_uncond), beside an unguided distance.
    alpha_rew: the reward's weight beside the mean over a latent's numbers, where the paper's 100 stands beside their
    sum (with normalise off). normalise: divide all but the reward's gradient by mean |x0 - x_ref| per sample; the
    paper's weight is then alpha_rew times that distance.
    """

    shown = (
        "steps", "timesteps", "cfg", "ratio", "fake_rate", "alpha_rew", "guidance", "distance", "huber", "sid_alpha",
        "space", "normalise", "low", "high", "shift",
    )  # fmt: skip

    cfg: float = changed(MatchingConfig, "cfg", default=7.5)
    distance: Distance = setting("pseudo_huber", advanced=True,
        help="pseudo_huber is DI*'s, l2 is SIM's and cannot run away, kl is Diff-Instruct's.",
        page="pseudo_huber (DI\\*), l2 (SIM), kl (Diff-Instruct). With pseudo_huber a large reward outweighs the pull "
        "back to the teacher, which is bounded; l2's is not.")
    huber: float = setting(0.00054, 1e-8, 1e3, step=1e-5, round=1e-8, advanced=True,
        help="Where pseudo_huber turns from square to straight.", remedy="0.00054 is iCT's, per number")
    space: Space = setting("x0", advanced=True,
        help="Compare clean latents, every level alike, or the scores themselves.")
    guidance: Guidance = setting("in",
        help="in: the teacher is guided inside the distance (better). out: guidance pulls as a reward of its own.")
    sid_alpha: float = setting(1.0, -10, 10, step=0.1, advanced=True,
        help="l2 only: SiD's alpha; 1 is the exact gradient.",
        remedy="1 is the exact gradient, 1.2 SiD's choice without guidance")
    alpha_rew: float = setting(0.0, 0, 1e6, step=0.1,
        help="Weight of the reward; connect one to `reward`. Too much of it and the student runs after the reward.",
        page="Weight of the reward, beside a mean over a latent's numbers where the paper's 100 stands beside their "
        "sum; so with `normalise` off. With it on the other terms are divided by the teacher's distance and this one "
        "is not, so the paper's weight is this times that distance. Too much of it and the student runs after the "
        "reward.", remedy="0 is no reward")

    def check(self) -> None:
        """See the base."""
        super().check()
        if self.sid_alpha != 1.0 and self.distance != "l2":
            raise ValueError(f"sid_alpha belongs to distance 'l2', and distance is {self.distance!r}: set it to 1")


class Partials(NamedTuple):
    """The surrogate's derivatives by x0, x_fake and x_ref (B, ...), summed over a latent, and d(y) (B,)."""

    x0: Tensor
    fake: Tensor
    ref: Tensor
    distance: Tensor


def partials(config: DIStarConfig, x0: Tensor, fake: Tensor, ref: Tensor, a: Tensor, s: Tensor) -> Partials:
    """Derivatives of -W d'(u) . (x_fake - x0), u = x_fake - x_ref, at levels a, s (B,) of the papers' coordinates.

    With d(u) = rho - c and rho = sqrt(mean u^2 + c^2): d' = u / rho, and by u: -W (e / rho - u mean(u e) / rho^3),
    e = x_fake - x0. "kl" has no graph through the networks: its derivatives by them are zero.
    """
    u, e = fake - ref, fake - x0
    # One score is this times one x0.
    to_score = a / s.square() if config.space == "score" else torch.ones_like(a)
    if config.distance == "kl":
        weight = broadcast(a * to_score if config.space == "score" else to_score, u)
        zero = torch.zeros_like(u)
        return Partials(weight * u, zero, zero, mean_each(weight * u.square()))
    if config.distance == "l2":
        weight = to_score.square()
        direction = broadcast(weight, u) * u
        by_u = -broadcast(weight, u) * (e + 2 * (config.sid_alpha - 1) * u)
        distance = weight * mean_each(u.square()) / 2
    else:
        c = config.huber / to_score.clamp(min=1e-12)
        rho = (mean_each(u.square()) + c.square()).sqrt()
        direction = broadcast(to_score / rho, u) * u
        by_u = -broadcast(to_score / rho, u) * (e - u * broadcast(mean_each(u * e) / rho.square(), u))
        distance = to_score * (rho - c)
    return Partials(direction, by_u - direction, -by_u, distance)


class DIStar(ScoreMatching):
    """DI*, SIM and DI++; see the module."""

    name = "DI*"
    rewards = "differentiable"
    config: DIStarConfig

    def __init__(self, config: DIStarConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, student_sigmas(denoiser, config.steps, config.timesteps), tools)

    @classmethod
    def reward_refusal(cls, config: DIStarConfig) -> str | None:
        """See the contract."""
        if not config.alpha_rew:
            return None
        return (
            f"alpha_rew is {config.alpha_rew}, and there is no reward: connect a differentiable one, or set alpha_rew "
            "to 0"
        )

    @classmethod
    def job_refusal(cls, config: DIStarConfig) -> str | None:
        """See the contract."""
        if not config.alpha_rew:
            return None
        return (
            f"alpha_rew is {config.alpha_rew}, and a job takes no reward: set it to 0, or train in the node Train "
            "Distillation"
        )

    @classmethod
    def graphs_wait(cls, config: DIStarConfig) -> bool:
        """See the contract: the student's, beside those of the distance and the reward."""
        return config.distance != "kl" or config.alpha_rew > 0

    def _gradient(self, batch: Batch, x: Tensor, level: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        """What moves x (B, ...): the surrogate's gradient, guidance and the reward's, always added in this order."""
        settings, denoiser, cond, draws = self.config, self.denoiser, batch.cond, batch.draws
        sigma = denoiser.levels.drawn(draws.uniform("matching level"), settings.low, settings.high, settings.shift)
        noise = draws.normal("matching noise", batch.shape)
        guided = settings.cfg != 1
        with torch.no_grad():
            x_t = denoiser.path.add_noise(x, sigma, noise)
            asked = [Asked(x_t, sigma, told) for told in (cond, cond, *([batch.uncond] if guided else []))]
            fake, real, *without = denoiser.predict_each(asked, ["fake", None, None][: len(asked)])
            gap = real - without[0] if without else torch.zeros_like(real)
        inside = guided and settings.guidance == "in"
        a, s = alpha_sigma(denoiser.path, sigma)
        parts = partials(settings, x, fake, real + (settings.cfg - 1) * gap if inside else real, a, s)

        g = parts.x0
        if settings.distance != "kl":
            g = g + self._vjp("fake", x, sigma, noise, cond, parts.fake)
            g = g + self._vjp(None, x, sigma, noise, cond, (settings.cfg if inside else 1.0) * parts.ref)
            if inside:
                g = g + self._vjp(None, x, sigma, noise, batch.uncond, (1 - settings.cfg) * parts.ref)
        if guided and not inside:
            # The implicit reward log p(c | x_t): its score is (a / s^2) gap, and dx_t / dx0 is a.
            weight = (a / s).square() if settings.space == "score" else torch.ones_like(a)
            g = g - (settings.cfg - 1) * broadcast(weight, gap) * gap
        if settings.normalise:
            g = g / broadcast(mean_each((x - real - (settings.cfg - 1) * gap).abs()), g)
        metrics: dict[str, Tensor | float] = {"distance": parts.distance.mean()}
        if settings.alpha_rew:
            pull, reward = self._reward(x, batch)
            # The surrogate is a mean over a latent's numbers, the reward one number to a latent.
            g = g - settings.alpha_rew * x[0].numel() * pull
            metrics |= {"reward": reward.mean(), "reward_slope": pull.square().mean().sqrt()}
        return torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0), metrics

    def _vjp(self, adapter: str | None, x: Tensor, sigma: Tensor, noise: Tensor, cond: Cond, weight: Tensor) -> Tensor:
        """weight^T d x0_network / d x through x_t, one network's graph at a time."""
        leaf = x.detach().requires_grad_()
        # The backward pass stays inside: gradient checkpointing runs the forward again with the adapter that is on.
        with torch.enable_grad(), self.denoiser.adapter(adapter):
            x_t = self.denoiser.path.add_noise(leaf, sigma, noise)
            return torch.autograd.grad(self.denoiser.predict_x0(x_t, sigma, cond), leaf, weight)[0]

    def _reward(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(d reward / d x, reward (B,)) of the student's samples."""
        assert self.reward is not None
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            reward = self.reward(leaf, batch.prompts, batch)
            return slope_of(reward, leaf, self.name), reward.detach()


register(Method("di_star", DIStarConfig, DIStar, "distillation"))
