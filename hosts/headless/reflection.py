"""The SAMPLER of reflection on the headless host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...sampling.reflection import Keep, ReflectionConfig, sample_reflection
from ..prior import first_latent, identity
from ..reflection import check_pair, residuals_told
from .guider import Guider
from .samplers import Run
from .search import parts
from .work import say


@dataclass(frozen=True, eq=False)
class ReflectionSampler:
    """Reflection with a weak guider, and another one that goes down in place of the strong one if wished."""

    weak: Guider
    config: ReflectionConfig
    reflecting: Guider | None = None

    def sample(self, run: Run) -> Tensor:
        """The latent at the last level; noise is scaled to the first as ComfyUI does it."""
        weak = self._leg(run, "weak", self.weak)
        down = None if self.reflecting is None else self._leg(run, "reflecting", self.reflecting)
        with residuals_told(say) as told:
            x = sample_reflection(
                run.masked(run.noise),
                first_latent(run.path, run.sigmas[0], run.latent, run.max_denoise)(run.noise),
                run.sigmas,
                extra_args={"seed": run.seed},
                callback=run.reporter(),
                disable=True,
                path=run.path,
                weak=weak,
                config=self.config,
                reflecting=down,
                keep=_keep(run),
                inverted=told,
            )
        return run.finished(x)

    def _leg(self, run: Run, name: str, guider: Guider):
        model = guider.model
        empty = [branch for branch, entries in (("positive", guider.positive), ("negative", guider.negative))
                 if entries is not None and not entries]  # fmt: skip
        check_pair(name, empty, (model.latent, run.form), (model.path, run.path))
        return replace(run, denoiser=guider.denoiser(run.noise.shape)).masked(run.noise)


def _keep(run: Run) -> Keep | None:
    mask = run.mask
    if mask is None:
        return None
    return lambda x, sigma: torch.where(mask > 0, x, run.path.add_noise(run.latent, sigma, run.noise))


def reflection_sampler(weak: Guider, config: ReflectionConfig, reflecting: Guider | None = None) -> ReflectionSampler:
    """See `hosts.api`."""
    return ReflectionSampler(weak, config, reflecting)


def cfgs(guiders: Sequence[Guider]) -> tuple[float, ...] | None:
    """See `hosts.api`."""
    first = guiders[0]
    for guider in guiders:
        if guider.model.source is not first.model.source or identity(parts(guider)) != identity(parts(first)):
            return None
    return tuple(float(guider.cfg) for guider in guiders)


def at_cfg(guider: Guider, cfg: float) -> Guider:
    """See `hosts.api`."""
    return Guider(guider.model, guider.positive, guider.negative, cfg)
