"""The search nodes in real ComfyUI: inside core's guiders, agreeing with the headless host, stopped and resumed."""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytestmark = pytest.mark.integration
STEPS, PROMPT = 5, "a blue seven on yellow paper"
CALLS = 12 * STEPS


@pytest.fixture(scope="module")
def parts(embedded, ours):
    """parts(variant, headless) -> host, model, positive, negative, vae, reward: the embedded model with its weights."""

    @cache
    def make(variant="flow", headless=False):
        host, model, clip, vae = embedded(variant, headless)
        with torch.inference_mode():
            words = [host.encode_text(clip, text) for text in (PROMPT, "")]
            reward = ours("hosts.rewards.kinds").make(host, "embedded_judge", {"boldness": 1.0})
        return host, model, *words, vae, reward

    return make


@pytest.fixture(scope="module")
def nodes(ours):
    return ours("nodes.search")


def settings(nodes, name="dts_star", **changes):
    return {"method": name, **{i.id: i.default for i in nodes.METHODS[name]()}, **changes}


def empty(batch=1, channels=16):
    return {"samples": torch.zeros(batch, channels, 8, 8)}


def simple(comfy, model):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)


def run(nodes, guider, sigmas, vae, reward, name="dts_star", latent=None, **given):
    how = settings(nodes, name, **given.pop("how", {}))
    given = {"calls": CALLS, "prompt": PROMPT, "seed": 3, **given}
    with torch.inference_mode():
        return nodes.RetortTreeSearch.execute(guider, sigmas, latent or empty(), vae, reward, how, **given).args


def ancestral(comfy):
    return comfy.samplers.sampler_object("euler_ancestral")


def alike(comfy):
    """(our transition, core's sampler) that draw alike: fresh noise is drawn on the card by core, and never by us."""
    on_card = comfy.model_management.get_torch_device().type != "cpu"
    return ("ode", comfy.samplers.sampler_object("euler")) if on_card else ("auto", ancestral(comfy))


