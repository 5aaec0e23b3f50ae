"""The distilled nodes on the headless host, with a network that only remembers what it was given."""

from __future__ import annotations

import pytest
import torch

from retort.graphs.api.schema import HiddenHolder
from retort.hosts.headless.host import host
from retort.hosts.headless.model import LatentFormat, Model, NetworkSource
from retort.hosts.prompted import Source
from retort.nodes.checks import Asked
from retort.nodes.distilled import RetortDistilledSampler, RetortDistilledSetup, RetortDistilledSigmas
from retort.sampling.path import FLOW, VE
from retort.sampling.presets import PRESETS, PresetMismatch
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule

PROMPT = [[torch.zeros(1, 4, 8), {}]]


class Network:
    """Predicts a tenth of its input and keeps what came in."""

    device = torch.device("cpu")
    repeats_context = False

    def __init__(self):
        self.inputs, self.timesteps = [], []

    def conditions(self, tokens, extra, shape):
        return {"context": tokens}

    def __call__(self, x, timestep, **conditions):
        self.inputs.append(x)
        self.timesteps.append(timestep)
        return x * 0.1


def eps(channels=4, network=None):
    return Model(
        NetworkSource(lambda loras: network or Network()), DiscreteSchedule(), VE, "eps", LatentFormat(channels)
    )


def flow(network=None):
    source = NetworkSource(lambda loras: network or Network())
    return Model(source, FlowSchedule(shift=3.0), FLOW, "flow", LatentFormat(16))


def flux2():
    source = NetworkSource(lambda loras: Network())
    return Model(source, FlowSchedule(2.02), FLOW, "flow", LatentFormat(128, downscale=16))


def test_sigmas_are_the_presets():
    assert torch.equal(
        RetortDistilledSigmas.execute(eps(), "dmd2_sdxl_1step", 0).args[0][:1], DiscreteSchedule().sigmas[399:400]
    )
    assert len(RetortDistilledSigmas.execute(eps(), "lcm", 6).args[0]) == 7
    typed = RetortDistilledSigmas.execute(flow(), "custom", 0, "1000, 500").args[0]
    assert typed.tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(("denoise", "left"), [(1.0, 4), (0.75, 3), (0.5, 2), (0.1, 1), (0.0, None)])
def test_denoise_keeps_the_end_of_the_grid(denoise, left):
    whole = RetortDistilledSigmas.execute(eps(), "dmd2_sdxl_4step", 0).args[0]
    kept = RetortDistilledSigmas.execute(eps(), "dmd2_sdxl_4step", 0, "", denoise).args[0]
    assert torch.equal(kept, whole[:0] if left is None else whole[-1 - left :])


def test_sampler_follows_the_preset_unless_told_otherwise():
    for key, preset in PRESETS.items():
        if preset.frames_per_block is not None:  # ComfyUI's own sampler alone
            with pytest.raises(ValueError, match="autoregressive video is sampled in ComfyUI alone"):
                RetortDistilledSampler.execute(key)
            continue
        sampler = RetortDistilledSampler.execute(key).args[0]
        assert (sampler.rule, sampler.start) == (preset.rule, preset.start)
        assert sampler.preset is (preset if key != "custom" else None)
    sampler = RetortDistilledSampler.execute("tdm_sd3", "re-noise", "noised latent").args[0]
    assert (sampler.rule.mode, sampler.start) == ("renoise", "noised")


def test_setup_samples_as_the_preset_says():
    network = Network()
    model, guider, sampler, sigmas, split = RetortDistilledSetup.execute(flow(network), PROMPT, "tdm_sd3", 0).args
    assert split == 4
    assert model.schedule.shift == 6.0 and guider.cfg == 1.0 and guider.model is model
    noise = torch.randn(2, 16, 8, 8)
    out = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=1)
    assert torch.isfinite(out).all()
    assert torch.equal(network.inputs[0], noise)
    assert [float(t[0]) for t in network.timesteps] == [999.0, 947.0, 856.0, 666.0]


def test_setup_does_not_touch_the_incoming_model():
    model = flow()
    patched = RetortDistilledSetup.execute(model, PROMPT, "tdm_sd3", 0).args[0]
    assert model.schedule.shift == 3.0 and patched is not model


