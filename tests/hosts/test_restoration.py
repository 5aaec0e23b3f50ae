"""Restoring with a network whose answer is known: sizes, tiles, masks, captions, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from retort.hosts.methods import Run
from retort.hosts.restoration.run import RestorationRequest, Size, pictures, run, softened, tiles_of
from retort.restoration.one_step import OneStep
from retort.restoration.resize import region
from retort.restoration.tiles import Tiling
from retort.sampling.path import FLOW, VE, VP
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule

PATHS = {"VE": (VE, DiscreteSchedule()), "VP": (VP, DiscreteSchedule()), "FLOW": (FLOW, FlowSchedule(shift=1.0))}


class Host:
    """A host whose latents are pixels, and whose network answers `x0(z, text)`, behind each path's conversions."""

    def __init__(self, path="FLOW", x0=lambda z, text: z, dims=2, scale=1.0):
        self.path, self._schedule = PATHS[path]
        self.x0, self.dims, self.scale = x0, dims, scale
        self.calls, self.said, self.texts, self.steps = [], [], [], []

    def schedule(self, model):
        return self._schedule

    def noise_path(self, model):
        return self.path

    def latent_format(self, model):
        return 3, self.dims

    def latents_in(self, model, samples):
        return samples * self.scale

    def method_sampler(self, method):
        return method

    def encode_text(self, clip, text):
        self.texts.append(text)
        return text

    def cfg_guider(self, model, positive, negative, cfg):
        assert negative is None and cfg == 1
        return positive

    def encode_images(self, vae, images):
        assert images.shape[1] % 64 == 0 and images.shape[2] % 64 == 0
        z = images[..., :3].movedim(-1, 1)
        return {"samples": z.movedim(0, 1)[None] if self.dims == 3 else z}

    def decode(self, vae, samples):
        samples = samples[0].movedim(1, 0) if samples.ndim == 5 else samples
        return samples.movedim(1, -1)

    def sample(self, guider, sampler, sigmas, latent, seed):
        z = latent["samples"] * self.scale
        self.calls.append(tuple(z.shape))

        def model(x, sigma, **extra):
            shown = x / (1 + sigmas[0] ** 2).sqrt() if self.path.kind == "VE" else x
            torch.testing.assert_close(shown, z)
            return self.x0(shown, guider)

        def unasked(*_):
            raise AssertionError

        out = sampler.sample(
            Run(model=model, path=self.path, sigmas=sigmas, shape=z.shape[1:], latent=z, noise=z, mask=None,
                schedule=self._schedule, latents_in=lambda s: s, latents_out=lambda s: s, tell=self.said.append,
                keep=None, other=unasked, beside=unasked, labelled=unasked, relay=unasked, again=unasked)
        )  # fmt: skip
        return out / self.scale

    def progress(self, total):
        return SimpleNamespace(step=lambda done, preview=None, text="": self.steps.append((done, total)))

    def check_cancelled(self):
        pass

    def say(self, text, warn=False):
        self.said.append(text)


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def request(scale=1.0, tile=128, overlap=32, window="gaussian", **rest):
    given = {"colour_fix": "none"} | rest
    return RestorationRequest(size=Size(scale, Tiling(tile, overlap, window), given.pop("least_side", 0)), **given)


def restored(host, images, made):
    return run(host, None, None, None, images, made)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(1, 1), (3, 10_000), (37, 53), (200, 300)])
def test_what_a_network_leaves_alone_is_the_enlargement(path, size):
    picture = draw(1, *size, 3)
    host = Host(path)
    scale = 1.0 if max(size) > 5000 else 2.0
    got = restored(host, picture, request(scale=scale, tile=512 if max(size) > 5000 else 128))
    expected = region(picture, (round(size[0] * scale), round(size[1] * scale))).clamp(0, 1)
    assert got.shape == expected.shape and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert host.steps[-1][0] == host.steps[-1][1] and not host.said


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("colour", ["wavelet", "adain", "none"])
@pytest.mark.parametrize("window", ["gaussian", "cosine"])
def test_a_constant_picture_stays_constant(path, colour, window):
    picture = torch.full((1, 150, 270, 3), 0.4)
    got = restored(Host(path), picture, request(window=window, colour_fix=colour))
    assert float((got - 0.4).abs().max()) < 1 / 255


