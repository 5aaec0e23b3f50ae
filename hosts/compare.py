"""Two models on the same prompts and seeds, scored by a reward; pictures as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rewards.comparison import Comparison, compare
from ..rewards.contract import Reward
from ..rewards.scoring import score
from ..sampling.parts import parts_of
from ..sampling.prior import require_steps
from .contract import CLIP, GUIDER, LATENT, SAMPLER, VAE, Host
from .rewards.sheet import pairs_sheet


@dataclass(frozen=True)
class Sampling:
    """How both models sample: a SAMPLER, SIGMAS, guidance, and a LATENT for the size."""

    sampler: SAMPLER
    sigmas: Tensor
    cfg: float
    latent: LATENT


@dataclass
class Compared:
    """images of each model (N, H, W, 3) and their scores, in the order of prompts, seeds within."""

    base: Tensor
    tuned: Tensor
    scores: list[tuple[float, float]]
    prompts: list[str]
    comparison: Comparison

    def sheet(self, most: int) -> Tensor:
        """IMAGE of the first `most` pairs with their scores."""
        return pairs_sheet(self.base[:most], self.tuned[:most], self.scores[:most])

    def text(self, name: str) -> str:
        """The comparison, the mean scores, and a line for each pair."""
        means = [sum(column) / len(self.scores) for column in zip(*self.scores, strict=True)]
        lines = [f"tuned against base by {name}: {self.comparison}", f"mean {means[0]:.5g} -> {means[1]:.5g}"]
        for i, ((a, b), prompt) in enumerate(zip(self.scores, self.prompts, strict=True)):
            lines.append(f"{i + 1}. {a:.5g} -> {b:.5g}  {prompt}")
        return "\n".join(lines)


def refuse_no_prompts(prompts: Sequence[str]) -> None:
    """ValueError where there are none."""
    if not prompts:
        raise ValueError("prompts is empty: write one in each line, best others than those that were trained on")


def sampled(host: Host, guider: GUIDER, vae: VAE, sampling: Sampling, seeds: Sequence[int]) -> Tensor:
    """Pictures (N, frames, H, W, 3) in [0, 1], one for each seed, each from the noise of its own seed."""
    parts = parts_of(host.latents_of(guider, sampling.latent))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.stack([torch.randn(part.shape[1:], generator=g) for g in generators]) for part in parts]
    empty = {"samples": host.nested([torch.zeros_like(part) for part in noise])}
    samples = host.sample(guider, sampling.sampler, sampling.sigmas, empty, seeds[0], host.nested(noise))
    images = host.decode(vae, samples)
    return images.view(len(seeds), -1, *images.shape[1:])


def run(
    host: Host,
    models: tuple[Any, Any],
    clip: CLIP,
    vae: VAE,
    reward: Reward,
    prompts: Sequence[str],
    negative: str,
    sampling: Sampling,
    seeds: Sequence[int],
) -> Compared:
    """Sample base and tuned (`models`, in this order) and score them; each seed gives both the same noise.

    ValueError for no prompt or no step, and as `score` raises it.
    """
    require_steps(sampling.sigmas, "compare")
    refuse_no_prompts(prompts)
    without = host.encode_text(clip, negative) if sampling.cfg != 1 else None
    progress = host.progress(len(prompts))
    made: tuple[list[Tensor], list[Tensor]] = ([], [])
    scores: tuple[list[float], list[float]] = ([], [])
    words: list[str] = []
    for done, prompt in enumerate(prompts):
        encoded = host.encode_text(clip, prompt)
        words += [prompt] * len(seeds)
        for which, model in enumerate(models):
            host.check_cancelled()
            guider = host.cfg_guider(model, encoded, without, sampling.cfg)
            # A video's score is the mean of its frames'.
            frames = sampled(host, guider, vae, sampling, seeds)
            with torch.no_grad():
                scores[which].extend(score(reward, frames, [prompt] * len(seeds)).tolist())
            made[which].append(frames[:, 0])
        progress.step(done + 1)
    base, tuned = scores
    pairs, comparison = list(zip(base, tuned, strict=True)), compare(tuned, base)
    progress.step(len(prompts), text=f"tuned {comparison}")
    return Compared(torch.cat(made[0]), torch.cat(made[1]), pairs, words, comparison)
