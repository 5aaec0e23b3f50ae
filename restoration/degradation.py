"""Bad pictures made of good ones: real-world, face and infrared degradations.

Real-world: Wang et al. 2021, "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data" (arXiv
2107.10833), sections 3.1 to 3.4: blur, resize, noise, JPEG, twice, and a sinc filter for ringing; the constants are
those that InstaRevive (arXiv 2504.15513) trains with. Kernels: its section 3.2 (generalised Gaussian and plateau
shapes) and equation 5 (sinc). Face: Zhou et al. 2022, "Towards Robust Blind Face Restoration with Codebook
Lookup Transformer" (arXiv 2206.11253), equation 7. Infrared (blur of the optics, coarse pixels, noise and column
stripes of the sensor) is our own choice.

Every sample has a generator of its own, so a batch of eight equals eight batches of one. Borders are repeated where the
papers reflect them, because reflection needs pictures larger than the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.accounts import seed_of
from ..sampling.settings import Settings, changed, setting
from .jpeg import jpeg

Range = tuple[float, float]
# Kernel sides, before the sinc filter that ends the second stage too.
SIDES = (7, 9, 11, 13, 15, 17, 19, 21)


def _check_range(name: str, values: Range, least: float, most: float) -> None:
    if not least <= values[0] <= values[1] <= most:
        raise ValueError(f"{name} is {values}; give two numbers, the smaller first, between {least:g} and {most:g}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it is a probability, so use 0 to 1")


@dataclass(frozen=True)
class Blur:
    """How a kernel is drawn. sigma: pixels; probability: of blurring at all; sinc: of a sinc filter instead.

    kinds: weights of round and oblong Gaussians, generalised Gaussians and plateaus, in pairs; beta and plateau: ranges
    of the latter two's exponents, half of the draws below 1 and half above.
    """

    sigma: Range = (0.2, 3.0)
    sides: tuple[int, ...] = SIDES
    probability: float = 1.0
    sinc: float = 0.1
    kinds: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    beta: Range = (0.5, 4.0)
    plateau: Range = (1.0, 2.0)

    def __post_init__(self) -> None:
        _check_range("sigma", self.sigma, 0.01, 100)
        _check_share("probability", self.probability)
        _check_share("sinc", self.sinc)
        _check_range("beta", self.beta, 0.1, 10)
        _check_range("plateau", self.plateau, 0.1, 10)
        if not self.sides or any(side < 1 or side % 2 == 0 for side in self.sides):
            raise ValueError(f"sides is {self.sides}; give odd numbers of pixels, such as 7, 9, 11")
        if len(self.kinds) != 6 or min(self.kinds) < 0 or not sum(self.kinds):
            raise ValueError(f"kinds is {self.kinds}; give six weights of at least 0, not all 0")


@dataclass(frozen=True)
class Stage:
    """Blur, resize, noise and JPEG, once.

    resize: weights of enlarging, shrinking and keeping; scale: range of the factor. gaussian: probability of Gaussian
    rather than Poisson noise; sigma: the former's, in 255ths; poisson: the latter's factor; grey: probability of one
    noise for all colours. quality: JPEG's.
    """

    blur: Blur = Blur()
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    scale: Range = (0.15, 1.5)
    gaussian: float = 0.5
    sigma: Range = (1.0, 30.0)
    poisson: Range = (0.05, 3.0)
    grey: float = 0.4
    quality: tuple[int, int] = (30, 95)

    def __post_init__(self) -> None:
        if len(self.resize) != 3 or min(self.resize) < 0 or not sum(self.resize):
            raise ValueError(f"resize is {self.resize}; give three weights of at least 0, not all 0")
        _check_range("scale", self.scale, 0.01, 10)
        if not self.scale[0] <= 1 <= self.scale[1]:
            raise ValueError(f"scale is {self.scale}; the range must hold 1, the factor of keeping the size")
        _check_share("gaussian", self.gaussian)
        _check_range("sigma", self.sigma, 0, 255)
        _check_range("poisson", self.poisson, 0, 100)
        _check_share("grey", self.grey)
        _check_range("quality", self.quality, 1, 100)


@dataclass(frozen=True)
class RealWorld(Settings):
    """The two-stage degradation.

    shrink: input size over output size. strength: of all other damage, 1 being the ranges as they stand. final_sinc:
    probability of the closing filter.
    """

    first: Stage = Stage()
    second: Stage = Stage(
        Blur(sigma=(0.2, 1.5), probability=0.8), (0.3, 0.4, 0.3), (0.3, 1.2), 0.5, (1.0, 25.0), (0.05, 2.5)
    )
    shrink: float = setting(4.0, 1, 64, step=0.5, remedy="1 keeps the size",
        help="Sides of the picture over those of the degraded one.",
        page="Sides of the picture over those of the degraded one; 4 for a restorer of scale 4.")
    strength: float = setting(1.0, 0, 1, step=0.05, remedy="1 is as restorers are trained",
        help="1: as restorers are trained. Below, every damage is drawn in towards none.",
        page="1 is the training's; below, blur, noise, resizing and JPEG are drawn in towards none.")
    final_sinc: float = 0.8

    def check(self) -> None:
        """See the base."""
        _check_share("final_sinc", self.final_sinc)

    def at_full_strength(self) -> RealWorld:
        """The same damage at strength 1, by ranges that are drawn in towards "nothing"; the size is left alone."""
        share = self.strength

        def weaker(stage: Stage) -> Stage:
            low, high = stage.blur.sigma
            sigma = (low, (1 - share) * low + share * high)
            blur = replace(stage.blur, sigma=sigma, probability=stage.blur.probability * share)
            worst, best = stage.quality
            return replace(
                stage,
                blur=blur,
                scale=_towards(1.0, stage.scale, share),
                sigma=_towards(0.0, stage.sigma, share),
                poisson=_towards(0.0, stage.poisson, share),
                quality=(round(100 - share * (100 - worst)), round(100 - share * (100 - best))),
            )

        first, second = weaker(self.first), weaker(self.second)
        return replace(self, first=first, second=second, strength=1.0, final_sinc=self.final_sinc * share)


@dataclass(frozen=True)
class Face(Settings):
    """Oblong or round Gaussian blur, shrinking by a drawn factor, noise, JPEG, and back to the size it had."""

    blur: Blur = Blur((0.1, 10.0), (41,), 1.0, 0.0, (0.5, 0.5, 0.0, 0.0, 0.0, 0.0))
    shrink: Range = (4.0, 8.0)
    sigma: Range = (0.0, 20.0)
    quality: tuple[int, int] = (60, 100)

    def check(self) -> None:
        """See the base."""
        _check_range("shrink", self.shrink, 1, 64)
        _check_range("sigma", self.sigma, 0, 255)
        _check_range("quality", self.quality, 1, 100)


@dataclass(frozen=True)
class Infrared(Settings):
    """Blur, coarse pixels, noise of each pixel and of each column (255ths); the outcome is grey."""

    blur: Blur = Blur((0.6, 2.0), (15,), 1.0, 0.0, (0.7, 0.3, 0.0, 0.0, 0.0, 0.0))
    shrink: float = changed(RealWorld, "shrink")
    sigma: Range = (1.0, 10.0)
    stripes: Range = (0.0, 4.0)

    def check(self) -> None:
        """See the base."""
        _check_range("sigma", self.sigma, 0, 255)
        _check_range("stripes", self.stripes, 0, 255)


Degradation = RealWorld | Face | Infrared


def _towards(end: float, between: Range, share: float) -> Range:
    """A range at `share` of the way from one number to itself."""
    low, high = between
    return end * (1 - share) + share * low, end * (1 - share) + share * high


def degrade(images: Tensor, config: Degradation, seed: int, first: int = 0) -> Tensor:
    """Images (B, H, W, 3) in [0, 1] degraded: (B, h, w, 3) in [0, 1].

    h = max(1, round(H / shrink)), w likewise; Face keeps the size. Sample i draws from the seed and first + i alone.
    ValueError for images of another shape.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; give (B, H, W, 3), none of them 0")
    ways: dict[type, Callable[..., Tensor]] = {RealWorld: _real_world, Face: _face, Infrared: _infrared}
    work = ways[type(config)]
    made = []
    for index, image in enumerate(images.float().clamp(0, 1), start=first):
        generator = torch.Generator().manual_seed(seed_of(seed, "degradation", index))
        made.append(work(image.movedim(-1, 0), config, generator).clamp(0, 1).movedim(0, -1))
    return torch.stack(made)


