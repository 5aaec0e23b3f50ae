"""The restoration nodes on the embedded model, without ComfyUI."""

from __future__ import annotations

import json

import pytest
import torch

from retort.hosts import api
from retort.hosts.headless import progress
from retort.hosts.restoration import captions as captioners
from retort.models import digits
from retort.nodes import NODES
from retort.restoration.color_fix import coarse
from retort.restoration.metrics import psnr
from retort.restoration.one_step import OneStep

BY_NAME = {node.__name__: node for node in NODES}


def node(name, /, **inputs):
    return BY_NAME[name].execute(**inputs).args


@pytest.fixture(scope="module")
def stack():
    return api.host.embedded("flow")


@pytest.fixture(scope="module")
def student(stack):
    return api.host.with_lora(stack[0], "digits_flow_dmd2_1step.safetensors", 1.0)


@pytest.fixture(scope="module")
def drawn():
    """Three held-out digits (3, 64, 64, 3) and their captions."""
    fields, labels = digits.load("held_out")
    found = digits.draw(fields[:3], labels[:3], torch.Generator().manual_seed(4))
    return found.image.movedim(1, -1), [found.caption(i) for i in range(3)]


@pytest.mark.parametrize("variant", ["flow", "eps"])
def test_one_call_on_the_clean_latent(variant, drawn):
    """Against the formula, with the network asked directly."""
    picture = drawn[0][:1]
    model, clip, vae = api.host.embedded(variant)
    got = node("RetortRestore", model=model, clip=clip, vae=vae, image=picture, caption=drawn[1][0], scale=1.0, tile=64,
               overlap=8, colour_fix="none")[0]  # fmt: skip
    z = model.latent.process_in(vae.encode(picture))
    ((tokens, extra),) = clip.encode(drawn[1][0])
    with torch.inference_mode():
        raw = model.network(z, torch.tensor([400.0]), **model.network.conditions(tokens, extra, z.shape))
    if variant == "flow":
        x0 = z - 0.4 * raw
    else:
        s = float(OneStep().sigmas(model.schedule, model.path)[0].double())
        abar = 1 / (1 + s * s)
        x0 = (z - (1 - abar) ** 0.5 * raw) / abar**0.5
    torch.testing.assert_close(got, vae.decode(model.latent.process_out(x0)), atol=1e-4, rtol=0)


def test_a_caption_matters_and_a_lora_counts(stack, student, drawn):
    model, clip, vae = stack
    given = {"clip": clip, "vae": vae, "image": drawn[0], "scale": 1.0, "tile": 64, "overlap": 8}
    one = node("RetortRestore", model=student, caption="a red three on white paper", **given)[0]
    other = node("RetortRestore", model=student, caption="a blue seven on yellow paper", **given)[0]
    base = node("RetortRestore", model=model, caption="a red three on white paper", **given)[0]
    assert float((one - other).abs().max()) > 0.02 and float((one - base).abs().max()) > 0.02
    each = node("RetortRestore", model=student, caption="\n".join(drawn[1]), caption_per_line=True, **given)[0]
    for i in range(3):
        alone = given | {"image": drawn[0][i : i + 1]}
        singly = node("RetortRestore", model=student, caption=drawn[1][i], **alone)[0]
        torch.testing.assert_close(each[i : i + 1], singly, atol=1e-4, rtol=0)


def test_wavelets_keep_the_colours(stack, student, drawn):
    _, clip, vae = stack
    got = node("RetortRestore", model=student, clip=clip, vae=vae, image=drawn[0], scale=2.0, tile=128, overlap=16)[0]
    assert got.shape == (3, 128, 128, 3)
    plain = torch.nn.functional.interpolate(drawn[0].movedim(-1, 1), scale_factor=2, mode="bicubic").movedim(1, -1)
    # Up to what is cut to [0, 1] in the end.
    assert float((coarse(got) - coarse(plain)).abs().mean()) < 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overlap": 40}, "overlap 40 must be between 0 and 32"),
        ({"tile_captions": "a\nb"}, "2 lines and there are 1 tiles"),
        ({"caption_per_line": True, "caption": "a\nb\nc\nd\ne"}, "5 lines for 3 images"),
        ({"mask": torch.ones(2, 8, 8)}, "2 masks for 3 images"),
        ({"latent_scale": 0.18215}, "latents are shifted too"),
    ],
)
def test_what_does_not_fit_is_said(stack, drawn, given, message):
    model, clip, vae = stack
    inputs = {"image": drawn[0], "scale": 1.0, "tile": 64, "overlap": 8} | given
    with pytest.raises(ValueError, match=message):
        node("RetortRestore", model=model, clip=clip, vae=vae, **inputs)


