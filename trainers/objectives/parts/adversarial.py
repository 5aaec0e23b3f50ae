"""The gradient of distribution matching, and a discriminator beside it on the features of teacher or fake score.

DMD2 (Yin et al. 2024, arXiv 2405.14867), section 4.3. The heads' features are the network's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ....sampling.accounts import seed_of
from ....sampling.settings import Settings, setting
from .contract import Asked, Batch, Loss, Player, Tools, TrainableDenoiser
from .discriminator import Discriminator
from .score_matching import MatchingConfig, ScoreMatching

GanOn = Literal["teacher", "fake"]
Kind = Literal["real", "fake"]
# The discriminator's loss beside the fake score's, which matters only where both train one adapter.
CRITIC_WEIGHT = 1e-2


@dataclass(frozen=True)
class GanConfig(Settings):
    """A discriminator beside the matching. gan_on: whose features it sees."""

    gan_weight: float = setting(0.0, 0, 100, step=0.001, round=1e-5,
        help="Weight of the discriminator, which needs images; 0 for none. Published runs: 0.001 to 0.03.",
        remedy="0 is no GAN, 0.005 is SDXL's")
    gan_on: GanOn = setting("teacher", advanced=True,
        help="Whose features the discriminator sees: the frozen teacher's, or the fake score's, which it then trains.")


@dataclass(frozen=True)
class AdversarialConfig(GanConfig, MatchingConfig):
    """What `Adversarial` asks of a method's settings."""


