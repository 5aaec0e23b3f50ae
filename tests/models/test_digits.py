"""The drawn digits: true captions, seeds, and a held-out split that never meets the training one."""

import torch

from retort.models import digits


def drawn(count=200, seed=3):
    fields, labels = digits.load("train")
    return digits.draw(fields[:count], labels[:count], torch.Generator().manual_seed(seed))


def test_the_same_seed_draws_the_same_digits():
    assert torch.equal(drawn().image, drawn().image)
    assert not torch.equal(drawn().image, drawn(seed=4).image)


def test_splits_are_disjoint_and_whole():
    train, held_out = digits.load("train")[0], digits.load("held_out")[0]
    assert len(train) == 1437 and len(held_out) == 360
    rows = {tuple(r.flatten().tolist()) for r in train}
    # scikit-learn's set holds no duplicate scans, so a shared row would be a leak.
    assert not any(tuple(r.flatten().tolist()) in rows for r in held_out)


def test_paper_and_ink_are_the_colours_that_the_caption_names():
    batch = drawn()
    corner = batch.image[:, :, :3, :3].mean((2, 3))
    low, high = torch.tensor([digits._HSV[name] for name in digits.COLOURS]).float().unbind(1)
    middle = digits._rgb(batch.paper, torch.full((len(corner), 3), 0.5))
    assert (low <= high).all()
    assert (corner - middle).abs().max() < 0.45
    others = torch.stack(
        [digits._rgb(torch.full_like(batch.paper, c), torch.full((len(corner), 3), 0.5)) for c in range(8)]
    )
    nearest = (others - corner).square().sum(-1).argmin(0)
    assert (nearest == batch.paper).float().mean() > 0.95


def test_slant_follows_a_shear_and_weight_a_thicker_pen():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")

    def bar(width, shear):
        return torch.sigmoid(width / 2 - (x - 32 + shear * (y - 32)).abs())[None, None] * ((y > 10) & (y < 54))

    strokes = torch.cat([bar(5, 0.0), bar(11, 0.4), bar(16, -0.4)])
    weight, slant = digits.measure(strokes)
    assert weight.tolist() == [0, 1, 2]
    assert [digits.SLANTS[s] for s in slant.tolist()] == ["upright", "right", "left"]


def test_full_captions_say_everything_and_varied_ones_only_what_they_report():
    text, said = digits.describe(7, 6, 4, 2, 0)
    assert text == "a bold blue seven on yellow paper, leaning left"
    assert said == {"digit", "ink", "paper", "weight", "slant"}
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        text, said = digits.describe(7, 6, 4, 2, 0, generator)
        assert ("blue" in text) == ("ink" in said)
        assert ("yellow paper" in text) == ("paper" in said)
        assert ("bold" in text) == ("weight" in said)
        assert ("seven" in text or "7" in text) == ("digit" in said)