def test_a_model_for_many_steps_is_warned_of(stack, drawn):
    model, clip, vae = stack
    with progress.heard() as said:
        node("RetortRestore", model=model, clip=clip, vae=vae, image=drawn[0], scale=1.0, tile=64, overlap=8,
             caption=drawn[1][0])  # fmt: skip
    assert any("one-step restorer" in line for line in said)


def test_the_embedded_restorer_is_not_warned_of_though_it_sharpens(stack, drawn):
    model, clip, vae = stack
    restorer = api.host.with_lora(model, "digits_flow_restorer.safetensors", 1.0)
    blurred = node("RetortDegrade", image=drawn[0], kind={"kind": "infrared", "shrink": 4.0}, keep_size=True, seed=3)[0]
    with progress.heard() as said:
        restored = node("RetortRestore", model=restorer, clip=clip, vae=vae, image=blurred, scale=1.0, tile=64,
                        overlap=8, caption="\n".join(drawn[1]), caption_per_line=True)[0]  # fmt: skip
    assert not said
    assert float(psnr(drawn[0], restored).mean()) > float(psnr(drawn[0], blurred).mean())


# Degrade, colours, comparison, spectra.


def test_degrading(drawn):
    for kind in ({"kind": "real world", "shrink": 2.0, "strength": 0.5}, {"kind": "infrared", "shrink": 2.0}):
        small = node("RetortDegrade", image=drawn[0], kind=kind, seed=3)[0]
        assert small.shape == (3, 32, 32, 3)
        assert torch.equal(small, node("RetortDegrade", image=drawn[0], kind=kind, seed=3)[0])
        assert not torch.equal(small, node("RetortDegrade", image=drawn[0], kind=kind, seed=4)[0])
        torch.testing.assert_close(small[:1], node("RetortDegrade", image=drawn[0][:1], kind=kind, seed=3)[0])
        assert node("RetortDegrade", image=drawn[0], kind=kind, keep_size=True)[0].shape == drawn[0].shape
    face = node("RetortDegrade", image=drawn[0][..., :1], kind={"kind": "face"}, seed=3)[0]
    assert face.shape == drawn[0].shape


def test_colours_of_another(drawn):
    image, source = torch.cat([drawn[0][:2], drawn[0][:2, ..., :1]], -1), drawn[0][2:, ::2]
    for method in ("wavelet", "adain"):
        fixed = node("RetortColorFix", image=image, source=source, method=method)[0]
        assert fixed.shape == image.shape and torch.equal(fixed[..., 3], image[..., 3])
    untouched = node("RetortColorFix", image=image, source=source, strength=0.0)[0]
    torch.testing.assert_close(untouched, image)
    with pytest.raises(ValueError, match="source holds 3"):
        node("RetortColorFix", image=image, source=drawn[0])


