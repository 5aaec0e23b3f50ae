"""Two networks in one sampling run, as Wan 2.2 has them: who is asked where, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.integration


def shifted(shift, steps):
    t = torch.arange(steps, 0, -1) / steps
    return torch.cat([shift * t / (1 + (shift - 1) * t), torch.zeros(1)])


@pytest.fixture(scope="module")
def relay(ours):
    """relay(second guider, boundary, mode, **rule) -> SAMPLER that goes on with it."""
    host, distilled = ours("hosts.comfyui.host").host, ours("sampling.distilled")

    def make(second, boundary=0.875, mode="deterministic", **rule):
        found = distilled.Rule(mode, **rule)
        return host.method_sampler(ours("hosts.methods").Distilled(found, "unit", None, second, boundary))

    return make


@pytest.fixture(scope="module")
def pair(networks):
    """pair(kind) -> two MODELs of one class with weights of their own."""
    made = {}

    def make(kind):
        if kind not in made:
            one, other = networks(kind), networks(kind)
            generator = torch.Generator().manual_seed(3)
            for weight in other.model.diffusion_model.parameters():
                if weight.ndim > 1:
                    weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
            made[kind] = one, other
        return made[kind]

    return make


GRIDS = {"wan": shifted(5, 4), "flow": shifted(3, 4), "eps": None, "cog": None}


def grid(comfy, model, kind):
    """(sigmas, a boundary between its second and third level)."""
    found = GRIDS[kind]
    if found is None:
        found = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    return found, float(found[1] + found[2]) / 2


@pytest.mark.parametrize(
    ("boundary", "shift", "counts"),
    [(0.875, 5, (2, 3, 4)), (0.875, 8, (3, 4, 5)), (0.9, 5, (2, 3, 3)), (0.9, 8, (2, 3, 4))],
)
def test_wans_networks_are_each_asked_at_their_own_levels(
    tiny, pair, guided, sample, relay, recording, boundary, shift, counts
):
    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan")
    for steps, first in zip((4, 6, 8), counts, strict=True):
        sigmas = shifted(shift, steps)
        second = guided(low, positive, negative)
        with recording(high) as above, recording(low) as below:
            sample(guided(high, positive, negative), relay(second, boundary), sigmas, latent)
        asked = [[float(t) for call in seen.timesteps for t in call.unique()] for seen in (above, below)]
        assert asked[0] == pytest.approx([1000 * float(s) for s in sigmas[:first]], rel=1e-6)
        assert asked[1] == pytest.approx([1000 * float(s) for s in sigmas[first:-1]], rel=1e-6)
        assert min(asked[0]) >= 1000 * boundary > max(asked[1])


@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_two_samplers_by_hand_to_the_bit(comfy, tiny, pair, guided, sample, relay, batch):
    """KSamplerAdvanced with leftover noise, then another."""
    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan", batch)
    core = comfy.nodes
    high, low = _sd3(high, 5.0), _sd3(low, 5.0)
    advanced = core.KSamplerAdvanced()
    with torch.inference_mode():
        begun = advanced.sample(
            high, "enable", 7, 4, 1.0, "euler", "simple", positive, negative, latent, 0, 2, "enable"
        )[0]  # fmt: skip
        ended = advanced.sample(
            low, "disable", 7, 4, 1.0, "euler", "simple", positive, negative, begun, 2, 10000, "disable"
        )[0]["samples"]  # fmt: skip
        simple = comfy.samplers.calculate_sigmas(low.get_model_object("model_sampling"), "simple", 4)
    found = sample(guided(high, positive, negative), relay(guided(low, positive, negative)), simple, latent)
    assert torch.equal(found, ended)


def _sd3(model, shift):
    import comfy_extras.nodes_model_advanced as advanced

    return advanced.ModelSamplingSD3().patch(model, shift)[0]


@pytest.mark.parametrize("kind", ["wan", "flow", "eps", "cog"])
@pytest.mark.parametrize(
    ("mode", "rule"),
    [
        ("renoise", {}), ("deterministic", {}), ("ancestral", {}), ("tcd", {"eta": 0.3}),
        ("renoise", {"label_scale": 0.5}),
    ],
)  # fmt: skip
def test_one_network_twice_is_the_network_once(comfy, ours, tiny, guided, sample, relay, kind, mode, rule):
    """Fresh noise and steps go on where they were; in a batch; up to the rounding of a LATENT between two samplers."""
    model, positive, negative, latent = tiny(kind, 2)
    sigmas, boundary = grid(comfy, model, kind)
    guider = guided(model, positive, negative, 2.0)
    once = sample(guider, relay(None, 0.0, mode, **rule), sigmas, latent)
    twice = sample(guider, relay(guider, boundary, mode, **rule), sigmas, latent)
    torch.testing.assert_close(twice, once, rtol=1e-3, atol=1e-3 * float(once.abs().max()))
    assert torch.equal(sample(guider, relay(guider, 1e-3, mode, **rule), sigmas, latent), once)  # nothing below it


@pytest.mark.parametrize("kind", ["wan", "flow", "eps", "cog"])
def test_a_masked_area_stays_and_the_rest_does_not_notice_the_handover(comfy, tiny, guided, sample, relay, kind):
    model, positive, negative, latent = tiny(kind, 2)
    sigmas, boundary = grid(comfy, model, kind)
    shape = latent["samples"].shape
    picture = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, *shape[-2:])
    mask[..., : shape[-1] // 2] = 1.0
    latent = {"samples": picture, "noise_mask": mask}
    guider = guided(model, positive, negative)
    once, twice = (sample(guider, relay(*at), sigmas, latent) for at in ((None, 0.0), (guider, boundary)))
    torch.testing.assert_close(twice, once, rtol=1e-3, atol=1e-3 * float(once.abs().max()))
    kept = twice[..., shape[-1] // 2 :] - picture[..., shape[-1] // 2 :]
    assert float(kept.abs().max()) < 1e-4 and float((twice - picture).abs().max()) > 0.1


def bumped(model, strength, seed=1):
    generator = torch.Generator().manual_seed(seed)
    clone = model.clone()
    clone.add_patches(
        {
            name: ("diff", (torch.randn(weight.shape, generator=generator) * 0.1,))
            for name, weight in model.model.state_dict().items()
            if weight.ndim >= 2 and name.startswith("diffusion_model.")
        },
        strength,
    )
    return clone


def test_two_loras_on_one_network_are_two_networks_and_neither_is_left_behind(
    comfy, tiny, networks, guided, sample, relay
):
    _, positive, negative, latent = tiny("wan")
    base, other = networks("wan"), networks("wan")
    sigmas, boundary = grid(comfy, base, "wan")
    first, second, apart = (
        guided(bumped(*of), positive, negative) for of in ((base, 0.8), (base, -1.5), (other, -1.5))
    )
    plain = relay(None, 0.0)
    before = [sample(guider, plain, sigmas, latent) for guider in (first, second)]
    found = sample(first, relay(second, boundary), sigmas, latent)
    assert torch.equal(found, sample(first, relay(apart, boundary), sigmas, latent))
    for guider, was in zip((first, second), before, strict=True):
        assert torch.equal(sample(guider, plain, sigmas, latent), was) and not torch.equal(found, was)


def test_each_guider_keeps_its_own_prompts_cfg_and_times(comfy, tiny, pair, guided, sample, relay):
    """By hand again, with core's SamplerCustomAdvanced on either side of the boundary and a split of the sigmas."""
    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan")
    sigmas, boundary = grid(comfy, high, "wan")
    late = [[t, {**e, "start_percent": 0.3}] for t, e in negative]
    first, second = guided(high, positive, negative, 3.0), guided(low, late + positive, positive, 1.5)
    begun = sample(first, relay(None, 0.0), sigmas[:3], latent)
    noise = comfy.custom.Noise_EmptyNoise()
    noise.seed = 7
    with torch.inference_mode():
        ended = comfy.custom.SamplerCustomAdvanced.execute(
            noise, second, relay(None, 0.0), sigmas[2:], {"samples": begun}
        )[0]["samples"]
    assert torch.equal(sample(first, relay(second, boundary), sigmas, latent), ended)


