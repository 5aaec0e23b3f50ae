"""The embedded twins' training losses, sampling for their own build, and their first one-step students.

Flow: x_t = (1 - t) x0 + t n, the network predicts n - x0 at timestep 1000 t (rectified flow, arXiv 2209.03003).
eps: x_t = sqrt(abar) x0 + sqrt(1 - abar) n on Stable Diffusion's schedule, the network predicts n (arXiv 2006.11239).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import trange

from ..sampling.distilled import sample_distilled, start
from ..sampling.grids import simple
from ..sampling.path import FLOW, VE, NoisePath
from ..sampling.schedule import DiscreteSchedule, FlowSchedule, Schedule
from ..sampling.standard import sample_dpmpp_2m
from . import digits, judge, text
from .training import save_atomically

KINDS = ("flow", "eps")
BATCH = 64
SHIFT = 3.0  # stock loaders give every SD3 layout this timestep shift
GUIDANCE = 4.0  # what the twins are best sampled with
TEACHER_GUIDANCE = 3.0  # less, where a student copies it: its colours stay natural
# Timesteps that the students are trained at, by number of steps; in one step an eps student starts at 399, as DMD2's.
STUDENT_STEPS = {
    "flow": {1: (1000,), 2: (1000, 750), 4: (1000, 900, 750, 500)},
    "eps": {1: (399,), 2: (999, 499), 4: (999, 749, 499, 249)},
}
PAIRS = 4096
TEACHER_STEPS = 12
DROPPED = 0.1  # share of captions replaced by "", so that classifier-free guidance has an unconditional branch


class Prompts:
    """Random captions of stored attributes, encoded by the frozen text encoder."""

    def __init__(self, encoder: text.TextEncoder):
        self.encoder = encoder.requires_grad_(False)
        self.tokenizer = text.WordTokenizer()

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Captions to the network's `encoder_hidden_states` (B, 16, 128) and `pooled_projections` (B, 128)."""
        with torch.no_grad():
            tokens, pooled = self.encoder(self.tokenizer.batch(captions))
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def caption(self, rows: dict[str, torch.Tensor], chosen: torch.Tensor, generator: torch.Generator) -> list[str]:
        """One random caption for each chosen row; some are empty."""
        values = torch.stack([rows[name][chosen] for name in judge.HEADS], 1).tolist()
        dropped = torch.rand(len(values), generator=generator) < DROPPED
        return ["" if drop else digits.describe(*row, generator)[0] for row, drop in zip(values, dropped, strict=True)]


def loss(
    kind: str, model: nn.Module, rows: dict[str, torch.Tensor], encoder: text.TextEncoder, towards_x0: bool = False
) -> Callable:
    """The training loss of a twin as a function of a generator; towards_x0 weighs an eps error by its sigma.

    An error of eps is one of x0 over sigma, so plain eps loss hardly sees the levels at which a digit takes shape.
    """
    prompts, schedule = Prompts(encoder), DiscreteSchedule()

    def flow(x0: torch.Tensor, noise: torch.Tensor, generator: torch.Generator):
        t = torch.sigmoid(torch.randn(len(x0), generator=generator) * 1.1 + 0.3)
        level = t[:, None, None, None]
        return (1 - level) * x0 + level * noise, t * 1000, noise - x0

    def eps(x0: torch.Tensor, noise: torch.Tensor, generator: torch.Generator):
        # Colour and digit are decided at high noise, so those levels are drawn more often than a uniform draw would.
        t = (torch.rand(len(x0), generator=generator).sqrt() * 1000).long().clamp_max(999)
        abar = (1 / (schedule.sigmas[t].square() + 1))[:, None, None, None]
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t.float(), noise

    corrupt = {"flow": flow, "eps": eps}[kind]

    def value(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(rows["latent"]), (BATCH,), generator=generator)
        x0 = rows["latent"][chosen].float()
        noise = torch.randn(x0.shape, generator=generator)
        x, timestep, target = corrupt(x0, noise, generator)
        cond = prompts.encode(prompts.caption(rows, chosen, generator))
        out = model(hidden_states=x, timestep=timestep, **cond, return_dict=False)[0]
        error = (out - target).square().mean((1, 2, 3))
        return (error * schedule.sigma(timestep).clamp(0.3, 5)).mean() if towards_x0 else error.mean()

    return value


