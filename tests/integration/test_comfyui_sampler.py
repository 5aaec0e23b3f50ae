"""Few-step sampling in real ComfyUI: what enters the network, and that the samples are core's where core can do it."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from retort.sampling import presets

pytestmark = pytest.mark.integration



def stand_in(preset):
    """The tiny network that stands in for a preset's model; None for latents or sound that no such network here has,
    and for blocks of frames, which only the model's own class samples."""
    kinds = {"v": "cog", "flow": "wan" if preset.latent_dims == 3 else "flow"}
    if preset.audio_shift is not None or preset.frames_per_block is not None:
        return None
    if preset.family == "flow" and preset.latent_channels not in (None, 16):
        return None
    return kinds.get(preset.family, "eps16" if preset.latent_channels == 16 else "eps")


PRESETS = [key for key, preset in presets.PRESETS.items() if key != "custom" and stand_in(preset)]


@pytest.fixture
def setup(comfy):
    """setup(model, positive, preset, **options) -> MODEL, GUIDER, SAMPLER, SIGMAS of RetortDistilledSetup."""

    def make(model, positive, preset, steps=0, **options):
        return comfy.plugin["RetortDistilledSetup"].execute(model, positive, preset, steps, **options).args[:4]

    return make


def noise_of(comfy, latent, seed):
    return comfy.sample.prepare_noise(latent["samples"], seed)


def test_loading_the_plugin_delays_the_start_of_comfyui_by_at_most_three_tenths_of_a_second(comfy):
    assert comfy.import_seconds <= 0.3
    assert not comfy.imported, "packages that ComfyUI had not imported itself"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_network_first_sees_the_noise_of_the_seed_and_the_presets_timesteps(
    comfy, ours, tiny, setup, sample, recording, near, preset
):
    chosen = presets.PRESETS[preset]
    for steps in chosen.step_counts:
        model, positive, negative, latent = tiny(stand_in(chosen), batch=2)
        if chosen.start == "latent":
            latent = {"samples": torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1))}
        prompts = {} if chosen.cfg == 1 else {"negative": negative}
        patched, guider, sampler, sigmas = setup(model, positive, preset, steps, **prompts)
        with recording(patched) as seen:
            sample(guider, sampler, sigmas, latent, seed=11)

        first = noise_of(comfy, latent, 11)
        if chosen.start == "latent":
            first = model.model.process_latent_in(latent["samples"])
        assert len(seen.inputs) == steps
        assert (seen.inputs[0][: len(first)] - first).abs().max() < near(1e-5, first)
        received = [float(t) for call in seen.timesteps for t in call.unique()]
        if chosen.timesteps:  # whole numbers exactly
            assert received == [math.floor(t * chosen.label_scale) for t in presets.timesteps(chosen, steps)]
        else:
            expected = [1000 * level for level in presets.levels(chosen, steps).tolist()]
            assert received == pytest.approx(expected, rel=0, abs=1e-3)


def test_dmd2_is_core_lcm_on_core_simple_to_the_bit(comfy, tiny, setup, sample, guided):
    for batch in (1, 3):
        model, positive, negative, latent = tiny("eps", batch)
        _, guider, sampler, sigmas = setup(model, positive, "dmd2_sdxl_4step")
        simple = comfy.custom.BasicScheduler.execute(model, "simple", 4, 1.0)[0]
        assert torch.equal(sigmas, simple)
        lcm = comfy.samplers.sampler_object("lcm")
        assert torch.equal(
            sample(guider, sampler, sigmas, latent), sample(guided(model, positive, negative), lcm, simple, latent)
        )


def test_dmd2_equals_core_on_a_latent_image_too(comfy, tiny, setup, sample):
    model, positive, _, latent = tiny("eps", 2)
    latent["samples"] = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(3))
    latent["noise_mask"] = torch.zeros(1, 1, 64, 64)
    latent["noise_mask"][..., 32:] = 1
    lcm = comfy.samplers.sampler_object("lcm")
    for denoise in (1.0, 0.5):
        _, guider, sampler, sigmas = setup(model, positive, "dmd2_sdxl_4step", denoise=denoise)
        assert len(sigmas) == (5 if denoise == 1 else 3)
        for mask in (latent, {"samples": latent["samples"]}):
            assert torch.equal(sample(guider, sampler, sigmas, mask), sample(guider, lcm, sigmas, mask))


