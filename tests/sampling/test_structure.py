"""Structure guidance: its filter is a projector, the fine part is the plain sampler's, the coarse the reference's."""

from __future__ import annotations

import pytest
import torch

from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.standard import SAMPLERS, SamplingDiverged
from retort.sampling.structure import StructureConfig, check_reference, coarse, sample_structure

PATHS = [VE, FLOW, VP, NoisePath("FLOW", 8.0)]
IMAGE, VIDEO = (2, 4, 11, 8), (2, 4, 3, 11, 8)
LEVELS = {"VE": [14.0, 5.0, 1.2, 0.4], "FLOW": [0.95, 0.7, 0.5, 0.2], "VP": [14.0, 5.0, 1.2, 0.4]}


def grid(path, to_zero=True, dtype=torch.float64):
    return torch.tensor(LEVELS[path.kind] + [0.0] * to_zero, dtype=dtype)


def draw(noise, shape):
    return tuple(noise(shape, seed, torch.float64) for seed in (1, 2, 3))


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 16])
def test_the_filter_is_an_orthogonal_projector(noise, shape, factor):
    x, y, _ = draw(noise, shape)
    once = coarse(x, factor)
    assert once.shape == x.shape
    torch.testing.assert_close(coarse(once, factor), once, rtol=0, atol=1e-14)
    assert float(((x - once) * coarse(y, factor)).sum()) == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(once.mean((-2, -1)), x.mean((-2, -1)), rtol=0, atol=1e-12)


def test_the_filter_means_over_blocks_the_last_of_which_may_be_smaller():
    x = torch.arange(15.0, dtype=torch.float64).view(1, 1, 3, 5)
    expected = torch.tensor([[3.0, 3.0, 5.0, 5.0, 6.5], [3.0, 3.0, 5.0, 5.0, 6.5], [10.5, 10.5, 12.5, 12.5, 14.0]])
    assert torch.equal(coarse(x, 2)[0, 0], expected.double())
    assert torch.equal(coarse(x, 8), torch.full_like(x, 7.0)) and coarse(x, 1) is x
    video = torch.stack([x, 2 * x], 2)
    assert torch.equal(coarse(video, 2), torch.stack([coarse(x, 2), 2 * coarse(x, 2)], 2))


