"""The embedded twins' training losses, and sampling with them and their students outside any host.

Flow: x_t = (1 - t) x0 + t n, the network predicts n - x0 at timestep 1000 t (rectified flow, arXiv 2209.03003).
eps: x_t = sqrt(abar) x0 + sqrt(1 - abar) n on Stable Diffusion's schedule, the network predicts n (arXiv 2006.11239).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..sampling.distilled import Mode, Rule, sample_distilled, start
from ..sampling.grids import simple
from ..sampling.path import FLOW, VE, NoisePath
from ..sampling.schedule import DiscreteSchedule, FlowSchedule, Schedule
from ..sampling.standard import sample_dpmpp_2m
from . import digits, judge, text

KINDS = ("flow", "eps")
BATCH = 64
SHIFT = 3.0  # stock loaders give every SD3 layout this timestep shift
GUIDANCE = 4.0  # what the twins are best sampled with
# Timesteps that the students are trained at, by number of steps; in one step an eps student starts at 399, as DMD2's.
STUDENT_STEPS = {
    "flow": {1: (1000,), 4: (1000, 900, 750, 500)},
    "eps": {1: (399,), 4: (999, 749, 499, 249)},
}
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
        return ["" if drop else digits.described(row, generator)[0] for row, drop in zip(values, dropped, strict=True)]


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
def study(denoiser: Denoiser, noise: torch.Tensor, steps: int, mode: Mode = "renoise") -> torch.Tensor:
    """Model latents (B, 16, h, w) of a student in 1 or 4 calls from unit noise."""
    sigmas = denoiser.levels(STUDENT_STEPS[denoiser.kind][steps])
    x = start(denoiser.path, sigmas[0], noise, None)
    return sample_distilled(denoiser, x, sigmas, {}, disable=True, path=denoiser.path, rule=Rule(mode))
