"""Reflection in real ComfyUI: guiders inside a guider, and networks that are shared or must not be."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.integration
STEPS = 5


@pytest.fixture(scope="module")
def maths(ours):
    return ours("sampling.reflection")


@pytest.fixture(scope="module")
def host(ours):
    return ours("hosts.comfyui.host").host


@pytest.fixture(scope="module")
def reflect(ours, host, maths):
    """reflect(weak guider, reflecting guider or None, **settings) -> SAMPLER."""

    def make(weak, reflecting=None, **settings):
        method = ours("hosts.methods").Reflected(weak, maths.ReflectionConfig(**settings), reflecting)
        return host.method_sampler(method)

    return make


def simple(comfy, model, steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def euler(comfy, name="euler"):
    return comfy.samplers.sampler_object(name)


def pair(tiny, guided, kind, batch=1, cfg=3.0, weak=0.0):
    model, positive, negative, latent = tiny(kind, batch)
    return model, guided(model, positive, negative, cfg), guided(model, positive, negative, weak), latent


KINDS = ["flow", "eps16", "eps", "v", "wan", "cog"]


def close(a, b, part=1e-5):
    return float((a - b).abs().max()) <= part * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["euler", "heun", "dpmpp_2m"])
def test_a_pair_without_a_gap_is_core(comfy, tiny, guided, sample, reflect, kind, base):
    model, strong, _, latent = pair(tiny, guided, kind, batch=2)
    sigmas = simple(comfy, model, 4)
    found = sample(strong, reflect(strong, inversion="fixed_point", base=base), sigmas, latent)
    none = sample(strong, reflect(strong, end=0.0, base=base), sigmas, latent)
    if kind != "cog":  # core has no VP sampler: it integrates in coordinates of its own
        assert torch.equal(none, sample(strong, euler(comfy, base), sigmas, latent))
    assert close(found, none, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_legs_are_what_the_maths_says(comfy, ours, tiny, guided, sample, reflect, maths, kind):
    """Written out with the same guiders outside any nesting: each guider's own x0 at each call, one after another."""
    model, strong, weak, latent = pair(tiny, guided, kind, batch=2, weak=1.0)
    path = ours("hosts.comfyui.coordinates").path_of(model.get_model_object("model_sampling"))
    sigmas = simple(comfy, model, 4)[1:]
    found = sample(strong, reflect(weak), sigmas, latent)

    def alone(guider):
        class Once(comfy.samplers.Sampler):
            def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, *_, **__):
                self.x0 = wrap(self.x, self.sigma, **extra_args)
                return noise

        def denoise(x, sigma):
            once = Once()
            once.x, once.sigma = x, sigma
            guider.sample(torch.zeros_like(x), torch.zeros_like(x), once, sigmas, seed=7)
            return once.x0

        return denoise

    noise = comfy.sample.prepare_noise(latent["samples"], 7)
    with torch.inference_mode():
        expected = maths.sample_reflection(
            alone(strong), path.add_noise(torch.zeros_like(noise), sigmas[0], noise), sigmas, disable=True, path=path,
            weak=alone(weak), config=maths.ReflectionConfig(),
        )  # fmt: skip
        expected = model.model.process_latent_out(expected)
    assert close(found, expected) and not close(found, sample(strong, euler(comfy), sigmas, latent), 1e-3)


def bumped(comfy, model, strength, seed=1):
    """A clone with patches on every matrix."""
    generator = torch.Generator().manual_seed(seed)
    patches = {
        name: (torch.randn(weight.shape, generator=generator) * 0.1,)
        for name, weight in model.model.state_dict().items()
        if weight.ndim >= 2 and name.startswith("diffusion_model.")
    }
    clone = model.clone()
    clone.add_patches({k: ("diff", v) for k, v in patches.items()}, strength)
    return clone


