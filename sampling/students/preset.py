"""`Preset`: everything that sampling needs to know of one few-step student.

A flow's even levels 1, (n - 1)/n .. 1/n are shifted by s x / (1 + (s - 1) x) (Esser et al. 2024, arXiv 2403.03206, eq.
23) or by mu, which is the same with s = e^mu. mu may depend on the number of tokens, one for 16 x 16 pixels: along a
line, as for Flux.1, or by the empirical rule of FLUX.2 (github.com/black-forest-labs/flux2, compute_empirical_mu).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..distilled import MODES, STARTS, Mode, Rule, Start
from ..path import KINDS

Family = Literal["eps", "v", "edm", "flow", "any"]
FAMILIES: tuple[str, ...] = get_args(Family)
# Those of a family by default, and what it may run on besides: a flow that is carried as VE (Cosmos Predict2).
_PATHS = {"eps": ("VE",), "v": ("VE", "VP"), "edm": ("VE",), "flow": ("FLOW",), "any": KINDS}
_MORE_PATHS = {"flow": ("VE",)}
Certainty = Literal["code", "maker", "port", "template"]
CERTAINTIES: tuple[str, ...] = get_args(Certainty)
MuRule: TypeAlias = float | Literal["bfl"] | tuple[float, float, float, float]
TOKEN = 16  # pixels along a side
MOST_STEPS = 100  # of a student
LEAST_LEVEL = 1e-6  # of a flow; a step to the next one divides by it
_MOST_MU = 20.0  # beyond it all levels are 1, or none is more than LEAST_LEVEL


_ORDER = f"from high to low, up to 1 and at least {LEAST_LEVEL:g}, so that float32 tells them apart"


class PresetMismatch(ValueError):
    """The preset cannot be used as asked; the message names the value at fault and the remedy."""


@dataclass(frozen=True)
class Refine:
    """A second stage, on an enlarged latent: its levels, from high to low, and its mode (None: that of the first)."""

    levels: tuple[float, ...]
    mode: Mode | None = None


@dataclass(frozen=True)
class Preset:
    """One published student. Raises ValueError naming the field when a value makes no sense.

    family: what the network predicts. paths: the NoisePath kinds it runs on, by default those of the family.

    One tuple per step count, from high to low, the default count first, in one of four fields; the custom preset has
    none. timesteps: the network's own integers (0 .. 1000). levels: a flow's levels in (0, 1]. unshifted: a flow's
    levels before `shift` or `mu`, one of which is then given. sigmas: the levels of a continuous schedule (EDM), whose
    network has no integers.
    shift: flow shift, which is also set on the model. mu: a number; "bfl"; or (tokens, mu, other tokens, its mu), two
    points of a line. audio_shift: shift of the sound of a model of video with sound.

    mode, eta, label_scale, noise_scale, clip: see `Rule`. start: see `distilled.start`. refine: a second stage.
    boundary: of two networks the first samples the levels from here on up, the second those below.
    frames_per_block: of autoregressive video, how many frames of the latent are sampled to their end at a time.
    cfg: guidance between two branches. guidance: the number that a guidance-distilled network is told. lora_strength:
    at which the student's LoRA is loaded. latent_channels, latent_dims (1 sound, 2 image, 3 video): None where any
    fits.

    architectures: names of ComfyUI's model classes (comfy.supported_models) that the student is one of. files: patterns
    of the names of published files, with * and ?, by which it is recognised. note: which file, and where it goes.
    source: who says so; certainty: "code" (the maker's), "maker" (a card or statement), "port", or "template".
    """

    key: str
    title: str
    family: Family
    timesteps: tuple[tuple[int, ...], ...] = ()
    mode: Mode = "renoise"
    start: Start = "unit"
    cfg: float = 1.0
    paths: tuple[str, ...] = ()
    shift: float | None = None
    latent_channels: int | None = None
    latent_dims: int | None = None
    note: str = ""
    source: str = ""
    levels: tuple[tuple[float, ...], ...] = ()
    unshifted: tuple[tuple[float, ...], ...] = ()
    mu: MuRule | None = None
    audio_shift: float | None = None
    eta: float = 1.0
    label_scale: float = 1.0
    noise_scale: float | None = None
    clip: float | None = None
    refine: Refine | None = None
    boundary: float | None = None
    guidance: float | None = None
    lora_strength: float = 1.0
    architectures: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    certainty: Certainty = "code"
    frames_per_block: int | None = None
    sigmas: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"Preset {self.key!r}: {field} is {_short(vars(self)[field])}; {remedy}")

        require(self.family in FAMILIES, "family", f"use one of {', '.join(FAMILIES)}")
        require(self.mode in MODES, "mode", f"use one of {', '.join(MODES)}")
        require(self.start in STARTS, "start", f"use one of {', '.join(STARTS)}")
        require(self.certainty in CERTAINTIES, "certainty", f"use one of {', '.join(CERTAINTIES)}")
        require(0 < self.cfg <= 100, "cfg", "use a positive number up to 100, 1 for a student without guidance")
        for name in ("shift", "audio_shift"):
            value = vars(self)[name]
            require(value is None or 0 < value <= 1000, name, "use a positive number up to 1000 or None")
        require(self.guidance is None or 0 <= self.guidance <= 100, "guidance", "use 0 .. 100 or None")
        require(-10 <= self.lora_strength <= 10, "lora_strength", "use -10 .. 10, 1 for a LoRA as it is")
        require(self.boundary is None or 0 < self.boundary < 1, "boundary", "use a level between 0 and 1 or None")
        blocks = self.frames_per_block
        require(blocks is None or 0 < blocks <= 64, "frames_per_block", "use 1 .. 64 or None")
        require(blocks is None or self.mode == "renoise", "mode", "blocks of frames are sampled by 'renoise' alone")
        require(self.latent_dims in (None, 1, 2, 3), "latent_dims", "use 1 (sound), 2 (image), 3 (video) or None")
        require(self.latent_channels is None or self.latent_channels > 0, "latent_channels", "use a count or None")
        if not self.paths:
            object.__setattr__(self, "paths", _PATHS[self.family])
        allowed = (*_PATHS[self.family], *_MORE_PATHS.get(self.family, ()))
        require(all(p in allowed for p in self.paths), "paths", f"family {self.family!r} runs on {', '.join(allowed)}")
        try:
            _ = self.rule
        except ValueError as error:
            raise ValueError(f"Preset {self.key!r}: {error}") from error
        self._check_grids(require)
        flow_alone = ("levels", "unshifted", "mu", "audio_shift", "refine", "boundary", "frames_per_block")
        for name in flow_alone if self.family != "flow" else ():
            require(vars(self)[name] in (None, ()), name, "only a student of family 'flow' has it")

    def _check_grids(self, require) -> None:
        """The step counts' lists, and what must stand beside them."""
        given = [name for name in ("timesteps", "levels", "unshifted", "sigmas") if vars(self)[name]]
        require(len(given) < 2, given[-1] if given else "levels", f"{' and '.join(given)} exclude one another")
        require(all(self.timesteps), "timesteps", "every step count needs at least one timestep")
        for grid in self.timesteps:
            require(all(0 <= t <= 1000 for t in grid), "timesteps", "the network's timesteps lie in 0 .. 1000")
            require(_descending(grid), "timesteps", "list each step count's timesteps from high to low")
        for name in ("levels", "unshifted"):
            for levels in vars(self)[name]:
                require(are_levels(levels), name, f"list each count's levels {_ORDER}")
        falling = all(map(_falling, self.sigmas))
        require(falling, "sigmas", "list each count's levels from high to low, above 0, as float32 has them")
        require(not self.sigmas or self.family != "flow", "sigmas", "a flow's levels stand in levels")
        field = given[0] if given else "timesteps"
        counts = self.step_counts
        require(self.mode != "single" or set(counts) <= {1}, field, "mode 'single' makes exactly one call")
        require(len(set(counts)) == len(counts), field, "give each step count once")

        bent = [name for name in ("shift", "mu") if vars(self)[name] is not None]
        require(not self.unshifted or len(bent) == 1, "unshifted", "give a shift or a mu beside it, and not both")
        require(self.mu is None or bool(self.unshifted), "mu", "give the steps or unshifted levels that it shifts")
        if isinstance(self.mu, tuple):
            require(
                len(self.mu) == 4 and self.mu[0] != self.mu[2], "mu",
                "write two points of a line: tokens, mu, other tokens, mu",
            )  # fmt: skip
            most = f"give mu from -{_MOST_MU:g} to {_MOST_MU:g} at both points, such as 0.5 and 1.15"
            require(max(map(abs, self.mu[1::2])) <= _MOST_MU, "mu", most)
        elif isinstance(self.mu, str):
            require(self.mu == "bfl", "mu", "use a number, 'bfl', or two points of a line")
        elif self.mu is not None:
            require(abs(self.mu) <= _MOST_MU, "mu", f"use -{_MOST_MU:g} .. {_MOST_MU:g}, such as 1.15")
        if self.sized:
            require(all(g[0] == 1 for g in self.unshifted), "unshifted", "begin at 1 where mu depends on the size")
        else:
            for unbent in self.unshifted:
                require(are_levels(self.shifted(torch.tensor(unbent), len(unbent), 0).tolist()), *_collapsed(bent[0]))
        if self.refine is not None:
            require(are_levels(self.refine.levels), "refine", f"list its levels {_ORDER}")
            require(self.refine.mode in (None, *MODES), "refine", f"its mode is one of {', '.join(MODES)}")

    @property
    def rule(self) -> Rule:
        """What the student does between its levels."""
        return Rule(self.mode, self.eta, self.label_scale, self.noise_scale, self.clip)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The step counts that the preset knows, the default first; empty for the custom preset."""
        return tuple(len(grid) for grid in self.timesteps or self.levels or self.unshifted or self.sigmas)

    @property
    def sized(self) -> bool:
        """Whether the levels depend on the size of the picture."""
        return isinstance(self.mu, str | tuple)

    def shifted(self, times: Tensor | float, steps: int, tokens: int) -> Tensor:
        """Levels of times in (0, 1] of an unshifted schedule, float32, by `shift` or else by `mu`.

        steps: of the whole run. tokens: one for 16 x 16 pixels; both matter where mu depends on them.
        """
        x = torch.as_tensor(times, dtype=torch.float32)
        # The operations of ComfyUI's schedules in their order: equal levels are equal to the bit.
        if self.shift is not None:
            return x if self.shift == 1 else self.shift * x / (1 + (self.shift - 1) * x)
        e = math.exp(self.mu_of(steps, tokens))
        return e / (e + (1 / x - 1))

    def mu_of(self, steps: int, tokens: int) -> float:
        """mu for a run of so many steps on so many tokens, from -20 to 20; 0, which shifts nothing, without one."""
        found = self.mu or 0.0
        if isinstance(found, tuple):
            first, low, last, high = found
            found = low + (high - low) * (tokens - first) / (last - first)
        elif isinstance(found, str):
            found = _empirical_mu(tokens, steps)
        return max(-_MOST_MU, min(_MOST_MU, found))


def tokens_of(width: int, height: int) -> int:
    """How many tokens a picture of so many pixels has."""
    return round(width * height / TOKEN**2)


def _empirical_mu(tokens: int, steps: int) -> float:
    """FLUX.2's mu: between lines fitted for 10 and for 200 steps, but above 4300 tokens the latter alone."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def _descending(grid: Sequence[float]) -> bool:
    return all(a > b for a, b in zip(grid, grid[1:], strict=False))


def _falling(grid: Sequence[float]) -> bool:
    # As they are sampled at.
    found = torch.tensor(grid, dtype=torch.float32).tolist()
    return len(found) > 0 and _descending(found) and found[-1] > 0


def are_levels(grid: Sequence[float]) -> bool:
    """Whether numbers are levels of a flow that can be sampled at, in fp32, which may not tell two of them apart."""
    return _falling(grid) and grid[-1] >= LEAST_LEVEL and grid[0] <= 1


def _collapsed(field: str) -> tuple[str, str]:
    return field, f"its levels must differ in float32 and be at least {LEAST_LEVEL:g}: use a smaller shift"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
