"""Teleport, Student-t noise, structure and dopri5 in real ComfyUI: eps, v and flow, UNet and DiT, images and video."""

from __future__ import annotations

import importlib

import pytest
import torch

pytestmark = pytest.mark.integration

KINDS = ["flow", "eps", "v", "wan", "cog"]


@pytest.fixture
def ready(comfy, tiny, guided):
    """ready(kind, batch, steps) -> (MODEL, GUIDER, SIGMAS, empty LATENT)."""

    def make(kind, batch=2, steps=6, cfg=2.0):
        model, positive, negative, latent = tiny(kind, batch)
        sigmas = comfy.custom.BasicScheduler.execute(model, "simple", steps, 1.0)[0]
        return model, guided(model, positive, negative, cfg), sigmas, latent

    return make


@pytest.fixture
def statistics(node):
    """statistics(model, latent, form) -> GAUSS_STATS of a dozen random latents of a LATENT's size."""

    def make(model, latent, form="this size (low rank)", **changes):
        many = torch.randn(12, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(8)) * 2 + 0.3
        given = {"latents": [{"samples": many}], "rank": [0], "folder": [""], "width": [64], "height": [64],
                 "name": [""], "form": [form]} | changes  # fmt: skip
        return node("RetortGaussianStatistics", model=[model], **given)[0]

    return make


def euler(comfy):
    return comfy.samplers.sampler_object("euler")


def traced(comfy, guider, sampler, sigmas, latent, seed=7):
    """(samples, [(step, total)]) of a run with a callback."""
    steps = []
    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    with torch.inference_mode():
        out = guider.sample(
            noise, latent["samples"], sampler, sigmas, seed=seed, denoise_mask=latent.get("noise_mask"),
            callback=lambda step, x0, x, total: steps.append((step, total)),
        )  # fmt: skip
    return out.cpu(), steps


@pytest.mark.parametrize("infer", [False, True])
@pytest.mark.parametrize("form", ["this size (low rank)", "any size (stationary)"])
@pytest.mark.parametrize("kind", KINDS)
def test_teleported_the_network_first_sees_the_latent_of_the_formula(
    comfy, ours, node, ready, statistics, recording, near, kind, form, infer
):
    model, guider, sigmas, latent = ready(kind, cfg=1.0)
    gauss = statistics(model, latent, form)
    inner = euler(comfy) if kind != "cog" else node("RetortStructureSampler", reference=latent, end_percent=0.0)[0]
    sampler = node("RetortTeleportSampler", sampler=inner, statistics=gauss, infer_mean=infer)[0]
    with recording(model) as seen:
        out, steps = traced(comfy, guider, sampler, sigmas, latent)
    assert torch.isfinite(out).all() and steps == [(2, 6), (3, 6), (4, 6), (5, 6)]
    assert len(seen.inputs) == 4 + infer

    path = ours("hosts.comfyui.coordinates").path_of(model.get_model_object("model_sampling"))
    noise = comfy.sample.prepare_noise(latent["samples"], 7)
    first = ours("sampling.prior").Prior(None, path, sigmas, noise.shape[1:], top=True).first(noise)
    teleport = ours("sampling.teleport")
    mean = None
    if infer:
        x0 = x0_of(comfy, ours, guider, first, sigmas[0])
        mean = teleport.inferred_mean(gauss, path, first, x0, sigmas[0])
    x = teleport.teleport(first, gauss, path, sigmas[0], sigmas[2], mean)
    expected = x / (1 + sigmas[2] ** 2) ** 0.5 if path.kind == "VE" else x
    atol = near(1e-4 * float(expected.std()), expected)
    torch.testing.assert_close(seen.inputs[infer].float(), expected, rtol=1e-4, atol=atol)


def x0_of(comfy, ours, guider, x, sigma):
    """What the guided model answers to x at a level."""

    class Once(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            self.x0 = model_wrap(x.to(noise.device), sigma.to(noise.device).expand(len(x)), **extra_args).cpu()
            return noise

    once = Once()
    with torch.inference_mode():
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), once, torch.tensor([float(sigma), 0.0]), seed=7)
    return once.x0