@pytest.fixture
def loadable(comfy, networks, tmp_path):
    """loadable(kind) -> a MODEL that a file stands behind, so that it can be read a second time."""
    import safetensors.torch

    def make(kind):
        fresh = networks(kind)
        path = tmp_path / f"{kind}.safetensors"
        weights = fresh.model.diffusion_model.state_dict()
        safetensors.torch.save_file({k: v.clone().contiguous() for k, v in weights.items()}, path)
        return comfy.sd.load_diffusion_model(str(path))

    return make


@pytest.mark.parametrize("kind", ["flow", "eps", "wan"])
@pytest.mark.parametrize("file", [True, False], ids=["own network", "swapped"])
def test_a_weak_leg_leaves_the_strong_one_as_it_was_to_the_bit(
    comfy, tiny, networks, loadable, guided, sample, reflect, kind, file, caplog
):
    base = loadable(kind) if file else networks(kind)
    _, positive, negative, latent = tiny(kind)
    strong_model, weak_model = bumped(comfy, base, 0.8), bumped(comfy, base, -1.5)
    strong, weak = (guided(m, positive, negative, 2.0) for m in (strong_model, weak_model))
    sigmas = simple(comfy, base)
    answers = {}

    def probing(guider, name):
        """A guider that also notes what it says to one fixed latent whenever it is asked."""
        inner = guider.predict_noise

        def predict(x, timestep, *options):
            same = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) * 0.5
            answers.setdefault(name, []).append(inner(same, torch.full_like(timestep, float(sigmas[1])), *options))
            return inner(x, timestep, *options)

        guider.predict_noise = predict
        return guider

    plain = {name: sample(g, euler(comfy), sigmas, latent) for name, g in (("strong", strong), ("weak", weak))}
    with caplog.at_level("INFO", logger="retort"):
        found = sample(probing(strong, "strong"), reflect(weak, end=0.6), sigmas, latent)
    assert ("swapped before each leg" in caplog.text) != file and ("read again from its file" in caplog.text) == file
    first, *others = answers["strong"]
    assert len(others) == STEPS + 3 - 1 and all(torch.equal(first, other) for other in others)
    del strong.predict_noise
    for name, guider in (("strong", strong), ("weak", weak)):
        assert torch.equal(sample(guider, euler(comfy), sigmas, latent), plain[name])
    assert not close(found, plain["strong"], 1e-3)
    # Both ways of keeping them apart are the two networks loaded one beside the other.
    separate = networks(kind)
    apart = guided(bumped(comfy, separate, -1.5), positive, negative, 2.0)
    assert close(sample(strong, reflect(apart, end=0.6), sigmas, latent), found)


def test_networks_that_do_not_fit_take_turns_and_it_is_said(comfy, ours, tiny, networks, guided, sample, reflect,
                                                            monkeypatch, caplog):  # fmt: skip
    _, positive, negative, latent = tiny("flow")
    one, other = networks("flow"), bumped(comfy, networks("flow"), 1.0)
    strong, weak = guided(one, positive, negative, 2.0), guided(other, positive, negative, 1.0)
    sigmas = simple(comfy, one)
    expected = sample(strong, reflect(weak), sigmas, latent)
    module = ours("hosts.comfyui.reflection")
    fetched = []
    fetch = module._Leg.fetch
    monkeypatch.setattr(module._Leg, "loaded", lambda leg: leg.patcher is not one)
    monkeypatch.setattr(module._Leg, "fetch", lambda leg: (fetched.append(leg.patcher is one), fetch(leg)))
    assert torch.equal(sample(strong, reflect(weak), sigmas, latent), expected)
    # Down, up, and the step after it shares its network with the next way down.
    assert fetched == [True, False] * (STEPS - 1) + [True]
    assert "do not fit together" in caplog.text and "GB" in caplog.text


def test_one_network_of_which_the_card_holds_a_part_takes_no_turns(
    comfy, ours, tiny, guided, sample, reflect, monkeypatch, caplog
):
    model, strong, weak, latent = pair(tiny, guided, "flow")
    sigmas = simple(comfy, model)
    expected = sample(strong, reflect(weak), sigmas, latent)
    leg = ours("hosts.comfyui.reflection")._Leg
    monkeypatch.setattr(leg, "loaded", lambda leg: False)
    monkeypatch.setattr(leg, "fetch", lambda leg: pytest.fail("loaded again"))
    assert torch.equal(sample(strong, reflect(weak), sigmas, latent), expected)
    assert "do not fit together" not in caplog.text


