"""Distils a deterministic few-step student whose every state, not only the last, has the teacher's distribution.

Luo et al. 2025, "Learning Few-Step Diffusion Models by Trajectory Distribution Matching" (TDM, arXiv 2503.06674): the
student's ODE state x_mid after one step is diffused on to tau and its score compared with the teacher's there, summed
over the steps; gradients pass through one step. Images are not needed.

In the papers' coordinates (a, s of `alpha_sigma`), with unit noise n:
    x_tau = (a_tau / a_mid) x_mid + beta n,   beta^2 = s_tau^2 - (a_tau s_mid / a_mid)^2
    student   x0 -> sg(x0 + (x_real - x_fake) + (cfg - 1)(x_real - x_uncond))
    fake      "demo": |x_fake - x0|^2 min(SNR, 5) w, w = exp(-mean(m^2) / 2) / exp(-mean(n^2) / 2), where m is the whole
              noise of x_tau in units of s_tau (the authors' released training code);
              exact_score: |(beta / s_tau) eps_fake - n|^2, since the score of x_tau given x_mid is -n / beta. The first
              matches the last state exactly and the ones between only nearly; the second matches all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...sampling.distilled import Rule, sample_distilled
from ...sampling.path import NoisePath, broadcast
from ...sampling.settings import changed, setting
from ...sampling.students.preset import MOST_STEPS
from .parts.contract import (
    Batch,
    Cond,
    Loss,
    Objective,
    Player,
    Tools,
    TrainableDenoiser,
    alpha_sigma,
    guided,
    mean_each,
)
from .parts.grids import student_sigmas
from .parts.registry import Method, register
from .parts.score_matching import MatchingConfig, StudentConfig

Diffusing = Literal["separate", "top"]

# The authors' margins, in thousandths of the schedule: the noise floor of tau (and, with exact_score, how far above the
# state it starts, since its target's variance grows as 1 / beta^2), and how far below its upper end it stops.
FLOOR, CEILING = 20.0, 10.0
RANDOM_MID = 20.0
MOST_SNR = 5.0
BETAS = (0.0, 0.95)
MOST_FAKES = 16


@dataclass(frozen=True)
class TDMConfig(StudentConfig):
    """What is matched, where, and how. The authors' grid for PixArt is "899, 674, 449, 224".

    steps_choices: several numbers of steps (TDM-unify), on default grids; `steps` is then the number of the previews.
    conditioned: the fake score is told the step (and the number of steps) by an adapter of its own for each, and a
    whole batch takes the same step. The authors tell both networks by an input, which a LoRA for any model cannot add;
    the student learns from the levels alone, which differ between the grids for the most part.
    diffusing: "separate" - tau between the state and the step's start, where one unconditional fake score is unbiased;
    "top" - up to the grid's start, which only a conditioned one is unbiased for. exact_score: see the module. huber: c
    of the element-wise pseudo-Huber loss. normalise: divide by mean |x0 - x_real| per sample.
    """

    shown = (
        "steps", "timesteps", "cfg", "fake_rate", "diffusing", "exact_score", "huber", "normalise", "random_mid",
        "steps_choices", "conditioned",
    )  # fmt: skip

    steps: int = changed(StudentConfig, "steps", default=4)
    steps_choices: str = setting("", advanced=True,
        help="Several numbers of steps for one student, such as 1, 2, 4 (TDM-unify); empty for one number.")
    cfg: float = changed(MatchingConfig, "cfg", default=4.5)
    diffusing: Diffusing = setting("separate", advanced=True,
        help="Compare between two of the student's levels, or up to the highest.",
        page="*separate*: compare between two of the student's levels. *top*: up to the highest.")
    random_mid: bool = setting(False, advanced=True, help="End each step at a random level of its interval.")
    exact_score: bool = setting(False, advanced=True,
        help="Match the state after every step exactly, not only the last (the gradient is noisier).")
    huber: float = setting(1e-3, 0, 100, step=0.001, round=1e-6, advanced=True,
        help="Where the pseudo-Huber loss turns from square to straight; 0 for squares.",
        remedy="0.001 is the authors', 0 takes squares")
    normalise: bool = changed(MatchingConfig, "normalise")
    fake_rate: float = changed(MatchingConfig, "fake_rate", advanced=True, default=5.0, step=0.5,
        help="Learning rate of the fake score over the student's; both move every step.", remedy="5 is the authors'")
    conditioned: bool = setting(False, advanced=True,
        help="Tell the fake score the step: an adapter for each.",
        page="Tell the fake score the student's step, by an adapter of its own for each; only so are `top` and "
        "steps_choices exact. It takes as many adapters' memory, and a batch takes one step.")

    def check(self) -> None:
        """See the base."""
        super().check()
        if self.steps_choices and self.timesteps:
            raise ValueError("timesteps fixes one grid and steps_choices asks for several: empty one of them")
        if self.steps not in self.choices:
            raise ValueError(
                f"steps_choices {self.steps_choices!r} lacks {self.steps}, the number of steps of the previews: add it"
            )
        if self.conditioned and sum(self.choices) > MOST_FAKES:
            raise ValueError(
                f"conditioned makes an adapter for each of {sum(self.choices)} steps, and {MOST_FAKES} are the most: "
                "lower steps, or switch it off"
            )

    @property
    def choices(self) -> tuple[int, ...]:
        """The numbers of steps that are trained."""
        if not self.steps_choices.strip():
            return (self.steps,)
        try:
            numbers = tuple(int(part) for part in self.steps_choices.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(1 <= n <= MOST_STEPS for n in numbers):
            raise ValueError(
                f'steps_choices must be numbers of 1 to {MOST_STEPS} with commas between, such as "1, 2, 4", '
                f"got {self.steps_choices!r}"
            )
        return numbers


def between(path: NoisePath, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(ratio, beta) of the forward diffusion x_next = ratio x + beta n, levels (B,), in the papers' coordinates."""
    (a, s), (a_next, s_next) = alpha_sigma(path, sigma), alpha_sigma(path, sigma_next)
    ratio = a_next / a
    # Equal levels can come out below zero by rounding.
    return ratio, (s_next.square() - (ratio * s).square()).clamp(min=0).sqrt()