def test_hooks_of_the_second_prompt_are_its_own(comfy, tiny, pair, guided, sample, relay):
    from comfy import hooks as core

    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan")
    sigmas, boundary = grid(comfy, high, "wan")
    name = "diffusion_model.blocks.0.self_attn.q.weight"
    stem, generator = name.removesuffix(".weight"), torch.Generator().manual_seed(4)
    down, up = (torch.randn(shape, generator=generator) * 0.3 for shape in ((2, 128), (128, 2)))
    lora = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    hooks = core.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    hooked = core.set_hooks_for_conditioning(positive, hooks)
    for network in (low, high):  # the same one too
        first, second = guided(high, positive, negative), guided(network, hooked, negative)
        plain = sample(first, relay(guided(network, positive, negative), boundary), sigmas, latent)
        found = sample(first, relay(second, boundary), sigmas, latent)
        begun = sample(first, relay(None, 0.0), sigmas[:3], latent)
        noise = comfy.custom.Noise_EmptyNoise()
        noise.seed = 7
        with torch.inference_mode():
            ended = comfy.custom.SamplerCustomAdvanced.execute(
                noise, second, relay(None, 0.0), sigmas[2:], {"samples": begun}
            )[0]["samples"]
        assert torch.equal(found, ended) and not torch.equal(found, plain)