@pytest.mark.parametrize(
    ("model", "preset", "steps", "timesteps", "said"),
    [
        (eps(), "tdm_sd3", 0, "", ["TDM, SD3", "predicts 'eps'", "dmd2_sdxl_4step"]),
        (flow(), "dmd2_sdxl_4step", 0, "", ["DMD2", "predicts 'flow'", "boogu_turbo", "custom"]),
        (eps(16), "dmd2_sdxl_4step", 0, "", ["4 channels", "16", "digits_eps"]),
        (eps(), "dmd2_sdxl_4step", 3, "", ["steps is 3", "4"]),
        (eps(), "custom", 0, "", ["timesteps is empty", "999"]),
        (eps(), "custom", 0, "999, 400, 400", ["400 follows 400"]),
        (eps(), "custom", 0, "1000", ["1000 is outside"]),
        (eps(), "custom", 0, "x", ["'x'"]),
    ],
)
def test_a_mismatch_is_named_with_its_remedy(model, preset, steps, timesteps, said):
    for execute in (
        lambda: RetortDistilledSetup.execute(model, PROMPT, preset, steps, timesteps),
        lambda: RetortDistilledSigmas.execute(model, preset, steps, timesteps),
    ):
        with pytest.raises(PresetMismatch) as error:
            execute()
        for words in said:
            assert words in str(error.value)


def test_levels_follow_the_size_of_the_latent_and_1024_without_one(monkeypatch):
    said = []
    monkeypatch.setattr(type(host), "say", lambda self, text, warn=False: said.append(text))
    model = flux2()
    plain = RetortDistilledSigmas.execute(model, "flux2_klein", 0).args[0]
    large = {"samples": torch.zeros(1, 128, 96, 96)}
    sized = RetortDistilledSetup.execute(model, PROMPT, "flux2_klein", 0, latent=large).args[3]
    assert plain.tolist() == pytest.approx([1, 0.96738, 0.90814, 0.7672, 0], abs=1e-5)
    assert sized.tolist() == pytest.approx([1, 0.9575, 0.8825, 0.7146, 0], abs=5e-5)
    assert said[0].endswith("for 1024 x 1024 pixels, since no latent is connected")
    assert said[1].startswith("FLUX.2 klein, 4 steps: 4 calls at levels 1, 0.957")
    assert said[1].endswith(", for 1536 x 1536 pixels")


def test_guidance_is_told_where_the_prompt_has_none():
    model = flux2()
    prompt = [[PROMPT[0][0], {}], [PROMPT[0][0], {"guidance": 4.0}]]
    guider = RetortDistilledSetup.execute(model, prompt, "flux2_dev_turbo", 0).args[1]
    assert [more["guidance"] for _, more in guider.positive] == [2.5, 4.0]
    assert prompt[0][1] == {}
    kept = RetortDistilledSetup.execute(model, prompt, "flux2_klein", 0).args[1]
    assert kept.positive is prompt


def test_image_to_image_runs_at_trained_levels_alone():
    model = flow()
    whole = RetortDistilledSigmas.execute(model, "z_image_turbo", 0).args[0]
    for hundredths in range(1, 100):
        kept = RetortDistilledSigmas.execute(model, "z_image_turbo", 0, "", hundredths / 100).args[0]
        assert len(kept) > 1 and torch.equal(kept, whole[-len(kept) :])


