"""The order of a run's samples, what a batch holds, and the memory that it will take."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from retort.sampling.parts import WHOLE, Parts
from retort.sampling.path import VE
from retort.trainers.data import Data
from retort.trainers.objectives.parts.contract import DEGRADED


def row(mean):
    return {"mean": torch.tensor([float(mean)])}


def mixed(narrow=5, wide=4):
    """Samples of two sizes; sample i has the mean i, and its latent is full of i."""
    shapes = [(3, 4, 4)] * narrow + [(3, 4, 8)] * wide
    return Data([row(i) for i in range(len(shapes))], latents=[torch.full(s, float(i)) for i, s in enumerate(shapes)])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_groups_are_of_one_size_and_every_sample_comes_before_any_comes_again(size):
    data = mixed()
    lap = -(-5 // size) + -(-4 // size)
    for start in (0, lap, 5 * lap):
        groups = [data.group(position, size, 7) for position in range(start, start + lap)]
        assert all(len(group) == size and len({data.shape_of(i) for i in group}) == 1 for group in groups)
        assert set(Counter(i for group in groups for i in group)) == set(range(9))
    orders = [[data.group(position, size, seed) for position in range(4 * lap)] for seed in (7, 7, 8)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:lap] != orders[0][lap : 2 * lap]


def test_a_batch_keeps_prompts_beside_their_pictures(tiny):
    data = mixed()
    data.prompts = tuple(f"prompt {i}" for i in range(9))
    batch = data.batch(tiny(VE), [7, 5], [0, 1], 0, 0, 0.0)
    assert batch.shape == (3, 4, 8) and batch.prompts == ("prompt 7", "prompt 5")
    assert batch.cond["mean"].tolist() == [7.0, 5.0] and batch.latents.flatten(1).mean(1).tolist() == [7.0, 5.0]


def test_dropped_prompts_are_the_empty_one_of_their_size_and_their_share_is_right(tiny):
    data, denoiser = mixed(), tiny(VE)
    data.uncond, data.unconds = row(-1), {(3, 4, 8): row(-2)}
    means = [
        float(data.batch(denoiser, [i], [0], 0, step, 0.3).cond["mean"]) for i in (0, 8) for step in range(300)
    ]  # fmt: skip
    assert set(means) == {0.0, -1.0, 8.0, -2.0}
    for dropped in (-1.0, -2.0):
        assert means.count(dropped) / 300 == pytest.approx(0.3, abs=0.08)
    whole = data.batch(denoiser, [0, 1, 2, 3], [0, 1, 2, 3], 0, 5, 0.5).cond["mean"]
    parts = [data.batch(denoiser, [i], [i], 0, 5, 0.5).cond["mean"] for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))


def test_data_that_cannot_be_learnt_from_is_refused():
    one = torch.zeros(3, 4, 4)
    for given, message in (
        ({"conds": []}, "data set is empty"),
        ({"conds": [row(0)]}, "connect an empty latent"),
        ({"conds": [row(0)], "latents": [one, one]}, "2 latents and 1 prompts"),
        ({"conds": [row(0)] * 2, "latents": [one, torch.zeros(4, 4, 4)]}, "differ in channels"),
        ({"conds": [row(0)] * 2, "latents": [one, torch.zeros(3, 1, 4, 4)]}, "differ in channels"),
        ({"conds": [row(0)] * 2, "latents": [one, one / 0]}, "latent 1 holds NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            Data(**given)


def pictured(count=4):
    """Samples whose latents are their pictures' means, and how they are damaged: by a value of the draw's own."""
    pictures = [torch.full((4, 6, 3), 50 * (i + 1), dtype=torch.uint8) for i in range(count)]
    data = Data([row(i) for i in range(count)], latents=[p.float().movedim(-1, 0) / 255 for p in pictures])
    data.pictures = pictures
    data.degrade = lambda images, draws: images.movedim(-1, 1) + draws.uniform("damage")[:, None, None, None]
    return data


def test_pictures_are_damaged_anew_in_every_step_and_alike_in_every_batch(tiny):
    data, net = pictured(), tiny(VE)
    first, second = (data.batch(net, [2, 0], [0, 1], 3, step, 0.0).columns[DEGRADED] for step in (0, 1))
    assert first.shape == (2, 3, 4, 6) and not torch.equal(first, second)
    alone = data.batch(net, [0], [1], 3, 0, 0.0).columns[DEGRADED]
    torch.testing.assert_close(alone[0], first[1], rtol=0, atol=0)
    # The damage is added to the very picture.
    damage = first[0] - 150 / 255
    torch.testing.assert_close(damage, damage[:1, :1, :1].expand_as(damage))


def test_a_damaged_latent_of_another_size_is_refused(tiny):
    data = pictured()
    data.degrade = lambda images, draws: images.movedim(-1, 1)[..., :4]
    with pytest.raises(ValueError, match=r"a degraded picture of \(4, 6\) becomes a latent \(3, 4, 4\) and the clean"):
        data.batch(tiny(VE), [0], [0], 3, 0, 0.0)


def test_without_pictures_samples_begin_at_noise(tiny):
    data = mixed()
    draws = data.batch(tiny(VE), [0, 1], [0, 1], 3, 0, 0.0).draws
    torch.testing.assert_close(data.start([0, 1], draws, "x"), draws.normal("x", (3, 4, 4)))


def test_packed_latents_of_unlike_parts_never_share_a_batch(tiny):
    """Both kinds have as many numbers: they are told apart by their parts, and each batch knows its own."""
    kinds = [Parts(((2, 3, 3), (2, 6)), (1.0, 0.5)), Parts(((2, 6), (2, 3, 3)), (1.0, 0.5))]
    parts = [kinds[i % 2] for i in range(6)]
    net = tiny(VE)
    told = {"mean": torch.zeros(1)}
    data = Data([told] * 6, latents=[torch.randn(1, 30) for _ in range(6)], parts=parts)
    for position in range(9):
        rows = data.group(position, 2, 0)
        batch = data.batch(net, rows, [0, 1], 0, 0, 0.0)
        assert len({data.kind_of(i) for i in rows}) == 1 and batch.parts == parts[rows[0]] and batch.shape == (1, 30)
    assert Data([told], latents=[torch.randn(2, 3, 3)]).parts_of(0) is WHOLE
    with pytest.raises(ValueError, match="parts of 1"):
        Data([told] * 2, latents=[torch.randn(1, 30)] * 2, parts=parts[:1])
