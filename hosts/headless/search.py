"""A search inside one run of the headless GUIDER."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..prior import Job, Prior, first_latent, identity
from .guider import Guider
from .samplers import Run

CANCELLED = KeyboardInterrupt


class SearchSampler:
    """A SAMPLER that lets a job do the sampling."""

    def __init__(self, guider: Guider, job: Job, batch: int):
        self.guider, self.job, self.batch = guider, job, batch

    def sample(self, run: Run) -> Tensor:
        """What a guider calls with noise (1, ...); gives back what the job does."""
        made: dict[int, Any] = {}

        def model(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
            count = len(x)
            if count not in made:
                # A denoiser is made for one size of batch. The area that is kept has the first candidate's noise.
                rows = (count, *run.noise.shape[1:])
                mask = None if run.mask is None else run.mask.expand(rows)
                own = replace(run, denoiser=self.guider.denoiser(x.shape), latent=run.latent.expand(rows), mask=mask)
                made[count] = own.masked(run.noise.expand(rows))
            return made[count](x, sigma, **extra_args)

        return self.job(
            Prior(
                model=model,
                path=run.path,
                sigmas=run.sigmas,
                shape=tuple(run.noise.shape[1:]),
                first=first_latent(run.path, run.sigmas[0], run.latent, run.max_denoise),
                stored=lambda x0: self.guider.model.latent.process_out(x0.float()),
                mixed_levels=True,
                calls_per_eval=sum(map(len, self.guider.branches())),
                identity=identity((self.guider.cfg, *parts(self.guider))),
                batch=self.batch,
                again=lambda: None,
                extra_args={"seed": run.seed},
            )
        )


def latents_of(guider: Guider, latent: dict[str, Any]) -> Tensor:
    """See `hosts.api`."""
    return guider.model.latent.fitted(latent["samples"])


def latents_out(guider: Guider, x0: Tensor) -> Tensor:
    """See `hosts.api`."""
    return guider.model.latent.process_out(x0.float())


def search(
    guider: Guider, samples: Tensor, mask: Tensor | None, sigmas: Tensor, noise: Tensor, batch: int, seed: int, job: Job
) -> Tensor:
    """See `hosts.api`."""
    return guider.sample(noise, samples, SearchSampler(guider, job, batch), sigmas, mask, None, seed)


def parts(guider: Guider) -> Iterator[Any]:
    """What names a guider's model and conditions, cfg apart."""
    yield type(guider.model.network).__name__, guider.model.prediction
    yield [(lora.name, lora.strength) for lora in guider.model.loras]
    for conditioning in (guider.positive, guider.negative or []):
        yield len(conditioning)
        for tokens, extra in conditioning:
            yield tokens
            yield from (extra[name] for name in ("pooled_output",) if isinstance(extra.get(name), Tensor))