def diffuse_on(path: NoisePath, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """A latent (B, ...) in ComfyUI's coordinates taken by fresh unit noise from level sigma (B,) up to sigma_next."""
    ratio, beta = between(path, sigma, sigma_next)
    if path.kind == "VE":
        # x = x0 + sigma n is the papers' x_t / a_t: nothing is scaled down on the way up.
        return x + broadcast(beta / alpha_sigma(path, sigma_next)[0], x) * noise
    return broadcast(ratio, x) * x + broadcast(beta, x) * noise


class TDM(Objective):
    """Trajectory distribution matching with a student and a fake score; see the module."""

    name = "tdm"
    of_parts = True
    config: TDMConfig
    student_rule = Rule("deterministic")

    def __init__(self, config: TDMConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        self.grids = {k: student_sigmas(denoiser, k, config.timesteps).to(denoiser.device) for k in config.choices}

    @classmethod
    def asks_uncond(cls, config: TDMConfig) -> bool:
        """See the contract."""
        return config.cfg != 1

    @classmethod
    def graphs_wait(cls, config: TDMConfig) -> bool:
        """See the contract: the student's, while the fake score learns."""
        return True

    @property
    def players(self) -> dict[str, Player]:
        """Both move every step; the fake score is told apart by its learning rate alone."""
        fakes = dict.fromkeys(self.fake(k, i) for k in self.config.choices for i in range(k))
        rate = self.config.fake_rate
        return {"student": Player("student", betas=BETAS), **{f: Player(f, rate=rate, betas=BETAS) for f in fakes}}

    @property
    def student_levels(self) -> list[Tensor]:
        """See the contract."""
        return list(self.grids[self.config.steps][:-1])

    @property
    def student_grids(self) -> list[list[Tensor]]:
        """See the contract."""
        own = self.config.steps
        return [list(self.grids[k][:-1]) for k in sorted(self.grids, key=lambda k: (k != own, k))]

    def fake(self, steps: int, number: int) -> str:
        """The fake score's adapter for a step of the student that makes so many."""
        return f"fake_{steps}_{number}" if self.config.conditioned else "fake"

    def _time(self, sigma: Tensor) -> Tensor:
        """Thousandths of the schedule: timesteps on eps and v, 1000 sigma on flow."""
        return self.denoiser.levels.time(sigma)

    def _level(self, time: Tensor) -> Tensor:
        return self.denoiser.levels.trained(time)

    def rollout(self, batch: Batch, sigmas: Tensor, pick: Tensor) -> Tensor:
        """x (B, ...) at the beginning of step pick (B,) of the student's deterministic sampling, without gradient."""
        denoiser, path = self.denoiser, self.denoiser.path
        x = path.unit_start(sigmas[0], batch.draws.normal("noise", batch.shape))
        picks = pick.tolist()
        with torch.no_grad(), denoiser.adapter("student"):
            for k in range(max(picks)):
                rows = [row for row, last in enumerate(picks) if last > k]
                # Samples that have arrived wait: they take no part in the calls of those that go on.
                cond = batch.cond if len(rows) == len(x) else denoiser.chosen(batch.cond, rows)
                x0 = denoiser.predict_x0(x[rows], sigmas[k].expand(len(rows)), cond)
                moved = path.move(x[rows], x0, sigmas[k], sigmas[k + 1])
                x = x.to(moved.dtype).index_copy(0, torch.tensor(rows, device=x.device), moved)
        return x

    def levels(self, batch: Batch, sigmas: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma of the state, sigma of tau), (B,) each. In intervals too narrow for the margins these shrink."""
        draws, config = batch.draws, self.config
        start, mid = self._time(sigmas[pick]), self._time(sigmas[pick + 1].clamp(min=0))
        sigma_mid = sigmas[pick + 1]
        mid = torch.where(sigma_mid > 0, mid, torch.zeros_like(mid))
        if config.random_mid:
            reach = (start - mid - RANDOM_MID).clamp(min=0)
            moved = mid + reach * draws.uniform("mid")
            sigma_mid = torch.where(moved >= 1, self._level(moved), sigma_mid)
            mid = torch.where(moved >= 1, moved, mid)
        end = start if config.diffusing == "separate" else self._time(sigmas[:1]).expand_as(start)
        room = end - mid
        above = (FLOOR - mid).clamp(min=FLOOR if config.exact_score else 0.0)
        low, high = mid + torch.minimum(above, room / 2), end - (room / 4).clamp(max=CEILING)
        return sigma_mid, self._level(low + (high - low) * draws.uniform("tau"))

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The fake score's loss, then the student's, on one rollout and one x_tau, by the fake score before its update.

        The authors' trainer updates the fake score first, and draws step, noise and tau again for the student; one
        x_tau for both spares a rollout and a call.

        Where there is memory for it the student's call is made once and its graph waits for the loss: two graphs exist
        while the fake score learns. Else the call is made twice.
        """
        config, denoiser, path, draws, parts = self.config, self.denoiser, self.denoiser.path, batch.draws, batch.parts
        choices = config.choices
        steps = choices[int(draws.common("steps") * len(choices))]
        sigmas = self.grids[steps]
        if config.conditioned:
            pick = torch.full((len(batch),), int(draws.common("pick") * steps), device=denoiser.device)
        else:
            pick = draws.integers("pick", 0, steps)
        fake = self.fake(steps, int(pick[0]))
        x, sigma = self.rollout(batch, sigmas, pick), sigmas[pick]
        with nullcontext() if denoiser.may_wait() else torch.no_grad(), denoiser.adapter("student"):
            made = denoiser.predict_x0(x, sigma, batch.cond)
        x0 = made.detach()
        sigma_mid, sigma_tau = self.levels(batch, sigmas, pick)
        noise = draws.normal("tau_noise", batch.shape)
        x_mid = path.move(x, x0, sigma, sigma_mid)
        x_tau = diffuse_on(path, x_mid, sigma_mid, sigma_tau, noise)

        with denoiser.adapter(fake):
            x_fake = denoiser.predict_x0(x_tau, sigma_tau, batch.cond)
        if config.exact_score:
            beta_over_s = between(path, sigma_mid, sigma_tau)[1] / alpha_sigma(path, sigma_tau)[1]
            eps_fake = path.noise_from(x_tau, x_fake, sigma_tau)
            away = broadcast(beta_over_s, x) * eps_fake - noise
            each = parts.sum(lambda _, part: mean_each(part.square()), away)
        else:

            def weighed(gain: float, away: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
                return mean_each(away.square()) * self.demo_weight(eps, noise, sigma_mid, sigma_tau, gain)

            each = parts.sum(weighed, parts.own(x_fake - x0), path.noise_from(x, x0, sigma), noise)
        x_fake = x_fake.detach()
        loss = each.mean()
        del each
        yield Loss(fake, loss, {"fake_loss": loss.detach()})
        del loss

        with torch.no_grad(), denoiser.adapter(None):
            x_real = guided(denoiser, x_tau, sigma_tau, batch.cond, batch.uncond, config.cfg, joined=True)
        target = x0 + x_real - x_fake
        if not made.requires_grad:
            with denoiser.adapter("student"):
                made = denoiser.predict_x0(x, sigma, batch.cond)
        error = parts.own(made - target)
        del made

        def distance(_: float, error: Tensor, apart: Tensor) -> Tensor:
            scale = mean_each(apart).clamp(min=1e-8) if config.normalise else torch.ones_like(sigma)
            c = config.huber
            return mean_each((error.square() + c * c).sqrt() - c if c else error.square()) / scale

        each = parts.sum(distance, error, parts.own((x0 - x_real).abs()))
        yield Loss("student", each.mean(), {"gap": (x_real - x_fake).abs().mean()})

    def demo_weight(
        self, eps: Tensor, noise: Tensor, sigma_mid: Tensor, sigma_tau: Tensor, gain: float = 1.0
    ) -> Tensor:
        """min(SNR, 5) times the importance weight, tempered by a mean over the latent's numbers; (B,).

        eps: the noise that the student predicted at the step's start; it is what x_mid holds of noise. gain: of a part
        that is carried larger than it is, whose signal in its own noise is so many times stronger.
        """
        path = self.denoiser.path
        ratio, beta = between(path, sigma_mid, sigma_tau)
        (_, s_mid), (a, s) = alpha_sigma(path, sigma_mid), alpha_sigma(path, sigma_tau)
        m = (broadcast(ratio * s_mid, eps) * eps + broadcast(beta, eps) * noise) / broadcast(s, eps)
        importance = ((mean_each(noise.square()) - mean_each(m.square())) / 2).exp()
        return (gain * (a / s * path.sigma_data)).square().clamp(max=MOST_SNR) * importance

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """The student's deterministic sampling: the states that it was trained on."""
        denoiser, sigmas = self.denoiser, self.grids[self.config.steps].to(noise.device)

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return denoiser.predict_x0(x, sigma, cond)

        start = denoiser.path.unit_start(sigmas[0], noise)
        return sample_distilled(model, start, sigmas, disable=True, path=denoiser.path, rule=self.student_rule)


register(Method("tdm", TDMConfig, TDM, "distillation"))