@pytest.mark.parametrize("variant", ["flow", "eps"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_candidate_is_cores_plain_sample_and_more_are_better(comfy, nodes, parts, guided, sample, variant, cfg):
    _, model, positive, negative, vae, reward = parts(variant)
    guider, sigmas = guided(model, positive, negative, cfg), simple(comfy, model)
    branches, (transition, core) = 1 if cfg == 1 else 2, alike(comfy)
    plain = sample(guider, core, sigmas, empty(), seed=3)
    one, _, saved, *_ = run(nodes, guider, sigmas, vae, reward, calls=branches * STEPS, transition=transition)
    assert saved.states[0].ledger.calls == branches * STEPS
    assert torch.allclose(one["samples"], plain, atol=1e-5)
    with torch.inference_mode():
        before = float(reward(vae.decode(plain), PROMPT))
    for name in nodes.METHODS:
        best, top, saved, report, _ = run(nodes, guider, sigmas, vae, reward, name, calls=branches * CALLS)
        assert saved.states[0].best.reward >= before - 1e-3 or name in ("fk", "svdd")
        assert saved.states[0].ledger.calls <= branches * CALLS and torch.isfinite(top["samples"]).all()
        assert best["samples"].shape == (1, 16, 8, 8) and report.ndim == 4


def test_the_network_runs_as_often_as_is_counted(comfy, nodes, parts, guided, recording):
    _, model, positive, negative, vae, reward = parts("flow")
    sigmas = simple(comfy, model)
    basic = comfy.custom.BasicGuider.execute(model, positive)[0]
    perp = comfy.perpneg.PerpNegGuider.execute(model, positive, negative, negative, 3.0, 1.0)[0]
    for guider, branches in ((basic, 1), (guided(model, positive, negative, 3.0), 2), (perp, 3)):
        with recording(model) as seen:
            saved = run(nodes, guider, sigmas, vae, reward, calls=branches * 80, batch_size=3)[2]
        assert saved.states[0].ledger.calls == sum(len(x) for x in seen.inputs)
        # Only core's own way of guiding is known to treat each level of a batch alone.
        mixed = any(len(t.unique()) > 1 for t in seen.timesteps)
        assert mixed == (guider is not perp)


def test_conditions_with_a_time_keep_levels_apart(comfy, nodes, parts, guided, recording):
    _, model, positive, negative, vae, reward = parts("flow")
    late = [[t, {**extra, "start_percent": 0.0, "end_percent": 0.5}] for t, extra in negative]
    with recording(model) as seen:
        run(nodes, guided(model, positive, late, 3.0), simple(comfy, model), vae, reward)
    assert all(len(t.unique()) == 1 for t in seen.timesteps)


@pytest.mark.parametrize("variant", ["flow", "eps"])
def test_hosts_agree(comfy, ours, nodes, parts, guided, variant, card):
    if card == "bf16":
        pytest.skip("the headless host computes in fp32 here")
    host, model, positive, negative, vae, reward = parts(variant)
    sigmas = simple(comfy, model)
    here = run(nodes, guided(model, positive, negative, 3.0), sigmas, vae, reward, calls=2 * CALLS)
    host, model, positive, negative, vae, reward = parts(variant, True)
    search = ours("hosts.search.run")
    step = ours("sampling.transition").Transition()
    request = search.SearchRequest(sigmas, empty(), PROMPT, nodes.config_of(settings(nodes)), step, 3)
    guider = host.cfg_guider(model, positive, negative, 3.0)
    there = search.run(host, guider, vae, reward, request, nodes.budget_of(2 * CALLS, 0, ""), 8)
    assert (here[0]["samples"] - there.best["samples"]).abs().max() < 1e-4
    assert here[2].states[0].ledger.calls == there.saved.states[0].ledger.calls


class Stopping:
    """Presses ComfyUI's cancel while it scores its second batch; or answers NaN."""

    name, differentiable, range = "stopping", False, (0.0, 1.0)

    def __init__(self, comfy, wrong=False):
        self.comfy, self.wrong, self.seen = comfy, wrong, 0

    def __call__(self, images, prompts):
        self.seen += 1
        if self.seen == 2 and self.wrong:
            return images.mean((1, 2, 3)) * float("nan")
        if self.seen == 2:
            self.comfy.model_management.interrupt_current_processing()
        return images.mean((1, 2, 3))


def test_cancel_gives_the_best_so_far_and_resume_goes_on(comfy, nodes, parts, guided, sample):
    _, model, positive, negative, vae, _ = parts("flow")
    guider, sigmas = guided(model, positive, negative, 3.0), simple(comfy, model)
    _, top, saved, report, text = run(nodes, guider, sigmas, vae, Stopping(comfy), batch_size=2, calls=2 * CALLS)
    assert "stopped by: cancelled" in text and len(top["samples"]) == 4 and report.ndim == 4
    comfy.model_management.throw_exception_if_processing_interrupted()  # the rest of the workflow runs
    with torch.inference_mode():
        wrong = Stopping(comfy, wrong=True)
        with pytest.raises(ValueError, match="stopping is nan"):
            nodes.RetortResumeSearch.execute(saved, guider, vae, wrong, calls=2 * CALLS, batch_size=2)
        more = nodes.RetortResumeSearch.execute(saved, guider, vae, Stopping(comfy), calls=2 * STEPS, batch_size=8)
    assert more.args[2].states[0].drawn > saved.states[0].drawn or more.args[2].states[0].size > saved.states[0].size
    assert torch.isfinite(sample(guider, ancestral(comfy), sigmas, empty())).all()
    early = Stopping(comfy)
    early.seen = 1
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(nodes, guider, sigmas, vae, early)


def test_the_network_comes_back_after_a_reward_took_its_place(comfy, nodes, parts, guided, card):
    _, model, positive, negative, vae, reward = parts("flow")
    guider, sigmas = guided(model, positive, negative, 3.0), simple(comfy, model)

    class Greedy(Stopping):
        def __call__(self, images, prompts):
            comfy.model_management.unload_all_models()
            return reward(images, prompts)

    expected = run(nodes, guider, sigmas, vae, reward)[0]["samples"]
    assert torch.allclose(run(nodes, guider, sigmas, vae, Greedy(comfy))[0]["samples"], expected, atol=1e-5)
    # On a small card the reward is asked last, and keeps the place.
    there = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    assert guider.model_patcher in there or card == "little"


def test_a_mask_holds_and_a_batch_is_searched_item_by_item(comfy, nodes, parts, guided, sample):
    _, model, positive, negative, vae, reward = parts("flow")
    guider, sigmas = guided(model, positive, negative, 3.0), simple(comfy, model)
    pictures = sample(guider, ancestral(comfy), sigmas, empty(2), seed=8)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    latent = {"samples": pictures, "noise_mask": mask}
    best, top, saved, report, _ = run(nodes, guider, sigmas[1:], vae, reward, latent=latent, keep=2)
    assert len(best["samples"]) == len(report) == len(saved.states) == 2 and len(top["samples"]) == 4
    assert (best["samples"] - pictures)[..., :3].abs().max() < 1e-4 < (best["samples"] - pictures)[..., 5:].abs().max()


class FrameVae:
    """Decodes video latents of any model to grey frames."""

    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).clamp(0, 1)


@pytest.mark.parametrize("kind", ["wan", "cog", "eps"])
def test_other_networks(comfy, nodes, tiny, guided, sample, kind):
    model, positive, negative, latent = tiny(kind)
    guider, sigmas = guided(model, positive, negative, 2.0), simple(comfy, model)[-3:]
    reward = Stopping(comfy, wrong=False)
    reward.seen = 9
    best, top, saved, *_ = run(nodes, guider, sigmas, FrameVae(), reward, latent=latent, calls=16, batch_size=4)
    assert top["samples"].shape == (len(saved.states[0].best.found), *latent["samples"].shape[1:])
    assert torch.isfinite(top["samples"]).all() and saved.states[0].ledger.calls == 16
    transition, core = alike(comfy)
    one = run(nodes, guider, sigmas, FrameVae(), reward, latent=latent, calls=4, transition=transition)[0]["samples"]
    if kind == "eps":
        assert torch.allclose(one, sample(guider, core, sigmas, latent, seed=3), atol=1e-4)


def test_a_search_outlives_the_session_and_is_drawn_from(comfy, ours, nodes, parts, guided, tmp_path, monkeypatch):
    monkeypatch.setattr(comfy.folders, "get_output_directory", lambda: str(tmp_path))
    _, model, positive, negative, vae, reward = parts("flow")
    guider, sigmas, files = guided(model, positive, negative, 3.0), simple(comfy, model), ours("nodes.search_files")
    saved = run(nodes, guider, sigmas, vae, reward, "dts", latent=empty(2))[2]
    with torch.inference_mode():
        name = files.RetortSaveSearch.execute(saved, "kept").args[0]
        assert (tmp_path / "retort_searches" / "kept.safetensors").is_file()
        loaded = files.RetortLoadSearch.execute(name).args[0]
        here, there = (
            nodes.RetortResumeSearch.execute(one, guider, vae, reward, calls=2 * CALLS, batch_size=8).args
            for one in (saved, loaded)
        )
        assert torch.equal(here[1]["samples"], there[1]["samples"]) and len(here[0]["samples"]) == 2
        drawn = files.RetortDrawFromSearch.execute(here[2], guider, count=5, seed=2).args[0]["samples"]
        # A draw is one of the tree's finished latents, stored as a sampler stores it.
        best = files.RetortDrawFromSearch.execute(here[2], guider, count=200, seed=2).args[0]["samples"]
    assert drawn.shape == (10, 16, 8, 8)
    assert (here[0]["samples"][:1] - best[:200]).flatten(1).norm(dim=1).min() < 1e-3


def test_a_batch_that_memory_does_not_hold_is_halved(comfy, ours, monkeypatch):
    base = torch.nn.Module()
    base.memory_required = lambda shape: 100 * shape[0]
    device = torch.device("meta")
    patcher = comfy.model_patcher.ModelPatcher(base, device, device)
    fitting = ours("hosts.comfyui.search")._fitting
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 450)
    assert [fitting(patcher, (b, 4, 8, 8), device) for b in (1, 4, 5, 16)] == [1, 4, 2, 4]
    assert fitting(patcher, (16, 4, 8, 8), torch.device("cpu")) == 16
    # Weights that page by themselves fill the card, and leave it for whoever needs room.
    monkeypatch.setattr(patcher, "get_free_memory", lambda device: 450 + 1200)
    assert fitting(patcher, (16, 4, 8, 8), device) == 16


