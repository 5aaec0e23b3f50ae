"""Tiles: what they cover, that weights add up to one, that nothing is seen of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from retort.restoration.resize import enlarged, region, source_box
from retort.restoration.tiles import Grid, Tiling, spans, weights

SIZES = [(1, 1), (3, 1000), (37, 53), (64, 64), (65, 129), (200, 96), (127, 511)]


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def through(process, images, tiling):
    grid = Grid(*images.shape[1:3], tiling)
    canvas = torch.zeros_like(images)
    for i, (t, b, left, right) in enumerate(grid.boxes):
        grid.add(canvas, i, process(images[:, t:b, left:right]))
    return canvas


def convolution(reach, seed=3):
    kernel = torch.randn(3, 3, 2 * reach + 1, 2 * reach + 1, generator=torch.Generator().manual_seed(seed))
    kernel /= kernel.abs().sum()

    def process(x):
        padded = F.pad(x.movedim(-1, 1), (reach,) * 4, mode="replicate")
        return torch.tanh(F.conv2d(padded, kernel) * 2).movedim(1, -1)

    return process


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 113, 500, 4096])
@pytest.mark.parametrize(("tile", "overlap"), [(64, 0), (64, 8), (64, 32), (0, 0)])
def test_spans_cover_the_length_with_the_fewest_tiles(length, tile, overlap):
    found = spans(length, tile, overlap)
    assert found[0][0] == 0 and found[-1][1] == length
    if tile == 0 or length <= tile:
        assert found == [(0, length)]
        return
    assert all(end - begin == tile for begin, end in found)
    shared = [before[1] - after[0] for before, after in zip(found, found[1:], strict=False)]
    assert min(shared) >= overlap and max(shared) - min(shared) <= 1
    assert (len(found) - 1) * (tile - overlap) + overlap < length  # one fewer would not do


@pytest.mark.parametrize("window", ("gaussian", "cosine"))
@pytest.mark.parametrize("length", [1, 65, 100, 500, 4096])
@pytest.mark.parametrize("overlap", [0, 1, 8, 16, 32])
def test_weights_add_up_to_one_everywhere(window, length, overlap):
    along = spans(length, 64, overlap)
    total = torch.zeros(length)
    for (b, e), own in zip(along, weights(along, overlap, window), strict=True):
        assert own.min() >= 0 and torch.isfinite(own).all()
        total[b:e] += own
    torch.testing.assert_close(total, torch.ones(length), atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", ("gaussian", "cosine"))
@pytest.mark.parametrize("size", SIZES)
def test_a_constant_stays_constant_and_a_picture_itself(window, size):
    constant = torch.full((2, *size, 3), 0.37)
    tiling = Tiling(64, 16, window)
    assert float((through(lambda x: x, constant, tiling) - constant).abs().max()) < 1e-6
    picture = draw(2, *size, 3)
    assert float((through(lambda x: x, picture, tiling) - picture).abs().max()) < 1e-6


@pytest.mark.parametrize("size", [(200, 96), (127, 331), (64, 64), (40, 300)])
def test_cosine_tiles_equal_the_whole_where_the_reach_is_a_quarter_of_the_overlap(size):
    process, picture = convolution(4), draw(1, *size, 3)
    got = through(process, picture, Tiling(64, 16, "cosine"))
    assert float((got - process(picture)).abs().max()) < 1e-5  # exact, well within 1/255


def test_gaussian_tiles_equal_the_whole_within_a_255th():
    process, picture = convolution(2), draw(1, 200, 230, 3)
    got = through(process, picture, Tiling(64, 24, "gaussian"))
    assert float((got - process(picture)).abs().max()) < 1 / 255


@pytest.mark.parametrize("window", ("gaussian", "cosine"))
def test_no_seam_is_larger_than_a_step_inside(window):
    """Tiles that disagree by a constant each: the worst that a network does."""
    grid = Grid(300, 420, Tiling(128, 32, window))
    canvas = torch.zeros(1, 300, 420, 1)
    shifts = draw(len(grid), seed=5)
    ramp = torch.linspace(0, 1, 420)[None, None, :, None].expand(1, 300, 420, 1)
    for i, (t, b, left, right) in enumerate(grid.boxes):
        grid.add(canvas, i, ramp[:, t:b, left:right] + shifts[i])
    steps = canvas[0, :, :, 0].diff(dim=1).abs().amax(0)
    edges = {x for *_, left, right in grid.boxes for x in (left, right) if 0 < x < 420}
    at = torch.zeros(419, dtype=torch.bool)
    for x in edges:
        at[x - 1] = True
    assert float(steps[at].max()) <= float(steps[~at].max())


@pytest.mark.parametrize(
    ("given", "named"),
    [({"tile": -1}, "tile"), *(({"overlap": n}, "overlap") for n in (300, -1)), ({"window": "box"}, "window")],
)
def test_bad_tilings(given, named):
    with pytest.raises(ValueError, match=named):
        Tiling(**given)


def test_nothing_to_cover():
    with pytest.raises(ValueError, match="nothing to cover"):
        Grid(0, 5, Tiling())


# Resizing in parts.


@pytest.mark.parametrize("size", [(80, 40), (41, 33), (20, 10), (7, 5), (1, 1), (23, 90)])
def test_cubic_is_pillows(size):
    """torch's antialiased bicubic has Pillow's kernel and edges."""
    picture = draw(2, 20, 10, 3)
    expected = F.interpolate(picture.movedim(-1, 1), size, mode="bicubic", antialias=True).movedim(1, -1)
    torch.testing.assert_close(region(picture, size), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["cubic", "linear"])
@pytest.mark.parametrize("size", [(80, 40), (41, 33), (9, 31)])
def test_a_part_is_that_of_the_whole(kernel, size):
    picture = draw(1, 20, 10, 3)
    whole = region(picture, size, kernel=kernel)
    for box in [(0, size[0], 0, size[1]), (3, 9, 5, 8), (size[0] - 1, size[0], 0, 1)]:
        part = region(picture, size, box, kernel)
        torch.testing.assert_close(part, whole[:, box[0] : box[1], box[2] : box[3]], atol=1e-6, rtol=0)


def test_the_same_size_changes_nothing():
    picture = draw(1, 20, 10, 3)
    assert torch.equal(region(picture, (20, 10), (2, 5, 1, 9)), picture[:, 2:5, 1:9])


def test_sizes():
    assert enlarged(10, 20, 1.1) == (11, 22)
    assert enlarged(10, 21, 1.5) == (15, 32)
    assert enlarged(10, 20, 1.0, least=512) == (512, 1024)
    assert enlarged(600, 700, 1.0, least=512) == (600, 700)
    assert enlarged(1, 1, 0.25) == (1, 1)
    assert source_box((10, 20), (40, 80), (0, 40, 0, 80)) == (0, 10, 0, 20)
    assert source_box((10, 20), (40, 80), (6, 9, 79, 80)) == (1, 3, 19, 20)