@pytest.mark.parametrize(("kind", "preset"), [("eps", "tdm_sd15"), ("flow", "tdm_sd3"), ("wan", "custom")])
def test_deterministic_steps_are_core_euler_from_the_same_start(comfy, tiny, sample, guided, recording, kind, preset):
    model, positive, negative, latent = tiny(kind, 2)
    grid = comfy.plugin["RetortDistilledSigmas"].execute(model, preset, 0, "1000 900 600 250")[0]
    # Core begins with bare noise at the model's highest level only: the eps grid starts there, a flow's 999 does not.
    start = "unit noise" if kind == "eps" else "noised latent"
    sampler = comfy.plugin["RetortDistilledSampler"].execute(preset, "deterministic", start)[0]
    guider = guided(model, positive, negative, 2.5)
    with recording(model) as ours:
        out = sample(guider, sampler, grid, latent)
    for name in ("euler", "ddim"):
        with recording(model) as core:
            expected = sample(guider, comfy.samplers.sampler_object(name), grid, latent)
        for mine, theirs in zip(ours.inputs, core.inputs, strict=True):
            assert torch.equal(mine, theirs)
        # Core reaches x0 by one more subtraction and addition, which round.
        assert (out - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["flow", "eps", "v", "wan", "cog"])
def test_later_inputs_follow_the_re_noising_form(comfy, ours, tiny, sample, guided, recording, near, kind):
    model, positive, negative, latent = tiny(kind, 2)
    schedule = model.get_model_object("model_sampling")
    text = "1000 750 500" if kind in ("flow", "wan") else "999 749 499"
    sigmas = comfy.plugin["RetortDistilledSigmas"].execute(model, "custom", 0, text)[0]
    sampler = comfy.plugin["RetortDistilledSampler"].execute("custom", "re-noise", "unit noise")[0]
    x0s = []
    guider = guided(model, positive, negative)
    noise = comfy.custom.Noise_RandomNoise(7).generate_noise(latent)
    with torch.inference_mode(), recording(model) as seen:
        guider.sample(
            noise, latent["samples"], sampler, sigmas, callback=lambda i, x0, x, n: x0s.append(x0.cpu()), seed=7
        )

    # The sampler's stream begins at seed + 1 on the processor, and at the seed on a card, where it does not meet noise.
    here = comfy.model_management.get_torch_device()
    generator = torch.Generator(here).manual_seed(8 if here.type == "cpu" else 7)
    for call, x0 in enumerate(x0s[:-1], start=1):
        n, s = torch.randn(noise.shape, generator=generator, device=here).cpu(), sigmas[call]
        expected = {
            "FLOW": (1 - s) * x0 + s * n,
            "VE": (x0 + s * n) / (1 + s**2) ** 0.5,  # the network's view of x0 + s n
            "VP": (x0 + s * n) / (1 + s**2) ** 0.5,
        }[ours("hosts.comfyui.coordinates").path_of(schedule).kind]
        limit = near(1e-5 * max(1.0, float(expected.abs().max())), expected)
        assert (seen.inputs[call] - expected).abs().max() < limit


def test_a_batch_is_its_items(comfy, tiny, setup, sample):
    for kind, preset in (("flow", "tdm_sd3"), ("eps16", "digits_eps")):
        model, positive, _, latent = tiny(kind, 3)
        _, guider, sampler, sigmas = setup(model, positive, preset, 1 if preset == "digits_eps" else 4)
        noise = noise_of(comfy, latent, 5)
        with torch.inference_mode():
            together = guider.sample(noise, latent["samples"], sampler, sigmas, seed=5)
            for i in range(3):
                alone = guider.sample(noise[i : i + 1], latent["samples"][:1], sampler, sigmas, seed=5)
                assert (together[i : i + 1] - alone).abs().max() < 1e-6 * float(alone.abs().max())


