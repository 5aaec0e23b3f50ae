"""The sampling run around the samplers: noise, denoise, masks, guidance, scales; in closed form on a small network."""

from __future__ import annotations

import pytest
import torch

from retort.files.errors import UsageError
from retort.graphs.core.sampling import grid, sample_latent
from retort.hosts.headless.guider import Guider
from retort.hosts.headless.host import host
from retort.hosts.headless.noise import NoNoise, RandomNoise, prepare_noise
from retort.hosts.headless.samplers import StandardSampler
from retort.hosts.methods import Distilled
from retort.sampling.distilled import Rule
from retort.sampling.grids import GRIDS
from retort.sampling.presets import PRESETS
from retort.sampling.standard import SAMPLERS

KINDS = ("flow", "eps", "v")


def empty(batch=1, channels=4):
    return {"samples": torch.zeros(batch, channels, 8, 8)}


def picture(batch=1):
    return {"samples": torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3))}


def run(tiny, latent, name="euler", steps=4, cfg=3.0, denoise=1.0, seed=5, prompt="a seven", noise=None):
    guider = Guider(tiny.model, tiny.clip.encode(prompt), tiny.clip.encode(""), cfg)
    sigmas = grid(tiny.model, "simple", steps, denoise)
    sampler = StandardSampler(name) if isinstance(name, str) else name
    return sample_latent(guider, noise or RandomNoise(seed), sampler, sigmas, latent, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_items_alone(tiny, kind):
    whole = run(tiny(kind), empty(4))[0]["samples"]
    for i in range(4):
        one = run(tiny(kind), {**empty(), "batch_index": [i]})[0]["samples"]
        assert torch.allclose(whole[i], one[0], atol=1e-5)


def test_noise_is_one_stream_on_the_cpu():
    latent = torch.zeros(3, 4, 2, 2)
    whole = prepare_noise(latent, 9)
    assert torch.equal(whole, torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(9)))
    assert torch.equal(prepare_noise(latent, 9, [2, 0, 2]), whole[[2, 0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_one_batched_call_and_none_at_cfg_1(tiny, kind):
    guided, alone = tiny(kind), tiny(kind)
    run(guided, empty(2))
    assert [n for n, _ in guided.network.seen] == [4] * 4
    with_negative = run(alone, empty(2), cfg=1.0)[0]["samples"]
    assert [n for n, _ in alone.network.seen] == [2] * 4
    sigmas = grid(alone.model, "simple", 4)
    basic = Guider(alone.model, alone.clip.encode("a seven"))
    same = sample_latent(basic, RandomNoise(5), StandardSampler("euler"), sigmas, empty(2), 5)[0]["samples"]
    assert torch.equal(same, with_negative)


@pytest.mark.parametrize(("kind", "calls"), [("flow", [1, 1]), ("eps", [2])])
def test_prompts_of_other_lengths_are_repeated_where_the_network_allows_it(tiny, kind, calls):
    t = tiny(kind)
    out = run(t, empty(), prompt="a long prompt of more than twenty letters", steps=1)[0]["samples"]
    assert [n for n, _ in t.network.seen] == calls
    # Attention does not notice a repeated prompt, and neither does this network's mean.
    u = tiny("flow")
    u.network.repeats_context = True
    if kind == "flow":
        long = run(u, empty(), prompt="a long prompt of more than twenty letters", steps=1)[0]["samples"]
        assert torch.allclose(out, long, atol=1e-6)


def test_guidance_is_the_straight_line_through_both_answers(tiny):
    t = tiny("eps")
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([2.0, 5.0])

    def answer(positive, negative, cfg):
        return Guider(t.model, positive, negative, cfg).denoiser(x.shape)(x, sigma)

    yes, no = t.clip.encode("a seven"), t.clip.encode("")
    conditional, unconditional = answer(yes, None, 1.0), answer(no, None, 1.0)
    expected = unconditional + (conditional - unconditional) * 4.0
    assert torch.allclose(answer(yes, no, 4.0), expected, atol=1e-4)
    both = answer(yes + no, None, 1.0)
    assert torch.allclose(both, (conditional + unconditional) / 2, atol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "eps", "v", "x0"])
def test_predictions_become_x0(tiny, kind):
    t = tiny(kind)
    x, s = torch.randn(1, 4, 8, 8), 3.0 if kind != "flow" else 0.6
    sigma = torch.tensor([s])
    made = Guider(t.model, t.clip.encode("one")).denoiser(x.shape)(x, sigma)
    raw_in = x if kind == "flow" else x / (s * s + 1) ** 0.5
    tokens, extra = t.clip.encode("one")[0]
    raw = t.network(raw_in, t.model.schedule.timestep(sigma).float(), context=tokens, y=extra["pooled_output"])
    expected = {
        "flow": x - s * raw,
        "eps": x - s * raw,
        "v": x / (s * s + 1) - raw * s / (s * s + 1) ** 0.5,
        "x0": raw,
    }[kind]
    assert torch.allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_denoise_takes_the_end_of_a_longer_grid(tiny, kind):
    model = tiny(kind).model
    assert torch.equal(grid(model, "simple", 4, 0.5), GRIDS["simple"](model.schedule, 8)[-5:])
    assert len(grid(model, "normal", 4, 0.0)) == 0
    unchanged = run(tiny(kind), picture(), denoise=0.0)[0]["samples"]
    assert torch.equal(unchanged, picture()["samples"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_mask_keeps_the_latent_exactly_where_it_is_0(tiny, kind, name):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    out = run(tiny(kind), {**picture(2), "noise_mask": mask}, name)[0]["samples"]
    assert torch.allclose(out[..., :4], picture(2)["samples"][..., :4], atol=1e-5)
    assert (out[..., 4:] - picture(2)["samples"][..., 4:]).abs().mean() > 0.1
    full = run(tiny(kind), {**picture(2), "noise_mask": torch.ones(1, 1, 8, 8)}, name)[0]["samples"]
    assert torch.allclose(full, run(tiny(kind), picture(2), name)[0]["samples"], atol=1e-5)


def test_a_mask_of_another_size_is_resized(tiny):
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    out = run(tiny("flow"), {**picture(), "noise_mask": mask[None, None]})[0]["samples"]
    assert torch.allclose(out[..., :3], picture()["samples"][..., :3], atol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_the_network_first_sees_noise_of_unit_size(tiny, kind):
    t = tiny(kind)
    entered = []
    network = t.network
    t.model.source._loaded[()] = Spy(network, entered)
    run(t, empty(), steps=1)
    noise = prepare_noise(torch.zeros(1, 4, 8, 8), 5)
    assert torch.allclose(entered[0][:1], noise, atol=1e-6)
    assert float(network.seen[0][1][0]) == (1000.0 if kind == "flow" else 999.0)


class Spy:
    """Keeps what enters a network."""

    def __init__(self, network, entered):
        self.network, self.entered = network, entered
        self.device, self.repeats_context, self.conditions = "cpu", network.repeats_context, network.conditions

    def __call__(self, x, timestep, **conditions):
        self.entered.append(x.clone())
        return self.network(x, timestep, **conditions)


def test_an_empty_latent_is_not_shifted_and_takes_the_models_channels(tiny):
    a = run(tiny("flow"), empty(channels=16))[0]["samples"]
    assert torch.equal(a, run(tiny("flow"), empty())[0]["samples"])
    wrong = {"samples": torch.randn(1, 16, 8, 8)}
    with pytest.raises(UsageError, match="16 channels and the model's have 4"):
        run(tiny("flow"), wrong)


def test_a_split_grid_with_leftover_noise_continues_where_it_stopped(tiny):
    for kind in KINDS:
        t = tiny(kind)
        guider = Guider(t.model, t.clip.encode("one"))
        sigmas, sampler = grid(t.model, "simple", 6), StandardSampler("euler")
        whole = sample_latent(guider, RandomNoise(1), sampler, sigmas, empty(), 1)[0]["samples"]
        half = sample_latent(guider, RandomNoise(1), sampler, sigmas[:4], empty(), 1)[0]
        rest = sample_latent(guider, NoNoise(), sampler, sigmas[3:], half, 1)[0]["samples"]
        assert torch.allclose(whole, rest, atol=2e-4)


def test_the_second_output_is_the_last_x0(tiny):
    t = tiny("eps")
    guider = Guider(t.model, t.clip.encode("one"))
    sigmas = grid(t.model, "simple", 4)[:3]
    latent, x0 = sample_latent(guider, RandomNoise(1), StandardSampler("euler"), sigmas, empty(), 1)
    assert (latent["samples"] - x0["samples"]).std() > 0.5  # the noise that is left
    full = sample_latent(guider, RandomNoise(1), StandardSampler("euler"), grid(t.model, "simple", 4), empty(), 1)
    assert torch.allclose(full[0]["samples"], full[1]["samples"], atol=1e-6)


def test_conditioning_of_other_nodes_is_refused_by_name(tiny):
    t = tiny("eps")
    conditioning = [[t.clip.encode("one")[0][0], {"pooled_output": torch.zeros(1, 6), "area": (8, 8, 0, 0)}]]
    with pytest.raises(UsageError, match="'area' needs ComfyUI"):
        Guider(t.model, conditioning).denoiser(torch.Size((1, 4, 8, 8)))


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_a_students_first_input_is_the_seeds_noise_below_the_top_too(tiny, kind):
    t = tiny(kind)
    entered = []
    t.model.source._loaded[()] = Spy(t.network, entered)
    preset = PRESETS["dmd2_sdxl_1step"] if kind == "eps" else None
    sigmas = t.model.schedule.sigma(torch.tensor([399.0])) if kind == "eps" else torch.tensor([0.4])
    sampler = host.method_sampler(Distilled(Rule("single"), "unit", preset))
    guider = host.cfg_guider(t.model, t.clip.encode("one"), None, 1.0)
    sample_latent(guider, RandomNoise(5), sampler, torch.cat([sigmas, torch.zeros(1)]), empty(), 5)
    assert torch.allclose(entered[0], prepare_noise(torch.zeros(1, 4, 8, 8), 5), atol=1e-5)


def test_host_functions(tiny):
    flow, eps = tiny("flow").model, tiny("eps").model
    assert host.noise_path(flow).kind == "FLOW" and host.prediction(eps) == "eps"
    assert host.latent_format(eps) == (4, 2)
    assert host.schedule(host.with_shift(flow, 6.0)).shift == 6.0 and flow.schedule.shift == 3.0
    with pytest.raises(ValueError, match="only flow models have a timestep shift"):
        host.with_shift(eps, 6.0)
    with pytest.raises(ValueError, match="connect `negative`"):
        host.cfg_guider(eps, [], None, 4.0)
