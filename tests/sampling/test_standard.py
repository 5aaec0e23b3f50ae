"""Standard samplers on Gaussians: exact solutions, orders of convergence, batches, videos and what diverges."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.standard import SAMPLERS, SamplingDiverged, default_noise_sampler

PATHS = [VE, FLOW, VP, NoisePath("FLOW", 8.0)]
DETERMINISTIC = {"euler": 1, "heun": 2, "dpmpp_2m": 2, "ddim": 1}
TOP = {"VE": 14.0, "FLOW": 0.95, "VP": 14.0}


def geometric(path, steps, low=0.05):
    return torch.linspace(math.log(TOP[path.kind]), math.log(low), steps + 1, dtype=torch.float64).exp()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence_to_the_exact_flow(name, path, gaussian, noise):
    model = gaussian(path)
    x = 3 * noise((2, 4, 3, 3), dtype=torch.float64)

    def error(steps):
        sigmas = geometric(path, steps)
        out = SAMPLERS[name](model, x, sigmas, disable=True, path=path)
        return float((out - model.ode(x, sigmas[0], sigmas[-1])).abs().max())

    order = math.log2(error(200) / error(400))
    assert order == pytest.approx(DETERMINISTIC[name], abs=0.15)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_datum_is_reached_in_one_step(name, path, gaussian, noise):
    model = gaussian(path, mu=0.4, S=0.0)
    x = noise((2, 4, 3, 3), dtype=torch.float64)
    out = SAMPLERS[name](model, x, torch.tensor([TOP[path.kind], 0.0], dtype=torch.float64), disable=True, path=path)
    torch.testing.assert_close(out, torch.full_like(x, 0.4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_single_datum_is_followed_exactly_between_levels(name, path, gaussian, noise):
    n = noise((2, 4, 3, 3), dtype=torch.float64)
    mu = torch.full_like(n, 0.4)
    sigmas = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    out = SAMPLERS[name](gaussian(path, S=0.0), path.add_noise(mu, 0.9, n), sigmas, disable=True, path=path)
    torch.testing.assert_close(out, path.add_noise(mu, 0.2, n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 4, 5, 6), (8, 4, 3, 5, 6)], ids=["image", "video"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_of_eight_is_eight_batches_of_one(name, path, shape, gaussian, noise):
    fresh = [noise(shape, 10 + k) for k in range(4)]
    sigmas = torch.tensor([TOP[path.kind], 0.8, 0.5, 0.1, 0.0])

    def sample(rows):
        options = {}
        if name in ("lcm", "euler_ancestral"):
            stream = iter(fresh)
            options["noise_sampler"] = lambda sigma, sigma_next: next(stream)[rows]
        return SAMPLERS[name](gaussian(path), noise(shape)[rows], sigmas, disable=True, path=path, **options)

    together = sample(slice(None))
    assert together.shape == shape
    for k in range(8):
        assert torch.equal(together[k : k + 1], sample(slice(k, k + 1)))


@pytest.mark.parametrize("path", PATHS)
def test_lcm_renoises_the_clean_latent(path, gaussian, noise):
    fresh = noise((2, 4, 5, 6), 3)
    model = gaussian(path)
    out = SAMPLERS["lcm"](
        model, noise((2, 4, 5, 6)), torch.tensor([0.9, 0.3]), disable=True, path=path, noise_sampler=lambda *_: fresh
    )
    x0 = model(model.inputs[0], torch.tensor([0.9, 0.9]))
    torch.testing.assert_close(out, path.add_noise(x0, 0.3, fresh))


@pytest.mark.parametrize("path", PATHS)
def test_ancestral_steps_keep_the_marginal_of_a_single_datum(path, gaussian, noise):
    """With S = 0 the latent must be mu's at every level: standard deviation b(sigma), whatever mix of old and new."""
    shape = (4, 4, 64, 64)
    n, mu = noise(shape, 1), torch.full(shape, 0.4)
    x = path.add_noise(mu, 0.9, n)
    out = SAMPLERS["euler_ancestral"](
        gaussian(path, S=0.0), x, torch.tensor([0.9, 0.6, 0.3]), {"seed": 5}, disable=True, path=path
    )
    unit = path.noise_from(out, mu, 0.3)
    assert float(unit.mean()) == pytest.approx(0, abs=0.02)
    assert float(unit.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("path", [VE, FLOW, VP])
def test_ancestral_without_fresh_noise_is_euler(path, gaussian, noise):
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0])
    x = noise((2, 4, 5, 6))
    ancestral = SAMPLERS["euler_ancestral"](gaussian(path), x, sigmas, disable=True, path=path, eta=0.0)
    euler = SAMPLERS["euler"](gaussian(path), x, sigmas, disable=True, path=path)
    torch.testing.assert_close(ancestral, euler, rtol=1e-5, atol=1e-5)


def test_default_noise_starts_after_the_seed_of_the_start_noise(noise):
    x = torch.empty(2, 4, 5, 6)
    draw = default_noise_sampler(x, seed=7)
    generator = torch.Generator().manual_seed(8)
    for _ in range(2):
        assert torch.equal(draw(None, None), torch.randn(x.shape, generator=generator))
    torch.manual_seed(3)
    free = default_noise_sampler(x)(None, None)
    torch.manual_seed(3)
    assert torch.equal(free, torch.randn(x.shape))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", [VE, FLOW, VP])
def test_callback_gets_every_step_in_the_path_s_own_coordinates(name, path, gaussian, noise):
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0])
    model, seen = gaussian(path), []
    x = noise((2, 4, 5, 6))
    SAMPLERS[name](model, x, sigmas, {"seed": 1}, seen.append, True, path=path)
    assert [info["i"] for info in seen] == [0, 1, 2]
    assert [float(info["sigma"]) for info in seen] == sigmas[:3].tolist()
    assert all(set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"} for info in seen)
    torch.testing.assert_close(seen[0]["x"], x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_levels_to_move_between_leave_the_latent_alone(name, gaussian, noise):
    x = noise((2, 4, 5, 6))
    for sigmas in (torch.tensor([0.5]), torch.empty(0)):
        for path in (VE, VP):
            assert torch.equal(SAMPLERS[name](gaussian(path), x, sigmas, disable=True, path=path), x)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_model_that_breaks_is_named_with_step_and_sigma(name, bad, gaussian, noise):
    good = gaussian(VE)

    def model(x, sigma, **extra_args):
        out = good(x, sigma)
        if float(sigma[0]) == 0.5:
            out[0, 0, 0, 0] = bad
        return out

    sigmas = torch.tensor([4.0, 0.75, 0.5, 0.25])
    # heun asks for the level ahead, so its second call of step 2 already meets it.
    step = "step 2 of 3 .sigma 0.75." if name == "heun" else "step 3 of 3 .sigma 0.5."
    with pytest.raises(SamplingDiverged, match=f"NaN or infinity in {step}.*bf16 or fp32"):
        SAMPLERS[name](model, noise((2, 4, 5, 6)), sigmas, disable=True)


def test_a_latent_that_comes_in_broken_is_named(gaussian):
    x = torch.full((1, 4, 5, 6), math.nan)
    with pytest.raises(SamplingDiverged, match=r"entered step 1 of 1 \(sigma 4\) already holds NaN"):
        SAMPLERS["euler"](gaussian(VE), x, torch.tensor([4.0, 0.0]), disable=True)


def test_overflow_without_a_broken_model_is_named(noise):
    with pytest.raises(SamplingDiverged, match="left its number format"):
        SAMPLERS["euler"](lambda x, s: x * 0, noise((1, 4, 5, 6)), torch.tensor([1e-30, 1e30]), disable=True)