def test_a_network_in_part_on_its_card_is_loaded(comfy, ours, monkeypatch):
    leg = object.__new__(ours("hosts.comfyui.reflection")._Leg)
    leg.patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(4, 4), torch.device("meta"), torch.device("cpu"))
    for held, loaded in ((0, False), (16, True), (80, True)):
        leg.patcher.model.model_loaded_weight_memory = held
        assert leg.loaded() == loaded


def test_a_pair_of_one_model_shares_its_network_and_loads_nothing(comfy, tiny, guided, sample, reflect, monkeypatch):
    model, strong, weak, latent = pair(tiny, guided, "flow")
    sigmas = simple(comfy, model)
    sample(strong, reflect(weak), sigmas, latent)
    loaded = [m.model for m in comfy.model_management.current_loaded_models]
    same = guided(model.clone(), *(c for c in tiny("flow")[1:3]), 0.0)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", lambda *a, **k: pytest.fail("loaded again"))
    a, b = (sample(strong, reflect(guider), sigmas, latent) for guider in (weak, same))
    assert torch.equal(a, b) and [m.model for m in comfy.model_management.current_loaded_models] == loaded


@pytest.mark.parametrize("inversion", ["euler", "midpoint", "fixed_point"])
@pytest.mark.parametrize(("weak_cfg", "branches"), [(0.0, 1), (1.0, 1), (2.0, 2)])
def test_calls_are_counted_as_the_network_runs(
    comfy, ours, host, tiny, guided, sample, reflect, recording, weak_cfg, branches, inversion
):
    model, strong, weak, latent = pair(tiny, guided, "flow", weak=weak_cfg)
    sigmas = simple(comfy, model)
    down = guided(model, *tiny("flow")[1:3], 1.0)
    for reflecting, each in ((None, 2), (down, 1)):
        sampler = reflect(weak, reflecting, inversion=inversion, end=0.6)
        with recording(model) as seen:
            sample(strong, sampler, sigmas, latent)
        spent = ours("hosts.reflection").spent(host, strong, host.method_of(sampler), sigmas)
        calls = {"euler": 1, "midpoint": 2, "fixed_point": 3}[inversion]
        assert sum(len(x) for x in seen.inputs) == spent.reflected == 2 * STEPS + 3 * (each + calls * branches)
        assert (spent.plain, spent.step) == (2 * STEPS, 2)


def test_cfg_0_is_what_core_makes_of_both_branches(comfy, tiny, guided, sample, reflect):
    model, strong, weak, latent = pair(tiny, guided, "eps")
    sigmas = simple(comfy, model)
    both = guided(model.clone(), *tiny("eps")[1:3], 0.0)
    both.model_patcher.model_options["disable_cfg1_optimization"] = True
    both.model_options = both.model_patcher.model_options
    # A batch of two rounds otherwise than one of one.
    assert close(*(sample(strong, reflect(guider), sigmas, latent) for guider in (weak, both)))


def test_a_guider_may_be_its_own_partner_and_is_left_as_it_was(comfy, tiny, guided, sample, reflect):
    model, strong, _, latent = pair(tiny, guided, "flow")
    before = set(vars(strong))
    sample(strong, reflect(strong, strong, inversion="fixed_point"), simple(comfy, model), latent)
    assert set(vars(strong)) == before and strong.model_patcher is model