def network(reach=4):
    kernel = torch.randn(3, 3, 2 * reach + 1, 2 * reach + 1, generator=torch.Generator().manual_seed(3))
    kernel /= kernel.abs().sum()
    return lambda z, text: torch.sigmoid(F.conv2d(F.pad(z, (reach,) * 4, mode="replicate"), kernel) * 3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_tiles_equal_the_whole(path, scale):
    """A small convolutional network reaches no further than a quarter of the overlap."""
    picture = draw(2, 150, 107, 3)
    whole = restored(Host(path, network()), picture, request(scale, 0, 0))
    tiled = Host(path, network())
    # Pixels that are repeated outside the picture are the same in both where the sides are multiples of 64 or not.
    got = restored(tiled, picture, request(scale, 128, 32, "cosine"))
    rim = 5
    assert float((got - whole)[:, :-rim, :-rim].abs().max()) < 1 / 255 / 10
    assert sum(shape[0] for shape in tiled.calls) > 2 and {shape[-1] for shape in tiled.calls} == {128}


def test_no_seam():
    """Steps across tile borders are no larger than inside, for a network that answers each tile with another tint."""
    tint = iter(torch.linspace(0, 0.3, 64))
    ramp = torch.linspace(0.2, 0.6, 400)[None, None, :, None].expand(1, 96, 400, 3)
    host = Host("FLOW", lambda z, text: z + next(tint))
    got = restored(host, ramp, request(tile=128, overlap=32, batch_size=1))
    steps = got[0, :, :, 0].diff(dim=1).abs().amax(0)
    edges = sorted({x for *_, a, b in request().size.grid(96, 400).boxes for x in (a, b) if 0 < x < 400})
    inside = torch.ones(399, dtype=torch.bool)
    inside[[x - 1 for x in edges]] = False
    assert float(steps[~inside].max()) <= float(steps[inside].max())


def test_channels():
    grey, alpha = draw(1, 40, 50, 1), draw(1, 40, 50, 4)
    assert restored(Host(), grey, request()).shape == (1, 40, 50, 3)
    got = restored(Host("FLOW", lambda z, text: 1 - z), alpha, request())
    torch.testing.assert_close(got[..., 3], alpha[..., 3])
    torch.testing.assert_close(got[..., :3], 1 - alpha[..., :3], atol=1e-5, rtol=0)
    assert restored(Host(), draw(1, 40, 50, 3).half(), request()).dtype == torch.float32
    for bad in (torch.zeros(1, 0, 5, 3), torch.zeros(1, 5, 5, 2), torch.zeros(5, 5, 3)):
        with pytest.raises(ValueError, match="image has shape"):
            pictures(bad)


def test_masks():
    picture = draw(1, 200, 300, 3)
    mask = torch.zeros(200, 300)
    mask[20:60, 30:80] = 1
    host = Host("FLOW", lambda z, text: 1 - z)
    got = restored(host, picture, request(mask=mask, feather=0))
    expected = torch.where(mask[None, :, :, None] > 0, 1 - picture, picture)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert sum(shape[0] for shape in host.calls) == 1  # the other tiles are not run
    empty = Host("FLOW", lambda z, text: 1 - z)
    kept = restored(empty, picture, request(mask=torch.zeros(1, 10, 10)))
    torch.testing.assert_close(kept, picture, atol=2e-6, rtol=0)
    assert [any("the mask is empty" in text for text in one.said) for one in (empty, host)] == [True, False]
    assert not empty.calls and empty.steps[-1][0] == empty.steps[-1][1]
    full = restored(Host("FLOW", lambda z, text: 1 - z), picture, request(mask=torch.ones(64, 64)))
    torch.testing.assert_close(full, 1 - picture, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="3 masks for 2 images"):
        restored(Host(), draw(2, 40, 40, 3), request(mask=torch.ones(3, 40, 40)))


def test_feathering_is_a_slope():
    mask = torch.zeros(1, 5, 101)
    mask[..., 50:] = 1
    soft = softened(mask, 1, 8)[0, 2, :, 0]
    assert soft[41] == 0 and soft[59] == pytest.approx(1) and bool((soft.diff() >= -1e-6).all())
    assert float(soft[49] + soft[50]) == pytest.approx(1)
    assert torch.equal(softened(mask, 1, 0)[0, :, :, 0], mask[0])


def test_captions_reach_their_images_and_tiles():
    """The answer is the length of the text, so that each pixel says which caption it had."""
    host = Host("FLOW", lambda z, text: torch.full_like(z, len(text) / 10))
    picture = draw(2, 64, 224, 3)
    got = restored(host, picture, request(caption="a\nbbb", caption_per_line=True))
    torch.testing.assert_close(got[0], torch.full_like(got[0], 0.1))
    torch.testing.assert_close(got[1], torch.full_like(got[1], 0.3))
    boxes = request().size.grid(64, 224).boxes
    assert len(boxes) == 2
    tiles = "a\n\nccccc\ndddd"
    got = restored(host, picture, request(caption="zz", tile_captions=tiles, window="cosine"))
    for row, left, right in ((0, 0.1, 0.2), (1, 0.5, 0.4)):
        assert float(got[row, 0, 0, 0]) == pytest.approx(left) and float(got[row, 0, -1, 0]) == pytest.approx(right)
    mixed = restored(host, picture, request(caption="zz", tile_captions=tiles, tile_strength=0.25))
    assert float(mixed[1, 0, 0, 0]) == pytest.approx(0.75 * 0.2 + 0.25 * 0.5)
    none = Host("FLOW", lambda z, text: torch.full_like(z, len(text) / 10))
    got = restored(none, picture, request(caption="zz", tile_captions=tiles, tile_strength=0.0))
    torch.testing.assert_close(got, torch.full_like(got, 0.2))
    assert none.texts == ["zz"]  # captions that do not count are not encoded


def test_a_batch_is_as_each_alone_and_batch_size_changes_nothing():
    pictures_ = draw(5, 70, 150, 3)
    run_ = lambda images, batch: restored(Host("VE", network()), images, request(batch_size=batch))  # noqa: E731
    whole = run_(pictures_, 4)
    torch.testing.assert_close(whole, torch.cat([run_(pictures_[i : i + 1], 4) for i in range(5)]))
    torch.testing.assert_close(whole, run_(pictures_, 1), atol=1e-6, rtol=0)
    many = draw(40, 8, 8, 3)
    torch.testing.assert_close(run_(many, 7), torch.cat([run_(many[i : i + 1], 1) for i in range(40)]))


def test_video_models_get_all_frames_at_once():
    host = Host("FLOW", lambda z, text: 1 - z, dims=3)
    frames = draw(21, 70, 70, 3)
    got = restored(host, frames, request())
    torch.testing.assert_close(got, 1 - frames, atol=1e-5, rtol=0)
    assert host.calls == [(1, 3, 21, 128, 128)] and host.steps[-1][0] == host.steps[-1][1]
    host.decode = lambda vae, samples: samples[0, :, :17].movedim(0, -1)
    with pytest.raises(ValueError, match="17 frames of 21"):
        restored(host, frames, request())


def test_least_side_works_larger_and_comes_back():
    host = Host()
    got = restored(host, draw(1, 20, 30, 3), request(scale=2.0, least_side=256, tile=512, overlap=64))
    assert got.shape == (1, 40, 60, 3) and host.calls == [(1, 3, 256, 384)]


def test_latent_scale():
    """Raw latents times 0.18215, whatever the model's own factor is; what comes back is raw again."""
    seen = []
    host = Host("VE", lambda z, text: seen.append(z) or z, scale=0.13025)
    picture = draw(1, 64, 64, 3)
    got = restored(host, picture, request(latent_scale=0.18215))
    torch.testing.assert_close(seen[0], picture.movedim(-1, 1) * 0.18215)
    torch.testing.assert_close(got, picture, atol=1e-5, rtol=0)
    shifted = Host()
    shifted.latents_in = lambda model, samples: (samples - 0.06) * 1.5
    with pytest.raises(ValueError, match="latent_scale"):
        restored(shifted, picture, request(latent_scale=0.18215))


def test_a_model_that_enlarges_is_warned_of_once():
    host = Host("FLOW", lambda z, text: 1.5 * z)
    restored(host, draw(2, 100, 200, 3), request())
    (said,) = host.said
    assert "1.50 times" in said and "one-step" in said
    same = Host("FLOW", lambda z, text: 1.05 * z)
    restored(same, draw(1, 100, 200, 3), request())
    assert not same.said


def test_tiles_of_the_source_are_those_of_the_result():
    picture = draw(1, 60, 100, 3)
    size = Size(4.0, Tiling(128, 32))
    parts = list(tiles_of(picture, size))
    boxes = size.grid(60, 100).boxes
    assert len(parts) == len(boxes)
    for part, (top, bottom, left, right) in zip(parts, boxes, strict=True):
        expected = picture[:, top // 4 : -(-bottom // 4), left // 4 : -(-right // 4)]
        assert torch.equal(part, expected)


@pytest.mark.parametrize(("given", "named"), [({"scale": 0.0}, "scale"), ({"scale": 17}, "scale"),
                                              ({"least_side": -1}, "least_side")])  # fmt: skip
def test_sizes_that_cannot_be(given, named):
    with pytest.raises(ValueError, match=named):
        Size(**given)


class Coarse(Host):
    """Latents of an eighth of the side and 16 channels, as those of SD3 and Flux."""

    def latent_format(self, model):
        return 16, 2

    def encode_images(self, vae, images):
        z = F.avg_pool2d(images.movedim(-1, 1), 8)
        return {"samples": torch.cat([z, z.new_zeros(len(z), 13, *z.shape[2:])], 1)}

    def decode(self, vae, samples):
        return samples[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)


# Prints how much memory this process took at most above what it had, less the result, in bytes.
MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_restoration as t
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
host, picture = t.Coarse(), torch.full((1, 4096, 4096, 3), 0.5)
t.restored(host, picture[:, :512, :512], t.request(tile=512, overlap=64))
before = peak()
out = t.restored(host, picture, t.request(tile=512, overlap=64))
print(peak() - before - out.numel() * 4)
assert abs(float(out.min()) - 0.5) < 1 / 255 and abs(float(out.max()) - 0.5) < 1 / 255
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_the_memory_of_a_large_picture_is_the_tiles():
    """Of 4096 x 4096 (201 MB as a tensor), beside the picture and the result: what a dozen tiles take (3 MB each)."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, os.path.dirname(__file__)], capture_output=True, text=True, check=False,
        # A fixed threshold: else what glibc keeps of freed tensors depends on the order in which they were freed.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 12 * 512 * 512 * 3 * 4, done.stdout


def test_the_timestep_is_the_wishs():
    host = Host("VP")
    restored(host, draw(1, 64, 64, 3), request(one_step=OneStep(250)))
    with pytest.raises(ValueError, match="timestep"):
        OneStep(0)