def _real_world(image: Tensor, config: RealWorld, generator: torch.Generator) -> Tensor:
    config = config.at_full_strength()
    height, width = (max(1, round(side / config.shrink)) for side in image.shape[1:])
    first, second = config.first, config.second
    x = _noisy(_resized(_blurred(image, first.blur, generator), first, image.shape[1:], generator), first, generator)
    x = _as_jpeg(x, first.quality, generator)
    x = _blurred(x, second.blur, generator)
    x = _noisy(_resized(x, second, (height, width), generator), second, generator)
    saved_last, filtered = _chance(generator, 0.5), _chance(generator, config.final_sinc)
    side = _choice(generator, SIDES)
    closing = sinc_kernel(_uniform(generator, (math.pi / 3, math.pi)), side) if filtered else None
    if not saved_last:
        x = _as_jpeg(x, second.quality, generator)
    x = _resize(x, (height, width), _choice(generator, MODES))
    if closing is not None:
        x = convolve(x, closing)
    return _as_jpeg(x, second.quality, generator) if saved_last else x


def _face(image: Tensor, config: Face, generator: torch.Generator) -> Tensor:
    x = _blurred(image, config.blur, generator)
    factor = _uniform(generator, config.shrink)
    x = _resize(x, tuple(max(1, round(side / factor)) for side in image.shape[1:]), "bilinear")
    x = x + _uniform(generator, config.sigma) / 255 * torch.randn(x.shape, generator=generator).to(x)
    return _resize(_as_jpeg(x, config.quality, generator), tuple(image.shape[1:]), "bilinear")