def test_steps_are_counted_through_and_a_user_can_stop_in_either_part(comfy, tiny, pair, guided, relay):
    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan")
    sigmas, boundary = grid(comfy, high, "wan")
    first, second = guided(high, positive, negative), guided(low, positive, negative)
    seen = []
    noise = comfy.sample.prepare_noise(latent["samples"], 7)

    def run(callback):
        with torch.inference_mode():
            return first.sample(noise, latent["samples"], relay(second, boundary), sigmas, callback=callback, seed=7)

    whole = run(lambda step, x0, x, total: seen.append((step, total)))
    assert seen == [(i, 4) for i in range(4)]
    for stop in (0, 1, 2, 3):

        def stopping(step, x0, x, total, stop=stop):
            if step == stop:
                raise comfy.model_management.InterruptProcessingException

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(stopping)
    assert torch.equal(run(None), whole)


def test_the_second_network_is_loaded_when_it_is_needed_and_the_first_only_before(
    comfy, tiny, pair, guided, sample, relay, monkeypatch
):
    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan")
    sigmas, boundary = grid(comfy, high, "wan")
    events = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu",
        lambda models, *given, **named: (events.append(("load", models[0] is low)), load(models, *given, **named))[1],
    )
    handles = [
        model.model.diffusion_model.register_forward_pre_hook(
            lambda module, given, second=model is low: events.append(("call", second))
        )
        for model in (high, low)
    ]
    sample(guided(high, positive, negative), relay(guided(low, positive, negative), boundary), sigmas, latent)
    for handle in handles:
        handle.remove()
    calls = [[("load", second), ("call", second), ("call", second)] for second in (False, True)]
    assert events == calls[0] + calls[1]


def test_a_guider_of_the_first_network_refuses_whoever_does_not_hand_on(comfy, ours, tiny, pair, guided, sample, relay):
    host = ours("hosts.comfyui.host").host
    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan")
    sigmas, boundary = grid(comfy, high, "wan")
    first, second = host.cfg_guider(high, positive, negative, 1.0, boundary), guided(low, positive, negative)
    assert first.model_patcher is high and first.model_options is high.model_options
    expected = sample(guided(high, positive, negative), relay(second, boundary), sigmas, latent)
    assert torch.equal(sample(first, relay(second, boundary), sigmas, latent), expected)
    euler = comfy.samplers.sampler_object("euler")
    with pytest.raises(ValueError, match="sigmas go below 0.885.*SAMPLER of the same Distilled Setup"):
        sample(first, euler, sigmas, latent)
    assert torch.isfinite(sample(first, euler, sigmas[:3], latent)).all()


