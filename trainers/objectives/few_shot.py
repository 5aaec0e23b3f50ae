"""Moves a model into the style of a few images: how things look is learnt late, what is where is kept from the source.

Hu et al. 2023, "Phasic Content Fusing Diffusion Model with Directional Distribution Consistency for Few-Shot Model
Adaption" (ICCV 2023, arXiv 2309.03729). The paper's: the phases (t below or above T_s = 300; even and odd steps), m(t),
a(t) = 20^(t / 1000) and the weights made of it (the authors' code), the consistency
L_DDC = MSE(E(x0^{A->B}), E(x_A) + w), w = mean E(target) - mean E(source), predicted in one shot.

Proposals here, since a run has a few target images and no source set:
* source images are the frozen model's own samples for the target's prompts, `source_steps` Euler steps from noise;
* x_A is the frozen model's one-shot x0 of the same x_t, so that both sides are equally blurred;
* E, unless the engine sets `embed`, is the frozen network's middle features of a clean latent, averaged over places
  (the paper: CLIP of the decoded image);
* m(t) multiplies L_DDC. The paper mixes features by it in a new module inside the network, which a LoRA for any MODEL
  cannot add; its VGG style loss needs pixels and is left out; L_diff is squared in the network's own output, not L1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sampling.grids import simple
from ...sampling.path import broadcast
from ...sampling.settings import Settings, setting
from .parts.contract import Batch, Cond, Loss, Objective, Tools, TrainableDenoiser, mean_each, sample_guided
from .parts.registry import Method, register

# (latents (B, ...), batch) -> (B, F), with gradients to the latents; decoding happens inside.
Embed = Callable[[Tensor, Batch], Tensor]

# In thousandths of the schedule. Above 900 the weight of L_diff would be negative, hence the authors' cap at 800.
TOP, LAST = 800.0, 900.0
BASE = 20.0
# The authors' divisor of L_diff in the phase of style.
QUIET = 5.0
# A clean latent is shown to the network with the little noise level of this place.
CLEAN = 20.0


@dataclass(frozen=True)
class FewShotConfig(Settings):
    """Settings of the adaptation. phase: T_s. consistency: weight of L_DDC. cfg: of source samples and previews; none
    where there is no empty prompt. steps: of the previews.
    """

    shown = ("consistency", "cfg", "source_steps", "phase")

    phase: float = setting(300.0, 50, 750, step=10.0, advanced=True,
        help="Where content ends and style begins, in thousandths of the schedule.", remedy="300 is the paper's")
    consistency: float = setting(1.0, 0, 1e4, step=0.1,
        help="How strongly the model's own variety is kept; 0 is plain fine-tuning in phases.",
        remedy="1 is the paper's")
    source_steps: int = setting(4, 1, 100,
        help="Steps for each of those samples; 4 gives rough ones, 20 good ones.",
        remedy="4 gives rough, 20 good source samples")
    cfg: float = setting(4.0, 1, 100, step=0.1,
        help="Guidance of the model's own samples that the images are compared with, and of previews.",
        remedy="1 is no guidance")
    steps: int = setting(20, 1, 1000, remedy="20 is enough for a preview")


def content_share(t: Tensor, phase: float) -> Tensor:
    """m(t) = 1 / (1 + exp(T_s - t)), t in thousandths: practically a step at T_s."""
    return torch.sigmoid(t - phase)


def content_weight(t: Tensor) -> Tensor:
    """a(t) = 20^(t / 1000)."""
    return BASE ** (t / 1000)


def diffusion_weight(t: Tensor) -> Tensor:
    """20^0.9 - a(t), what L_diff is left with at t up to 900."""
    return BASE ** (LAST / 1000) - content_weight(t)


def directional_consistency(adapted: Tensor, source: Tensor, direction: Tensor) -> Tensor:
    """L_DDC (B,): mean squared distance of E(x0^{A->B}) from E(x_A) + w, embeddings (B, F), direction (F,)."""
    return mean_each((adapted - source - direction).square())


class FewShot(Objective):
    """Phasic few-shot adaptation of one adapter; see the module.

    embed: E; None takes the network's own features. direction: w (F,), made by `prepare`.
    """

    name = "few_shot"
    of_samples = True
    needs_latents = True
    config: FewShotConfig

    def __init__(self, config: FewShotConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        self.embed: Embed | None = None
        self.direction: Tensor | None = None

    @classmethod
    def graphs_wait(cls, config: FewShotConfig) -> bool:
        """See the contract: the student's, while the consistency is computed."""
        return config.consistency > 0

    @torch.no_grad()
    def prepare(self, samples: Iterable[Batch]) -> None:
        """Make w from the target images and as many source samples, by the frozen model alone."""
        if self.config.consistency:
            each = [self._embed(b.images, b) - self._embed(self._source(b), b) for b in samples]
            self.direction = torch.cat(each).mean(0)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.denoiser.levels.trained(t)

    def _embed(self, latents: Tensor, batch: Batch) -> Tensor:
        if self.embed is not None:
            return self.embed(latents, batch)
        denoiser = self.denoiser
        sigma = self._sigma(torch.full((len(batch),), CLEAN, device=latents.device))
        with denoiser.adapter(None):
            clean = denoiser.path.add_noise(latents, sigma, torch.zeros_like(latents))
            features = denoiser.features(clean, sigma, batch.cond)
        # (B, N, C) of a transformer, (B, C, ...) of a UNet.
        return torch.cat([f.mean(1) if f.ndim == 3 else f.flatten(2).mean(2) for f in features], 1)

    @torch.no_grad()
    def _source(self, batch: Batch) -> Tensor:
        """Samples (B, ...) of the frozen model for the batch's prompts."""
        with self.denoiser.adapter(None):
            noise = batch.draws.normal("source", batch.shape)
            return self._sampled(noise, batch.cond, batch.uncond, self.config.source_steps)

    def _sampled(self, noise: Tensor, cond: Cond, uncond: Cond, steps: int) -> Tensor:
        sigmas = simple(self.denoiser.schedule, steps).to(noise.device)
        return sample_guided(self.denoiser, sigmas, noise, cond, uncond, self.config.cfg)

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """Even steps: consistency, then L_diff, at one high t; odd steps: L_diff at low t."""
        config = self.config
        high = step % 2 == 0
        low, top = (config.phase, TOP) if high else (0.0, config.phase)
        # Never 0: there is nothing to learn at level 0 of a flow.
        t = top - (top - low) * batch.draws.uniform("level")
        t = (t - 1).clamp(min=low) if self.denoiser.levels.tabulated else t
        sigma = self._sigma(t)
        if high and config.consistency:
            yield self._consistency(batch, t, sigma)
        yield self._diffusion(batch, diffusion_weight(t) / (1.0 if high else QUIET), sigma)

    def _consistency(self, batch: Batch, t: Tensor, sigma: Tensor) -> Loss:
        if self.direction is None:
            raise ValueError("few_shot: `prepare` makes the direction from the target images before the first step")
        denoiser, path, cond = self.denoiser, self.denoiser.path, batch.cond
        x = path.add_noise(self._source(batch), sigma, batch.draws.normal("source noise", batch.shape))
        with torch.no_grad(), denoiser.adapter(None):
            source = self._embed(denoiser.predict_x0(x, sigma, cond), batch)
        with nullcontext() if denoiser.may_wait() else torch.no_grad(), denoiser.adapter("student"):
            x0 = denoiser.predict_x0(x, sigma, cond)
        leaf = x0.detach().requires_grad_()
        # E's graph gives a gradient, and the student's carries it on: where that may not wait, it is made afterwards.
        # The frozen adapter stays on until backward is done, since checkpointing runs the forward again there.
        with torch.enable_grad(), denoiser.adapter(None):
            each = directional_consistency(self._embed(leaf, batch), source, self.direction)
            weight = content_weight(t) * content_share(t, self.config.phase) * self.config.consistency
            pull = torch.autograd.grad((weight * each).sum(), leaf)[0]
        if not x0.requires_grad:
            with denoiser.adapter("student"):
                x0 = denoiser.predict_x0(x, sigma, cond)
        # Worth the loss itself, with the loss's gradient.
        worth = weight * each.detach() + (pull * (x0 - x0.detach())).flatten(1).sum(1)
        return Loss("student", worth.mean(), {"consistency": each.detach().mean()}, worth)

    def _diffusion(self, batch: Batch, weight: Tensor, sigma: Tensor) -> Loss:
        denoiser, latents = self.denoiser, batch.images
        x = denoiser.path.add_noise(latents, sigma, batch.draws.normal("noise", batch.shape))
        with denoiser.adapter("student"):
            error = denoiser.predict_x0(x, sigma, batch.cond) - latents
        scale = denoiser.parametrisation.scale(sigma).clamp(min=1e-2)
        each = mean_each((error / broadcast(scale, error)).square())
        worth = weight * each
        return Loss("student", worth.mean(), {"diffusion": each.detach().mean()}, worth, (each,), sigma)

    def buffers(self) -> dict[str, Tensor]:
        """The direction, which a resumed run may have prepared from another batch."""
        return {} if self.direction is None else {"direction": self.direction}

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """Euler with guidance on the schedule's simple grid; without an empty prompt, without guidance."""
        return self._sampled(noise, cond, uncond, self.config.steps)


register(Method("few_shot", FewShotConfig, FewShot, "images"))