def automatic(*files, kind="flow", preset="auto"):
    """Distilled Setup as it runs in a prompt, with the preset auto, behind loaders of these files."""
    loaders = {
        str(i): {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": name, "model": [str(i + 1), 0]}}
        for i, name in enumerate(files)
    }
    prompt = {**loaders, "setup": {"class_type": "RetortDistilledSetup", "inputs": {"model": ["0", 0]}}}
    hidden = HiddenHolder(unique_id="setup", prompt=prompt)
    running = type("Running", (RetortDistilledSetup,), {"hidden": hidden})
    return running.execute(flow() if kind == "flow" else eps(), PROMPT, preset, 0).args


def test_auto_takes_the_student_that_the_files_name_and_says_so(monkeypatch, where):
    said = []
    monkeypatch.setattr(type(host), "say", lambda self, text, warn=False: said.append(text))
    model, _, sampler, sigmas, *_ = automatic("style.safetensors", "z_image_turbo_bf16.safetensors")
    assert len(sigmas) == 9 and model.schedule.shift == 3.0 and sampler.rule.mode == "deterministic"
    assert said[-1].startswith("Z-Image-Turbo, 8 steps (auto, by the name of z_image_turbo_bf16.safetensors): 8 calls")
    _, _, sampler, sigmas, *_ = automatic("lcm-lora-sdxl.safetensors", kind="eps")
    assert len(sigmas) == 5 and sampler.rule.mode == "renoise"


def test_a_preset_that_does_not_fit_gives_way_to_the_one_that_the_files_name(where):
    said = r"^preset is dmd2_sdxl_4step, and z_image_turbo_bf16.safetensors is a student"
    with pytest.raises(ValueError, match=said):
        automatic("z_image_turbo_bf16.safetensors", preset="dmd2_sdxl_4step")
    with pytest.raises(ValueError, match="Load the model that it was made for, or choose a preset that fits"):
        automatic("my_own.safetensors", preset="dmd2_sdxl_4step")
    with pytest.raises(ValueError, match="Load the model that it was made for, or choose a preset that fits"):
        automatic("z_image_turbo_bf16.safetensors", preset="tdm_sd3", kind="eps")


def test_auto_refuses_to_guess(where):
    with pytest.raises(PresetMismatch, match="finds no student by the files of the model .style.safetensors"):
        automatic("style.safetensors")
    with pytest.raises(PresetMismatch, match="could be lcm .* or turbo .*: choose one"):
        automatic("lcm-lora-sdxl.safetensors", "sd_xl_turbo_1.0.safetensors", kind="eps")


def test_auto_is_refused_before_anything_runs_where_no_name_says_anything(where):
    def asked(name):
        prompt = {"1": {"class_type": "L", "inputs": {"lora_name": name}}, "2": {"class_type": "S", "inputs": {
            "model": ["1", 0]}}}  # fmt: skip
        return Asked({"preset": "auto", "steps": 0, "denoise": 1.0}, {"model": Source(prompt, "2")["model"]})

    RetortDistilledSetup.check(asked("z_image_turbo_bf16.safetensors"))
    with pytest.raises(PresetMismatch, match="preset 'auto' finds no student"):
        RetortDistilledSetup.check(asked("z_image_bf16.safetensors"))
    assert "auto" not in next(one.options for one in RetortDistilledSigmas.GET_SCHEMA().inputs if one.id == "preset")


def wan(network=None):
    source = NetworkSource(lambda loras: network or Network())
    return Model(source, FlowSchedule(shift=8.0), FLOW, "flow", LatentFormat(16, dims=3))


@pytest.mark.parametrize(("key", "steps", "split"), [
    ("wan22_lightx2v_t2v", 0, 2), ("wan22_lightx2v_t2v", 8, 4), ("wan22_lightx2v_i2v", 4, 2),
    ("wan22_lightx2v_i2v", 8, 3), ("sfwan22", 0, 4), ("dmd2_sdxl_4step", 0, 4),
])  # fmt: skip
def test_the_split_is_where_the_second_network_goes_on(key, steps, split):
    model = eps() if key.startswith("dmd2") else wan()
    sigmas, found = RetortDistilledSigmas.execute(model, key, steps).args
    assert found == split == RetortDistilledSetup.execute(model, PROMPT, key, steps).args[4]
    boundary = PRESETS[key].boundary or 0.0
    assert all((float(s) >= boundary) == (i < split) for i, s in enumerate(sigmas[:-1]))
    assert RetortDistilledSigmas.execute(model, key, steps, "", 0.0).args[1] == 0


def test_setup_samples_with_two_networks_each_at_its_levels():
    high, low = Network(), Network()
    model, guider, sampler, sigmas, split = RetortDistilledSetup.execute(
        wan(high), PROMPT, "wan22_lightx2v_t2v", 0, low_noise_model=wan(low)
    ).args
    assert split == 2 and guider.model is model and model.schedule.shift == sampler.second.model.schedule.shift == 5.0
    noise = torch.randn(1, 16, 2, 8, 8)
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=1)
    assert [float(t[0]) for t in high.timesteps] == pytest.approx([1000.0, 937.5])
    assert [float(t[0]) for t in low.timesteps] == pytest.approx([833.3333, 625.0])
    with pytest.raises(ValueError, match="sigmas go below 0.875"):
        guider.sample(noise, torch.zeros_like(noise), RetortDistilledSampler.execute("custom").args[0], sigmas, seed=1)


def test_image_to_image_below_the_boundary_asks_the_second_network_alone():
    high, low = Network(), Network()
    _, guider, sampler, sigmas, split = RetortDistilledSetup.execute(
        wan(high), PROMPT, "wan22_lightx2v_t2v", 0, "", 0.4, low_noise_model=wan(low)
    ).args
    assert split == 0 and not sampler.relays and float(sigmas[0]) < 0.875
    picture = torch.randn(1, 16, 2, 8, 8)
    guider.sample(torch.randn(1, 16, 2, 8, 8), picture, sampler, sigmas, seed=1)
    assert not high.inputs and len(low.inputs) == len(sigmas) - 1


