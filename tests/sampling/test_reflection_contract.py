"""Reflection as a sampler among samplers: batches, videos, masks, callbacks, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.path import FLOW, VE, VP
from retort.sampling.reflection import INVERSIONS, ReflectionConfig, sample_reflection
from retort.sampling.standard import SamplingDiverged

PATHS = [VE, FLOW, VP]


@pytest.mark.parametrize("shape", [(8, 4, 5, 6), (8, 4, 3, 5, 6)], ids=["image", "video"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("inversion", INVERSIONS)
def test_batch_of_eight_is_eight_batches_of_one(path, shape, inversion, gaussian, noise):
    sigmas = torch.tensor([0.95 if path.kind == "FLOW" else 14.0, 0.8, 0.5, 0.1, 0.0])
    config = ReflectionConfig(inversion=inversion, base="dpmpp_2m", rounds=2)

    def sample(rows):
        return sample_reflection(
            gaussian(path), noise(shape)[rows], sigmas, disable=True, path=path, weak=gaussian(path, mu=0.1),
            config=config,
        )  # fmt: skip

    together = sample(slice(None))
    assert together.shape == shape and together.dtype == torch.float32
    for k in range(8):
        torch.testing.assert_close(together[k : k + 1], sample(slice(k, k + 1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("inversion", INVERSIONS)
def test_a_mask_holds_after_each_leg(path, inversion, gaussian, noise):
    """What is kept is the picture at the level of the latent, whatever the models say there."""
    shape, picture, unit = (2, 4, 5, 6), noise((2, 4, 5, 6), 1), noise((2, 4, 5, 6), 2)
    free = torch.zeros(shape, dtype=torch.bool)
    free[..., 3:] = True
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0])
    asked = []

    def keep(x, sigma):
        asked.append(float(sigma))
        return torch.where(free, x, path.add_noise(picture, sigma, unit))

    def seen_by(model):
        def call(x, sigma, **extra_args):
            entered.append((float(sigma[0]), x))
            # As a host does it: what is kept is its picture.
            return torch.where(free, model(x, sigma), picture)

        return call

    entered, middle = [], inversion == "midpoint"
    out = sample_reflection(
        seen_by(gaussian(path)), path.add_noise(picture, 0.9, unit), sigmas, disable=True, path=path, keep=keep,
        weak=seen_by(gaussian(path, mu=2.0)), config=ReflectionConfig(inversion=inversion),
    )  # fmt: skip
    torch.testing.assert_close(out[~free], picture[~free])
    assert asked == pytest.approx([0.6, 0.9, 0.3, 0.6])
    assert len(entered) == 3 + 2 * (1 + {"euler": 1, "midpoint": 2, "fixed_point": 3}[inversion])
    for sigma, x in entered:
        expected = path.add_noise(picture, sigma, unit)
        if path.kind == "VP" and middle:
            continue  # halfway in VE coordinates is not halfway in VP's
        torch.testing.assert_close(x[~free], expected[~free], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"begin": -0.1}, "begin must be between 0 and 1, got -0.1: it is a share"),
        ({"end": 1.5}, "end must be between 0 and 1, got 1.5: it is a share"),
        ({"begin": 0.6, "end": 0.5}, "in this order"),
        ({"begin": math.nan}, "begin must be .* got nan"),
        ({"rounds": 0}, "rounds must be between 1 and 16, got 0"),
        ({"iterations": 0}, "iterations must be between 1 and 64, got 0"),
        ({"inversion": "exact"}, "inversion must be one of euler, midpoint, fixed_point, got 'exact'"),
        ({"base": "unipc"}, "base must be one of euler, heun, dpmpp_2m, got 'unipc'"),
        ({"base": "euler_ancestral"}, "base must be one of euler.*a step that draws fresh noise would drown"),
        ({"base": "dpmpp_2m_sde"}, "draws fresh noise"),
        ({"base": "lcm"}, "draws fresh noise"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ReflectionConfig(**settings)


def test_a_range_that_holds_no_step_of_the_schedule_is_refused(gaussian, noise):
    for sigmas, config in ((torch.tensor([4.0, 0.0]), {}), (torch.linspace(4, 1, 11), {"begin": 0.41, "end": 0.44})):
        with pytest.raises(ValueError, match=r"hold none of the \d+ steps.*widen the range or take more steps"):
            sample_reflection(
                gaussian(VE), noise((1, 4, 3, 3)), sigmas, disable=True, weak=gaussian(VE),
                config=ReflectionConfig(**config),
            )  # fmt: skip


@pytest.mark.parametrize("inversion", INVERSIONS)
@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("weak", "the weak model returned NaN or infinity in step 2 of 4"),
        ("down", "the strong model, in a reflection, returned NaN or infinity in step 2 of 4"),
        ("main", "the model returned NaN or infinity in step 2 of 4"),
    ],
)
def test_the_model_that_breaks_is_named(which, said, inversion, gaussian, noise):
    def breaking(name):
        calls = []

        def model(x, sigma, **extra_args):
            calls.append(sigma)
            out = gaussian(VE)(x, sigma)
            per_step = {"weak": {"euler": 1, "midpoint": 2, "fixed_point": 3}[inversion]}.get(name, 1)
            if name == which and len(calls) > per_step:
                out[0, 0, 0, 0] = math.nan
            return out

        return model

    with pytest.raises(SamplingDiverged, match=said):
        sample_reflection(
            breaking("main"), noise((2, 4, 5, 6)), torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0]), disable=True,
            weak=breaking("weak"), reflecting=breaking("down"), config=ReflectionConfig(inversion=inversion),
        )  # fmt: skip


def test_a_latent_that_comes_in_broken_is_named(gaussian):
    x = torch.full((1, 4, 5, 6), math.nan)
    with pytest.raises(SamplingDiverged, match="already holds NaN"):
        sample_reflection(
            gaussian(VE), x, torch.tensor([4.0, 2.0, 0.0]), disable=True, weak=gaussian(VE), config=ReflectionConfig()
        )


@pytest.mark.parametrize("path", PATHS)
def test_the_callback_gets_every_step_in_the_paths_own_coordinates(path, gaussian, noise):
    sigmas, x, seen = torch.tensor([0.9, 0.6, 0.3, 0.0]), noise((2, 4, 5, 6)), []
    model = gaussian(path)
    sample_reflection(
        model, x, sigmas, {"seed": 1}, seen.append, True, path=path, weak=gaussian(path),
        config=ReflectionConfig(inversion="fixed_point"),
    )  # fmt: skip
    assert [info["i"] for info in seen] == [0, 1, 2]
    assert all(set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"} for info in seen)
    torch.testing.assert_close(seen[0]["x"], x)


def test_no_levels_to_move_between_leave_the_latent_alone(gaussian, noise):
    x = noise((2, 4, 5, 6))
    for sigmas in (torch.tensor([0.5]), torch.empty(0)):
        for path in (VE, VP):
            found = sample_reflection(
                gaussian(path), x, sigmas, disable=True, path=path, weak=gaussian(path), config=ReflectionConfig()
            )
            assert torch.equal(found, x)
