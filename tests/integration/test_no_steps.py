"""Schedules of no step and of one level in real ComfyUI: what core's sampler gives, or a sentence about `sigmas`."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.integration
NO_STEPS = r"^sigmas: the schedule has no steps.*raise denoise"


@pytest.fixture
def ready(tiny, guided):
    """ready(kind) -> (MODEL, GUIDER, LATENT of two pictures)."""

    def make(kind):
        model, positive, negative, latent = tiny(kind, 2)
        filled = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1))
        return model, guided(model, positive, negative, 2.0), {**latent, "samples": filled}

    return make


def drawn(comfy, guider, sampler, sigmas, latent):
    noise = comfy.sample.prepare_noise(latent["samples"], 7)
    with torch.inference_mode():
        return guider.sample(noise, latent["samples"], sampler, sigmas, seed=7).cpu()


@pytest.mark.parametrize("kind", ["flow", "eps", "wan", "cog"])
def test_every_sampler_gives_what_cores_gives(comfy, node, near, ready, kind):
    model, guider, latent = ready(kind)
    middle = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
    many = torch.randn(6, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(8))
    gauss = node(
        "RetortGaussianStatistics", model=[model], latents=[{"samples": many}], rank=[0], folder=[""], width=[64],
        height=[64], name=[""], form=["this size (low rank)"],
    )[0]  # fmt: skip
    euler = comfy.samplers.sampler_object("euler")
    samplers = {
        "fresh noise": node("RetortDistilledSampler", preset="lcm")[0],
        "predicted noise": node("RetortDistilledSampler", preset="lightning_sdxl")[0],
        "teleport": node("RetortTeleportSampler", sampler=euler, statistics=gauss)[0],
        "reflection": node("RetortReflectionSampler", weak=guider)[0],
        "dopri5": node("RetortDopri5Sampler")[0],
        "structure": node("RetortStructureSampler", reference=latent)[0],
    }
    for levels in ([], [0.0], [middle]):
        sigmas = torch.tensor(levels)
        want = drawn(comfy, guider, euler, sigmas, latent)
        assert torch.isfinite(want).all()
        for name, sampler in samplers.items():
            if name == "reflection" and kind == "cog":
                continue
            out = drawn(comfy, guider, sampler, sigmas, latent)
            torch.testing.assert_close(out, want, rtol=1e-4, atol=near(1e-4, want), msg=f"{name} {levels}")


@pytest.mark.parametrize("levels", [[], [0.5]])
def test_searches_comparisons_and_set_ups_name_the_sigmas(comfy, embedded, ours, levels):
    host, model, clip, vae = embedded("flow", False)
    search, policy, reflect = (ours(f"nodes.{name}") for name in ("search", "noise_policy", "reflection"))
    sigmas, latent = torch.tensor(levels), {"samples": torch.zeros(2, 16, 8, 8)}
    with torch.inference_mode():
        words = [host.encode_text(clip, text) for text in ("a seven", "")]
        reward = ours("hosts.rewards.kinds").make(host, "sharpness", {})
        guider = host.cfg_guider(model, *words, 2.0)
        for name, inputs in search.METHODS.items():
            how = {"method": name, **{one.id: one.default for one in inputs()}}
            with pytest.raises(ValueError, match=NO_STEPS):
                search.RetortTreeSearch.execute(guider, sigmas, latent, vae, reward, how)
        with pytest.raises(ValueError, match=NO_STEPS):
            policy.RetortNoisePolicy.execute(guider, sigmas, latent, vae, reward)
        pair = {"pair": "cfg", "weak_cfg": 0.0}
        made = reflect.RetortReflectionSetup.execute(model, *words, pair, sigmas=sigmas).args
        assert made[2].startswith("sigmas: the schedule has no steps")
        with pytest.raises(ValueError, match=NO_STEPS):
            reflect.RetortReflectionCompare.execute(made[0], made[1], sigmas, latent, vae)