@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("path", PATHS)
def test_guided_to_zero_the_coarse_part_is_the_references_and_the_fine_the_plain_samplers(
    path, shape, iterations, gaussian, noise
):
    """The model acts on each number alone and linearly, so it commutes with the filter and keeps both parts apart."""
    model = gaussian(path)
    x, reference, n = draw(noise, shape)
    config = StructureConfig(factor=4, iterations=iterations)
    out = sample_structure(
        model, x, grid(path), disable=True, path=path, config=config, reference=reference, noise=n
    )  # fmt: skip
    plain = SAMPLERS["euler"](model, x, grid(path), disable=True, path=path)
    torch.testing.assert_close(coarse(out, 4), coarse(reference, 4), rtol=0, atol=1e-12)
    torch.testing.assert_close(out - coarse(out, 4), plain - coarse(plain, 4), rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", ["ode", "ancestral"])
def test_a_filter_of_one_gives_the_reference(path, steps, gaussian, noise):
    x, reference, n = draw(noise, IMAGE)
    config = StructureConfig(factor=1, steps=steps)
    out = sample_structure(
        gaussian(path), x, grid(path), {"seed": 1}, disable=True, path=path, config=config, reference=reference, noise=n
    )  # fmt: skip
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_above_zero_the_coarse_part_is_that_of_the_reference_at_the_same_level(path, gaussian, noise):
    x, reference, n = draw(noise, IMAGE)
    model, sigmas = gaussian(path), grid(path, to_zero=False)
    for iterations in range(3):
        out = sample_structure(
            model, x, sigmas, disable=True, path=path, config=StructureConfig(4, iterations), reference=reference,
            noise=n,
        )  # fmt: skip
        target = reference
        for _ in range(iterations):
            target = model(path.add_noise(target, sigmas[-1], n), sigmas[-1:].expand(2))
        guide = path.add_noise(target, sigmas[-1], n)
        torch.testing.assert_close(coarse(out, 4), coarse(guide, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", ["ode", "ancestral"])
def test_with_nothing_guided_it_is_the_plain_sampler(path, steps, gaussian, noise):
    x, reference, n = draw(noise, IMAGE)
    config = StructureConfig(first=1e-9, last=1e-9, steps=steps)
    out = sample_structure(
        gaussian(path), x, grid(path), {"seed": 4}, disable=True, path=path, config=config, reference=reference, noise=n
    )  # fmt: skip
    name = {"ode": "euler", "ancestral": "euler_ancestral"}[steps]
    plain = SAMPLERS[name](gaussian(path), x, grid(path), {"seed": 4}, disable=True, path=path)
    if path.kind == "VP" and steps == "ancestral":
        torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-10)
    else:
        torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [VE, FLOW, VP])
def test_only_levels_in_the_range_are_guided_and_each_iteration_is_a_call(path, gaussian, noise):
    x, reference, n = draw(noise, IMAGE)
    levels = LEVELS[path.kind]
    model = gaussian(path)
    config = StructureConfig(4, 3, first=levels[1], last=levels[2])
    sample_structure(model, x, grid(path), disable=True, path=path, config=config, reference=reference, noise=n)
    called = [float(s[0]) for s in model.sigmas]
    one, two, three, four = levels
    assert called == pytest.approx([one, two, two, two, two, three, three, three, three, four])


@pytest.mark.parametrize("path", [VE, FLOW, VP])
@pytest.mark.parametrize("shape", [(8, 4, 6, 8), (8, 4, 2, 6, 8)])
def test_a_batch_of_eight_is_eight_batches_and_one_reference_serves_all(path, shape, gaussian, noise):
    x, references, n = draw(noise, shape)
    config = StructureConfig(4, 1)

    def run(x, reference, n):
        return sample_structure(
            gaussian(path), x, grid(path), disable=True, path=path, config=config, reference=reference, noise=n
        )  # fmt: skip

    parts = [run(x[i : i + 1], references[i : i + 1], n[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(run(x, references, n), torch.cat(parts), rtol=1e-12, atol=1e-12)
    assert torch.equal(run(x, references[:1], n), run(x, references[:1].repeat(8, *(1,) * (x.ndim - 1)), n))


@pytest.mark.parametrize("path", [VE, FLOW, VP])
def test_outside_the_mask_nothing_is_guided(path, gaussian, noise):
    x, reference, n = draw(noise, IMAGE)
    mask = torch.zeros(IMAGE, dtype=torch.float64)
    mask[..., 3:] = 1
    out = sample_structure(
        gaussian(path), x, grid(path), disable=True, path=path, config=StructureConfig(4), reference=reference, noise=n,
        mask=mask,
    )  # fmt: skip
    plain = SAMPLERS["euler"](gaussian(path), x, grid(path), disable=True, path=path)
    torch.testing.assert_close(out[..., :3], plain[..., :3], rtol=1e-12, atol=1e-12)
    assert float((out[..., 3:] - plain[..., 3:]).abs().max()) > 0.01


def test_the_callback_gets_every_step(gaussian, noise):
    x, reference, n = draw(noise, IMAGE)
    seen = []
    sample_structure(
        gaussian(VE), x, grid(VE), None, seen.append, True, path=VE, config=StructureConfig(4, 1), reference=reference,
        noise=n,
    )  # fmt: skip
    assert [info["i"] for info in seen] == [0, 1, 2, 3]
    assert all(set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"} for info in seen)


def test_bad_values_are_named(gaussian, noise):
    for field, bad in (("factor", 0), ("iterations", 17), ("steps", "heun")):
        with pytest.raises(ValueError, match=f"{field}.*{bad}"):
            StructureConfig(**{field: bad})
    with pytest.raises(ValueError, match="ends at level 2, above its start 1.*start_percent"):
        StructureConfig(first=1.0, last=2.0)
    for shape in ((1, 4, 8, 8), (3, 4, 11, 8), (2, 16, 11, 8)):
        with pytest.raises(ValueError, match="reference latent has shape .* VAE of this model"):
            check_reference(torch.zeros(shape), IMAGE)
    with pytest.raises(ValueError, match="packed"):
        check_reference(torch.zeros(1, 1, 77), (1, 1, 77))
    x, reference, n = draw(noise, IMAGE)
    with pytest.raises(SamplingDiverged, match="model returned NaN or infinity in step 1 of 4"):
        sample_structure(
            lambda x, s: x * float("nan"), x, grid(VE), disable=True, path=VE, config=StructureConfig(4),
            reference=reference, noise=n,
        )  # fmt: skip