def test_teleport_does_nothing_and_is_core_to_the_bit_where_it_must(comfy, node, ready, statistics, caplog):
    for kind in ("flow", "eps16"):
        model, guider, sigmas, empty = ready(kind, batch=1)
        gauss = statistics(model, empty)
        shape = empty["samples"].shape
        image = {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
        mask = torch.zeros(1, 1, 64, 64)
        mask[..., 32:] = 1
        other = {"samples": torch.zeros(*shape[:-1], 10)}
        cases = [
            ("below the model's highest level", sigmas[2:], empty, {}),
            ("latent is not empty", sigmas, image, {}),
            ("noise mask", sigmas, {**empty, "noise_mask": mask}, {}),
            ("and the statistics have 6 directions", sigmas, other, {}),
            ("nothing to skip", sigmas, empty, {"skip_steps": 0}),
            ("nothing to skip", sigmas, empty, {"sigma_skip": float(sigmas[0])}),
        ]
        for said, levels, latent, changes in cases:
            sampler = node("RetortTeleportSampler", sampler=euler(comfy), statistics=gauss, **changes)[0]
            with caplog.at_level("INFO", "retort"):
                caplog.clear()
                out, steps = traced(comfy, guider, sampler, levels, latent)
            assert any(said in line and "Teleport does nothing" in line for line in caplog.messages), (said, kind)
            plain, core = traced(comfy, guider, euler(comfy), levels, latent)
            assert torch.equal(out, plain) and steps == core, said


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "euler_ancestral", "uni_pc", "lcm", "ddim"])
def test_any_core_sampler_goes_on_after_a_teleport(comfy, node, ready, statistics, near, name):
    for kind in ("flow", "eps16"):
        model, guider, sigmas, latent = ready(kind, steps=8)
        inner = comfy.samplers.sampler_object(name)
        sampler = node(
            "RetortTeleportSampler", sampler=inner, statistics=statistics(model, latent), sigma_skip=float(sigmas[3])
        )[0]
        out, steps = traced(comfy, guider, sampler, sigmas, latent)
        assert torch.isfinite(out).all() and steps[0] == (3, 8), name
        # The same by core's own split of a grid, from the teleported latent that a run to the end of the jump gives.
        ended = node("RetortTeleportSampler", sampler=inner, statistics=statistics(model, latent), skip_steps=3)[0]
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(latent["samples"], 7)
            half = guider.sample(noise, latent["samples"], ended, sigmas[:4], seed=7)
            rest = guider.sample(torch.zeros_like(noise), half, inner, sigmas[3:], seed=7).cpu()
        # What is stored in between leaves the model's scale and comes back, which rounds.
        torch.testing.assert_close(out, rest, rtol=1e-3, atol=near(2e-3 * float(rest.std()), rest))


def test_a_distilled_student_goes_on_from_the_teleported_latent(comfy, node, ready, statistics, recording):
    model, guider, sigmas, latent = ready("flow", cfg=1.0)
    gauss = statistics(model, latent)
    seen_by = []
    inner = node("RetortDistilledSampler", preset="custom", mode="deterministic", start="unit noise")[0]
    for one in (inner, euler(comfy)):
        sampler = node("RetortTeleportSampler", sampler=one, statistics=gauss, infer_mean=False)[0]
        with recording(model) as seen:
            traced(comfy, guider, sampler, sigmas, latent)
        seen_by.append(seen.inputs)
    for mine, core in zip(*seen_by, strict=True):
        torch.testing.assert_close(mine, core, rtol=1e-4, atol=1e-4)


