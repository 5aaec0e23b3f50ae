"""Distribution matching distillation: a student whose samples a frozen teacher and a learnt fake score find alike.

DMD2 (Yin et al. 2024, arXiv 2405.14867), sections 4.2 (two time scales), 4.3 (GAN), 4.4 (several steps), 4.5 (backward
simulation). DMD (Yin et al. 2023, arXiv 2311.18828), sections 3.2 (matching) and 3.3 (regression): the configuration
`DMD`. Guidance and matching at levels of their own: Decoupled DMD (Liu et al. 2025, arXiv 2511.22677).
Proposals, not the papers': the regression is pseudo-Huber on latents where DMD has LPIPS on pixels; in the decoupled
form each of the two terms has the normaliser of its own level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...sampling import grids
from ...sampling.accounts import seed_of
from ...sampling.distilled import sample_distilled
from ...sampling.path import broadcast
from ...sampling.settings import setting
from ...sampling.standard import default_noise_sampler, sample_dpmpp_2m
from .parts.contract import (
    Asked,
    Batch,
    Cond,
    Loss,
    Player,
    TrainableDenoiser,
    guided,
    mean_each,
)
from .parts.discriminator import Discriminator
from .parts.grids import student_sigmas
from .parts.score_matching import GanConfig, MatchingConfig, StudentConfig

Kind = Literal["real", "fake"]
# The discriminator's loss beside the fake score's, which matters only where both train one adapter.
CRITIC_WEIGHT = 1e-2
# iCT's constant (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3), per element.
HUBER = 0.00054


@dataclass(frozen=True)
class DMD2Config(GanConfig, MatchingConfig, StudentConfig):
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
    regression_weight: float = setting(0.0, 0, 100, step=0.01,
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


class Call(NamedTuple):
    """A call of the student: what it is given, at which level (a number, and for every sample)."""

    x: Tensor
    level: float
    sigma: Tensor


class DMD2:
    """See the module; `Objective` in `contract`."""

    name = "DMD2"
    # Whether the GAN judges the student at the level and with the noise of the matching term.
    judges_matched = False
    # Whether nothing but the GAN makes a graph between a student's call and its backward pass.
    matches_without_graph = True

    def __init__(self, config: DMD2Config, denoiser: TrainableDenoiser):
        if config.shift != 1 and denoiser.path.kind != "FLOW":
            raise ValueError(f"shift is {config.shift}, and this model is not a flow: set it to 1")
        self.config, self.denoiser = config, denoiser
        self.sigmas = student_sigmas(denoiser, config.steps, config.timesteps)
        self.discriminator: Discriminator | None = None
        self.needs_latents = config.gan_weight > 0
        self.needs_uncond = config.cfg != 1

    @property
    def players(self) -> dict[str, Player]:
        """The student, and the fake score with the discriminator."""
        fake = Player("fake", rate=self.config.fake_rate, modules=self.discriminator)
        return {"student": Player("student"), "fake": fake}

    def prepare(self, samples: Iterable[Batch]) -> None:
        """The discriminator's heads are made to measure."""
        if not self.config.gan_weight:
            return
        batch = next(iter(samples))
        x = torch.zeros(len(batch), *batch.shape, device=self.denoiser.device)
        sigma = torch.full((len(batch),), float(self.sigmas[0]), device=self.denoiser.device)
        widths = self.denoiser.feature_widths(x, sigma, batch.cond)
        self.discriminator = Discriminator(widths, seed_of(batch.draws.seed, "discriminator")).to(self.denoiser.device)

    @property
    def keeps_call(self) -> bool:
        """Whether the student's call keeps its graph until it learns, which spares a second: never beside others."""
        return self.matches_without_graph and not self.config.gan_weight

    @property
    def scope(self) -> tuple[float, float]:
        """Places (0 .. 1) of the levels between which student and teacher are compared."""
        return self.config.low, self.config.high

    @property
    def pairs(self) -> int:
        """See the contract."""
        config = self.config
        return config.pairs if config.regression_steps or config.regression_weight else 0

    def make_pairs(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """See the contract."""
        return make_pairs(self.denoiser, noise, cond, uncond, self.config.pair_steps, self.config.cfg)

    # ---- losses ----------------------------------------------------------------------------------

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

    def _made(self, batch: Batch, call: Call, learns: bool) -> Tensor:
        """The student's sample (B, ...), with a graph where it is to learn by it and may keep it so long."""
        with nullcontext() if learns and self.keeps_call else torch.no_grad(), self.denoiser.adapter("student"):
            return self.denoiser.predict_x0(call.x, call.sigma, batch.cond)

    @torch.no_grad()
    def _simulate(self, batch: Batch) -> Call:
        """Backward simulation (section 4.5): the student's own way to the level that it is trained at in this step."""
        draws, levels = batch.draws, self.sigmas.tolist()
        last = int(draws.common("step of the grid") * self.config.steps)
        x = self.denoiser.path.unit_start(levels[0], draws.normal("start", batch.shape))
        with self.denoiser.adapter("student"):
            for i in range(last):
                x0 = self.denoiser.predict_x0(x, self._each(levels[i], len(batch)), batch.cond)
                x = self.denoiser.path.add_noise(x0, levels[i + 1], draws.normal(f"renoise {i + 1}", batch.shape))
        return Call(x, levels[last], self._each(levels[last], len(batch)))

    def _each(self, level: float, count: int) -> Tensor:
        return torch.full((count,), level, device=self.denoiser.device)

    def _levels(self, batch: Batch, name: str) -> Tensor:
        """A level over the whole range for every sample."""
        return self.denoiser.levels.drawn(batch.draws.uniform(name), shift=self.config.shift)

    # ---- the student -----------------------------------------------------------------------------

    def _gradient(self, batch: Batch, x: Tensor, level: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        """What moves x (B, ...), the student's sample made at `level`: matching, guidance and the GAN's pull."""
        config, draws = self.config, batch.draws
        uniform = draws.uniform("matching level")
        sigma = self.denoiser.levels.drawn(uniform, *self.scope, config.shift)
        noise = draws.normal("matching noise", batch.shape)
        with torch.no_grad():
            g = self._matching(batch, x, level, self.denoiser.path.add_noise(x, sigma, noise), sigma)
        metrics: dict[str, Tensor | float] = {"matching_norm": g.square().flatten(1).mean(1).sqrt().mean()}
        if not config.gan_weight:
            return g, metrics
        if not self.judges_matched:
            sigma, noise = self._levels(batch, "gan level"), draws.normal("gan noise", batch.shape)
        pull, logits = self._pull(batch, x, sigma, noise)
        g, more = self.weighted(g, logits, uniform)
        metrics["gan_loss"] = functional.softplus(-logits).mean()
        # The GAN's loss is a mean over samples, the matching one over their elements besides.
        return g + config.gan_weight * pull * x[0].numel(), metrics | more

    def _matching(self, batch: Batch, x: Tensor, level: float, x_t: Tensor, sigma: Tensor) -> Tensor:
        """g in x0 (DMD, section 3.2): fake - guided teacher, over the teacher's distance from x."""
        config, denoiser = self.config, self.denoiser
        matched = Asked(x_t, sigma, batch.cond)
        guiding: list[Asked] = []
        if config.decoupled:
            # No noisier than the student's own input: there its picture is still open, and guidance is to decide it.
            low, high = self.scope
            high = min(high, denoiser.levels.place(level, config.shift))
            low = min(low, high)
            sigma = denoiser.levels.drawn(batch.draws.uniform("guidance level"), low, high, config.shift)
            x_t = denoiser.path.add_noise(x, sigma, batch.draws.normal("guidance noise", batch.shape))
            guiding = [Asked(x_t, sigma, batch.cond), Asked(x_t, sigma, batch.uncond)]
        elif config.cfg != 1:
            guiding = [Asked(x_t, sigma, batch.uncond)]
        asked = [matched, matched, *guiding]
        fake, real, *guides = denoiser.predict_each(asked, ["fake", *[None] * (len(asked) - 1)])
        # Taken apart, so that matching is zero while the fake score is the teacher.
        matching = fake - real
        if not config.decoupled:
            guidance = (config.cfg - 1) * (real - guides[0]) if guides else torch.zeros_like(real)
            return self._normalised(matching - guidance, x, real + guidance)
        guidance = (config.cfg - 1) * (guides[0] - guides[1])
        return self._normalised(matching, x, real) - self._normalised(guidance, x, guides[0] + guidance)

    def _normalised(self, g: Tensor, x: Tensor, teacher: Tensor) -> Tensor:
        if self.config.normalise:
            g = g / broadcast(mean_each((x - teacher).abs()), g)
        # A sample on which the teacher agrees to the last bit, or overflows, has nothing to say.
        return torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)

    def _student(
        self, batch: Batch, call: Call, g: Tensor, metrics: dict[str, Tensor | float], x: Tensor | None = None
    ) -> Loss:
        """x: the call's result, which is computed again where it has no graph."""
        if x is None or not x.requires_grad:
            with self.denoiser.adapter("student"):
                x = self.denoiser.predict_x0(call.x, call.sigma, batch.cond)
        return Loss("student", matching_loss(x, g), metrics)

    def _regression(self, batch: Batch, weight: float) -> Loss:
        """DMD, section 3.3, on latents: the student's first call meets the teacher's x0 from the same noise."""
        noise, target = batch.columns["pair_noise"], batch.columns["pair_target"]
        level = float(self.sigmas[0])
        with self.denoiser.adapter("student"):
            x = self.denoiser.path.unit_start(level, noise)
            x0 = self.denoiser.predict_x0(x, self._each(level, len(batch)), batch.cond)
        loss = pseudo_huber(x0, target).mean()
        return Loss("student", weight * loss, {"regression_loss": loss.detach()})

    # ---- the GAN ---------------------------------------------------------------------------------

    def critic(self, batch: Batch, x_t: Tensor, sigma: Tensor) -> Tensor:
        """The discriminator's logits (B,) of x_t, with gradients to it; the judged network's adapter is on."""
        if self.discriminator is None:
            raise ValueError("the discriminator has no heads yet: call prepare with a batch of the run first")
        return self.discriminator(self.denoiser.features(x_t, sigma, batch.cond))

    def _judging(self) -> AbstractContextManager[None]:
        return self.denoiser.adapter("fake" if self.config.gan_on == "fake" else None)

    def _pull(self, batch: Batch, x: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(d softplus(-D) / dx (B, ...), logits (B,)): the generator's half of the GAN, by a product with x a leaf."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad(), self._judging():
            logits = self.critic(batch, self.denoiser.path.add_noise(leaf, sigma, noise), sigma)
            (pull,) = torch.autograd.grad(functional.softplus(-logits).sum(), leaf)
        return pull, logits.detach()

    def weighted(self, g: Tensor, logits: Tensor, uniform: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """g (B, ...) times a weight of each sample, from its logit and its place between low and high; here 1."""
        return g, {}

    def _critics(self, batch: Batch, x: Tensor) -> Iterator[Loss]:
        """The discriminator's loss on fakes x (B, ...) and on the batch's images, of one call where both fit in one."""
        both = self.denoiser.joined([self._shown(batch, x, "fake"), self._shown(batch, batch.latents, "real")])
        if both is None:
            yield self._critic(batch, x, "fake")
            yield self._critic(batch, batch.latents, "real")
            return
        with self._judging():
            logits = self.critic(dataclasses.replace(batch, cond=both.cond), both.x, both.sigma).split(len(x))
        one, other = self._judged(logits[0], "fake"), self._judged(logits[1], "real")
        yield Loss("fake", one.value + other.value, one.metrics | other.metrics)

    def _critic(self, batch: Batch, x0: Tensor | None, kind: Kind) -> Loss:
        """Half of the discriminator's loss: on the teacher's features its heads alone learn, on the fake's both do."""
        shown = self._shown(batch, x0, kind)
        with self._judging():
            return self._judged(self.critic(batch, shown.x, shown.sigma), kind)

    def _shown(self, batch: Batch, x0: Tensor | None, kind: Kind) -> Asked:
        """What the discriminator is shown of clean latents."""
        if x0 is None:
            raise ValueError(f"gan_weight is {self.config.gan_weight}, and the batch has no latents: give images, or 0")
        sigma = self._levels(batch, f"critic level, {kind}")
        noise = batch.draws.normal(f"critic noise, {kind}", batch.shape)
        return Asked(self.denoiser.path.add_noise(x0, sigma, noise), sigma, batch.cond)

    def _judged(self, logits: Tensor, kind: Kind) -> Loss:
        signed = logits if kind == "real" else -logits
        loss = functional.softplus(-signed).mean()
        right = (signed.detach() > 0).float().mean()
        return Loss("fake", CRITIC_WEIGHT * loss, {f"critic_loss_{kind}": loss.detach(), f"critic_right_{kind}": right})

    # ---- the fake score --------------------------------------------------------------------------

    def _fake(self, batch: Batch, x: Tensor) -> Loss:
        """Denoising score matching on the student's samples (DMD, section 3.2), in what the network itself puts out."""
        sigma = self._levels(batch, "fake level")
        x_t = self.denoiser.path.add_noise(x, sigma, batch.draws.normal("fake noise", batch.shape))
        with self.denoiser.adapter("fake"):
            error = self.denoiser.predict_x0(x_t, sigma, batch.cond) - x
        scale = self.denoiser.parametrisation.scale(sigma)
        loss = (error / broadcast(scale, error)).square().mean()
        return Loss("fake", loss, {"score_loss": loss.detach()})

    # ---- the rest of the contract ----------------------------------------------------------------

    def after_step(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing is kept."""

    def buffers(self) -> dict[str, Tensor]:
        """Nothing is kept."""
        return {}

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """See the contract; the noise between steps is the same every time."""
        sigmas = self.sigmas.to(noise.device)
        return sample_distilled(
            lambda x, sigma: self.denoiser.predict_x0(x, sigma, cond),
            self.denoiser.path.unit_start(sigmas[0], noise),
            sigmas,
            disable=True,
            path=self.denoiser.path,
            mode="renoise",
            noise_sampler=default_noise_sampler(noise, seed=0),
        )


def matching_loss(x: Tensor, g: Tensor) -> Tensor:
    """A number whose gradient to x is g / numel: half the mean square of x from where g would take it."""
    return 0.5 * functional.mse_loss(x, (x - g).detach())


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
