"""Fine-tunes a flow, eps or v network on images with the loss that it was made with: flow matching, denoising.

Lipman et al. 2022 (arXiv 2210.02747), eq. 9, and Dao et al. 2023, "Flow Matching in Latent Space" (arXiv 2307.08698),
section 3.1: E_t |v(z_t, t) - (z_1 - z_0)|^2, t uniform; Ho et al. 2020 (arXiv 2006.11239), eq. 14, on eps networks.
Esser et al. 2024 (arXiv 2403.03206), section 3.1: logit-normal t. Xu et al. 2023, PFGM++ (arXiv 2302.04265), with
r = sigma sqrt(D): the kernel of eq. 4 is a multivariate Student-t of D degrees of freedom, so only the noise changes.

An error of the network's own output is `Parametrisation.scale` times larger in x0. ComfyUI's trainer compares x0, which
weighs flow by sigma^2, eps by sigma^2 (213-fold at the top) and v by sigma^2 / (1 + sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...sampling.between import handover
from ...sampling.grids import simple
from ...sampling.parts import own_level
from ...sampling.settings import Settings, setting
from ...sampling.student_t import check_aug_dim, student_t
from .parts.contract import (
    Batch,
    Cond,
    Draws,
    Loss,
    Objective,
    Tools,
    TrainableDenoiser,
    euler_guided,
    mean_each,
)
from .parts.registry import Method, register

LossSpace = Literal["native", "x0"]
Drawing = Literal["uniform", "logit_normal", "core"]
Expert = Literal["whole", "high noise", "low noise"]


@dataclass(frozen=True)
class FlowMatchingConfig(Settings):
    """How levels are drawn and errors weighed.

    loss_space: "native" - of the network's own output (flow, eps or v); "x0" - of the clean latent, as core's trainer.
    levels: "uniform" - every t alike (timesteps on eps and v, sigma itself on flow); "logit_normal" - t =
    sigmoid(mean + std n); "core" - every percentage of the sampling alike, so that the model's shift counts.
    max_weight: native only, the most that an error of x0 is magnified (1 / sigma^2 has no bound on flow).
    expert, boundary: which of two networks is trained that share the levels at a boundary, as Wan 2.2's do: the one of
    high noise has the boundary and what is above it, the other what is below. Draws are those of the whole range, given
    that they fall into the expert's. steps: of the previews, for which `Tools.other` is asked at the other's levels.
    """

    shown = ("loss_space", "levels", "cfg", "mean", "std", "max_weight", "aug_dim")

    loss_space: LossSpace = setting("native", advanced=True,
        help="native: the error of what the network predicts, as it was trained. x0: of the picture, as core does.",
        page="*native*: the error of what the network predicts, as it was trained. *x0*: of the picture, as core's "
        "trainer does, which weighs a flow's levels by sigma squared.")
    levels: Drawing = setting("uniform", advanced=True,
        help="How noise levels are drawn; logit_normal (SD3) prefers the middle, core is the core trainer's.",
        page="How noise levels are drawn: *uniform*; *logit_normal*, which prefers the middle, as SD3 was trained; "
        "*core*, as core's trainer draws them. On models with a continuous schedule (SVD, Playground 2.5, Stable "
        "Cascade, SDXL behind ModelSamplingContinuousEDM) *uniform* is even in the angle between picture and noise.")
    mean: float = setting(0.0, -10, 10, step=0.1, advanced=True, help="logit_normal: above 0 draws noisier levels.",
        remedy="0 centres t at one half")
    std: float = setting(1.0, 0.01, 10, step=0.1, advanced=True, help="logit_normal: how far they spread.",
        remedy="1 is SD3's")
    max_weight: float = setting(1e4, 1, 1e8, step=100.0, advanced=True,
        help="The most that an error of the picture is magnified at low noise.", remedy="1e4 binds below sigma 0.01")
    aug_dim: float = setting(0.0, 0, 1e12, step=16.0, advanced=True,
        help="Experimental: PFGM++'s D, heavier-tailed noise; 0 is Gaussian, else at least 1/8 of a latent's size.")
    expert: Expert = setting("whole", advanced=True,
        help="Models of two networks, such as Wan 2.2 A14B: which of them this is. Only its levels are trained.",
        page="Models of two networks (Wan 2.2 A14B): which of them `model` is, so that only its levels are drawn. "
        "*whole* is for all other models. With `other_expert` connected, previews are sampled by both. Without it "
        "those of *high noise* show what it has decided on at the boundary, and those of *low noise* are made by that "
        "network alone, which never learnt to begin.")
    boundary: float = setting(0.875, 0.001, 0.999, step=0.005, round=1e-3, advanced=True,
        help="Where the two networks meet: 0.875 for Wan 2.2 from text, 0.9 from a picture.",
        remedy="0.875 is Wan 2.2's from text, 0.9 from a picture")
    steps: int = setting(20, 1, 1000, remedy="20 is enough for a preview")
    cfg: float = setting(4.0, 0, 100, step=0.1, help="Guidance of the previews; training has none.")

    def check(self) -> None:
        """See the base."""
        check_aug_dim(self.aug_dim)


def quantile(draws: Draws) -> Tensor:
    """A number in (0, 1) for each sample, fp64 (B,), for the radius of Student-t noise."""
    # One draw has 24 bits, whose lowest value, zero, would make an infinite latent; two have 48.
    coarse, fine = (draws.uniform(f"student_t/{part}").double().cpu() for part in ("coarse", "fine"))
    return coarse + (fine + 2.0**-25) * 2.0**-24


class FlowMatching(Objective):
    """Plain fine-tuning of one adapter; see the module."""

    name = "flow_matching"
    of_samples = True
    of_parts = True
    needs_latents = True
    config: FlowMatchingConfig

    def __init__(self, config: FlowMatchingConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        if config.expert != "whole" and denoiser.path.kind != "FLOW":
            raise ValueError(
                f"expert {config.expert!r} is one of two networks that share a flow's levels, and this model is no "
                "flow: set it to whole"
            )

    def sigma(self, draws: Draws) -> Tensor:
        """The step's levels (B,)."""
        config, levels = self.config, self.denoiser.levels
        level = levels.sampled if config.levels == "core" else levels.uniform
        # Of a uniform draw, in (0, 1]: flow has nothing to learn at level 0.
        normal = config.levels == "logit_normal"
        drawn = draws.normal("level", ()) if normal else 1 - draws.uniform("level")

        def share(drawn: Tensor) -> Tensor:
            return torch.sigmoid(config.mean + config.std * drawn) if normal else drawn

        if config.expert == "whole":
            return level(share(drawn))
        # The place of the boundary among the draws, on the scale on which these are even.
        edge = _place(level, config.boundary)
        if normal:
            edge = (edge.logit() - config.mean) / config.std
        return self._within(drawn, edge, normal, lambda drawn: level(share(drawn)))

    def _within(self, drawn: Tensor, edge: Tensor, normal: bool, level: Callable[[Tensor], Tensor]) -> Tensor:
        """Levels (B,) of draws, normal or uniform in (0, 1], given that they fall on the expert's side of an edge."""
        upper = self.config.expert == "high noise"
        chance, split = (torch.special.ndtr(x.double()) if normal else x.double() for x in (drawn, edge))
        kept = split + (1 - split) * chance if upper else split * chance
        inside = torch.special.ndtri(kept) if normal else kept
        found = level(inside.to(drawn.device)).float()
        # By rounding to fp32 a level may land on the other side.
        nearest = torch.tensor(self.config.boundary)
        on_side = (float(nearest) >= self.config.boundary) == upper
        end = float(nearest if on_side else nearest.nextafter(torch.tensor(float(upper))))
        return found.clamp(min=end) if upper else found.clamp(max=end)

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss: the squared error in the chosen space."""
        denoiser, latents, parts = self.denoiser, batch.images, batch.parts
        sigma = self.sigma(batch.draws)
        noise = student_t(batch.draws.normal("noise", batch.shape), quantile(batch.draws), self.config.aug_dim)
        x = denoiser.path.add_noise(latents, sigma, noise)
        errors = []

        def weighed(gain: float, error: Tensor) -> Tensor:
            errors.append(mean_each(error.square()))
            if self.config.loss_space == "x0":
                return errors[-1]
            scale = denoiser.parametrisation.scale(own_level(sigma, gain))
            return errors[-1] * scale.pow(-2).clamp(max=self.config.max_weight)

        with denoiser.adapter("student"):
            each = parts.sum(weighed, parts.own(denoiser.predict_x0(x, sigma, batch.cond) - latents))
        yield Loss("student", each.mean(), {}, each, tuple(errors), sigma)

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """Euler with guidance on the schedule's simple grid; without an empty prompt, without guidance.

        Of two experts each makes the steps from its own levels, where there is the other one.
        """
        config, denoiser = self.config, self.denoiser
        sigmas = simple(denoiser.schedule, config.steps).to(noise.device)
        first = handover(sigmas, config.boundary)
        if config.expert == "high noise" and self.other is None:
            sigmas = torch.cat([sigmas[:first], sigmas[-1:]])
        x = denoiser.path.unit_start(sigmas[0], noise)
        if config.expert == "whole" or self.other is None:
            return euler_guided(denoiser, sigmas, x, cond, uncond, config.cfg)
        for leg, expert in ((sigmas[: first + 1], "high noise"), (sigmas[first:], "low noise")):
            if len(leg) > 1:
                with nullcontext(denoiser) if expert == config.expert else self.other() as asked:
                    x = euler_guided(asked, leg, x, cond, uncond, config.cfg)
        return x


def _place(level: Callable[[Tensor], Tensor], boundary: float) -> Tensor:
    """The share (0-d, fp64) in (0, 1) whose level is the boundary; levels rise with shares."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = float(level(torch.tensor([middle], dtype=torch.float64))) < boundary
        low, high = (middle, high) if below else (low, middle)
    return torch.tensor((low + high) / 2, dtype=torch.float64)


register(Method("flow", FlowMatchingConfig, FlowMatching, "images"))