def test_student_t_noise_at_infinity_is_random_noise_to_the_bit(comfy, node, ready, sample):
    for kind in ("flow", "eps", "wan"):
        _, guider, sigmas, latent = ready(kind)
        for given in (latent, {**latent, "batch_index": [3, 1]}):
            (noise,) = node("RetortStudentTNoise", seed=11, aug_dim=0.0)
            core = comfy.custom.Noise_RandomNoise(11)
            assert noise.seed == 11 and torch.equal(noise.generate_noise(given), core.generate_noise(given))
        with torch.inference_mode():
            out = comfy.custom.SamplerCustomAdvanced.execute(noise, guider, euler(comfy), sigmas, latent)[0]
        assert torch.equal(out["samples"], sample(guider, euler(comfy), sigmas, latent, seed=11))


def test_student_t_noise_has_one_radius_to_a_sample_also_where_a_latent_is_several(comfy, node):
    (noise,) = node("RetortStudentTNoise", seed=5, aug_dim=6.0)
    core = comfy.custom.Noise_RandomNoise(5)
    nested = importlib.import_module("comfy.nested_tensor").NestedTensor
    parts = [torch.zeros(2, 4, 3, 8, 8), torch.zeros(2, 8, 20)]
    mine = noise.generate_noise({"samples": nested(parts)}).unbind()
    theirs = core.generate_noise({"samples": nested(parts)}).unbind()
    ratios = [(a / b).flatten(1) for a, b in zip(mine, theirs, strict=True)]
    radius = ratios[0][:, :1]
    for ratio in ratios:
        torch.testing.assert_close(ratio, radius.expand_as(ratio))
    assert float((radius[0] - radius[1]).abs()) > 1e-3
    whole = noise.generate_noise({"samples": torch.zeros(4, 4, 8, 8)})
    part = noise.generate_noise({"samples": torch.zeros(2, 4, 8, 8), "batch_index": [2, 0]})
    assert torch.equal(part, whole[[2, 0]])


def references(latent, count=1):
    shape = (count, *latent["samples"].shape[1:])
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(31))}


def blocks(samples, factor=4):
    return torch.nn.functional.avg_pool2d(samples.reshape(-1, *samples.shape[-2:]), factor)