def test_a_second_model_of_another_kind_is_refused(comfy, tiny, pair, guided, sample, relay):
    high, _ = pair("wan")
    _, positive, negative, latent = tiny("wan")
    other, positive2, negative2, _ = tiny("flow")
    with pytest.raises(ValueError, match="the second guider's model has latents of another format"):
        sample(guided(high, positive, negative), relay(guided(other, positive2, negative2)), shifted(5, 4), latent)


def test_the_node_samples_with_both_and_a_search_with_the_first_is_refused(
    comfy, tiny, pair, node, sample, recording
):
    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan", 2)
    for key, steps, first in (("wan22_lightx2v_t2v", 8, 4), ("wan22_lightx2v_i2v", 8, 3), ("wan22_lightx2v_t2v", 4, 2)):
        model, guider, sampler, sigmas, split = node(
            "RetortDistilledSetup", model=high, positive=positive, preset=key, steps=steps, low_noise_model=low
        )
        shift = [m.get_model_object("model_sampling").shift for m in (model, sampler.method.second.model_patcher)]
        assert split == first and guider.model_patcher is model and shift == [5.0, 5.0]
        with recording(high) as above, recording(low) as below:
            found = sample(guider, sampler, sigmas, latent)
        assert (len(above.inputs), len(below.inputs)) == (first, steps - first)
    alone = node("RetortDistilledSampler", preset="wan22_lightx2v_t2v")[0]
    begun = sample(guider, alone, sigmas[: split + 1], latent)
    second = sampler.method.second
    noise = comfy.custom.Noise_EmptyNoise()
    noise.seed = 7
    with torch.inference_mode():
        ended = comfy.custom.SamplerCustomAdvanced.execute(noise, second, alone, sigmas[split:], {"samples": begun})
    assert torch.equal(found, ended[0]["samples"])
    for name in ("euler", "dpmpp_2m", "lcm"):
        with pytest.raises(ValueError, match="sigmas go below 0.875"):
            sample(guider, comfy.samplers.sampler_object(name), sigmas, latent)


def test_only_one_of_two_is_in_memory_where_both_have_no_room(comfy, card, tiny, pair, guided, sample, relay,
                                                              monkeypatch):  # fmt: skip
    """On a card whose memory, as core counts it, holds one network and the little that sampling needs."""
    if not card:
        pytest.skip("needs a card: RETORT_SECOND_DEVICE=plain")
    high, low = pair("wan")
    _, positive, negative, latent = tiny("wan")
    sigmas, boundary = grid(comfy, high, "wan")
    management = comfy.model_management
    management.unload_all_models()
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(type(high.model), "memory_required", lambda self, *given, **named: 0)
    size = high.model_size()

    def free(dev=None, torch_free_too=False):
        left = int(1.1 * size) - sum(m.loaded_size() for m in (high, low))
        return (left, left) if torch_free_too else left

    for model, name in ((high, "first"), (low, "second")):
        assert model.loaded_size() == 0, name
    expected = None
    for short in (False, True):
        if short:
            monkeypatch.setattr(management, "get_free_memory", free)
        there = []
        handles = [
            model.model.diffusion_model.register_forward_pre_hook(
                lambda module, given, there=there: there.append(tuple(m.loaded_size() > 0 for m in (high, low)))
            )
            for model in (high, low)
        ]
        sampler = relay(guided(low, positive, negative), boundary)
        found = sample(guided(high, positive, negative), sampler, sigmas, latent)
        for handle in handles:
            handle.remove()
        if short:
            assert there == [(True, False)] * 2 + [(False, True)] * 2 and torch.equal(found, expected)
        else:
            assert there == [(True, False)] * 2 + [(True, True)] * 2
            management.unload_all_models()
        expected = found


class FirstThree:
    """In place of a VAE."""

    def decode(self, samples):
        pictures = samples[:, :3].movedim(1, -1).sigmoid()
        return pictures.flatten(0, 1) if samples.ndim == 5 else pictures