class Adversarial(ScoreMatching):
    """Score matching whose student may learn from a discriminator besides; of images, where gan_weight is above 0."""

    # Whether the GAN judges the student at the level and with the noise of the matching term.
    judges_matched = False
    without_images = "set gan_weight to 0"
    config: AdversarialConfig

    def __init__(
        self, config: AdversarialConfig, denoiser: TrainableDenoiser, sigmas: Tensor, tools: Tools | None = None
    ):
        super().__init__(config, denoiser, sigmas, tools)
        self.discriminator: Discriminator | None = None

    @classmethod
    def asks_latents(cls, config: AdversarialConfig) -> bool:
        """See the contract."""
        return cls.needs_latents or config.gan_weight > 0

    @classmethod
    def looks_inside(cls, config: Any) -> bool:
        """See the contract."""
        return config.gan_weight > 0

    @classmethod
    def graphs_wait(cls, config: Any) -> bool:
        """See the contract: the student's, while the discriminator pulls at its sample."""
        return config.gan_weight > 0

    @property
    def players(self) -> dict[str, Player]:
        """The student, and the fake score with the discriminator."""
        fake = Player("fake", rate=self.config.fake_rate, modules=self.discriminator)
        return {"student": Player("student"), "fake": fake}

    def prepare(self, samples: Iterable[Batch]) -> None:
        """The discriminator's heads are made to measure."""
        super().prepare(samples)
        if not self.config.gan_weight:
            return
        batch = next(iter(samples))
        x = torch.zeros(len(batch), *batch.shape, device=self.denoiser.device)
        sigma = torch.full((len(batch),), float(self.sigmas[0]), device=self.denoiser.device)
        widths = self.denoiser.feature_widths(x, sigma, batch.cond)
        self.discriminator = Discriminator(widths, seed_of(batch.draws.seed, "discriminator")).to(self.denoiser.device)

    def _gradient(self, batch: Batch, x: Tensor, level: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        """What moves x (B, ...), the student's sample made at `level`: matching, guidance and the GAN's pull."""
        config, draws = self.config, batch.draws
        uniform = draws.uniform("matching level")
        sigma = self.denoiser.levels.drawn(uniform, *self.scope, config.shift)
        noise = draws.normal("matching noise", batch.shape)
        judged = pull = logits = None
        if config.gan_weight and self.judges_matched:
            pull, logits, judged = self._pull(batch, x, sigma, noise, whole=True)
        with torch.no_grad():
            g = self._distribution(batch, x, level, self.denoiser.path.add_noise(x, sigma, noise), sigma, judged)
        metrics: dict[str, Tensor | float] = {"matching_norm": g.square().flatten(1).mean(1).sqrt().mean()}
        if not config.gan_weight:
            return g, metrics
        if pull is None or logits is None:
            sigma, noise = self._levels(batch, "gan level"), draws.normal("gan noise", batch.shape)
            pull, logits, _ = self._pull(batch, x, sigma, noise)
        g, more = self.weighted(g, logits, uniform)
        metrics["gan_loss"] = functional.softplus(-logits).mean()
        # The GAN's loss is a mean over samples, the matching one over their elements besides.
        pull = batch.parts.map(lambda gain, part: config.gan_weight * (gain * part) * part[0].numel(), pull)
        return g + pull, metrics | more

    def _distribution(
        self, batch: Batch, x: Tensor, level: float, x_t: Tensor, sigma: Tensor, judged: Tensor | None = None
    ) -> Tensor:
        """Fake score less guided teacher at x_t (B, ...), the student's sample x noised to sigma (B,).

        judged: x0 (B, ...) of x_t by the network that the discriminator looks at, where it has been computed.
        """
        config = self.config
        matched = Asked(x_t, sigma, batch.cond)
        guiding = [Asked(x_t, sigma, batch.uncond)] if config.cfg != 1 else []
        asked = [matched, matched, *guiding]
        fake, real, *guides = self._scores(asked, judged)
        # Taken apart, so that matching is zero while the fake score is the teacher.
        guidance = (config.cfg - 1) * (real - guides[0]) if guides else torch.zeros_like(real)
        return self._normalised(fake - real - guidance, x, real + guidance, batch.parts)

    def _scores(self, asked: list[Asked], judged: Tensor | None) -> list[Tensor]:
        """x0 of each call: the fake score's first, then the teacher's; judged: see `_distribution`."""
        names = ["fake", *[None] * (len(asked) - 1)]
        if judged is None:
            return self.denoiser.predict_each(asked, names)
        known = 0 if self.config.gan_on == "fake" else 1
        found = self.denoiser.predict_each(asked[:known] + asked[known + 1 :], names[:known] + names[known + 1 :])
        return [*found[:known], judged, *found[known:]]

    # ---- the discriminator -----------------------------------------------------------------------

    def critic(self, batch: Batch, x_t: Tensor, sigma: Tensor) -> Tensor:
        """The discriminator's logits (B,) of x_t, with gradients to it; the judged network's adapter is on."""
        return self._heads(self.denoiser.features(x_t, sigma, batch.cond))

    def critic_and_x0(self, batch: Batch, x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the judged network's x0 (B, ...) of the same pass, which has no gradient."""
        features, x0 = self.denoiser.features_and_x0(x_t, sigma, batch.cond)
        return self._heads(features), x0

    def _heads(self, features: list[Tensor]) -> Tensor:
        if self.discriminator is None:
            raise ValueError("the discriminator has no heads yet: call prepare with a batch of the run first")
        return self.discriminator(features)

    def _judging(self) -> AbstractContextManager[None]:
        return self.denoiser.adapter("fake" if self.config.gan_on == "fake" else None)

    def _pull(
        self, batch: Batch, x: Tensor, sigma: Tensor, noise: Tensor, whole: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(d softplus(-D) / dx (B, ...), logits (B,), x0 (B, ...) of the judged network where `whole`).

        The generator's half of the GAN, by a product with x a leaf.
        """
        leaf = x.detach().requires_grad_()
        with torch.enable_grad(), self._judging():
            x_t = self.denoiser.path.add_noise(leaf, sigma, noise)
            if whole:
                logits, x0 = self.critic_and_x0(batch, x_t, sigma)
            else:
                logits, x0 = self.critic(batch, x_t, sigma), None
            (pull,) = torch.autograd.grad(functional.softplus(-logits).sum(), leaf)
        return pull, logits.detach(), x0

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
