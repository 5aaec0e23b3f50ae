"""Skips the first steps of sampling: to a latent in heavy noise all data is one Gaussian, whose flow is a formula.

Wang and Vastola 2024, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and its
Applications" (arXiv 2412.09726): the Gaussian score, its probability-flow ODE in closed form, and the hybrid sampler
that begins at a later level of the same grid. For data N(mu, Sigma) and a path x = a x0 + b n

    D(x) = mu + a Sigma (a^2 Sigma + b^2)^-1 (x - a mu)                     the posterior mean
    x' = a' mu + [(a'^2 Sigma + b'^2) (a^2 Sigma + b^2)^-1]^1/2 (x - a mu)   the flow from one level to another

which is the paper's solution on VE (a = 1) and its like on VP and FLOW. Two forms of Sigma have a cheap root: few
eigenvectors with an isotropic rest (probabilistic PCA, Tipping and Bishop 1999), and stationary latents, whose Sigma is
one Hermitian block for each frequency and fits every size.

A prompt and guidance shift the mean. It can be inferred from one call of the model: solving the first equation for mu
with D the model's x0 gives mu = D + (a / b^2) Sigma (a D - x) (own idea; exact for a Gaussian model, and D itself where
a flow is pure noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .path import NoisePath
from .standard import FiniteWatch

Law = Callable[[Tensor], Tensor]
"""A function of eigenvalues, elementwise."""

# More than this of a spectrum's size below zero, or of its blocks' parts that are not Hermitian, is no rounding.
_ROUNDING = 1e-3
_MOST_NUMBERS = 2**31


class Statistics(Protocol):
    """A Gaussian of latents in the model's own scale."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether latents of a shape (B, C, ...) have this Gaussian."""
        ...

    def mean_of(self, shape: Sequence[int]) -> Tensor:
        """mu, to be broadcast over latents of a shape that fits; fp64 on the CPU."""
        ...

    def applied(self, law: Law, v: Tensor) -> Tensor:
        """law(Sigma) v for v (B, C, ...), fp64 on the CPU; law is taken of Sigma's eigenvalues."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What `read` needs to make it again."""
        ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """Few eigenvectors and an isotropic rest: for latents of one size.

    mean (C, ...). vectors (q, N) orthonormal, N = C x ...; values (q,) their variances; rest: variance of every
    direction beside them. fp32. Raises ValueError naming what does not fit.
    """

    mean: Tensor
    vectors: Tensor
    values: Tensor
    rest: float

    def __post_init__(self) -> None:
        n, q = self.mean.numel(), len(self.values)
        if self.mean.ndim not in (3, 4) or n == 0:
            raise ValueError(f"the mean has shape {tuple(self.mean.shape)}, and (C, H, W) or (C, T, H, W) is needed")
        if self.values.ndim != 1 or tuple(self.vectors.shape) != (q, n):
            raise ValueError(f"{q} eigenvalues need eigenvectors of shape ({q}, {n}), got {tuple(self.vectors.shape)}")
        _check_finite(mean=self.mean, vectors=self.vectors, values=self.values, rest=torch.tensor(self.rest))
        if self.rest < 0 or bool((self.values < 0).any()):
            raise ValueError("a variance is negative: these are no statistics of latents")
        gram = self.vectors.double() @ self.vectors.double().T
        if q and float((gram - torch.eye(q, dtype=gram.dtype)).abs().max()) > _ROUNDING:
            raise ValueError("the eigenvectors are not orthonormal: these are no statistics of latents")

    def fits(self, shape: Sequence[int]) -> bool:
        """See Statistics."""
        return tuple(shape[1:]) == tuple(self.mean.shape)

    def mean_of(self, shape: Sequence[int]) -> Tensor:
        """See Statistics."""
        return self.mean.double()

    def applied(self, law: Law, v: Tensor) -> Tensor:
        """See Statistics."""
        flat, u = v.cpu().double().flatten(1), self.vectors.double()
        rest = law(torch.tensor(self.rest, dtype=torch.float64))
        within = flat @ u.T
        return (rest * flat + (within * (law(self.values.double()) - rest)) @ u).view(v.shape)

    def state(self) -> dict[str, Tensor]:
        """See Statistics."""
        rest = torch.tensor(self.rest, dtype=torch.float64)
        return {"mean": self.mean, "vectors": self.vectors, "values": self.values, "rest": rest}

    def __str__(self) -> str:
        size = " x ".join(str(n) for n in self.mean.shape)
        return f"{len(self.values)} directions and an even rest, for latents of {size}"