def test_a_noise_policy_goes_into_core_samplers(comfy, ours, nodes, parts, guided, sample):
    _, model, positive, negative, vae, reward = parts("flow")
    guider, sigmas, policies = guided(model, positive, negative, 3.0), simple(comfy, model), ours("nodes.noise_policy")
    euler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        noise, best, _, saved, *_ = policies.RetortNoisePolicy.execute(
            guider, sigmas, empty(), vae, reward, prompt=PROMPT, calls=2 * STEPS * 16, samples=8, seed=3, keep=16
        ).args
        other = policies.RetortPolicyNoise.execute(saved, 4).args[0]
        sampled = comfy.custom.SamplerCustomAdvanced.execute(other, guider, euler, sigmas, empty(3))[0]["samples"]
        plain = comfy.custom.SamplerCustomAdvanced.execute(
            comfy.custom.Noise_RandomNoise(4), guider, euler, sigmas, empty(3)
        )[0]["samples"]
    assert saved.states[0].step == 2 and sampled.shape == (3, 16, 8, 8)
    assert (sampled - plain).abs().max() > 1e-3 and torch.isfinite(sampled).all()
    # The first candidate is core's plain sample of the seed.
    first = next(c.latent for c in saved.states[0].best.found if c.number == 0)
    stored = model.model.process_latent_out(first)
    assert torch.allclose(stored, sample(guider, euler, sigmas, empty(), seed=3)[0], atol=1e-4)