@pytest.fixture
def searched(comfy, ours, tiny, guided, tmp_path, monkeypatch):
    """searched(kind, high, low, method) -> best latent, the search, and what resumes it with a second guider."""
    host = ours("hosts.comfyui.host").host
    monkeypatch.setattr(type(host), "runs_folder", lambda self: tmp_path / "retort")
    nodes, reward = ours("nodes.search"), ours("hosts.rewards.kinds").make(host, "sharpness", {})

    def run(kind, high, low, method="best_of_n", **given):
        _, positive, negative, latent = tiny(kind)
        sigmas, boundary = grid(comfy, high, kind)
        guiders = [None if one is None else guided(one, positive, negative, 2.0) for one in (high, low)]
        how = {"method": method, **{one.id: one.default for one in nodes.METHODS[method]()}}
        given = {"calls": 32, "seed": 3, "batch_size": 2, "boundary": boundary, **given}
        with torch.inference_mode():
            best, _, saved, *_ = nodes.RetortTreeSearch.execute(
                guiders[0], sigmas, latent, FirstThree(), reward, how, low_noise_guider=guiders[1], **given
            ).args

        def resumed(search, second):
            with torch.inference_mode():
                return nodes.RetortResumeSearch.execute(
                    search, guiders[0], FirstThree(), reward, calls=32, low_noise_guider=second
                ).args[0]["samples"]

        return best["samples"], saved, resumed, guiders[1]

    return run


@pytest.mark.parametrize("kind", ["wan", "flow", "eps"])
@pytest.mark.parametrize("method", ["best_of_n", "dts_star", "fk"])
def test_a_search_asks_each_network_at_its_own_levels(comfy, pair, searched, recording, kind, method):
    """And with the same network twice it is the search of that network, but for how calls are batched."""
    high, low = pair(kind)
    sigmas, boundary = grid(comfy, high, kind)
    schedule = high.get_model_object("model_sampling")
    with recording(high) as above, recording(low) as below:
        found, saved, *_ = searched(kind, high, low, method)
    edge = float(schedule.timestep(torch.tensor(boundary)))
    asked = [torch.cat([call.flatten().float() for call in seen.timesteps]) for seen in (above, below)]
    assert float(asked[0].min()) >= edge > float(asked[1].max())
    assert saved.states[0].ledger.calls == sum(map(len, asked)) and saved.request.boundary == boundary
    alone = searched(kind, high, None, method)
    twice = searched(kind, high, high, method)[0]
    torch.testing.assert_close(twice, alone[0], rtol=1e-4, atol=1e-5 * float(twice.abs().max()))
    assert (found - alone[0]).abs().max() > 1e-3


def test_a_search_of_two_networks_goes_on_from_its_file_with_both(ours, pair, searched):
    host, files = ours("hosts.comfyui.host").host, ours("hosts.search.files")
    _, saved, resumed, second = searched("wan", *pair("wan"), method="dts_star")
    files.save(host, saved, "two")
    loaded = files.load(host, "two")
    assert torch.equal(resumed(loaded, second), resumed(saved, second))
    with pytest.raises(ValueError, match="begun with two networks, so connect the second one's guider again"):
        resumed(saved, None)
    _, one, again, _ = searched("wan", pair("wan")[0], None)
    with pytest.raises(ValueError, match="begun with one; disconnect it"):
        again(one, second)