def test_comparing(drawn):
    worse = (drawn[0] + 0.1 * torch.randn(drawn[0].shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    out = BY_NAME["RetortCompareImages"].execute(before=worse, after=drawn[0], clean=drawn[0])
    sheet, found, likeness, text = out.args
    assert sheet.shape == (3, 64, 128, 3) and found == 100 and likeness == pytest.approx(1)
    assert "before: PSNR" in text and "after: PSNR 100.00 dB, SSIM 1.0000" in text
    assert len(out.ui["retort_before"]) == len(out.ui["retort_after"]) == 3 and out.ui["text"] == (text,)
    assert json.dumps(out.ui)
    found = node("RetortCompareImages", before=worse[:1, ::2, ::2], after=drawn[0])[1]
    assert 5 < found < 40
    assert node("RetortCompareImages", before=worse, after=drawn[0])[1] == pytest.approx(
        float(psnr(drawn[0], worse).mean()), abs=1e-4
    )
    reward = node("RetortReward", kind={"kind": "sharpness"})[0]
    assert "sharpness: before" in node("RetortCompareImages", before=worse, after=drawn[0], reward=reward)[3]
    with pytest.raises(ValueError, match="before holds 2"):
        node("RetortCompareImages", before=worse[:2], after=drawn[0])


def test_spectral_guidance_is_a_patch_on_a_clone(stack, student, drawn):
    _, clip, vae = stack
    given = {"clip": clip, "vae": vae, "image": drawn[0], "scale": 1.0, "tile": 0, "overlap": 0, "colour_fix": "none"}
    plain = node("RetortRestore", model=student, **given)[0]
    aim = drawn[0][:1]
    off = node("RetortSpectralGuidance", model=student, vae=vae, reference=aim, scale=0.0)[0]
    torch.testing.assert_close(node("RetortRestore", model=off, **given)[0], plain)
    on = node("RetortSpectralGuidance", model=student, vae=vae, reference=aim, spectrum=0.0, structure=1.0, scale=1.0)[
        0
    ]
    assert not student.patches and len(on.patches) == 1
    guided = node("RetortRestore", model=on, **given)[0]
    assert float((guided - plain).abs().max()) > 0.01
    # Nearer to what it was drawn to.
    assert float((guided[0] - aim[0]).square().mean()) < float((plain[0] - aim[0]).square().mean())
    with pytest.raises(ValueError, match="start_percent 0.5 and end_percent 0.2 enclose nothing"):
        node("RetortSpectralGuidance", model=student, vae=vae, reference=aim, start_percent=0.5, end_percent=0.2)
    other = node("RetortSpectralGuidance", model=student, vae=vae, reference=drawn[0][:, :48, :48])[0]
    with pytest.raises(ValueError, match="size that is sampled"):
        node("RetortRestore", model=other, **given)


# Captions.


class Says:
    """A captioner that counts what it saw; `answer(image) -> str`."""

    def __init__(self, answer):
        self.answer, self.seen = answer, []
        self.holder = self
        self.offloaded = 0

    def caption(self, images):
        self.seen.append(tuple(images.shape))
        return [self.answer(image) for image in images]

    def offload(self):
        self.offloaded += 1


@pytest.fixture
def says(monkeypatch):
    def make(answer):
        made = Says(answer)
        monkeypatch.setitem(captioners.KINDS, "embedded", lambda host, **settings: made)
        return made

    return make


def test_captions_of_pictures_and_tiles_fit_restore(says, stack, student):
    picture = torch.zeros(2, 60, 100, 3)
    picture[:, :, 50:] = 1
    made = says(lambda image: f"{float(image.mean()):.2f}")
    size = {"scale": 2.0, "tile": 64, "overlap": 8}
    given = {"image": picture, "captioner": {"captioner": "embedded"}, "per_tile": True, "suffix": "ink"}
    whole, tiles = node("RetortCaption", **given, **size)
    assert whole == "0.50, ink\n0.50, ink" and made.offloaded == 1
    lines = tiles.splitlines()
    count = len(lines) // 2
    assert lines[:count] == lines[count:] and lines[0] == "0.00, ink" and lines[3] == "1.00, ink"
    _, clip, vae = stack
    got = node("RetortRestore", model=student, clip=clip, vae=vae, image=picture, caption=whole, tile_captions=tiles,
               caption_per_line=True, **size)[0]  # fmt: skip
    assert got.shape == (2, 120, 200, 3)
    assert node("RetortCaption", image=picture, captioner={"captioner": "embedded"})[1] == ""


def test_captioners_that_say_nothing_or_far_too_much_or_fail(says):
    picture = torch.zeros(3, 20, 20, 3)
    says(lambda image: "")
    assert node("RetortCaption", image=picture, captioner={"captioner": "embedded"})[0] == "\n\n"
    says(lambda image: "word " * 20_000)
    with progress.heard() as said:
        (text, _) = node("RetortCaption", image=picture, captioner={"captioner": "embedded"}, batch_size=2)
    assert len(text) < 3 * 2001 and any("did not stop" in line for line in said)

    def fail(image):
        raise RuntimeError("broken")

    made = says(fail)
    with pytest.raises(RuntimeError, match="broken"):
        node("RetortCaption", image=picture, captioner={"captioner": "embedded"})
    assert made.offloaded == 1