@dataclass(frozen=True, eq=False)
class Stationary:
    """The same statistics everywhere in the picture, and through a video: for latents of every size.

    mean (C,). spectrum (*size, C, C), complex64: for each frequency of an orthonormal FFT over the size, the covariance
    of the channels. Raises ValueError naming what does not fit.
    """

    mean: Tensor
    spectrum: Tensor

    def __post_init__(self) -> None:
        c = len(self.mean)
        if self.mean.ndim != 1 or c == 0 or self.spectrum.ndim not in (4, 5) or self.spectrum.shape[-2:] != (c, c):
            raise ValueError(
                f"means of {c} channels need a spectrum of shape (H, W, {c}, {c}) or (T, H, W, {c}, {c}), got "
                f"{tuple(self.spectrum.shape)}"
            )
        _check_finite(mean=self.mean, spectrum=torch.view_as_real(self.spectrum))
        size = float(self.spectrum.abs().max())
        if float((self.spectrum - self.spectrum.mH).abs().max()) > _ROUNDING * size:
            raise ValueError("the spectrum's blocks are not Hermitian: these are no statistics of latents")
        if float(torch.linalg.eigvalsh(self.spectrum).min()) < -_ROUNDING * size:
            raise ValueError("a variance is negative: these are no statistics of latents")

    def fits(self, shape: Sequence[int]) -> bool:
        """See Statistics."""
        return len(shape) == self.spectrum.ndim and shape[1] == len(self.mean)

    def mean_of(self, shape: Sequence[int]) -> Tensor:
        """See Statistics."""
        return self.mean.double().view(-1, *(1,) * (len(shape) - 2))

    def applied(self, law: Law, v: Tensor) -> Tensor:
        """See Statistics."""
        dims = tuple(range(2, v.ndim))
        values, vectors = torch.linalg.eigh(_resized(self.spectrum.to(torch.complex128), v.shape[2:]))
        waves = torch.fft.fftn(v.cpu().double(), dim=dims, norm="ortho").movedim(1, -1).unsqueeze(-1)
        waves = vectors @ (law(values.clamp(min=0)).unsqueeze(-1) * (vectors.mH @ waves))
        return torch.fft.ifftn(waves.squeeze(-1).movedim(-1, 1), dim=dims, norm="ortho").real

    def state(self) -> dict[str, Tensor]:
        """See Statistics."""
        return {"mean": self.mean, "spectrum": torch.view_as_real(self.spectrum).contiguous()}

    def __str__(self) -> str:
        size = " x ".join(str(n) for n in self.spectrum.shape[:-2])
        return f"a spectrum of {len(self.mean)} channels over {size}, for latents of any size"