class Denoiser:
    """A twin as the sampling contract wants it: `denoiser(x, sigma) -> x0`, guided when `cfg` is not 1.

    `network` is a diffusers SD3 transformer; cond and uncond are what `Prompts.encode` gives.
    """

    def __init__(self, kind: str, network: nn.Module, cond: dict, uncond: dict | None = None, cfg: float = 1.0):
        self.kind, self.network, self.cfg = kind, network, cfg
        self.schedule: Schedule = FlowSchedule(SHIFT) if kind == "flow" else DiscreteSchedule()
        self.path: NoisePath = FLOW if kind == "flow" else VE
        self.cond = cond
        if cfg != 1.0:
            if uncond is None:
                raise ValueError(f"cfg is {cfg} but no unconditional prompt was given; pass uncond or set cfg to 1")
            self.cond = {k: torch.cat([v, uncond[k].expand_as(v)]) for k, v in cond.items()}

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x (B, 16, h, w) at sigma (B,) -> x0."""
        if self.cfg == 1.0:
            return self.predict(x, sigma)
        cond, uncond = self.predict(torch.cat([x, x]), torch.cat([sigma, sigma])).chunk(2)
        return uncond + (cond - uncond) * self.cfg

    def predict(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x0 without guidance."""
        level = sigma[:, None, None, None]
        entering = x if self.kind == "flow" else x / (level.square() + 1).sqrt()
        timestep = self.schedule.timestep(sigma).float()
        out = self.network(hidden_states=entering, timestep=timestep, **self.cond, return_dict=False)[0]
        return x - level * out

    def levels(self, timesteps: tuple[int, ...]) -> torch.Tensor:
        """Sigmas of network timesteps, and the closing zero."""
        t = torch.tensor(timesteps)
        sigmas = t / 1000 if self.kind == "flow" else self.schedule.sigma(t)
        return torch.cat([sigmas, torch.zeros(1)])


@torch.no_grad()
def teach(denoiser: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Model latents (B, 16, h, w) by DPM-Solver++(2M) over `steps` calls from unit noise, on the "simple" grid."""
    sigmas = simple(denoiser.schedule, steps)
    x = start(denoiser.path, sigmas[0], noise, None)
    return sample_dpmpp_2m(denoiser, x, sigmas, disable=True, path=denoiser.path)


@torch.no_grad()
def study(denoiser: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Model latents (B, 16, h, w) of a student in 1, 2 or 4 calls from unit noise."""
    sigmas = denoiser.levels(STUDENT_STEPS[denoiser.kind][steps])
    x = start(denoiser.path, sigmas[0], noise, None)
    return sample_distilled(denoiser, x, sigmas, {}, disable=True, path=denoiser.path)


def pairs(kind: str, network: nn.Module, encoder: text.TextEncoder, work: Path) -> dict[str, torch.Tensor]:
    """Teacher pairs: noise, guided teacher latent and caption attributes, PAIRS of them."""
    path = work / f"pairs_{kind}.safetensors"
    if not path.exists():
        prompts, generator = Prompts(encoder), torch.Generator().manual_seed(7)
        kept: dict[str, list[torch.Tensor]] = {"noise": [], "latent": [], "tokens": [], "pooled": []}
        uncond = prompts.encode([""])
        for _ in trange(PAIRS // BATCH, desc=f"pairs {kind}"):
            values = torch.stack([torch.randint(k, (BATCH,), generator=generator) for k in judge.HEADS.values()], 1)
            cond = prompts.encode([digits.describe(*row, generator)[0] for row in values.tolist()])
            noise = torch.randn(BATCH, 16, 8, 8, generator=generator)
            latent = teach(Denoiser(kind, network, cond, uncond, TEACHER_GUIDANCE), noise, TEACHER_STEPS)
            for name, value in zip(kept, (noise, latent, *cond.values()), strict=True):
                kept[name].append(value.half())
        save_atomically({k: torch.cat(v) for k, v in kept.items()}, path)
    return load_file(path)


def student_loss(kind: str, network: nn.Module, rows: dict[str, torch.Tensor]) -> Callable:
    """Regression of the student's x0 on the teacher's: from the pair's own noise at a first step, else re-noised."""
    entry = sorted({steps[0] for steps in STUDENT_STEPS[kind].values()})
    later = sorted({t for steps in STUDENT_STEPS[kind].values() for t in steps[1:]})

    def value(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(rows["noise"]), (BATCH // 2,), generator=generator)
        noise, target, tokens, pooled = (rows[k][chosen].float() for k in ("noise", "latent", "tokens", "pooled"))
        cond = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
        denoiser = Denoiser(kind, network, cond)
        # Half the batches learn the one-step map, the other half the later steps of the two- and four-step grids.
        first = bool(torch.rand((), generator=generator) < 0.65)
        times = torch.tensor(entry if first else later)
        picked = times[torch.randint(len(times), (len(chosen),), generator=generator)]
        sigma = denoiser.levels(tuple(picked.tolist()))[:-1]
        fresh = torch.randn(target.shape, generator=generator)
        path = denoiser.path
        x = path.unit_start(sigma, noise) if first else path.add_noise(target, sigma, fresh)
        return ((denoiser.predict(x, sigma) - target).square() + 1e-3).sqrt().mean()

    return value
