"""Distribution matching distillation: a student whose samples a frozen teacher and a learnt fake score find alike.

DMD2 (Yin et al. 2024, arXiv 2405.14867), sections 4.2 (two time scales), 4.3 (GAN), 4.4 (several steps), 4.5 (backward
simulation). DMD (Yin et al. 2023, arXiv 2311.18828), sections 3.2 (matching) and 3.3 (regression): the configuration
`DMD`. Guidance and matching at levels of their own: Decoupled DMD (Liu et al. 2025, arXiv 2511.22677).
Proposals, not the papers': the regression is pseudo-Huber on latents where DMD has LPIPS on pixels; in the decoupled
form each of the two terms has the normaliser of its own level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...sampling import grids
from ...sampling.settings import setting
from ...sampling.standard import sample_dpmpp_2m
from .parts.adversarial import Adversarial, AdversarialConfig
from .parts.contract import Asked, Batch, Cond, Loss, Tools, TrainableDenoiser, guided, mean_each
from .parts.grids import student_sigmas
from .parts.registry import Method, register
from .parts.score_matching import StudentConfig

# iCT's constant (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3), per element.
HUBER = 0.00054


@dataclass(frozen=True)
class DMD2Config(AdversarialConfig, StudentConfig):
    """DMD2's settings. gan_weight: of the GAN's gradient beside the matching one, above 0 images are needed.
    regression_weight: what remains of the regression after its steps (DMD: 0.25).
    """

    shown: ClassVar[tuple[str, ...]] = (
        "steps", "timesteps", "cfg", "ratio", "fake_rate", "gan_weight", "gan_on", "regression_steps",
        "regression_weight", "pairs", "pair_steps", "decoupled", "normalise", "low", "high", "shift",
    )  # fmt: skip

    decoupled: bool = setting(False, advanced=True,
        help="Compare guidance only at levels no noisier than the student's own (Decoupled DMD).")
    regression_steps: int = setting(0, 0, 10_000_000,
        help="First so many steps copy pictures of the teacher: one-step students of large models need it.",
        remedy="0 is no warm-up")
    regression_weight: float = setting(0.0, 0, 100, advanced=True, step=0.01,
        help="How much of that remains afterwards; 0.25 with gan_weight 0 is DMD as first published.",
        remedy="0 is none, 0.25 is DMD's")
    pairs: int = setting(1000, 1, 10_000_000, advanced=True, help="Teacher pictures made for that.",
        page="Teacher pictures made for that; they are kept in the run's folder.", remedy="one-step SDXL took 10000")
    pair_steps: int = setting(30, 1, 1000, advanced=True, help="The teacher's steps for each of them.",
        remedy="30 is enough for this sampler")

    def check(self) -> None:
        """See the base."""
        super().check()
        if self.decoupled and self.cfg == 1:
            raise ValueError("decoupled separates guidance from matching, and cfg is 1: raise cfg or switch it off")


# DMD as it was first published: regression throughout, no GAN, one time scale.
DMD = DMD2Config(ratio=1, regression_weight=0.25)


class DMD2(Adversarial):
    """See the module; `Objective` in `contract`."""

    name = "DMD2"
    of_parts = True
    config: DMD2Config

    def __init__(self, config: DMD2Config, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, student_sigmas(denoiser, config.steps, config.timesteps), tools)

    @property
    def pairs(self) -> int:
        """See the contract."""
        config = self.config
        return config.pairs if config.regression_steps or config.regression_weight else 0

    def make_pairs(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """See the contract."""
        return make_pairs(self.denoiser, noise, cond, uncond, self.config.pair_steps, self.config.cfg)

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """Student (every `ratio`-th step), then fake score, then discriminator, all on the same samples."""
        config = self.config
        if step < config.regression_steps:
            yield self._regression(batch, 1.0)
            return
        call = self._simulate(batch)
        learns = (step - config.regression_steps) % config.ratio == 0
        made = self._made(batch, call, learns)
        x = made.detach()
        if learns:
            g, metrics = self._gradient(batch, x, call.level)
            yield self._student(batch, call, g, metrics, made)
            if config.regression_weight:
                yield self._regression(batch, config.regression_weight)
        del made
        yield self._fake(batch, x)
        if config.gan_weight:
            yield from self._critics(batch, x)

    def _distribution(
        self, batch: Batch, x: Tensor, level: float, x_t: Tensor, sigma: Tensor, judged: Tensor | None = None
    ) -> Tensor:
        """See the base; decoupled, guidance is compared at a level of its own."""
        config, denoiser = self.config, self.denoiser
        if not config.decoupled:
            return super()._distribution(batch, x, level, x_t, sigma, judged)
        matched = Asked(x_t, sigma, batch.cond)
        # No noisier than the student's own input: there its picture is still open, and guidance is to decide it.
        low, high = self.scope
        high = min(high, denoiser.levels.place(level, config.shift))
        low = min(low, high)
        sigma = denoiser.levels.drawn(batch.draws.uniform("guidance level"), low, high, config.shift)
        x_t = denoiser.path.add_noise(x, sigma, batch.draws.normal("guidance noise", batch.shape))
        asked = [matched, matched, Asked(x_t, sigma, batch.cond), Asked(x_t, sigma, batch.uncond)]
        fake, real, *guides = self._scores(asked, judged)
        guidance = (config.cfg - 1) * (guides[0] - guides[1])
        matching = self._normalised(fake - real, x, real, batch.parts)
        return matching - self._normalised(guidance, x, guides[0] + guidance, batch.parts)

    def _regression(self, batch: Batch, weight: float) -> Loss:
        """DMD, section 3.3, on latents: the student's first call meets the teacher's x0 from the same noise."""
        noise, target = batch.columns["pair_noise"], batch.columns["pair_target"]
        level = float(self.sigmas[0])
        with self.denoiser.adapter("student"):
            x = self.denoiser.path.unit_start(level, noise)
            x0 = self.denoiser.predict_x0(x, self._each(level, len(batch)), batch.cond)
        own = batch.parts.own
        loss = batch.parts.sum(lambda _, x, y: pseudo_huber(x, y), own(x0), own(target)).mean()
        return Loss("student", weight * loss, {"regression_loss": loss.detach()})


def pseudo_huber(x: Tensor, target: Tensor) -> Tensor:
    """(B,) sqrt(mean d^2 + c^2) - c: an absolute error far away, a square nearby."""
    return (mean_each((x - target).square()) + HUBER**2).sqrt() - HUBER


@torch.no_grad()
def make_pairs(denoiser: TrainableDenoiser, noise: Tensor, cond: Cond, uncond: Cond, steps: int, cfg: float) -> Tensor:
    """The teacher's x0 (B, ...) from unit noise: DPM-Solver++(2M) on the `simple` grid, so always the same one."""
    sigmas = grids.simple(denoiser.schedule, steps).to(noise.device)
    with denoiser.adapter(None):
        return sample_dpmpp_2m(
            lambda x, sigma: guided(denoiser, x, sigma, cond, uncond, cfg),
            denoiser.path.unit_start(sigmas[0], noise),
            sigmas,
            disable=True,
            path=denoiser.path,
        )


register(Method("dmd2", DMD2Config, DMD2, "distillation"))