@pytest.fixture
def told(ours, tiny):
    """Two videos of two prompts, and the empty prompt: what a training is given."""
    _, positive, negative, _ = tiny("wan")
    rows = torch.randn(2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    return ours("trainers.dataset").Dataset(
        [tuple(positive[0]), tuple(negative[0])], [], tuple(negative[0]), list(rows)
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("expert", ["high noise", "low noise"])
def test_a_trainings_preview_is_what_both_networks_draw(comfy, ours, tiny, pair, told, expert, batch):
    """As core's two KSamplerAdvanced from equal noise: a new LoRA changes nothing. Both MODELs stay as they were."""
    pytest.importorskip("peft")
    high, low = (_sd3(model, 5.0) for model in pair("wan"))
    _, positive, negative, latent = tiny("wan", batch)
    advanced = comfy.nodes.KSamplerAdvanced()

    def drawn():
        with torch.inference_mode():
            begun = advanced.sample(
                high, "enable", 7, 5, 4.0, "euler", "simple", positive, negative, latent, 0, 3, "enable"
            )[0]  # fmt: skip
            return advanced.sample(
                low, "disable", 7, 5, 4.0, "euler", "simple", positive, negative, begun, 3, 10000, "disable"
            )[0]["samples"]  # fmt: skip

    host, expected = ours("hosts.comfyui.host").host, drawn()
    config = ours("trainers.methods").read_config(
        {"method": "flow", "objective": {"expert": expert, "boundary": 0.83, "steps": 5, "cfg": 4.0}}
    )
    model, other = (high, low) if expert == "high noise" else (low, high)
    unit = comfy.sample.prepare_noise(latent["samples"], 7).float()
    with host.training_session():
        denoiser = host.trainable(model)
        assembly = ours("hosts.training.assembly").Assembly(host, denoiser, config, None, other=other)
        denoiser.place(0)
        data = assembly.data(told)
        cond, uncond = denoiser.join([data.conds[0]] * batch), denoiser.join([data.uncond] * batch)
        with torch.no_grad(), denoiser.adapter("student"):
            found = denoiser.latents_out(assembly.objective.sample(unit.to(denoiser.device), cond, uncond)).cpu()
        denoiser.release()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(drawn(), expected)


@pytest.mark.parametrize("expert", ["high noise", "low noise"])
def test_a_training_node_draws_previews_with_both(comfy, ours, tiny, pair, node, recording, expert):
    pytest.importorskip("peft")
    high, low = (_sd3(model, 5.0) for model in pair("wan"))
    model, other = (high, low) if expert == "high noise" else (low, high)
    _, positive, negative, latent = tiny("wan")
    latent = {"samples": latent["samples"] + 0.1}
    given = {
        "model": [model], "other_expert": [other], "positive": [positive], "negative": [negative],
        "latents": [latent], "expert": [expert], "steps": [2], "preview_every": [2], "previews": [1], "rank": [2],
        "name": [f"two_{expert[:3]}"], "batch_size": [1], "prompts": [""],
    }  # fmt: skip
    lora, losses, file, run = node("RetortTrainFlow", **given)
    folder = ours("hosts.comfyui.host").host.runs_folder() / run
    assert (folder / "previews" / "step_0000002.png").is_file() and len(losses["loss"]) == 2


def test_a_network_that_is_no_expert_of_the_model_is_refused(comfy, tiny, pair, networks, node):
    pytest.importorskip("peft")
    high, _ = pair("wan")
    _, positive, negative, latent = tiny("wan")
    latent = {"samples": latent["samples"] + 0.1}
    given = {
        "model": [high], "other_expert": [networks("flow")], "positive": [positive], "negative": [negative],
        "latents": [latent], "steps": [1], "rank": [2], "name": ["stranger"], "batch_size": [1], "prompts": [""],
    }  # fmt: skip
    with pytest.raises(ValueError, match="other_expert: flow trains a network of all levels here; set `expert`"):
        node("RetortTrainFlow", **given, expert=["whole"])
    with pytest.raises(ValueError, match="other_expert is no network of the same build as model"):
        node("RetortTrainFlow", **given, expert=["high noise"])


@pytest.mark.parametrize("form", ["bf16", "fp8_scaled", "nvfp4", "int8_convrot"])
def test_an_expert_may_be_stored_otherwise_and_not_built_otherwise(comfy, ours, form):
    pytest.importorskip("peft")
    host, refuse = ours("hosts.comfyui.host").host, ours("hosts.training.assembly").refuse_stranger
    rows = ours("benchmarks.family_networks").families()
    with host.training_session():
        model, stored, other = (
            host.trainable(made) for made in (rows["WAN21_T2V"].model(), rows["WAN21_T2V"].model(form),
                                              rows["WAN21_I2V"].model())
        )  # fmt: skip
        refuse(model, stored)
        refuse(stored, model)
        with pytest.raises(ValueError, match="of the same build as model"):
            refuse(model, other)
        for denoiser in (model, stored, other):
            denoiser.release()