@pytest.mark.parametrize("iterations", [0, 1])
@pytest.mark.parametrize("steps", ["deterministic", "ancestral"])
@pytest.mark.parametrize("kind", KINDS)
def test_structure_to_the_end_gives_the_coarse_part_of_the_reference(
    comfy, node, ready, recording, kind, steps, iterations
):
    model, guider, sigmas, latent = ready(kind, steps=4, cfg=1.0)
    reference = references(latent, 2)
    (sampler,) = node(
        "RetortStructureSampler", reference=reference, iterations=iterations, end_percent=1.0, steps=steps
    )
    with recording(model) as seen:
        out, called = traced(comfy, guider, sampler, sigmas, latent)
    assert called == [(i, 4) for i in range(4)] and len(seen.inputs) == 4 + 3 * iterations
    expected = blocks(reference["samples"])
    torch.testing.assert_close(blocks(out), expected, rtol=1e-4, atol=1e-4)
    assert float((out - reference["samples"]).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_structure_without_a_guided_step_is_core_euler(comfy, node, ready, kind):
    _, guider, sigmas, latent = ready(kind)
    (sampler,) = node("RetortStructureSampler", reference=references(latent), start_percent=0.0, end_percent=0.0)
    out, _ = traced(comfy, guider, sampler, sigmas[:3], latent)
    if kind != "cog":  # core's samplers do not scale this model's latents as it was trained
        plain, _ = traced(comfy, guider, euler(comfy), sigmas[:3], latent)
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("kind", ["flow", "eps", "wan", "cog"])
@pytest.mark.parametrize("name", ["RetortStructureSampler", "RetortDopri5Sampler"])
def test_a_mask_keeps_the_rest_of_the_latent_image(comfy, node, ready, kind, name):
    _, guider, sigmas, latent = ready(kind, batch=1)
    image = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    inputs = (
        {"reference": references(latent), "end_percent": 1.0} if "Structure" in name else {"atol": 0.1, "rtol": 0.1}
    )
    (sampler,) = node(name, **inputs)
    out, _ = traced(comfy, guider, sampler, sigmas, {"samples": image, "noise_mask": mask})
    assert float((out - image)[..., 4:].abs().max()) < 1e-4
    assert float((out - image)[..., :4].abs().max()) > 1e-2


def test_dopri5_is_where_many_small_steps_go_and_says_its_calls(comfy, node, guided, caplog, recording):
    """On the embedded model: random networks bend so sharply that no solver's steps are small."""
    with torch.inference_mode():
        model, clip, _ = comfy.plugin["RetortEmbeddedModel"].execute("flow").args
        prompt = comfy.nodes.CLIPTextEncode().encode(clip, "a bold red seven on white paper")[0]
    guider, latent = guided(model, prompt, prompt, 1.0), {"samples": torch.zeros(3, 16, 8, 8)}
    sigmas = comfy.custom.BasicScheduler.execute(model, "simple", 5, 1.0)[0]
    (sampler,) = node("RetortDopri5Sampler", atol=1e-4, rtol=1e-4)
    with caplog.at_level("INFO", "retort"), recording(model) as seen:
        out, steps = traced(comfy, guider, sampler, sigmas, latent)
    assert any(f"dopri5: {len(seen.inputs)} calls, " in line for line in caplog.messages)
    assert steps == sorted(steps) and steps[-1] == (4, 5)
    fine = comfy.custom.BasicScheduler.execute(model, "simple", 250, 1.0)[0]
    expected, _ = traced(comfy, guider, comfy.samplers.sampler_object("heun"), fine, latent)
    assert float((out - expected).square().mean().sqrt()) < 5e-3 * float(expected.std())
    # Every item is held to the tolerance that it has alone.
    noise = comfy.sample.prepare_noise(latent["samples"], 7)
    for i in range(3):
        with torch.inference_mode():
            alone = guider.sample(noise[i : i + 1], latent["samples"][:1], sampler, sigmas, seed=7).cpu()
        assert float((out[i : i + 1] - alone).square().mean().sqrt()) < 5e-3 * float(alone.std())


@pytest.mark.parametrize("kind", ["eps", "v", "wan", "cog"])
def test_dopri5_runs_on_every_kind_of_model(comfy, node, ready, kind):
    _, guider, sigmas, latent = ready(kind, batch=1)
    (sampler,) = node("RetortDopri5Sampler", atol=1e-1, rtol=1e-1)
    out, _ = traced(comfy, guider, sampler, sigmas, latent)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["RetortTeleportSampler", "RetortStructureSampler", "RetortDopri5Sampler"])
def test_a_batch_is_its_items_and_every_core_guider_will_do(comfy, tiny, guided, node, ready, statistics, name):
    model, positive, negative, latent = tiny("flow", 3)
    _, guider, sigmas, _ = ready("flow", 3)
    inputs = {
        "RetortTeleportSampler": lambda: {"sampler": euler(comfy), "statistics": statistics(model, latent)},
        "RetortStructureSampler": lambda: {"reference": references(latent), "iterations": 1},
        "RetortDopri5Sampler": lambda: {"atol": 1e-2, "rtol": 1e-2},
    }[name]()
    (sampler,) = node(name, **inputs)
    noise = comfy.sample.prepare_noise(latent["samples"], 5)
    with torch.inference_mode():
        whole = guider.sample(noise, latent["samples"], sampler, sigmas, seed=5)
        # Of dopri5 the batch agrees to its tolerance, which a random network magnifies: see the embedded model.
        for i in range(0 if "Dopri5" in name else 3):
            alone = guider.sample(noise[i : i + 1], latent["samples"][:1], sampler, sigmas, seed=5)
            torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-3, atol=1e-4)
    same = [
        guided(model, positive, negative, 2.0),
        comfy.custom.DualCFGGuider.execute(model, positive, negative, negative, 2.0, 1.0, "regular")[0],
    ]
    for one in same:
        out, _ = traced(comfy, one, sampler, sigmas, latent, 5)
        assert torch.isfinite(out).all()
    basic, _ = traced(comfy, comfy.custom.BasicGuider.execute(model, positive)[0], sampler, sigmas, latent, 5)
    assert torch.isfinite(basic).all()


