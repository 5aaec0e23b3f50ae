"""Teleport, Student-t noise, structure and dopri5 as headless workflows run them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from retort.files.errors import UsageError
from retort.hosts.headless import folders
from retort.nodes.gaussian import FORMS


def step(name, /, **inputs):
    return {"class_type": name, "inputs": inputs}


def graph(kind="flow", batch=2, **changes):
    """Text to latent through SamplerCustomAdvanced, euler on simple, in API format."""
    return {
        "m": step("TinyLoader", kind=kind),
        "p": step("CLIPTextEncode", clip=["m", 1], text="a seven"),
        "q": step("CLIPTextEncode", clip=["m", 1], text=""),
        "g": step("CFGGuider", model=["m", 0], positive=["p", 0], negative=["q", 0], cfg=2.0),
        "s": step("BasicScheduler", model=["m", 0], scheduler="simple", steps=6, denoise=1.0),
        "l": step("EmptyLatentImage", width=64, height=64, batch_size=batch),
        "n": step("RandomNoise", noise_seed=3),
        "k": step("KSamplerSelect", sampler_name="euler"),
        "x": step(
            "SamplerCustomAdvanced", noise=["n", 0], guider=["g", 0], sampler=["k", 0], sigmas=["s", 0],
            latent_image=["l", 0],
        ),
        "d": step("VAEDecode", samples=["x", 0], vae=["m", 2]),
        "o": step("SaveImage", images=["d", 0], filename_prefix="beside"),
        **changes,
    }  # fmt: skip


def sampled(go, key="x", **changes):
    outcome = go(graph(**changes), keep=[key])
    return outcome.results.outputs[key][0][0]["samples"], outcome


def statistics(**inputs):
    inputs = {"form": FORMS[0], "rank": 0, "folder": "", "width": 64, "height": 64, "name": ""} | inputs
    return step("RetortGaussianStatistics", model=["m", 0], **inputs)


def teleported(sampler="k", **inputs):
    """Statistics of eight other samples, and the teleporting sampler between `sampler` and SamplerCustomAdvanced."""
    inputs = {"skip_steps": 2, "sigma_skip": 0.0, "infer_mean": False} | inputs
    many = {
        "l8": step("EmptyLatentImage", width=64, height=64, batch_size=8),
        "n8": step("RandomNoise", noise_seed=99),
        "x8": step(
            "SamplerCustomAdvanced", noise=["n8", 0], guider=["g", 0], sampler=["k", 0], sigmas=["s", 0],
            latent_image=["l8", 0],
        ),
        "h": statistics(latents=["x8", 0]),
        "t": step("RetortTeleportSampler", sampler=[sampler, 0], statistics=["h", 0], **inputs),
    }  # fmt: skip
    return many | {
        "x": step(
            "SamplerCustomAdvanced", noise=["n", 0], guider=["g", 0], sampler=["t", 0], sigmas=["s", 0],
            latent_image=["l", 0],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["flow", "eps", "v"])
@pytest.mark.parametrize("infer", [True, False])
def test_a_workflow_teleports(go, kind, infer):
    plain, _ = sampled(go, kind=kind)
    out, outcome = sampled(go, kind=kind, **teleported(infer_mean=infer))
    assert out.shape == plain.shape and torch.isfinite(out).all()
    assert float((out - plain).abs().max()) > 1e-3
    assert any(text.startswith("Teleport: 2 of 6 steps skipped, to sigma") for text in outcome.texts)
    assert any(text.startswith("8 latents: 4 directions") for text in outcome.texts)


def test_what_cannot_be_skipped_is_the_plain_sampler_to_the_bit_and_is_said(go):
    mask = {
        "i": step("VAEEncode", pixels=["d8", 0], vae=["m", 2]),
        "d8": step("VAEDecode", samples=["x8", 0], vae=["m", 2]),
    }
    cases = {
        "nothing to skip": ({"skip_steps": 0}, {}),
        "below the model's highest level": (
            {}, {"s": step("BasicScheduler", model=["m", 0], scheduler="simple", steps=6, denoise=0.5)},
        ),
        "latent is not empty": ({}, {"l": step("LatentFromBatch", samples=["x8", 0], batch_index=0, length=2)}),
        "the latents are (4, 8, 9)": ({}, {"l": step("EmptyLatentImage", width=72, height=64, batch_size=1)}),
    }  # fmt: skip
    for said, (inputs, changes) in cases.items():
        whole = {**teleported(**inputs), **changes, **mask}
        out, outcome = sampled(go, **whole)
        assert any(text.startswith("Teleport does nothing: ") and said in text for text in outcome.texts), outcome.texts
        plain, _ = sampled(go, **{**whole, "t": step("KSamplerSelect", sampler_name="euler")})
        assert torch.equal(out, plain), said


def test_any_size_statistics_teleport_another_size(go):
    changes = teleported() | {
        "l": step("EmptyLatentImage", width=72, height=40, batch_size=2),
        "h": statistics(latents=["x8", 0], form=FORMS[1]),
    }
    out, outcome = sampled(go, **changes)
    assert out.shape == (2, 4, 5, 9) and any("2 of 6 steps skipped" in text for text in outcome.texts)


def test_teleporting_to_the_end_needs_no_sampler(go):
    out, outcome = sampled(go, **teleported(skip_steps=50))
    assert torch.isfinite(out).all() and any("6 of 6 steps skipped, to sigma 0" in text for text in outcome.texts)


def test_statistics_are_saved_under_names_of_their_own_and_loaded(go, where):
    for _ in range(2):
        _, outcome = sampled(go, **teleported() | {"h": statistics(latents=["x8", 0], name="mine")})
    folder = where.models[0] / "gaussian_statistics"
    assert {path.name for path in folder.iterdir()} == {"mine.safetensors", "mine_2.safetensors"}
    assert any("saved as mine_2.safetensors" in text for text in outcome.texts)
    once, _ = sampled(go, **teleported())
    with folders.use(where):  # the list of files is made when the nodes are
        again, _ = sampled(go, **teleported() | {"h": step("RetortLoadGaussianStatistics", name="mine.safetensors")})
    torch.testing.assert_close(once, again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "none of latents, images and folder"),
        ({"latents": ["x8", 0], "folder": "pictures"}, "2 of latents, images and folder"),
        ({"latents": ["x8", 0], "rank": 8}, "rank must be 0 to 7 with 8 latents, got 8"),
        ({"latents": ["x8", 0], "name": "../mine"}, "name '../mine' cannot be a file's name"),
        ({"folder": "../pictures"}, "leaves its folder"),
        ({"folder": "nowhere"}, "folder 'nowhere' is not in"),
        ({"folder": "empty"}, "holds 0 pictures and latents"),
        ({"folder": "pictures"}, "connect `vae`"),
        ({"folder": "sizes"}, "several sizes"),
        ({"folder": "other"}, "has 3 channels and the model takes 4|have 3 channels and the model takes 4"),
        ({"folder": "strange"}, "no latent that Save Latent wrote"),
        ({"folder": "pickle"}, "is a pickle"),
    ],
)
def test_bad_sources_are_named(go, where, inputs, said):
    made = {name: where.inputs[0] / name for name in ("empty", "pictures", "sizes", "other", "strange", "pickle")}
    for folder in made.values():
        folder.mkdir()
    Image.new("RGB", (70, 64), "red").save(made["pictures"] / "a.png")
    for i, side in enumerate((8, 9)):
        save_file({"latent_tensor": torch.ones(1, 4, side, 8)}, made["sizes"] / f"{i}.latent")
    save_file({"latent_tensor": torch.ones(1, 3, 8, 8)}, made["other"] / "a.latent")
    save_file({"weight": torch.ones(1, 3, 8, 8)}, made["strange"] / "a.safetensors")
    (made["pickle"] / "a.latent").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UsageError, match=said):
        sampled(go, **teleported() | {"h": statistics(**inputs)})


def test_a_folder_of_pictures_and_latents(go, where):
    folder = where.inputs[0] / "mixed"
    folder.mkdir()
    for i, size in enumerate(((64, 64), (80, 64), (64, 96), (31, 20))):
        Image.new("RGB", size, (40 * i, 90, 250 - 40 * i)).save(folder / f"{i}.png")
    new = {"latent_tensor": torch.ones(2, 4, 8, 8), "latent_format_version_0": torch.zeros(0)}
    save_file(new, folder / "new.latent")
    save_file({"latent_tensor": torch.ones(1, 4, 8, 8) * 0.18215}, folder / "old.latent")
    (folder / "notes.txt").write_text("no picture")
    _, outcome = sampled(go, **teleported() | {"h": statistics(folder="mixed", vae=["m", 2], name="folder")})
    assert any(text.startswith("7 latents: 3 directions") for text in outcome.texts)
    state = load_file(where.models[0] / "gaussian_statistics" / "folder.safetensors")
    assert state["mean"].shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x04pickle", "is a pickle"),
        (b"", "not a whole safetensors file"),
        ({"weight": torch.ones(2)}, "holds no Gaussian statistics: it holds weight"),
        ({"mean": torch.ones(2, 3, 3)}, "holds no Gaussian statistics: it holds mean"),
        ({str(i): torch.ones(1) for i in range(5)}, "holds 5 tensors, and no Gaussian statistics"),
    ],
)
def test_files_of_strangers_are_refused_by_name(go, where, content, said):
    folder = where.models[0] / "gaussian_statistics"
    folder.mkdir()
    if isinstance(content, bytes):
        (folder / "theirs.safetensors").write_bytes(content)
    else:
        save_file(content, folder / "theirs.safetensors")
    with folders.use(where), pytest.raises(UsageError, match=f"theirs.safetensors.*{said}"):
        sampled(go, **teleported() | {"h": step("RetortLoadGaussianStatistics", name="theirs.safetensors")})


def noise(**inputs):
    return {"n": step("RetortStudentTNoise", **inputs)}


def test_student_t_noise_is_random_noise_at_infinity_and_scaled_below(go):
    plain, _ = sampled(go)
    same, _ = sampled(go, **noise(seed=3, aug_dim=0.0))
    assert torch.equal(plain, same)
    other, _ = sampled(go, **noise(seed=3, aug_dim=4.0))
    assert float((plain - other).abs().max()) > 1e-2
    again, _ = sampled(go, **noise(seed=3, aug_dim=4.0))
    assert torch.equal(other, again)
    with pytest.raises(UsageError, match="aug_dim must be 0 .* got 1.5"):
        sampled(go, **noise(seed=3, aug_dim=1.5))


def test_a_part_of_a_batch_has_the_noise_that_it_had_in_the_whole():
    from retort.hosts.headless.noise import RandomNoise
    from retort.hosts.noise import StudentTNoise

    made = StudentTNoise(RandomNoise, 5, 6.0)
    assert made.seed == 5
    whole = made.generate_noise({"samples": torch.zeros(4, 4, 3, 8, 8)})
    part = made.generate_noise({"samples": torch.zeros(2, 4, 3, 8, 8), "batch_index": [3, 1]})
    assert torch.equal(part, whole[[3, 1]])


def structure(**inputs):
    inputs = {
        "factor": 4, "iterations": 0, "start_percent": 0.0, "end_percent": 1.0, "steps": "deterministic",
    } | inputs  # fmt: skip
    return {
        "nr": step("RandomNoise", noise_seed=55),
        "r": step(
            "SamplerCustomAdvanced", noise=["nr", 0], guider=["g", 0], sampler=["k", 0], sigmas=["s", 0],
            latent_image=["l", 0],
        ),
        "t": step("RetortStructureSampler", reference=["r", 0], **inputs),
        "x": step(
            "SamplerCustomAdvanced", noise=["n", 0], guider=["g", 0], sampler=["t", 0], sigmas=["s", 0],
            latent_image=["l", 0],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["flow", "eps", "v"])
@pytest.mark.parametrize("inputs", [{}, {"iterations": 2}, {"steps": "ancestral"}])
def test_structure_guided_to_the_end_has_the_coarse_part_of_the_reference(go, kind, inputs):
    outcome = go(graph(kind=kind, **structure(**inputs)), keep=["x", "r"])
    out, reference = (outcome.results.outputs[key][0][0]["samples"] for key in ("x", "r"))
    pooled = [torch.nn.functional.avg_pool2d(t, 4) for t in (out, reference)]
    torch.testing.assert_close(*pooled, rtol=1e-5, atol=1e-5)
    assert float((out - reference).abs().max()) > 1e-3


def test_structure_keeps_what_a_mask_keeps(go, where):
    picture = Image.new("RGBA", (64, 64), (10, 200, 30, 255))
    picture.paste((10, 200, 30, 0), (32, 0, 64, 64))
    picture.save(where.inputs[0] / "half.png")
    changes = structure() | {
        "i": step("LoadImage", image="half.png"),
        "e": step("VAEEncode", pixels=["i", 0], vae=["m", 2]),
        "l": step("SetLatentNoiseMask", samples=["e", 0], mask=["i", 1]),
    }
    outcome = go(graph(**changes), keep=["x", "e"])
    out, kept = (outcome.results.outputs[key][0][0]["samples"] for key in ("x", "e"))
    assert float((out - kept)[..., :4].abs().max()) < 1e-5 < 1e-2 < float((out - kept)[..., 4:].abs().max())


def test_a_reference_of_another_size_and_an_empty_range_are_named(go):
    small = structure() | {"r": step("EmptyLatentImage", width=32, height=64, batch_size=1)}
    with pytest.raises(UsageError, match="reference latent has shape .1, 4, 8, 4. and what is sampled .2, 4, 8, 8."):
        sampled(go, **small)
    with pytest.raises(UsageError, match="start_percent 0.8 and end_percent 0.2 enclose nothing"):
        sampled(go, **structure(start_percent=0.8, end_percent=0.2))


@pytest.mark.parametrize("kind", ["flow", "eps", "v"])
def test_dopri5_says_its_calls_and_agrees_with_many_small_steps(go, kind):
    tight = {"t": step("RetortDopri5Sampler", atol=1e-4, rtol=1e-4, max_calls=100_000)}
    advanced = graph()["x"]["inputs"] | {"sampler": ["t", 0]}
    # The tiny network looks up whole timesteps on eps and v; between two levels every solver takes the same ones.
    out, outcome = sampled(go, kind=kind, **tight, x=step("SamplerCustomAdvanced", **advanced))
    assert any(text.startswith("dopri5: ") and " calls, " in text for text in outcome.texts)
    many = step("BasicScheduler", model=["m", 0], scheduler="simple", steps=1000, denoise=1.0)
    fine, _ = sampled(go, kind=kind, s=many, k=step("KSamplerSelect", sampler_name="heun"))
    assert float((out - fine).abs().max()) < 0.05 * float(fine.std())


def test_dopri5_without_calls_to_spend_says_how_far_it_came(go):
    with pytest.raises(UsageError, match=r"max_calls \(12\) are spent at sigma .* raise max_calls"):
        sampled(
            go, t=step("RetortDopri5Sampler", atol=1e-8, rtol=1e-8, max_calls=12),
            x=step("SamplerCustomAdvanced", **graph()["x"]["inputs"] | {"sampler": ["t", 0]}),
        )  # fmt: skip
