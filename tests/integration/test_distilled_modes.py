"""Labels, noise scales and sound's shift in real ComfyUI, on tiny networks of the models' own classes."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

pytestmark = pytest.mark.integration

LTX = {
    "num_layers": 1, "cross_attention_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2,
    "caption_channels": 64,
}  # fmt: skip
SIZES = {
    "MiniMaxH3": {
        "image_model": "minimax_h3", "hidden_size": 128, "num_layers": 1, "token_refiner_num_layers": 1,
        "num_attention_heads": 1, "attention_head_dim": 128, "ffn_hidden_size": 128, "text_dim": 64,
        "timestep_input_dim": 64, "time_embed_hidden_size": 64, "time_embed_dim": 64, "rope_inv_freq_len": 16,
    },
    "LTXAV": {
        "image_model": "ltxav", **LTX, "audio_cross_attention_dim": 32, "audio_attention_head_dim": 16,
        "audio_num_attention_heads": 2, "connector_attention_head_dim": 32, "connector_num_attention_heads": 2,
        "connector_num_layers": 1,
    },
    "HiDreamO1": {
        "image_model": "hidream_o1",
        "text_config_overrides": {
            "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1,
        },
        "vision_config_overrides": {
            "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "depth": 1, "num_position_embeddings": 64,
        },
    },
}  # fmt: skip
LATENTS = {"MiniMaxH3": ((24, 2, 8, 8), (32, 2, 3)), "LTXAV": ((128, 2, 4, 4), (8, 6, 16)), "HiDreamO1": ((3, 64, 64),)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def real(comfy):
    """real(name) -> a MODEL of a class of comfy.supported_models with random weights, a prompt and an empty LATENT."""
    nested = importlib.import_module("comfy.nested_tensor").NestedTensor
    made = {}

    def build(name):
        torch.manual_seed(0)
        config = getattr(comfy.supported_models, name)(copy.deepcopy(SIZES[name]))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in (*model.diffusion_model.parameters(), *model.diffusion_model.buffers()):
                if weight.is_floating_point():
                    scale = min(0.16, weight[0].numel() ** -0.5) if weight.ndim > 1 else 0.02
                    weight.copy_(torch.randn(weight.shape, generator=generator) * scale + (weight.ndim == 1))
        device = comfy.model_management.get_torch_device()
        return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))

    def find(name):
        if name not in made:
            made[name] = build(name)
        if name == "HiDreamO1":
            ids = [151644, 872, 198, *range(100, 106), 151645, 198, 151644, 77091, 198, 151669, 151673]
            prompt = [[torch.zeros(1, 1, 1), {"text_input_ids": torch.tensor([ids])}]]
        else:
            prompt = [[draw(1, 8, 128 if name == "LTXAV" else 64, seed=5), {"frame_rate": 25}]]
        parts = [torch.zeros(1, *shape) for shape in LATENTS[name]]
        return made[name], prompt, {"samples": nested(parts) if len(parts) > 1 else parts[0]}

    return find


def parts_of(samples):
    return samples.unbind() if samples.is_nested else [samples]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(parts_of(one), parts_of(other), strict=True))


@pytest.fixture
def host(ours):
    return ours("hosts.comfyui.host").host


@pytest.mark.parametrize(("video", "audio"), [(6.0, 3.0), (10.0, 3.0), (12.0, 4.0)])
def test_the_sounds_shift_is_set_as_core_s_node_sets_it(comfy, host, real, guided, sample, video, audio):
    """To the bit, in what is sampled and in what the network itself computes with."""
    model, prompt, latent = real("MiniMaxH3")
    node = importlib.import_module("comfy_extras.nodes_minimax_h3").MiniMaxH3SigmaShift
    theirs, mine = node.execute(model, video, audio)[0], host.with_shift(model, video, audio)
    euler = comfy.samplers.sampler_object("euler")
    samplings = [m.get_model_object("model_sampling") for m in (theirs, mine)]
    sigmas = [comfy.samplers.calculate_sigmas(sampling, "simple", 2) for sampling in samplings]
    assert torch.equal(*sigmas)
    found, expected = (sample(guided(m, prompt, prompt), euler, sigmas[0], latent) for m in (mine, theirs))
    assert equal(found, expected)
    plain = sample(guided(host.with_shift(model, video), prompt, prompt), euler, sigmas[0], latent)
    assert equal(plain, expected) == (audio == 3.0)  # the family's own sound
    assert not model.model_options["transformer_options"] and "model_sampling" not in model.object_patches


def test_a_model_without_such_sound_has_no_shift_for_it(host, real, tiny):
    for model in (real("LTXAV")[0], tiny("flow")[0]):
        with pytest.raises(ValueError, match="audio_shift 3 cannot be set: only models of video with sound"):
            host.with_shift(model, 3.0, 3.0)


@pytest.mark.parametrize("mode", ["deterministic", "renoise", "ancestral"])
@pytest.mark.parametrize("name", ["LTXAV", "MiniMaxH3"])
def test_video_with_sound_goes_through_every_mode_and_two_networks(ours, host, real, guided, sample, name, mode):
    model, prompt, latent = real(name)
    method, rule = ours("hosts.methods").Distilled, ours("sampling.distilled").Rule(mode)
    sigmas, guider = torch.tensor([1.0, 0.9375, 0.8333, 0.625, 0.0]), guided(model, prompt, prompt)
    once = sample(guider, host.method_sampler(method(rule, "unit")), sigmas, latent)
    twice = sample(guider, host.method_sampler(method(rule, "unit", None, guider, 0.875)), sigmas, latent)
    assert len(parts_of(once)) == 2
    for a, b in zip(parts_of(twice), parts_of(once), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_a_second_stage_adds_its_first_levels_noise_to_the_latents_of_the_first(ours, host, real, guided, sample):
    """LTX's, with sound, as core's euler does it; core's last step to zero rounds otherwise."""
    model, prompt, latent = real("LTXAV")
    samplers = importlib.import_module("comfy.samplers")
    filled = {"samples": type(latent["samples"])([draw(*p.shape, seed=2) for p in latent["samples"].unbind()])}
    method, rule = ours("hosts.methods").Distilled, ours("sampling.distilled").Rule("deterministic")
    sigmas, guider = torch.tensor([0.909375, 0.725, 0.421875, 0.0]), guided(model, prompt, prompt)
    found = sample(guider, host.method_sampler(method(rule, "noised")), sigmas, filled)
    expected = sample(guider, samplers.sampler_object("euler"), sigmas, filled)
    for a, b in zip(parts_of(found), parts_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_hidream_o1_s_noise_is_core_s_to_the_bit(comfy, ours, host, real, guided, sample):
    """ModelNoiseScale at 7.5 and SamplerLCM that cuts at 2.5 deviations."""
    model, prompt, latent = real("HiDreamO1")
    node = importlib.import_module("comfy_extras.nodes_model_advanced").ModelNoiseScale
    theirs, mine = node().patch(model, 7.5)[0], host.with_noise_scale(model, 7.5)
    sigmas = torch.tensor([0.999, 0.6, 0.3, 0.0])
    lcm = comfy.samplers.ksampler("lcm", {"s_noise": 1.0, "s_noise_end": 1.0, "noise_clip_std": 2.5})
    method, rule = ours("hosts.methods").Distilled, ours("sampling.distilled").Rule
    # With torch 2.14 a network's first run may round otherwise than the next, core's own as well.
    _, expected = (sample(guided(theirs, prompt, prompt), lcm, sigmas, latent) for _ in range(2))
    for which in (mine, model):  # the family's own scale is 8
        sampler = host.method_sampler(method(rule(noise_scale=7.5, clip=2.5), "noised"))
        assert torch.equal(sample(guided(which, prompt, prompt), sampler, sigmas, latent), expected)
    assert model.get_model_object("model_sampling").noise_scale == 8.0


def test_noise_scales_are_for_flows(host, tiny):
    with pytest.raises(ValueError, match="noise_scale 7.5 cannot be set"):
        host.with_noise_scale(tiny("eps")[0], 7.5)


def makers_answer(network, scale):
    """What NitroFusion's authors let a BaseModel answer: its output read at the level of the timestep it is told."""

    def apply(x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **more):  # noqa: B006
        sampling = network.model_sampling
        seen = sampling.calculate_input(t, x)
        shown = (sampling.timestep(t) * scale).long()
        answer = network.diffusion_model(
            seen, shown.float(), context=c_crossattn, control=control, transformer_options=transformer_options, **more
        )
        level = sampling.sigma(shown).view(-1, 1, 1, 1)
        return sampling.calculate_denoised(level, answer.float(), seen * (level**2 + 1) ** 0.5)

    return apply


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("scale", [0.25, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_a_network_is_told_another_timestep_as_its_authors_tell_it(
    comfy, ours, host, tiny, guided, sample, recording, monkeypatch, near, scale, masked, batch
):
    model, positive, negative, latent = tiny("eps", batch)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    if masked:
        latent = {"samples": draw(*latent["samples"].shape, seed=4), "noise_mask": torch.zeros(1, 1, 8, 8)}
        latent["noise_mask"][..., :4] = 1
    method, rule = ours("hosts.methods").Distilled, ours("sampling.distilled").Rule
    guider, plain = guided(model, positive, negative, 2.0), host.method_sampler(method(rule(), "unit"))
    before = sample(guider, plain, sigmas, latent)
    with recording(model) as seen:
        found = sample(guider, host.method_sampler(method(rule(label_scale=scale), "unit")), sigmas, latent)
    assert [int(t) for call in seen.timesteps for t in call.unique()] == [int(t * scale) for t in (999, 749, 499, 249)]
    assert torch.equal(sample(guider, plain, sigmas, latent), before)  # nothing is left on the MODEL
    monkeypatch.setattr(model.model, "_apply_model", makers_answer(model.model, scale))
    expected = sample(guider, plain, sigmas, latent)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=near(1e-4 * float(expected.abs().max()), expected))
    assert not torch.allclose(found, before, atol=0.01)