@pytest.mark.parametrize("name", ["RetortTeleportSampler", "RetortStructureSampler", "RetortDopri5Sampler"])
def test_cancelling_stops_them(comfy, node, ready, statistics, name):
    model, guider, sigmas, latent = ready("flow")
    inputs = {
        "RetortTeleportSampler": lambda: {"sampler": euler(comfy), "statistics": statistics(model, latent)},
        "RetortStructureSampler": lambda: {"reference": references(latent)},
        "RetortDopri5Sampler": lambda: {"atol": 1e-6, "rtol": 1e-6},
    }[name]()
    (sampler,) = node(name, **inputs)
    seen = []

    def cancel(step, x0, x, total):
        seen.append(step)
        comfy.model_management.interrupt_current_processing(True)

    noise = comfy.sample.prepare_noise(latent["samples"], 5)
    with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
        guider.sample(noise, latent["samples"], sampler, sigmas, seed=5, callback=cancel)
    assert len(seen) == 1


def test_a_reference_of_another_model_or_size_is_named(comfy, node, ready):
    _, guider, sigmas, latent = ready("flow")
    for samples, said in (
        (torch.zeros(1, 4, 8, 8), "have 4 channels and the model takes 16"),
        (torch.zeros(1, 16, 4, 8), "reference latent has shape"),
    ):
        (sampler,) = node("RetortStructureSampler", reference={"samples": samples})
        with pytest.raises(ValueError, match=said):
            traced(comfy, guider, sampler, sigmas, latent)


def test_a_still_serves_a_video_model_of_one_frame(comfy, node, ready):
    _, guider, sigmas, _ = ready("wan")
    still = {"samples": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))}
    (sampler,) = node("RetortStructureSampler", reference=still, end_percent=1.0)
    out, _ = traced(comfy, guider, sampler, sigmas, {"samples": torch.zeros(1, 16, 1, 8, 8)})
    torch.testing.assert_close(blocks(out), blocks(still["samples"]), rtol=1e-4, atol=1e-4)


def test_the_embedded_statistics_are_listed_and_load(comfy, ours, node):
    (name,) = [i for i in comfy.plugin["RetortLoadGaussianStatistics"].GET_SCHEMA().inputs if i.id == "name"]
    assert "digits.safetensors" in name.options
    (gauss,) = node("RetortLoadGaussianStatistics", name="digits.safetensors")
    assert gauss.fits((1, 16, 8, 8)) and str(gauss).startswith("32 directions")


def test_statistics_are_saved_beside_comfyuis_models_and_pictures_read_from_its_input(
    comfy, ours, node, tiny, statistics, tmp_path, monkeypatch
):
    model, _, _, latent = tiny("flow")
    work = ours("hosts.comfyui.host").host
    monkeypatch.setattr(work, "statistics_folders", lambda: [tmp_path / "stats"])
    made = statistics(model, latent, name=["mine"])
    statistics(model, latent, name=["mine"])
    assert {path.name for path in (tmp_path / "stats").iterdir()} == {"mine.safetensors", "mine_2.safetensors"}
    (read,) = node("RetortLoadGaussianStatistics", name="mine.safetensors")
    torch.testing.assert_close(read.values, made.values)
    monkeypatch.setattr(work, "input_folders", lambda: [tmp_path])
    (tmp_path / "few").mkdir()
    from safetensors.torch import save_file

    for i in range(3):
        state = {"latent_tensor": torch.randn(1, 16, 8, 8), "latent_format_version_0": torch.zeros(0)}
        save_file(state, tmp_path / "few" / f"{i}.latent")
    found = statistics(model, latent, latents=None, folder=["few"])
    assert found.fits((1, 16, 8, 8))
    with pytest.raises(ValueError, match="leaves its folder"):
        statistics(model, latent, latents=None, folder=["../few"])