def test_conditions_with_a_time_an_area_or_a_mask_work_on_a_leg(comfy, tiny, guided, sample, reflect, recording):
    model, positive, negative, latent = tiny("eps")
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    sigmas = simple(comfy, model, 4)
    area = [[t, {**e, "area": (8, 16, 0, 0), "strength": 0.7}] for t, e in positive]
    mask = [[t, {**e, "mask": torch.ones(1, 128, 128), "mask_strength": 0.5}] for t, e in positive]
    late = [[t, {**e, "start_percent": 0.5, "end_percent": 1.0}] for t, e in positive]
    early = [[t, {**e, "start_percent": 0.0, "end_percent": 0.5}] for t, e in negative]
    for special in (area + positive, mask + positive, late + early):
        guider = guided(model, special, negative, 2.0)
        same = sample(guider, reflect(guider, inversion="fixed_point"), sigmas, latent)
        assert close(same, sample(guider, euler(comfy), sigmas, latent), 1e-3)
        plain = guided(model, positive, negative, 2.0)
        assert not torch.equal(
            sample(plain, reflect(guider), sigmas, latent), sample(plain, reflect(plain), sigmas, latent)
        )


@pytest.mark.parametrize("kind", ["flow", "eps", "cog", "wan"])
def test_a_mask_keeps_the_rest_of_the_picture(comfy, tiny, guided, sample, reflect, kind):
    model, strong, weak, latent = pair(tiny, guided, kind, batch=2)
    image = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, *([64, 64] if kind in ("flow", "eps") else [8, 8]))
    mask[..., : mask.shape[-1] // 2] = 1
    given = {"samples": image, "noise_mask": mask}
    for inversion in ("euler", "midpoint", "fixed_point"):
        out = sample(strong, reflect(weak, inversion=inversion), simple(comfy, model)[1:], given)
        assert close(out[..., 4:], image[..., 4:], 1e-4)
        assert (out[..., :4] - image[..., :4]).abs().max() > 1e-2
    soft = {"samples": image, "noise_mask": mask * 0.6 + 0.2}
    same = sample(strong, reflect(strong, inversion="fixed_point"), simple(comfy, model)[1:], soft)
    if kind != "cog":
        assert close(same, sample(strong, euler(comfy), simple(comfy, model)[1:], soft), 1e-3)


def test_each_picture_of_a_batch_keeps_its_own_mask(comfy, tiny, guided, sample, reflect):
    model, strong, weak, latent = pair(tiny, guided, "flow", batch=2)
    image = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, ..., :32], mask[1, ..., 32:] = 1, 1
    out = sample(strong, reflect(weak), simple(comfy, model)[1:], {"samples": image, "noise_mask": mask})
    assert close(out[0, ..., 4:], image[0, ..., 4:], 1e-4) and close(out[1, ..., :4], image[1, ..., :4], 1e-4)


def test_batch_and_callback_are_as_cores(comfy, tiny, guided, reflect):
    model, strong, weak, latent = pair(tiny, guided, "flow", batch=3)
    sigmas, noise = simple(comfy, model), comfy.sample.prepare_noise(latent["samples"], 5)
    sampler, calls = reflect(weak), []
    with torch.inference_mode():
        together = strong.sample(
            noise, latent["samples"], sampler, sigmas, seed=5, callback=lambda *given: calls.append(given)
        )
        for i in range(3):
            alone = strong.sample(noise[i : i + 1], latent["samples"][:1], sampler, sigmas, seed=5)
            assert close(together[i : i + 1], alone, 1e-5)
    assert [(c[0], c[3]) for c in calls] == [(i, STEPS) for i in range(STEPS)]


@pytest.fixture(scope="module")
def control(comfy):
    """A ControlNet for the tiny eps network, with weights that do something."""
    import importlib

    cldm = importlib.import_module("comfy.cldm.cldm")
    controlnet = importlib.import_module("comfy.controlnet")
    network = cldm.ControlNet(
        image_size=32, in_channels=4, model_channels=320, hint_channels=3, num_res_blocks=[1], channel_mult=[1],
        transformer_depth=[1], transformer_depth_middle=-2, context_dim=768, num_heads=8, num_head_channels=-1,
        use_spatial_transformer=True, legacy=False, operations=comfy.ops.disable_weight_init, dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    made = controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)
    return made.copy().set_cond_hint(torch.rand(1, 3, 64, 64, generator=generator), 1.0, (0.0, 0.8))