@pytest.mark.parametrize(
    ("kind", "preset"), [("flow", "tdm_sd3"), ("eps", "dmd2_sdxl_1step"), ("cog", "tdm_cogvideox_2b")]
)
def test_a_mask_keeps_the_rest_of_the_latent_image(ours, tiny, setup, sample, recording, near, kind, preset):
    model, positive, _, latent = tiny(kind)
    image = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, *([64, 64] if kind != "cog" else [8, 8]))
    mask[..., : mask.shape[-1] // 2] = 1
    patched, guider, sampler, sigmas = setup(model, positive, preset)
    with recording(patched) as seen:
        out = sample(guider, sampler, sigmas, {"samples": image, "noise_mask": mask}, seed=4)
    assert (out[..., 4:] - image[..., 4:]).abs().max() < 1e-5
    assert (out[..., :4] - image[..., :4]).abs().max() > 1e-2

    kept, n = model.model.process_latent_in(image), torch.randn(image.shape, generator=torch.manual_seed(4))
    for call, s in zip(seen.inputs, sigmas[:-1], strict=True):
        # What is kept enters the network at the level of the rest.
        level = (1 - s) * kept + s * n if kind == "flow" else (kept + s * n) / (1 + s**2) ** 0.5
        assert (call[..., 4:] - level[..., 4:]).abs().max() < near(1e-5 * max(1.0, float(level.abs().max())), level)


def test_every_core_guider(comfy, tiny, setup, sample, guided):
    model, positive, negative, latent = tiny("flow")
    _, guider, sampler, sigmas = setup(model, positive, "tdm_sd3")
    plain = sample(guider, sampler, sigmas, latent)
    custom = comfy.custom
    same = [
        guided(guider.model_patcher, positive, negative, 1.0),
        custom.BasicGuider.execute(guider.model_patcher, positive)[0],
        custom.DualCFGGuider.execute(guider.model_patcher, positive, negative, negative, 1.0, 1.0, "regular")[0],
        comfy.perpneg.PerpNegGuider.execute(guider.model_patcher, positive, negative, negative, 1.0, 0.0)[0],
    ]
    for one in same:
        assert (sample(one, sampler, sigmas, latent) - plain).abs().max() < 1e-5
    other = custom.DualCFGGuider.execute(guider.model_patcher, positive, negative, negative, 3.0, 2.0, "nested")[0]
    assert torch.isfinite(sample(other, sampler, sigmas, latent)).all()


def test_a_split_grid_is_the_whole_one(comfy, tiny, guided):
    for kind, text in (("flow", "1000 700 300"), ("eps", "999 600 200"), ("cog", "999 600 200")):
        model, positive, negative, latent = tiny(kind)
        guider = guided(model, positive, negative)
        sigmas = comfy.plugin["RetortDistilledSigmas"].execute(model, "custom", 0, text)[0]
        sampler = comfy.plugin["RetortDistilledSampler"].execute("custom", "deterministic")[0]
        noise = noise_of(comfy, latent, 3)
        with torch.inference_mode():
            whole = guider.sample(noise, latent["samples"], sampler, sigmas, seed=3)
            half = guider.sample(noise, latent["samples"], sampler, sigmas[:2], seed=3)
            rest = guider.sample(torch.zeros_like(noise), half, sampler, sigmas[1:], seed=3)
        assert (whole - rest).abs().max() < 2e-4 * max(1.0, float(whole.abs().max()))


def test_callback_and_previews_as_core(comfy, tiny, guided):
    model, positive, negative, latent = tiny("flow")
    guider = guided(model, positive, negative)
    sampler = comfy.plugin["RetortDistilledSampler"].execute("tdm_sd3")[0]
    sigmas = comfy.plugin["RetortDistilledSigmas"].execute(model, "tdm_sd3", 0)[0]
    calls = []
    with torch.inference_mode():
        out = guider.sample(
            noise_of(comfy, latent, 1), latent["samples"], sampler, sigmas, seed=1,
            callback=lambda step, x0, x, total: calls.append((step, x0, x, total)),
        )  # fmt: skip
    assert [(c[0], c[3]) for c in calls] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # The last step ends in the roundings of core's euler, which are not all of x0's bits.
    torch.testing.assert_close(model.model.process_latent_out(calls[-1][1]), out, rtol=1e-5, atol=1e-5)


def test_packed_latents_go_through(comfy, tiny, guided):
    # Core packs nested latents into (B, 1, N); the sampler must not care about the shape.
    model, positive, _, _ = tiny("flow")
    sampler = comfy.plugin["RetortDistilledSampler"].execute("tdm_sd3", "re-noise")[0]
    sigmas = comfy.plugin["RetortDistilledSigmas"].execute(model, "tdm_sd3", 0)[0]

    class Wrap:
        inner_model = model.model
        model_patcher = model

        def __call__(self, x, sigma, model_options, seed=None):
            return x * 0.5

    noise = torch.randn(2, 1, 77)
    out = sampler.sample(Wrap(), sigmas, {"model_options": {}, "seed": 1}, None, noise, torch.zeros_like(noise))
    assert out.shape == noise.shape


def test_models_with_other_coordinates_are_refused_by_name(comfy, ours):
    path_of, sampling = ours("hosts.comfyui.coordinates").path_of, comfy.model_sampling
    for name, schedule in (
        ("IMG_TO_IMG", "ModelSamplingDiscrete"),
        ("IMG_TO_IMG_FLOW", "ModelSamplingDiscreteFlow"),
    ):
        mixed = type("ModelSampling", (getattr(sampling, schedule), getattr(sampling, name)), {})()
        with pytest.raises(ValueError, match=name):
            path_of(mixed)
    kinds = {"EPS": "VE", "V_PREDICTION": "VE", "EDM": "VE", "X0": "VE", "V_PREDICTION_DDPM": "VP", "CONST": "FLOW"}
    for name, kind in kinds.items():
        mixed = type("ModelSampling", (sampling.ModelSamplingDiscrete, getattr(sampling, name)), {})()
        assert path_of(mixed).kind == kind
    cosmos = type("ModelSampling", (sampling.ModelSamplingCosmosRFlow, sampling.COSMOS_RFLOW), {})()
    assert path_of(cosmos) == ours("sampling.path").RECTIFIED
    flow = type("ModelSampling", (sampling.ModelSamplingDiscreteFlow, sampling.CONST), {})()
    flow.set_noise_scale(2.0)
    assert path_of(flow).noise_scale == 2.0


def test_noise_scale_reaches_the_network(comfy, tiny, setup, sample, recording, near):
    model, positive, _, latent = tiny("flow")
    sampling = type(model.model.model_sampling)(model.model.model_config)
    sampling.set_noise_scale(1.5)
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    patched, guider, sampler, sigmas = setup(model, positive, "tdm_sd3")
    assert patched.get_model_object("model_sampling").noise_scale == 1.5
    with recording(patched) as seen:
        sample(guider, sampler, sigmas, latent, seed=6)
    expected = 1.5 * noise_of(comfy, latent, 6)
    assert (seen.inputs[0] - expected).abs().max() < near(1e-5, expected)


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [
        ("ModelSamplingDiscreteFlow", {"multiplier": 1.0}),
        ("ModelSamplingFlux", {}),
        ("ModelSamplingAV", {"audio_shift": 2.0}),
    ],
)
def test_a_shift_is_sd3s_on_every_flow_schedule(comfy, ours, tiny, schedule, settings):
    model = tiny("flow")[0].clone()
    sampling = comfy.model_sampling
    old = type("ModelSampling", (getattr(sampling, schedule), sampling.CONST), {})(model.model.model_config)
    old.set_parameters(shift=1.15, **settings)
    model.add_object_patch("model_sampling", old)
    with torch.inference_mode():
        shifted = ours("hosts.comfyui.host").host.with_shift(model, 6.0)
    new, t = shifted.get_model_object("model_sampling"), torch.tensor(0.25)
    unit = settings.get("multiplier", 1000 if schedule != "ModelSamplingFlux" else 1.0)
    assert float(new.sigma(t * unit)) == pytest.approx(6 * 0.25 / (1 + 5 * 0.25))
    assert model.get_model_object("model_sampling") is old and old.shift == 1.15
    assert "audio_shift" not in settings or new.audio_shift == 2.0