def _infrared(image: Tensor, config: Infrared, generator: torch.Generator) -> Tensor:
    grey = (image * image.new_tensor((0.299, 0.587, 0.114))[:, None, None]).sum(0, keepdim=True)
    x = _blurred(grey, config.blur, generator)
    x = _resize(x, tuple(max(1, round(side / config.shrink)) for side in x.shape[1:]), "area")
    x = x + _uniform(generator, config.sigma) / 255 * torch.randn(x.shape, generator=generator).to(x)
    # Each column of a microbolometer has an amplifier of its own.
    columns = torch.randn((1, 1, x.shape[2]), generator=generator).to(x)
    return (x + _uniform(generator, config.stripes) / 255 * columns).expand(3, -1, -1)


MODES = ("area", "bilinear", "bicubic")


def _resize(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    # Not antialiased, as in the papers' loaders: aliasing is one of the damages.
    return F.interpolate(x[None], size=tuple(size), mode=mode)[0]


def _resized(x: Tensor, stage: Stage, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """x (C, h, w) at `size` times a drawn factor."""
    kind = _weighted(generator, stage.resize)
    low, high = ((1.0, stage.scale[1]), (stage.scale[0], 1.0), (1.0, 1.0))[kind]
    factor = _uniform(generator, (low, high))
    return _resize(x, [max(1, round(side * factor)) for side in size], _choice(generator, MODES))


def _noisy(x: Tensor, stage: Stage, generator: torch.Generator) -> Tensor:
    """x (C, h, w) with Gaussian or Poisson noise, in [0, 1]."""
    is_gaussian, is_grey = _chance(generator, stage.gaussian), _chance(generator, stage.grey)
    if is_gaussian:
        shape = (1, *x.shape[1:]) if is_grey else x.shape
        return (x + _uniform(generator, stage.sigma) / 255 * torch.randn(shape, generator=generator).to(x)).clamp(0, 1)
    scale = _uniform(generator, stage.poisson)
    source = x.new_tensor((0.299, 0.587, 0.114)) @ x.flatten(1) if is_grey else x.flatten(1)
    levels = (source.clamp(0, 1) * 255).round() / 255
    # A picture of fewer grey levels is taken to have counted fewer photons, to the next power of two.
    counts = 2.0 ** math.ceil(math.log2(len(torch.unique(levels))))
    noise = torch.poisson(levels.cpu() * counts, generator=generator).to(x) / counts - levels
    return (x + scale * noise.view(-1, *x.shape[1:])).clamp(0, 1)


def _as_jpeg(x: Tensor, quality: tuple[int, int], generator: torch.Generator) -> Tensor:
    drawn = int(torch.randint(quality[0], quality[1] + 1, (), generator=generator))
    return jpeg(x.movedim(0, -1), drawn).movedim(-1, 0)


def _blurred(x: Tensor, blur: Blur, generator: torch.Generator) -> Tensor:
    return convolve(x, draw_kernel(blur, generator)) if _chance(generator, blur.probability) else x


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """x (C, H, W) with one odd kernel (k, k) over every channel, borders repeated; any H, W from 1 on."""
    half = len(kernel) // 2
    weight = kernel.to(x).expand(len(x), 1, -1, -1)
    return F.conv2d(F.pad(x[None], (half,) * 4, mode="replicate"), weight, groups=len(x))[0]


def draw_kernel(blur: Blur, generator: torch.Generator) -> Tensor:
    """A kernel (k, k) of sum 1: sinc, or one of the six kinds."""
    side = _choice(generator, blur.sides)
    if _chance(generator, blur.sinc):
        return sinc_kernel(_uniform(generator, (math.pi / (3 if side < 13 else 5), math.pi)), side)
    kind = _weighted(generator, blur.kinds)
    sigma = _uniform(generator, blur.sigma)
    oblong = kind % 2 == 1
    other, angle = (_uniform(generator, blur.sigma), _uniform(generator, (-math.pi, math.pi))) if oblong else (sigma, 0)
    shape = ("gaussian", "gaussian", "generalised", "generalised", "plateau", "plateau")[kind]
    power = 1.0
    if shape != "gaussian":
        low, high = blur.beta if shape == "generalised" else blur.plateau
        below = _chance(generator, 0.5)
        power = _uniform(generator, (min(low, 1.0), min(high, 1.0)) if below else (max(low, 1.0), max(high, 1.0)))
    return bell_kernel(sigma, other, angle, side, power, shape == "plateau")


def bell_kernel(
    sigma: float, other: float, angle: float, side: int, power: float = 1.0, plateau: bool = False
) -> Tensor:
    """exp(-q^power / 2), or 1 / (1 + q^power) for a plateau, at q = c' S^-1 c, as a kernel (side, side) of sum 1.

    S has axes sigma and `other` (pixels), the first turned by `angle` (radians) from the x axis.
    """
    at = torch.arange(side, dtype=torch.float64) - side // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    q = ((along / sigma).square() + (across / other).square()) ** power
    kernel = 1 / (1 + q) if plateau else torch.exp(-q / 2)
    return (kernel / kernel.sum()).float()


def sinc_kernel(cutoff: float, side: int) -> Tensor:
    """cutoff J1(cutoff r) / (2 pi r), as a kernel (side, side) of sum 1: a low-pass, in radians a pixel."""
    at = torch.arange(side, dtype=torch.float64) - side // 2
    r = (at[:, None].square() + at[None].square()).sqrt()
    kernel = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    # J1(z) / z is 1/2 at 0.
    kernel[side // 2, side // 2] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()


def _uniform(generator: torch.Generator, between: Range) -> float:
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
    return between[0] + (between[1] - between[0]) * drawn


def _chance(generator: torch.Generator, probability: float) -> bool:
    return _uniform(generator, (0.0, 1.0)) < probability


def _choice(generator: torch.Generator, options: Sequence):
    return options[int(torch.randint(len(options), (), generator=generator))]


def _weighted(generator: torch.Generator, weights: Sequence[float]) -> int:
    return int(torch.multinomial(torch.tensor(weights), 1, generator=generator))
