"""Degradations: kernels in closed form, seeds, sizes, and what each part does alone."""

import math
from dataclasses import replace

import pytest
import torch

from retort.restoration import degradation as deg

CONFIGS = {"real": deg.RealWorld(), "face": deg.Face(), "infrared": deg.Infrared()}


def pictures(count, height, width, seed=0):
    return torch.rand((count, height, width, 3), generator=torch.Generator().manual_seed(seed))


def quiet(config=None):
    """The two stages without blur, noise or resizing, at the best JPEG."""
    return replace(config or deg.RealWorld(), strength=0.0)


def test_kernels_sum_to_one_and_are_symmetric():
    generator = torch.Generator().manual_seed(3)
    for kinds in torch.eye(6).tolist():
        for _ in range(20):
            kernel = deg.draw_kernel(deg.Blur(kinds=tuple(kinds), sinc=0.0), generator)
            assert len(kernel) in deg.SIDES
            assert float(kernel.sum()) == pytest.approx(1, abs=1e-5) and float(kernel.min()) >= 0
            torch.testing.assert_close(kernel, kernel.flip(0, 1))
    for _ in range(20):
        kernel = deg.draw_kernel(deg.Blur(sinc=1.0), generator)
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(kernel, kernel.T)


def test_a_bell_kernel_has_the_variances_it_was_asked_for():
    at = torch.arange(41) - 20.0
    for angle in (0.0, 0.7, math.pi / 2):
        kernel = deg.bell_kernel(3.0, 1.5, angle, 41)
        y, x = torch.meshgrid(at, at, indexing="ij")
        moments = [float((kernel * a * b).sum()) for a, b in ((x, x), (y, y), (x, y))]
        cos, sin = math.cos(angle), math.sin(angle)
        wanted = [9 * cos**2 + 2.25 * sin**2, 9 * sin**2 + 2.25 * cos**2, (9 - 2.25) * sin * cos]
        assert moments == pytest.approx(wanted, abs=0.01)


def test_generalised_and_plateau_kernels_fall_as_their_formulas_say():
    for plateau, at in ((False, lambda q: math.exp(-q / 2)), (True, lambda q: 1 / (1 + q))):
        kernel = deg.bell_kernel(2.0, 2.0, 0.0, 21, power=1.7, plateau=plateau)
        ratio = float(kernel[10, 13] / kernel[10, 10])
        assert ratio == pytest.approx(at((9 / 4) ** 1.7) / at(0.0), rel=1e-5)


def test_a_sinc_kernel_passes_what_is_slower_than_its_cutoff_and_stops_what_is_faster():
    at = torch.arange(101) - 50.0
    kernel = deg.sinc_kernel(math.pi / 2, 101)
    passed, stopped = (float((kernel.sum(0) * torch.cos(w * at)).sum()) for w in (0.35 * math.pi, 0.65 * math.pi))
    assert passed == pytest.approx(1, abs=0.05) and abs(stopped) < 0.05


def test_the_published_constants():
    first, second = deg.RealWorld().first, deg.RealWorld().second
    assert first.blur.kinds == second.blur.kinds == (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    assert (first.blur.sigma, second.blur.sigma) == ((0.2, 3.0), (0.2, 1.5))
    assert (first.resize, second.resize) == ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))
    assert (first.scale, second.scale) == ((0.15, 1.5), (0.3, 1.2))
    assert (first.sigma, second.sigma) == ((1, 30), (1, 25))
    assert (first.poisson, second.poisson) == ((0.05, 3), (0.05, 2.5))
    assert first.quality == second.quality == (30, 95) and first.grey == second.grey == 0.4
    assert (deg.RealWorld().shrink, deg.RealWorld().final_sinc, second.blur.probability) == (4, 0.8, 0.8)
    face = deg.Face()
    assert (face.blur.sides, face.blur.sigma, face.blur.kinds[:2]) == ((41,), (0.1, 10), (0.5, 0.5))
    assert (face.shrink, face.sigma, face.quality) == ((4, 8), (0, 20), (60, 100))


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_at_once_are_eight_of_one_and_a_seed_says_it_all(name):
    images, config = pictures(8, 40, 33), CONFIGS[name]
    out = deg.degrade(images, config, seed=5)
    ones = [deg.degrade(images[i : i + 1], config, seed=5, first=i) for i in range(8)]
    assert torch.equal(out, torch.cat(ones))
    assert torch.equal(out, deg.degrade(images, config, seed=5))
    assert not torch.equal(out, deg.degrade(images, config, seed=6))
    same = deg.degrade(images[:1].expand(2, -1, -1, -1), config, seed=5)
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 5), (37, 51)])
def test_any_size_gives_a_picture_in_range(name, size):
    config = CONFIGS[name]
    for seed in range(12):
        out = deg.degrade(pictures(1, *size), config, seed)
        wanted = size if name == "face" else tuple(max(1, round(side / 4)) for side in size)
        assert out.shape == (1, *wanted, 3)
        assert torch.isfinite(out).all() and float(out.min()) >= 0 and float(out.max()) <= 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_flat_picture_stays_flat_without_noise(name):
    config = CONFIGS[name]
    if name == "real":
        none = {"sigma": (0.0, 0.0), "poisson": (0.0, 0.0), "quality": (90, 95)}
        config = replace(config, first=replace(config.first, **none), second=replace(config.second, **none))
    elif name == "face":
        config = replace(config, sigma=(0.0, 0.0), quality=(90, 100))
    else:
        config = replace(config, sigma=(0.0, 0.0), stripes=(0.0, 0.0))
    for seed in range(10):
        out = deg.degrade(torch.full((1, 48, 40, 3), 0.6), config, seed)
        assert float((out - 0.6).abs().max()) < 3 / 255