def test_a_shift_on_an_eps_model_is_refused(ours, tiny):
    with pytest.raises(ValueError, match="shift 6 cannot be set.*predicts eps.*load a flow model"):
        ours("hosts.comfyui.host").host.with_shift(tiny("eps16")[0], 6.0)


def test_the_stock_lcm_patch_is_known(comfy, ours, tiny, setup, sample, recording):
    model, positive, _, latent = tiny("eps")
    patch = importlib.import_module("comfy_extras.nodes_model_advanced").ModelSamplingDiscrete()
    model = patch.patch(model, "lcm", False)[0]
    _, guider, sampler, sigmas = setup(model, positive, "lcm")
    with recording(model) as seen:
        out = sample(guider, sampler, sigmas, latent)
    assert [float(t) for t in torch.cat(seen.timesteps)] == [999.0, 759.0, 499.0, 259.0]
    assert torch.equal(out, sample(guider, comfy.samplers.sampler_object("lcm"), sigmas, latent))


def test_a_latent_of_nan_is_named(ours, tiny, setup, sample):
    model, positive, _, latent = tiny("flow")
    _, guider, sampler, sigmas = setup(model, positive, "digits_flow", 4, denoise=0.5)
    latent["samples"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ours("sampling.standard").SamplingDiverged, match="already holds NaN"):
        sample(guider, sampler, sigmas, latent)


def test_cfg_without_a_negative_prompt_is_refused(ours, tiny):
    model, positive, _, _ = tiny("flow")
    with pytest.raises(ValueError, match="cfg 2.5.*connect `negative`"):
        ours("hosts.comfyui.host").host.cfg_guider(model, positive, None, 2.5)
