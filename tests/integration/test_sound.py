"""Video with sound (nested latents) through searches and reflection, on networks of ComfyUI's own classes."""

from __future__ import annotations

import pytest
import tiny_sound as sound
import torch

pytestmark = pytest.mark.integration
STEPS = 4


@pytest.fixture(scope="module", params=list(sound.KINDS))
def kind(request, comfy):
    return request.param


@pytest.fixture(scope="module")
def tiny(comfy):
    """tiny(kind) -> MODEL, positive, negative; one shared MODEL per kind."""
    made = {}

    def get(kind):
        if kind not in made:
            with torch.inference_mode():
                made[kind] = sound.model(kind)
        return made[kind], sound.prompt(kind, 1), sound.prompt(kind, 2)

    return get


@pytest.fixture
def reward(ours):
    return ours("hosts.rewards.kinds").make(ours("hosts.comfyui.host").host, "sharpness", {})


@pytest.fixture
def searched(ours, tiny, guided, comfy, reward, tmp_path, monkeypatch):
    """searched(kind, method, **given) -> best, top, saved, report, text of Tree Search, and its guider."""
    host = ours("hosts.comfyui.host").host
    monkeypatch.setattr(type(host), "runs_folder", lambda self: tmp_path / "retort")
    nodes = ours("nodes.search")

    def run(kind, method="best_of_n", cfg=2.0, latent=None, **given):
        model, positive, negative = tiny(kind)
        guider = guided(model, positive, negative, cfg)
        how = {"method": method, **{i.id: i.default for i in nodes.METHODS[method]()}}
        given = {"calls": 8 * STEPS, "seed": 3, "batch_size": 3, **given}
        with torch.inference_mode():
            found = nodes.RetortTreeSearch.execute(
                guider, levels(comfy, model), latent or sound.empty(kind), sound.FirstFrames(), reward, how, **given
            ).args
        return *found, guider

    return run


def levels(comfy, model):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)


def parts(latent):
    return latent["samples"].unbind()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_first_candidate_is_cores_sample_with_its_sound(comfy, tiny, searched, sample, kind):
    """One candidate of a search is core's euler_ancestral of the same seed on the nested latent, to the bit."""
    best, top, saved, report, _, guider = searched(kind, calls=2 * STEPS)
    core = sample(guider, comfy.samplers.sampler_object("euler_ancestral"), levels(comfy, tiny(kind)[0]),
                  sound.empty(kind), seed=3).unbind()  # fmt: skip
    assert same(parts(best), core) and [p.shape[1:] for p in core] == list(map(torch.Size, sound.shapes(kind)))
    assert saved.states[0].ledger.calls == 2 * STEPS and same(parts(top), core) and report.ndim == 4


@pytest.mark.parametrize("method", ["best_of_n", "dts_star", "dts", "fk", "svdd"])
def test_every_method_goes_on_from_its_file(ours, searched, reward, kind, method):
    """Resumed from a file a search equals the one that goes on from memory, in both parts, to the bit."""
    *_, saved, _, _, guider = searched(kind, method)
    nodes, files = ours("nodes.search"), ours("hosts.search.files")
    host = ours("hosts.comfyui.host").host
    files.save(host, saved, "a search")
    loaded = files.load(host, "a search")
    assert same(parts(loaded.request.latent), parts(saved.request.latent))
    found = []
    for one in (saved, loaded):
        with torch.inference_mode():
            found.append(nodes.RetortResumeSearch.execute(one, guider, sound.FirstFrames(), reward, calls=64).args)
    here, there = found
    assert same(parts(here[0]), parts(there[0])) and same(parts(here[1]), parts(there[1]))
    assert here[2].states[0].ledger.calls > saved.states[0].ledger.calls
    if method in ("dts", "fk"):
        with torch.inference_mode():
            drawn = ours("hosts.search.run").draw_from(host, guider, loaded, 3, 5, False)
        assert [tuple(p.shape) for p in parts(drawn)] == [(3, *shape) for shape in sound.shapes(kind)]


def test_a_draw_is_stored_as_the_best_is(ours, searched, kind):
    """What core carries larger than it is (H3's sound) is drawn from a search in the size in which it is stored."""
    best, *_, saved, _, _, guider = searched(kind, "fk", keep=8)
    with torch.inference_mode():
        drawn = ours("hosts.search.run").draw_from(ours("hosts.comfyui.host").host, guider, saved, 6, 5, False)
        kept = searched(kind, "fk", keep=8)[1]
    sounds = list(parts(kept)[1])
    assert all(any(torch.allclose(one, other, rtol=1e-5) for other in sounds) for one in parts(drawn)[1])


def test_kept_sound_stays(searched, kind):
    """With a mask on the sound alone every candidate keeps the sound that came in, and the video is new."""
    latent = {"samples": sound.filled(kind, 4)}
    masks = [torch.ones(1, *shape) for shape in sound.shapes(kind)]
    latent["noise_mask"] = sound.nested([masks[0], 0 * masks[1]])
    best, *_ = searched(kind, latent=latent)
    video, heard = parts(best)
    assert torch.allclose(heard, parts(latent)[1], atol=1e-5) and not torch.allclose(video, parts(latent)[0], atol=0.1)


