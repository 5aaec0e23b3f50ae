"""Restoration in one call, learnt by score distillation: a degraded latent goes in as it stands, a clean one comes out.

InstaRevive (Zhu et al. 2025, arXiv 2504.15513): the student is called once at t = 400 on the clean latent of the
degraded picture, with its caption; a frozen teacher and a learnt fake score pull its output towards the
distribution of good pictures, a regression towards the very picture. The pull is DMD2's, as `adversarial` has it.

The authors published no trainer. Dynamic control here is our reading of the paper, not its formula: D is the running
mean squared distance of the output from the clean latent over that of the input, clipped to 0 .. 1; student and teacher
are compared at places low .. narrow + (high - narrow) D, and the regression weighs floor + (1 - floor) D of its whole.
So a student that is still far away is corrected over all noise levels and held to the picture, and one that is near is
corrected in detail, where noise keeps that detail and the two scores tell good from bad. Also ours: the regression
is squared error of latents; a feature loss on decoded pictures (LPIPS-like) stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...restoration.spoil import Spoiling
from ...sampling.distilled import Rule
from ...sampling.settings import changed, setting
from .parts.adversarial import Adversarial, AdversarialConfig, GanConfig, GanOn
from .parts.contract import DEGRADED, Batch, Cond, Draws, Loss, Player, Tools, TrainableDenoiser, mean_each
from .parts.grids import student_sigmas
from .parts.registry import Method, register
from .parts.score_matching import Call, MatchingConfig

Features = Literal["vgg16", "judge"]


@dataclass(frozen=True)
class InstaReviveConfig(AdversarialConfig, Spoiling):
    """Settings of a one-step restorer, and of how pictures are damaged for it.

    timestep: the network's own at which it is called (a flow's is 1000 sigma). matching_weight: of the distribution's
    pull (0 = regression alone, and no fake score). dynamic: whether scope and regression follow the distance D; narrow:
    where the scope ends at D = 0; floor: share of the regression that stays there; memory: how much of D a step keeps.
    """

    shown = (
        "degradation", "weakest", "strongest", "least", "most", "timestep", "cfg", "matching_weight",
        "regression_weight", "feature_weight", "features", "regression_steps", "dynamic", "ratio", "fake_rate",
        "gan_weight", "gan_on", "narrow", "floor", "memory", "low", "high", "shift", "normalise",
    )  # fmt: skip

    timestep: int = setting(400, 1, 1000,
        help="The network's timestep at which it is called, and will be when it restores.",
        page="What the network is told in its only call, in training and in *Restore*: 400 is InstaRevive's.",
        remedy="400 is the paper's")
    cfg: float = changed(MatchingConfig, "cfg", help="Guidance of the teacher; 1 needs no `negative`.",
        page="Guidance of the teacher; what you sample it with, or less. 1 needs no `negative`.")
    matching_weight: float = setting(1.0, 0, 100, advanced=True, step=0.05,
        help="Pull towards what good pictures look like; 0 is regression alone, smooth and three times as fast.",
        remedy="0 is regression alone")
    regression_weight: float = setting(1.0, 0, 1e4, advanced=True, step=0.1,
        help="Pull towards the very picture: more is truer to it, less is sharper.",
        remedy="0 is the distribution alone")
    feature_weight: float = setting(0.0, 0, 1e4, advanced=True, step=0.1,
        help="Pull towards what a frozen network sees in the picture, after decoding; 0 for none.",
        remedy="0 is no feature loss")
    features: Features = setting("vgg16", advanced=True,
        help="That network: models/rewards/vgg16.safetensors, or the one of the embedded digits.",
        page="That network: `vgg16` reads `models/rewards/vgg16.safetensors`; `judge` is the embedded digits'.")
    regression_steps: int = setting(0, 0, 10_000_000, help="First so many steps are regression alone.",
        page="First so many steps are regression alone. A third of all is a good beginning where there is no one-step "
        "student.", remedy="0 is no warm-up")
    dynamic: bool = setting(True, advanced=True,
        help="Compare over fewer noise levels, and regress less, the nearer the output is to the picture.")
    narrow: float = setting(0.3, 0.01, 1, step=0.05, advanced=True,
        help="dynamic: the highest level that is compared once the output is as good as the picture.")
    floor: float = setting(0.25, 0, 1, step=0.05, advanced=True,
        help="dynamic: share of the regression that is left then.", remedy="1 keeps the regression as it is")
    memory: float = setting(0.98, 0, 0.99999, step=0.005, round=1e-5, advanced=True,
        help="dynamic: how much of the running distance a step keeps.", remedy="0.98 looks back fifty steps")
    ratio: int = changed(MatchingConfig, "ratio", default=1, remedy="1 is the paper's")
    normalise: bool = changed(MatchingConfig, "normalise",
        help="Divide each sample's pull by the teacher's distance from it.")
    gan_weight: float = changed(GanConfig, "gan_weight", advanced=True,
        help="Weight of a discriminator beside the matching; 0 for none.", remedy="0 is no GAN")
    gan_on: GanOn = changed(GanConfig, "gan_on", advanced=True, help="Whose features the discriminator sees.")

    def check(self) -> None:
        """See the base."""
        super().check()
        if not self.low < self.narrow <= self.high:
            raise ValueError(
                "low, narrow and high must rise within 0 to 1 (narrow may be high), got "
                f"{self.low!r}, {self.narrow!r}, {self.high!r}: 0.02, 0.3, 0.98"
            )
        if not (self.matching_weight or self.regression_weight or self.feature_weight):
            raise ValueError("matching_weight, regression_weight and feature_weight are all 0: nothing would be learnt")
        if self.gan_weight and not self.matching_weight:
            raise ValueError(
                f"gan_weight is {self.gan_weight} and matching_weight 0: the discriminator belongs to the matching; "
                "set one of them otherwise"
            )


class InstaRevive(Adversarial):
    """See the module; `Objective` in `contract`, whose batches have a column "degraded"."""

    name = "InstaRevive"
    needs = frozenset({"pictures"})
    needs_latents = True
    student_rule, student_start = Rule("single"), "latent"
    config: InstaReviveConfig

    def __init__(self, config: InstaReviveConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, student_sigmas(denoiser, 1, str(config.timestep)), tools)
        # Running means of the input's and the output's squared distance, and of how much of them was seen.
        self.state = torch.zeros(3, device="cpu")

    @classmethod
    def asks_uncond(cls, config: Any) -> bool:
        """See the contract."""
        return config.cfg != 1 and config.matching_weight > 0

    @classmethod
    def feature_network(cls, config: InstaReviveConfig) -> str | None:
        """See the contract."""
        return config.features if config.feature_weight else None

    @classmethod
    def graphs_wait(cls, config: InstaReviveConfig) -> bool:
        """See the base; the feature loss has a graph of its own."""
        return super().graphs_wait(config) or config.feature_weight > 0

    @property
    def players(self) -> dict[str, Player]:
        """The student, and the fake score where there is matching."""
        everyone = super().players
        return everyone if self.config.matching_weight else {"student": everyone["student"]}

    def prepare(self, samples: Iterable[Batch]) -> None:
        """See the base. ValueError where a feature loss is wanted and nothing computes it."""
        if self.config.feature_weight and self.features is None:
            raise ValueError(
                f"feature_weight is {self.config.feature_weight}, and there is no network to look with: connect "
                "a VAE and choose features, or set it to 0"
            )
        super().prepare(samples)

    def spoil(self, images: Tensor, draws: Draws) -> Tensor:
        """Pictures (B, H, W, 3) in [0, 1], degraded anew in every step, at the size they had."""
        return self.config(images, draws.seeds("degradation"))

    # ---- dynamic control -------------------------------------------------------------------------

    @property
    def distance(self) -> float:
        """D, the output's distance over the input's, 1 before the first step and where control is off."""
        before, after, seen = self.state.tolist()
        if not (self.config.dynamic and seen and before):
            return 1.0
        return min(1.0, after / before)

    @property
    def scope(self) -> tuple[float, float]:
        """See the base; its upper end follows D."""
        config = self.config
        return config.low, config.narrow + (config.high - config.narrow) * self.distance

    @property
    def regression(self) -> float:
        """The regression's and the feature loss's share of their weights."""
        return self.config.floor + (1 - self.config.floor) * self.distance if self.config.dynamic else 1.0

    # ---- losses ----------------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """Student (every `ratio`-th step), then fake score, then discriminator, all on the same restored latents."""
        config = self.config
        matching = config.matching_weight > 0 and step >= config.regression_steps
        call = self._simulate(batch)
        learns = not matching or (step - config.regression_steps) % config.ratio == 0
        made = self._made(batch, call, learns)
        x = made.detach()
        if learns:
            g, metrics = self._towards(batch, x)
            if matching:
                pull, more = self._gradient(batch, x, call.level)
                g, metrics = g + config.matching_weight * pull, metrics | more
            yield self._student(batch, call, g, metrics, made)
        del made
        if matching:
            yield self._fake(batch, x)
            if config.gan_weight:
                yield from self._critics(batch, x)

    def _simulate(self, batch: Batch) -> Call:
        """The student's only call: the degraded latent as the network's own input, without noise."""
        level = float(self.sigmas[0])
        x = self.denoiser.path.unit_input(level, batch.columns[DEGRADED])
        return Call(x, level, self._each(level, len(batch)))

    def _towards(self, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """What moves x (B, ...) towards its clean latents, and how far they are apart."""
        config, clean = self.config, batch.images
        away = x - clean
        metrics: dict[str, Tensor | float] = {
            "distance": mean_each(away.square()).mean(),
            "input_distance": mean_each((batch.columns[DEGRADED] - clean).square()).mean(),
            "scope": self.scope[1],
            "regression_share": self.regression,
        }
        g = config.regression_weight * self.regression * away
        if self.features is not None and config.feature_weight:
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                each = self.features(leaf, clean)
                (pull,) = torch.autograd.grad(each.sum(), leaf)
            # The feature loss is a mean over samples, g one over their elements besides.
            g = g + config.feature_weight * self.regression * pull * x[0].numel()
            metrics["feature_distance"] = each.detach().mean()
        return g, metrics

    # ---- the rest of the contract ----------------------------------------------------------------

    def after_step(self, metrics: Mapping[str, float], step: int) -> None:
        """The running means take in the whole batch's distances."""
        if "distance" in metrics:
            seen = torch.tensor([metrics["input_distance"], metrics["distance"], 1.0])
            # Not divided by how much was seen: the quotient of the two means is free of it.
            self.state.lerp_(seen, 1 - self.config.memory)

    def buffers(self) -> dict[str, Tensor]:
        """The running means."""
        return {"distances": self.state}

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """x0 of degraded latents in one call."""
        level = float(self.sigmas[0])
        x = self.denoiser.path.unit_input(level, noise)
        return self.denoiser.predict_x0(x, self._each(level, len(noise)), cond)


register(Method("instarevive", InstaReviveConfig, InstaRevive, "restoration"))
