"""Two models on the same prompts and seeds, scored by a reward or asked about; pictures as pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..preferences import store as preferences
from ..preferences import tickets as preference_tickets
from ..preferences.tickets import Ticket
from ..rewards.comparison import Comparison, compare
from ..rewards.contract import Reward
from ..rewards.scoring import score
from ..sampling.parts import parts_of
from ..sampling.prior import require_steps
from .contract import CLIP, GUIDER, LATENT, SAMPLER, VAE, Host
from .rewards.sheet import pairs_sheet

BASE, TUNED = "base", "tuned"


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


def drawn(
    host: Host, models: tuple[Any, Any], clip: CLIP, vae: VAE, prompts: Sequence[str], negative: str,
    sampling: Sampling, seeds: Sequence[int],
) -> Iterator[tuple[str, Tensor, Tensor]]:  # fmt: skip
    """(prompt, pictures of base, of tuned) for each prompt, pictures as `sampled` gives them.

    `models` are base and tuned; each seed gives both the same noise. ValueError for no prompt or no step.
    """
    require_steps(sampling.sigmas, "compare")
    refuse_no_prompts(prompts)
    without = host.encode_text(clip, negative) if sampling.cfg != 1 else None
    for prompt in prompts:
        encoded, made = host.encode_text(clip, prompt), []
        for model in models:
            host.check_cancelled()
            guider = host.cfg_guider(model, encoded, without, sampling.cfg)
            made.append(sampled(host, guider, vae, sampling, seeds))
        base, tuned = made
        yield prompt, base, tuned


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
    """Sample base and tuned as `drawn` does, and score them. ValueError as there, and as `score` raises it."""
    progress = host.progress(len(prompts))
    made: tuple[list[Tensor], list[Tensor]] = ([], [])
    scores: tuple[list[float], list[float]] = ([], [])
    words: list[str] = []
    for done, (prompt, *both) in enumerate(drawn(host, models, clip, vae, prompts, negative, sampling, seeds)):
        words += [prompt] * len(seeds)
        for which, frames in enumerate(both):
            # A video's score is the mean of its frames'.
            with torch.no_grad():
                scores[which].extend(score(reward, frames, [prompt] * len(seeds)).tolist())
            made[which].append(frames[:, 0])
        progress.step(done + 1)
    base, tuned = scores
    pairs, comparison = list(zip(base, tuned, strict=True)), compare(tuned, base)
    progress.step(len(prompts), text=f"tuned {comparison}")
    return Compared(torch.cat(made[0]), torch.cat(made[1]), pairs, words, comparison)


def asked(
    host: Host, folder: Path, models: tuple[Any, Any], clip: CLIP, vae: VAE, prompts: Sequence[str], negative: str,
    sampling: Sampling, seeds: Sequence[int],
) -> tuple[str, list[Ticket], int]:  # fmt: skip
    """A blind test in a set's folder: (who is asked, tickets, pairs that were left out since both pictures are equal).

    Each pair is a ticket whose candidates stand in the order of their files' names, which are made of their content
    and tell nothing. Who is asked is a name made of all pictures, so that tests in one folder are counted apart.
    ValueError as `drawn` raises it.
    """
    progress, alike = host.progress(len(prompts)), 0
    found: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    for done, (prompt, *both) in enumerate(drawn(host, models, clip, vae, prompts, negative, sampling, seeds)):
        for pictures in zip(*both, strict=True):
            names = [preferences.keep_image(folder, frames[0].clamp(0, 1)) for frames in pictures]
            if names[0] == names[1]:
                alike += 1
                continue
            sides = (BASE, TUNED) if names[0] < names[1] else (TUNED, BASE)
            found.append((prompt, tuple(sorted(names)), sides))
        progress.step(done + 1)
    by = f"{preferences.BLIND}{hashlib.blake2b(repr(found).encode(), digest_size=4).hexdigest()}"
    made = [Ticket(prompt, candidates, by=by, models=sides) for prompt, candidates, sides in found]
    preference_tickets.ask(folder, made)
    return by, made, alike
