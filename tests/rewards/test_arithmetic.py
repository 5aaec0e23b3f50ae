"""What rewards compute without any network: preprocessing against PIL, heads, levels, simple measures, sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from retort.hosts.rewards.kinds import jpeg_bytes
from retort.rewards import deqa, preprocess, simple
from retort.rewards.combine import Combined, RunningScore, Term, statistics
from retort.rewards.heads import LinearHead, head_from
from retort.rewards.preprocess import CLIP, HPS, IMAGE_REWARD, Preprocess
from retort.rewards.scoring import score


def picture(seed: int, height: int = 60, width: int = 90) -> Image.Image:
    """Smooth shapes with edges, as pictures have them."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def hard(kind: str, height: int, width: int) -> Image.Image:
    """Edges at which bicubic overshoots most: between its two passes PIL cuts that off."""
    y, x = np.mgrid[:height, :width]
    if kind == "stripes":
        values = (x // 3 % 2) * (y // 3 % 2) * 255
    elif kind == "checks":
        values = (x + y) % 2 * 255
    elif kind == "silhouette":
        values = (((x - width / 2) / width) ** 2 + ((y - height / 2) / height) ** 2 < 0.1) * 255
    else:
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.fromarray(np.repeat(values.astype(np.uint8)[..., None], 3, -1))


def tensor(*pictures: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).float() / 255


IMAGES = tensor(*(picture(seed) for seed in range(5)))


def test_published_constants():
    assert CLIP.mean == IMAGE_REWARD.mean == HPS.mean == (0.48145466, 0.4578275, 0.40821073)
    assert CLIP.std == (0.26862954, 0.26130258, 0.27577711)
    assert CLIP.size == IMAGE_REWARD.size == HPS.size == 224
    assert {p.resample for p in (CLIP, IMAGE_REWARD, HPS)} == {"bicubic"}
    assert (CLIP.fit, IMAGE_REWARD.fit, HPS.fit) == ("floor crop", "crop", "pad")
    assert list(deqa.LEVELS) == ["excellent", "good", "fair", "poor", "bad"]
    assert list(deqa.LEVELS.values()) == [5, 4, 3, 2, 1]


def resized(given: Image.Image, width: int, height: int) -> Image.Image:
    """Across first, whatever order this Pillow would choose."""
    across = given.resize((width, given.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


SIZES = [(61, 90), (400, 301), (224, 224), (50, 50), (1000, 37), (331, 517)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("fit", ["crop", "floor crop", "pad", "stretch"])
@pytest.mark.parametrize("kind", ["smooth", "stripes", "checks", "silhouette", "noise"])
def test_tensors_are_prepared_as_pil_does(height, width, fit, kind):
    given = picture(3, height, width) if kind == "smooth" else hard(kind, height, width)
    size = 224
    if fit == "stretch":
        wanted = resized(given, size, size)
    elif fit == "pad":
        scale = size / max(height, width)
        small = resized(given, max(1, round(width * scale)), max(1, round(height * scale)))
        wanted = Image.new("RGB", (size, size))
        wanted.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    else:
        short = min(height, width)
        small = resized(given, int(size * width / short), int(size * height / short))
        left, top = (small.width - size) / 2, (small.height - size) / 2
        left, top = (round(left), round(top)) if fit == "crop" else (int(left), int(top))
        wanted = small.crop((left, top, left + size, top + size))
    found = Preprocess(fit=fit).fitted(tensor(given).movedim(-1, 1))[0].movedim(0, -1)
    assert found.shape == (size, size, 3)
    assert (found - tensor(wanted)[0]).abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["smooth", "stripes", "checks", "silhouette", "noise"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tensors_are_prepared_as_transformers_does(height, width, kind):
    processor = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil()
    given = picture(3, height, width) if kind == "smooth" else hard(kind, height, width)
    wanted = torch.as_tensor(processor(given, return_tensors="np")["pixel_values"])
    found = CLIP(tensor(given))
    scale = torch.tensor(CLIP.std).view(1, 3, 1, 1)  # back to pixels in [0, 1]
    assert ((found - wanted) * scale).abs().max() < 1e-2


def test_hps_pads_with_black_and_loses_nothing():
    wide = torch.ones(1, 30, 60, 3)
    found = HPS.fitted(wide.movedim(-1, 1))
    assert (found[..., :56, :] == 0).all() and (found[..., 168:, :] == 0).all()
    torch.testing.assert_close(found[..., 56:168, :], torch.ones(1, 3, 112, 224))
    # Padding comes before the normalisation: black, not grey.
    black = (0 - torch.tensor(HPS.mean)) / torch.tensor(HPS.std)
    torch.testing.assert_close(HPS(wide)[0, :, 0, 0], black)


def test_preparation_has_gradients_to_every_used_pixel():
    images = IMAGES[:1].clone().requires_grad_()
    Preprocess(32, "pad")(images).square().sum().backward()
    assert (images.grad.abs().sum(-1) > 0).float().mean() > 0.95


def test_settings_of_image_processors():
    clip = {
        "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
        "resample": 3, "image_mean": list(CLIP.mean), "image_std": list(CLIP.std), "do_resize": True,
    }  # fmt: skip
    assert preprocess.from_settings(clip) == Preprocess(short=224)
    vit = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert preprocess.from_settings(vit) == Preprocess(32, "stretch", (0.5,) * 3, (0.5,) * 3, "bilinear")
    larger = {**clip, "size": {"shortest_edge": 256}, "resample": 2}
    assert preprocess.from_settings(larger) == Preprocess(224, short=256, resample="bilinear")
    for wrong in ({**clip, "size": None}, {**clip, "resample": 1}, {**vit, "rescale_factor": 1 / 127.5},
                  {**vit, "size": {"height": 32, "width": 40}}, {"size": {"shortest_edge": 224}}):  # fmt: skip
        with pytest.raises(ValueError, match="image processor"):
            preprocess.from_settings(wrong)


def test_five_layers_are_one_linear_map():
    torch.manual_seed(0)
    head = LinearHead(768)
    weight, bias = head.collapsed()
    features = torch.nn.functional.normalize(torch.randn(7, 768), dim=-1)
    torch.testing.assert_close(head(features).double(), features.double() @ weight + bias, atol=1e-6, rtol=1e-5)
    published = {f"predictor.{name}": value for name, value in head.state_dict().items()}
    assert set(head.state_dict()) == {f"layers.{i}.{part}" for i in (0, 2, 4, 6, 7) for part in ("weight", "bias")}
    assert torch.equal(head_from(published)(features), head(features))
    with pytest.raises(ValueError, match="9 of the ten"):
        head_from({k: v for k, v in published.items() if not k.endswith("layers.7.bias")})
    with pytest.raises(ValueError, match="layers.2.weight has shape"):
        head_from({k: v[:, :4] if k.endswith("layers.2.weight") else v for k, v in published.items()})


def test_equal_levels_are_three():
    for value in (0.0, -7.5, 40.0):
        assert deqa.expected_level(torch.full((1, 5), value)).item() == pytest.approx(3.0, abs=1e-6)
    sure = torch.full((2, 5), -1e4)
    sure[0, 0] = sure[1, 4] = 0
    assert deqa.expected_level(sure).tolist() == [5.0, 1.0]


def test_level_tokens_are_those_after_the_sentence():
    words = {w: i for i, w in enumerate(f"{deqa.ANSWER} {' '.join(deqa.LEVELS)} </s>".split())}

    def encode(text):
        return [words[w] for w in text.split()]

    assert deqa.level_tokens(encode) == [words[w] for w in deqa.LEVELS]
    assert deqa.level_tokens(lambda text: [*encode(text), words["</s>"]]) == [words[w] for w in deqa.LEVELS]
    with pytest.raises(ValueError, match="same token"):
        deqa.level_tokens(lambda text: [min(i, 6) for i in encode(text)])


def test_jpeg_grows_with_detail():
    noise = np.random.default_rng(1).integers(0, 40, (120, 120, 3), dtype=np.uint8)
    sharp = Image.fromarray((np.asarray(picture(1, 120, 120)) * 0.8).astype(np.uint8) + noise)
    blurred = [sharp.filter(ImageFilter.GaussianBlur(r)) for r in (0, 1, 2, 4, 8)]
    small = simple.JpegSize(jpeg_bytes)(tensor(*blurred), "")
    large = simple.JpegSize(jpeg_bytes, prefer="large")(tensor(*blurred), "")
    assert (small.diff() > 0).all() and torch.equal(small, -large)
    assert round(large[0].item() * 1000) == len(jpeg_bytes(torch.from_numpy(np.array(blurred[0])), 95))
    sharpness = simple.Sharpness()(tensor(*blurred), "")
    assert (sharpness.diff() < 0).all()


def test_closed_forms():
    checks = torch.zeros(1, 8, 8, 3)
    checks[:, ::2, ::2] = checks[:, 1::2, 1::2] = 1
    # The Laplacian of a chessboard of 0 and 255 is -+4 * 255 everywhere.
    assert simple.Sharpness()(checks, "").item() == pytest.approx((4 * 255) ** 2, rel=1e-5)
    assert simple.Sharpness()(torch.full((1, 8, 8, 3), 0.3), "").item() == pytest.approx(0, abs=1e-6)
    grey = torch.rand(1, 8, 8, 1).expand(1, 8, 8, 3)
    assert simple.Colourfulness()(grey, "").item() == pytest.approx(0, abs=1e-3)
    red = torch.tensor([1.0, 0, 0]).expand(1, 8, 8, 3)
    # No spread; the centre is (255, 127.5).
    assert simple.Colourfulness()(red, "").item() == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-5)
    like = simple.PixelLikeness(torch.zeros(1, 8, 8, 3))
    torch.testing.assert_close(like(torch.full((2, 16, 12, 3), 0.25), ""), torch.tensor([0.75, 0.75]))


SIMPLE = [simple.Sharpness(), simple.Colourfulness(), simple.JpegSize(jpeg_bytes), simple.PixelLikeness(IMAGES[:2])]


@pytest.mark.parametrize("reward", SIMPLE, ids=lambda r: r.name)
def test_what_every_simple_reward_promises(reward):
    whole = score(reward, IMAGES, "")
    assert whole.shape == (5,) and whole.dtype == torch.float32
    torch.testing.assert_close(score(reward, IMAGES, "", batch=1), whole, rtol=1e-5, atol=1e-5)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(score(reward, IMAGES[order], ""), whole[order], rtol=1e-5, atol=1e-5)
    low, high = reward.range
    assert (whole >= low).all() and (whole <= high).all()
    images = IMAGES.clone().requires_grad_()
    found = reward(images, "")
    assert found.requires_grad == reward.differentiable
    if reward.differentiable:
        found.sum().backward()
        assert torch.isfinite(images.grad).all() and images.grad.abs().max() > 0


class Fixed:
    """Gives the mean of a channel, or what it is told to."""

    differentiable, range = True, (0.0, 1.0)

    def __init__(self, channel=0, gives=None):
        self.channel, self.gives, self.name = channel, gives, f"channel {channel}"

    def __call__(self, images, prompts):
        return images[..., self.channel].mean((1, 2)) if self.gives is None else self.gives


def test_weights_scores_limits_and_veto():
    raw = [Fixed(c)(IMAGES, "") for c in range(3)]
    summed = Combined((Term(Fixed(0), 2.0), Term(Fixed(1), -1.0)))
    torch.testing.assert_close(summed(IMAGES, ""), 2 * raw[0] - raw[1])
    assert summed.range == (-1.0, 2.0) and summed.differentiable and summed.name == "2 channel 0 + -1 channel 1"
    mean, std = statistics(Fixed(2), IMAGES, "")
    scored = Combined((Term(Fixed(2), mean=mean, std=std),))(IMAGES, "")
    torch.testing.assert_close(scored.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    limited = Combined((Term(Fixed(2), mean=mean, std=std, low=-0.5, high=0.5),))
    torch.testing.assert_close(limited(IMAGES, ""), scored.clamp(-0.5, 0.5))
    border = float(raw[0].median())
    vetoed = Combined((Term(Fixed(1)), Term(Fixed(0), 0.0, veto=border)))
    torch.testing.assert_close(vetoed(IMAGES, ""), torch.where(raw[0] < border, torch.tensor(-1.0), raw[1]))
    assert vetoed.range == (-1.0, 1.0)
    # No picture's score depends on another.
    torch.testing.assert_close(score(vetoed, IMAGES, "", batch=1), vetoed(IMAGES, ""))
    torch.testing.assert_close(score(limited, IMAGES, "", batch=2), limited(IMAGES, ""))


def test_combinations_that_cannot_be():
    with pytest.raises(ValueError, match="at least one"):
        Combined(())
    with pytest.raises(ValueError, match="std"):
        Term(Fixed(), std=0.0)
    with pytest.raises(ValueError, match="lower"):
        Term(Fixed(), low=1.0, high=1.0)
    with pytest.raises(ValueError, match="finite"):
        Term(Fixed(), weight=math.nan)
    with pytest.raises(ValueError, match="at least two"):
        statistics(Fixed(), IMAGES[:1], "")
    with pytest.raises(ValueError, match="differ"):
        statistics(Fixed(), IMAGES[:1].repeat(3, 1, 1, 1), "")


def test_a_running_score_does_not_mix_one_call():
    running = RunningScore(Fixed(0), least=3)
    raw = Fixed(0)(IMAGES, "")
    torch.testing.assert_close(running(IMAGES[:4], ""), raw[:4])
    torch.testing.assert_close(torch.tensor([running.mean, running.std]), torch.stack([raw[:4].mean(), raw[:4].std()]))
    expected = (raw[4:] - raw[:4].mean()) / raw[:4].std()
    torch.testing.assert_close(running(IMAGES[4:], ""), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("gives", "match"),
    [
        (torch.zeros(3), r"gave \(3,\) for 5"),
        (torch.zeros(5, 1), "one number each"),
        (1.0, "gave float"),
        (torch.tensor([0, 1, math.nan, 0, 0]), "nan for image 2"),
        (torch.tensor([0, 1, 0, math.inf, 0]), "inf for image 3"),
    ],
)
def test_a_reward_that_misbehaves_is_named(gives, match):
    with pytest.raises(ValueError, match=match):
        score(Fixed(0, gives), IMAGES, "")


def test_prompts_and_shapes():
    with pytest.raises(ValueError, match="2 prompts for 5 images"):
        score(Fixed(), IMAGES, ["a", "b"])
    with pytest.raises(ValueError, match="shape"):
        simple.Sharpness()(IMAGES[0], "")
    video = torch.stack([IMAGES[:3], IMAGES[1:4]])
    raw = Fixed()(IMAGES, "")
    wanted = torch.stack([raw[:3].mean(), raw[1:4].mean()])
    torch.testing.assert_close(score(Fixed(), video, ["a", "b"], batch=2), wanted)