def _check_finite(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity: these are no statistics of latents")


def _resized(spectrum: Tensor, size: Sequence[int]) -> Tensor:
    """The spectrum at the frequencies of another size: linear between neighbours, round the circle.

    A mean of Hermitian blocks is Hermitian and no less positive, and a frequency's mirror image stays its mirror image.
    """
    for dim, n in enumerate(size):
        old = spectrum.shape[dim]
        if n != old:
            at = torch.arange(n, dtype=torch.float64) * old / n
            below = at.floor().long()
            w = (at - below).view(-1, *(1,) * (spectrum.ndim - dim - 1))
            spectrum = (1 - w) * spectrum.index_select(dim, below % old) + w * spectrum.index_select(
                dim, (below + 1) % old
            )
    return spectrum


def low_rank(latents: Tensor, rank: int = 0) -> LowRank:
    """Statistics of latents (n, C, ...), n >= 2, in the model's scale; the rest has the mean variance of what is left.

    rank: directions that are kept, fewer than n; 0 keeps half of n, at most 256: the lesser half is mostly chance.
    Raises ValueError for fewer latents, or a rank that they cannot have.
    """
    n = len(latents)
    if n < 2:
        raise ValueError(f"statistics need at least 2 latents and {n} arrived; a hundred or more are better")
    if not 0 <= rank < n:
        raise ValueError(f"rank must be 0 to {n - 1} with {n} latents, got {rank}")
    _check_finite(latents=latents)
    q = rank or min(256, max(1, n // 2))
    flat = latents.detach().double().cpu().flatten(1)
    mean = flat.mean(0)
    _, roots, vectors = torch.linalg.svd((flat - mean) / math.sqrt(n - 1), full_matrices=False)
    values = roots.square()
    q = min(q, flat.shape[1])
    left = flat.shape[1] - q
    rest = float(values[q:].sum()) / left if left else 0.0
    return LowRank(mean.float().view(latents.shape[1:]), vectors[:q].float().contiguous(), values[:q].float(), rest)


def stationary(latents: Tensor) -> Stationary:
    """Statistics of latents (n, C, ...) in the model's scale, the mean one for each channel."""
    _check_finite(latents=latents)
    x = latents.detach().double().cpu()
    mean = x.transpose(0, 1).flatten(1).mean(1)
    dims = tuple(range(2, x.ndim))
    waves = torch.fft.fftn(x - mean.view(-1, *(1,) * len(dims)), dim=dims, norm="ortho").movedim(1, -1)
    spectrum = torch.einsum("n...c,n...d->...cd", waves, waves.conj()) / len(x)
    return Stationary(mean.float(), spectrum.to(torch.complex64))


def read(state: Mapping[str, Tensor]) -> Statistics:
    """The statistics that gave `state`. ValueError names what is wrong with tensors of another origin."""
    kinds = {frozenset(("mean", "vectors", "values", "rest")), frozenset(("mean", "spectrum"))}
    if frozenset(state) not in kinds:
        raise ValueError(
            f"it holds {', '.join(sorted(state)[:6]) or 'nothing'}, and mean, vectors, values and rest, or mean and "
            "spectrum are needed"
        )
    for name, value in state.items():
        if not value.is_floating_point() or value.numel() > _MOST_NUMBERS:
            raise ValueError(f"{name} is of {value.dtype} and shape {tuple(value.shape)}; fp32 is needed")
    if "spectrum" in state:
        spectrum = state["spectrum"].float()
        if spectrum.ndim < 1 or spectrum.shape[-1] != 2:
            raise ValueError(
                f"the spectrum has shape {tuple(spectrum.shape)}; its last side holds two parts of a number"
            )
        return Stationary(state["mean"].float(), torch.view_as_complex(spectrum.contiguous()))
    if state["rest"].ndim:
        raise ValueError(f"rest is one number, and has shape {tuple(state['rest'].shape)}")
    return LowRank(state["mean"].float(), state["vectors"].float(), state["values"].float(), float(state["rest"]))


def _coefficients(path: NoisePath, sigma: Tensor | float) -> tuple[float, float]:
    """(a, b) of x = a x0 + b n."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    level = float(sigma)
    return float(path.add_noise(one, level, zero)), float(path.add_noise(zero, level, one))


def teleport(
    x: Tensor,
    statistics: Statistics,
    path: NoisePath,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    mean: Tensor | None = None,
) -> Tensor:
    """x (B, C, ...) at level sigma > 0 carried along the Gaussian's flow to sigma_next, in x's dtype, on its device.

    mean: to be used in place of the statistics' own, broadcast over x.
    """
    (a, b), (a_next, b_next) = _coefficients(path, sigma), _coefficients(path, sigma_next)
    mu = statistics.mean_of(x.shape) if mean is None else mean.cpu().double()

    def law(value: Tensor) -> Tensor:
        return ((a_next**2 * value + b_next**2) / (a**2 * value + b**2)).sqrt()

    # Apple's GPUs have no double precision, so that the way there and back goes through the CPU.
    moved = a_next * mu + statistics.applied(law, x.cpu().double() - a * mu)
    return moved.to(x.dtype).to(x.device)


def inferred_mean(statistics: Statistics, path: NoisePath, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """The mean (B, C, ...), fp64 on the CPU, of the Gaussian with these covariances whose posterior mean at x is x0."""
    a, b = _coefficients(path, sigma)
    d = x0.cpu().double()
    return d + (a / b**2) * statistics.applied(lambda value: value, a * d - x.cpu().double())


@dataclass(frozen=True, eq=False)
class Teleport:
    """Where a sampler begins instead.

    steps: of the grid that are skipped; or, where sigma is above 0, everything above that level. infer: take the mean
    from one call of the model. Raises ValueError naming the field.
    """

    statistics: Statistics
    steps: int = 2
    sigma: float = 0.0
    infer: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"skip_steps must be 0 or more, got {self.steps!r}")
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma_skip must be 0 or a level of the model, got {self.sigma!r}")

    def first(self, sigmas: Tensor) -> int:
        """Number of the level in the grid (steps + 1,) that sampling begins at."""
        last = len(sigmas) - 1
        if self.sigma > 0:
            return next((i for i, level in enumerate(sigmas.tolist()) if level <= self.sigma), last)
        return min(self.steps, last)

    def why_not(self, sigmas: Tensor, shape: Sequence[int], top: bool, empty: bool, masked: bool) -> str:
        """Why nothing can be skipped; empty where something can.

        top: the grid begins at the model's highest level. empty: there is no latent image. masked: there is a mask.
        """
        if self.first(sigmas) == 0:
            return "nothing to skip: sigma_skip is not below the first level, or skip_steps is 0"
        if not top:
            return "the sigmas begin below the model's highest level, where the latent is no pure noise"
        if not empty:
            return "the latent is not empty: image to image begins from it, not from noise"
        if masked:
            return "there is a noise mask, and the statistics know nothing of what is kept"
        if not self.statistics.fits(shape):
            return f"the latents are {tuple(shape[1:])}, and the statistics have {self.statistics}"
        return ""

    def jump(self, model, x: Tensor, sigmas: Tensor, path: NoisePath) -> Tensor:
        """x (B, C, ...) at sigmas[0] -> the latent at the level `first` of the grid.

        model(x, sigma (B,)) -> x0 is called once where the mean is inferred; SamplingDiverged when it gives NaN.
        """
        mean = None
        if self.infer:
            x0 = model(x, sigmas[0] * x.new_ones(len(x)))
            watch = FiniteWatch(x, sigmas)
            watch.saw(0, x0)
            watch.checked(x0)
            mean = inferred_mean(self.statistics, path, x, x0, sigmas[0])
        return teleport(x, self.statistics, path, sigmas[0], sigmas[self.first(sigmas)], mean)