@pytest.mark.parametrize(
    ("denoise", "second", "left"), [(1.0, False, 2), (0.4, False, 0), (1.0, True, 0), (0.0, False, 0)]
)
def test_one_network_of_two_that_makes_all_calls_is_warned_of(monkeypatch, denoise, second, left):
    heard = []
    monkeypatch.setattr(host, "say", lambda text, warn=False: heard.append((text, warn)))
    low = wan() if second else None
    RetortDistilledSetup.execute(wan(), PROMPT, "wan22_lightx2v_t2v", 0, "", denoise, low_noise_model=low)
    assert [warn for _, warn in heard] == [bool(left)] * (denoise > 0)
    assert all((f"makes the other {left} too here" in text) == bool(left) for text, _ in heard)
    assert all(("low_noise_model" in text) == bool(left) for text, _ in heard)


def test_a_student_of_one_network_is_warned_of_nothing(monkeypatch):
    heard = []
    monkeypatch.setattr(host, "say", lambda text, warn=False: heard.append(warn))
    RetortDistilledSetup.execute(eps(), PROMPT, "dmd2_sdxl_4step", 0)
    RetortDistilledSigmas.execute(wan(), "wan22_lightx2v_t2v", 0)
    assert heard == [False, False]


def test_a_sampler_takes_a_guider_of_the_second_network():
    low = RetortDistilledSetup.execute(wan(), PROMPT, "wan22_lightx2v_i2v", 0).args[1]
    sampler = RetortDistilledSampler.execute("wan22_lightx2v_i2v", low_noise_guider=low).args[0]
    assert (sampler.second, sampler.boundary, sampler.relays) == (low, 0.9, True)


def test_modes_set_on_the_node_keep_what_is_the_students():
    sampler = RetortDistilledSampler.execute("dmd2_sdxl_4step", "TCD", eta=0.3).args[0]
    assert (sampler.rule.mode, sampler.rule.eta) == ("tcd", 0.3)
    for key, preset in PRESETS.items():
        rule = RetortDistilledSampler.execute(key, "ancestral", eta=0.5).args[0].rule
        assert (rule.mode, rule.eta) == ("ancestral", 0.5)
        same = ("label_scale", "noise_scale", "clip")
        assert [vars(rule)[name] for name in same] == [vars(preset.rule)[name] for name in same]


@pytest.mark.parametrize("key", [key for key, preset in PRESETS.items() if preset.refine])
def test_a_second_stage_has_its_own_levels_and_begins_on_a_noised_latent(key):
    network, preset = Network(), PRESETS[key]
    model = Model(
        NetworkSource(lambda loras: network), FlowSchedule(2.37), FLOW, "flow",
        LatentFormat(preset.latent_channels or 128, dims=3),
    )  # fmt: skip
    sigmas = RetortDistilledSigmas.execute(model, key, 0, stage="refine").args[0]
    assert sigmas.tolist() == pytest.approx([*preset.refine.levels, 0.0])
    _, guider, sampler, same, split = RetortDistilledSetup.execute(model, PROMPT, key, 0, stage="refine").args
    alone = RetortDistilledSampler.execute(key, stage="refine").args[0]
    assert torch.equal(same, sigmas) and split == 3
    assert sampler.rule == alone.rule and sampler.start == alone.start == "noised"
    assert sampler.rule.mode == (preset.refine.mode or preset.mode)
    picture, noise = (torch.randn(2, model.latent.channels, 1, 4, 4) for _ in range(2))
    guider.sample(noise, picture, sampler, sigmas, seed=1)
    s = float(sigmas[0])
    torch.testing.assert_close(network.inputs[0], s * noise + (1 - s) * picture, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "said"), [
    ({"preset": "tdm_sd3", "stage": "refine"}, "stage is 'refine', and 'TDM, SD3 medium, 4 steps' was published"),
    ({"preset": "custom", "stage": "refine"}, "stage is 'refine'"),
    ({"preset": "tdm_sd3", "low_noise_model": True}, "low_noise_model is connected, and 'TDM, SD3"),
    ({"preset": "custom", "timesteps": "999", "low_noise_model": True}, "low_noise_model is connected"),
])  # fmt: skip
def test_what_a_preset_does_not_have_is_refused_by_name(inputs, said):
    given = dict(inputs)
    if given.pop("low_noise_model", None):
        given["low_noise_model"] = flow()
    with pytest.raises(PresetMismatch, match=said):
        RetortDistilledSetup.execute(flow(), PROMPT, given.pop("preset"), 0, **given)


def test_a_second_model_of_another_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="low_noise_model does not fit: preset 'Wan 2.2 T2V"):
        RetortDistilledSetup.execute(wan(), PROMPT, "wan22_lightx2v_t2v", 0, low_noise_model=eps())