def test_strength_zero_changes_next_to_nothing_and_one_changes_nothing_of_the_settings():
    config = deg.RealWorld(shrink=1.0)
    assert config.at_full_strength() == config
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    images = torch.stack([x, y, (x + y) / 2], -1)[None]
    assert float((deg.degrade(images, quiet(config), 0) - images).abs().mean()) < 2 / 255
    harm = [
        float((deg.degrade(images.expand(16, -1, -1, -1), replace(config, strength=s), 0) - images).square().mean())
        for s in (0.0, 0.3, 1.0)
    ]
    assert harm == sorted(harm)


def test_gaussian_noise_has_the_strength_it_was_asked_for():
    noise = deg.Stage(blur=deg.Blur(probability=0.0), resize=(0, 0, 1), gaussian=1.0, sigma=(10, 10), grey=0.0)
    x = deg._noisy(torch.full((3, 128, 128), 0.5), noise, torch.Generator().manual_seed(0))
    assert float(x.std()) * 255 == pytest.approx(10, rel=0.03)
    grey = deg._noisy(torch.full((3, 64, 64), 0.5), replace(noise, grey=1.0), torch.Generator().manual_seed(0))
    assert torch.equal(grey[0], grey[1]) and float(grey.std()) > 0


def test_poisson_noise_grows_with_the_light():
    stage = deg.Stage(gaussian=0.0, poisson=(1, 1), grey=0.0)
    image = torch.cat([torch.full((3, 128, 64), 0.1), torch.full((3, 128, 64), 0.4)], 2)
    image[:, :, 0] = torch.linspace(0, 1, 128)
    out = deg._noisy(image, stage, torch.Generator().manual_seed(0)) - image
    counts = 2 ** math.ceil(math.log2(len(torch.unique((image * 255).round()))))
    for part, light in ((out[:, :, 1:64], 0.1), (out[:, :, 64:], 0.4)):
        assert float(part.std()) == pytest.approx(math.sqrt(light / counts), rel=0.06)


def test_infrared_is_grey_and_its_stripes_run_down_the_columns():
    config = deg.Infrared(sigma=(0, 0), stripes=(20, 20), shrink=1)
    out = deg.degrade(torch.full((1, 32, 32, 3), 0.5), config, 0)[0]
    assert torch.equal(out[..., 0], out[..., 1]) and torch.equal(out[0], out[-1])
    assert float(out[0, :, 0].std()) * 255 == pytest.approx(20, rel=0.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: deg.Blur(sigma=(3.0, 0.2)), "sigma is"),
        (lambda: deg.Blur(sides=(8,)), "odd numbers"),
        (lambda: deg.Blur(kinds=(1.0,)), "six weights"),
        (lambda: deg.Blur(probability=2.0), "probability"),
        (lambda: deg.Stage(resize=(0, 0, 0)), "three weights"),
        (lambda: deg.Stage(scale=(1.2, 1.5)), "must hold 1"),
        (lambda: deg.Stage(quality=(0, 50)), "quality is"),
        (lambda: deg.RealWorld(shrink=0.5), "shrink must be between 1 and 64, got 0.5: 1 keeps the size"),
        (lambda: deg.Face(shrink=(0.5, 2.0)), "shrink is"),
        (lambda: deg.Infrared(stripes=(-1.0, 2.0)), "stripes is"),
        (lambda: deg.RealWorld(strength=1.5), "strength must be between 0 and 1, got 1.5"),
        (lambda: deg.degrade(torch.zeros(4, 4, 3), deg.Face(), 0), r"\(B, H, W, 3\)"),
        (lambda: deg.degrade(torch.zeros(1, 4, 4, 1), deg.Face(), 0), r"\(B, H, W, 3\)"),
    ],
)
def test_bad_settings_are_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()