def test_a_server_runs_it(server, nodes):
    def step(name, /, **inputs):
        return {"class_type": name, "inputs": inputs}

    own = {f"method.{i.id}": i.default for i in nodes.METHODS["dts_star"]()}
    limits = {"calls": 40, "seconds": 0.0, "enough": "", "batch_size": 4}
    done = server.run(
        {
            "m": step("RetortEmbeddedModel", variant="flow"),
            "p": step("CLIPTextEncode", clip=["m", 1], text=PROMPT),
            "n": step("CLIPTextEncode", clip=["m", 1], text=""),
            "g": step("CFGGuider", model=["m", 0], positive=["p", 0], negative=["n", 0], cfg=2.0),
            "s": step("BasicScheduler", model=["m", 0], scheduler="simple", steps=4, denoise=1.0),
            "l": step("EmptySD3LatentImage", width=64, height=64, batch_size=1),
            "r": step("RetortReward", kind="embedded_judge", **{"kind.boldness": 1.0}),
            "t": step(
                "RetortTreeSearch", guider=["g", 0], sigmas=["s", 0], latent=["l", 0], vae=["m", 2], reward=["r", 0],
                prompt=PROMPT, method="dts_star", transition="auto", noise_level=0.7, keep=3, seed=1, **own, **limits,
            ),
            "u": step(
                "RetortResumeSearch", search=["t", 2], guider=["g", 0], vae=["m", 2], reward=["r", 0], **limits
            ),
            "d": step("VAEDecode", samples=["u", 1], vae=["m", 2]),
            "o": step("SaveImage", images=["d", 0], filename_prefix="found"),
        }
    )  # fmt: skip
    assert done["status"]["status_str"] == "success", done["status"]
    assert len(done["outputs"]["o"]["images"]) == 3
    # Its best picture has been on the node as a preview: it is not there twice.
    for node in ("t", "u"):
        assert "network calls" in done["outputs"][node]["text"][0] and "images" not in done["outputs"][node]