@pytest.mark.parametrize("kept", ["sound", "half of the video"])
def test_a_sampler_obeys_a_mask_for_each_part(ours, comfy, tiny, guided, sample, kind, kept):
    """Our deterministic sampler and a reflection that ends at once are core's euler beneath the same nested mask."""
    model, positive, negative = tiny(kind)
    guider, weak = guided(model, positive, negative, 2.0), guided(model, positive, negative, 0.0)
    masks = [torch.ones(1, *shape) for shape in sound.shapes(kind)]
    if kept == "sound":
        masks[1] *= 0
    else:
        masks[0][..., :2] = 0
    latent = {"samples": sound.filled(kind, 4), "noise_mask": sound.nested(masks)}
    distilled = ours("nodes.distilled").RetortDistilledSampler
    methods, config = ours("hosts.methods"), ours("sampling.reflection").ReflectionConfig
    reflected = ours("hosts.comfyui.sampler").MethodSampler(methods.Reflected(weak, config(begin=0.0, end=0.0)))
    with torch.inference_mode():
        ours_ = distilled.execute("custom", "deterministic", "noised latent")[0]
    core = sample(guider, comfy.samplers.sampler_object("euler"), levels(comfy, model), latent).unbind()
    for sampler in (ours_, reflected):
        found = sample(guider, sampler, levels(comfy, model), latent).unbind()
        for a, b in zip(found, core, strict=True):
            assert float((a - b).abs().max()) <= 2e-7 * max(1.0, float(b.abs().max()))
    for part, before, mask in zip(core, latent["samples"].unbind(), masks, strict=True):
        still = (mask == 0).expand_as(part)
        assert torch.allclose(part[still], before[still], atol=1e-5)


def test_items_of_a_batch_are_searched_by_themselves(searched, kind):
    """The first of two items is what it would be alone."""
    two, one = searched(kind, latent=sound.empty(kind, 2))[0], searched(kind)[0]
    assert len(parts(two)[0]) == 2 and same([part[:1] for part in parts(two)], parts(one))


def test_a_search_leaves_pictures_and_whole_latents_for_the_page(searched, kind, tmp_path):
    """The record of a candidate holds the video as core's Load Latent reads it, its sound beside it, and a picture."""
    from safetensors.torch import load_file

    best, *_ = searched(kind)
    folder = next((tmp_path / "retort_searches" / "records").glob("*/item_0"))
    kept = [load_file(path) for path in folder.glob("*.latent")]
    assert kept and len(list(folder.glob("*.jpg"))) == len(kept)
    assert any(same([row["latent_tensor"], row["latent_tensor_1"]], parts(best)) for row in kept)


def test_learnt_noise_is_noise_of_both_parts(ours, comfy, tiny, guided, sample, reward, kind):
    """FIND's NOISE after no step of its policy is core's noise, and a sampler takes it."""
    model, positive, negative = tiny(kind)
    guider = guided(model, positive, negative, 1.0)
    with torch.inference_mode():
        noise, *_ = ours("nodes.noise_policy").RetortNoisePolicy.execute(
            guider, levels(comfy, model), sound.empty(kind), sound.FirstFrames(), reward, samples=2, rate=1e-4,
            calls=2 * STEPS, seed=3,
        ).args  # fmt: skip
        mine = noise.generate_noise(sound.empty(kind)).unbind()
        core = comfy.custom.Noise_RandomNoise(3).generate_noise(sound.empty(kind)).unbind()
        out = comfy.custom.SamplerCustomAdvanced.execute(
            noise, guider, comfy.samplers.sampler_object("euler"), levels(comfy, model), sound.empty(kind)
        )[0]["samples"]
    assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(mine, core, strict=True))
    assert all(torch.isfinite(part).all() for part in out.unbind())


def test_no_reflection_is_euler_and_reflection_changes_both_parts(ours, comfy, tiny, guided, sample, kind):
    model, positive, negative = tiny(kind)
    strong, weak = guided(model, positive, negative, 3.0), guided(model, positive, negative, 0.0)
    methods, config = ours("hosts.methods"), ours("sampling.reflection").ReflectionConfig
    sampler = ours("hosts.comfyui.sampler").MethodSampler
    euler = sample(strong, comfy.samplers.sampler_object("euler"), levels(comfy, model), sound.empty(kind)).unbind()

    def run(end):
        made = sampler(methods.Reflected(weak, config(begin=0.0, end=end)))
        return sample(strong, made, levels(comfy, model), sound.empty(kind)).unbind()

    assert same(run(0.0), euler)
    assert all((a - b).abs().max() > 1e-3 and torch.isfinite(a).all() for a, b in zip(run(1.0), euler, strict=True))