def test_a_controlnet_on_the_strong_leg(comfy, tiny, guided, sample, reflect, control):
    model, positive, negative, latent = tiny("eps")
    with_it = [[t, {**e, "control": control, "control_apply_to_uncond": True}] for t, e in positive]
    strong, bare = guided(model, with_it, negative, 2.0), guided(model, positive, negative, 2.0)
    sigmas = simple(comfy, model)
    plain, without = (sample(g, euler(comfy), sigmas, latent) for g in (strong, bare))
    assert not close(plain, without, 1e-3)
    # It is in the strong leg and only there; the same on both legs cancels.
    found = sample(strong, reflect(bare), sigmas, latent)
    assert not close(found, plain, 1e-3)
    assert close(sample(strong, reflect(strong, inversion="fixed_point"), sigmas, latent), plain, 1e-3)
    assert torch.equal(sample(strong, euler(comfy), sigmas, latent), plain)


def test_pairs_that_cannot_be_are_refused(comfy, ours, tiny, guided, sample, reflect, networks):
    model, strong, weak, latent = pair(tiny, guided, "flow")
    sigmas = simple(comfy, model)
    other, positive, negative, _ = tiny("eps")
    with pytest.raises(ValueError, match=r"weak guider's model has latents of another format \(SD15\).*SD3"):
        sample(strong, reflect(guided(other, positive, negative, 1.0)), sigmas, latent)
    with pytest.raises(ValueError, match=r"reflecting guider's model has latents of another format"):
        sample(strong, reflect(weak, guided(other, positive, negative, 1.0)), sigmas, latent)
    odd, positive, negative, _ = tiny("eps16")
    with pytest.raises(ValueError, match=r"samples in other coordinates \(VE\) than the strong one's \(FLOW"):
        sample(strong, reflect(guided(odd, positive, negative, 1.0)), sigmas, latent)
    empty = guided(model, [], tiny("flow")[2], 2.0)
    with pytest.raises(ValueError, match=r"weak guider has no conditioning \(positive\): connect"):
        sample(strong, reflect(empty), sigmas, latent)
    with pytest.raises(ValueError, match="no conditioning"):
        sample(strong, reflect(comfy.samplers.CFGGuider(model)), sigmas, latent)
    with pytest.raises(ValueError, match="hold none of the 4 steps"):
        sample(strong, reflect(weak, begin=0.01, end=0.05), sigmas, latent)
    broken = [[t * float("nan"), e] for t, e in tiny("flow")[1]]
    diverged = ours("sampling.standard").SamplingDiverged
    with pytest.raises(diverged, match="the weak model returned NaN or infinity in step 1 of 5"):
        sample(strong, reflect(guided(model, broken, broken, 1.0)), sigmas, latent)
    # Nothing of a run that failed is left behind.
    assert close(sample(strong, reflect(strong, inversion="fixed_point"), sigmas, latent),
                 sample(strong, euler(comfy), sigmas, latent), 1e-3)  # fmt: skip


def test_a_residual_that_is_not_small_is_reported(comfy, tiny, networks, guided, sample, reflect, caplog):
    _, positive, negative, latent = tiny("flow")
    strong = guided(networks("flow"), positive, negative, 4.0)
    weak = guided(bumped(comfy, networks("flow"), 4.0), positive, negative, 4.0)
    sigmas = simple(comfy, strong.model_patcher, 3)
    with caplog.at_level("INFO", logger="retort"):
        sample(strong, reflect(weak, inversion="fixed_point", iterations=1), sigmas, latent)
    assert any(r.levelname == "WARNING" and "raise iterations" in r.getMessage() for r in caplog.records)
    caplog.clear()
    with caplog.at_level("INFO", logger="retort"):
        sample(strong, reflect(strong, inversion="fixed_point"), sigmas, latent)
    assert all(r.levelname == "INFO" for r in caplog.records) and "at most" in caplog.text
