"""Fine-tunes a flow, eps or v network on images with the loss that it was made with: flow matching, denoising.

Lipman et al. 2022 (arXiv 2210.02747), eq. 9, and Dao et al. 2023, "Flow Matching in Latent Space" (arXiv 2307.08698),
section 3.1: E_t |v(z_t, t) - (z_1 - z_0)|^2, t uniform; Ho et al. 2020 (arXiv 2006.11239), eq. 14, on eps networks.
Esser et al. 2024 (arXiv 2403.03206), section 3.1: logit-normal t. Xu et al. 2023, PFGM++ (arXiv 2302.04265), with
r = sigma sqrt(D): the kernel of eq. 4 is a multivariate Student-t of D degrees of freedom, so only the noise changes.

An error of the network's own output is `native_scale` times larger in x0. ComfyUI's trainer compares x0, which weighs
flow by sigma^2, eps by sigma^2 (213-fold at the top) and v by sigma^2 / (1 + sigma^2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...sampling.grids import simple
from ...sampling.standard import sample_euler
from ...sampling.student_t import check_aug_dim, student_t
from .parts.contract import Batch, Cond, Draws, Loss, Player, TrainableDenoiser, guided, mean_each, native_scale

LossSpace = Literal["native", "x0"]
Levels = Literal["uniform", "logit_normal", "core"]


@dataclass(frozen=True)
class FlowMatchingConfig:
    """How levels are drawn and errors weighed.

    loss_space: "native" - of the network's own output (flow, eps or v); "x0" - of the clean latent, as core's trainer.
    levels: "uniform" - every t alike (timesteps on eps and v, sigma itself on flow); "logit_normal" - t =
    sigmoid(mean + std n); "core" - every percentage of the sampling alike, so that the model's shift counts.
    max_weight: native only, the most that an error of x0 is magnified (1 / sigma^2 has no bound on flow).
    aug_dim: PFGM++'s D, of the Student-t noise; 0 (or inf) is Gaussian noise. From a tuned Gaussian model start with at
    least an eighth of the numbers in a latent. steps, cfg: of the previews.
    """

    loss_space: LossSpace = "native"
    levels: Levels = "uniform"
    mean: float = 0.0
    std: float = 1.0
    max_weight: float = 1e4
    aug_dim: float = 0.0
    steps: int = 20
    cfg: float = 4.0

    def __post_init__(self) -> None:
        if self.loss_space not in get_args(LossSpace):
            raise ValueError(
                f"loss_space {self.loss_space!r} is not known; use one of {', '.join(get_args(LossSpace))}"
            )
        if self.levels not in get_args(Levels):
            raise ValueError(f"levels {self.levels!r} is not known; use one of {', '.join(get_args(Levels))}")
        if not -10 <= self.mean <= 10:
            raise ValueError(f"mean must be -10 to 10, got {self.mean!r}: 0 centres t at one half")
        if not 0 < self.std <= 10:
            raise ValueError(f"std must be above 0 and at most 10, got {self.std!r}: 1 is SD3's")
        if not 1 <= self.max_weight <= 1e8:
            raise ValueError(f"max_weight must be 1 to 1e8, got {self.max_weight!r}: 1e4 binds below sigma 0.01")
        check_aug_dim(self.aug_dim)
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must be 1 to 1000, got {self.steps!r}: 20 is enough for a preview")
        if not 0 <= self.cfg <= 100:
            raise ValueError(f"cfg must be 0 to 100, got {self.cfg!r}")


def quantile(draws: Draws) -> Tensor:
    """A number in (0, 1) for each sample, fp64 (B,), for the radius of Student-t noise."""
    # One draw has 24 bits, whose lowest value, zero, would make an infinite latent; two have 48.
    coarse, fine = (draws.uniform(f"student_t/{part}").double().cpu() for part in ("coarse", "fine"))
    return coarse + (fine + 2.0**-25) * 2.0**-24


class FlowMatching:
    """Plain fine-tuning of one adapter; see the module."""

    name = "flow_matching"
    needs_latents = True
    needs_uncond = False
    pairs = 0

    def __init__(self, config: FlowMatchingConfig, denoiser: TrainableDenoiser):
        self.config, self.denoiser = config, denoiser
        self._flow = denoiser.path.kind == "FLOW"
        schedule = denoiser.schedule
        # The network's timestep at the top: 1000 on SD3's schedule, 1 on Flux's.
        self._top = float(schedule.timestep(torch.ones(1))) if self._flow else len(schedule.sigmas) - 1.0

    @property
    def players(self) -> dict[str, Player]:
        """The student alone."""
        return {"student": Player("student")}

    def prepare(self, samples: Iterable[Batch]) -> None:
        """Nothing to learn from the first samples."""

    def make_pairs(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """Never called: `pairs` is 0."""
        raise NotImplementedError

    def sigma(self, draws: Draws) -> Tensor:
        """The step's levels (B,)."""
        config, schedule = self.config, self.denoiser.schedule
        if config.levels == "logit_normal":
            t = torch.sigmoid(config.mean + config.std * draws.normal("level", ()))
        else:
            # In (0, 1]: flow has nothing to learn at level 0.
            t = 1 - draws.uniform("level")
        if config.levels == "core":
            return schedule.sigma(t * self._top)
        if self._flow:
            return t
        # Whole timesteps: the levels that the network was trained on, the lowest and the highest as often as others.
        return schedule.sigma((t * (self._top + 1)).ceil() - 1)

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss: the squared error in the chosen space."""
        denoiser, latents = self.denoiser, batch.images
        sigma = self.sigma(batch.draws)
        noise = student_t(batch.draws.normal("noise", batch.shape), quantile(batch.draws), self.config.aug_dim)
        x = denoiser.path.add_noise(latents, sigma, noise)
        with denoiser.adapter("student"):
            error = each = mean_each((denoiser.predict_x0(x, sigma, batch.cond) - latents).square())
        if self.config.loss_space == "native":
            scale = native_scale(denoiser.prediction, denoiser.path, sigma)
            each = error * scale.pow(-2).clamp(max=self.config.max_weight)
        yield Loss("student", each.mean(), {}, each, (error,), sigma)

    def after_step(self, metrics: Mapping[str, float], step: int) -> None:
        """No running averages."""

    def buffers(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """Euler with guidance on the schedule's simple grid; without an empty prompt, without guidance."""
        denoiser, cfg = self.denoiser, 1.0 if uncond is None else self.config.cfg
        sigmas = simple(denoiser.schedule, self.config.steps).to(noise.device)

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return guided(denoiser, x, sigma, cond, uncond, cfg)

        start = denoiser.path.unit_start(sigmas[0], noise)
        return sample_euler(model, start, sigmas, disable=True, path=denoiser.path)
