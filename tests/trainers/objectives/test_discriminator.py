"""The discriminator's heads: shapes, seeds, and silence before the first step."""

from __future__ import annotations

import pytest
import torch

from retort.trainers.objectives.parts.discriminator import Discriminator


def woken(seed: int = 0) -> Discriminator:
    made = Discriminator([8, 6, 4], seed)
    for head in made.heads:
        torch.nn.init.ones_(head.whole[-1].weight)
    return made


def features(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(count, *shape, generator=draw) for shape in ((8, 4, 4), (10, 6), (4, 2, 3, 3))]


def test_maps_tokens_and_videos_become_one_logit_each():
    logits = woken()(features(5))
    assert logits.shape == (5,)
    assert bool(logits.std() > 0)


def test_a_logit_depends_on_its_sample_alone():
    made, seen = woken(), features(5)
    alone = torch.cat([made([f[i : i + 1] for f in seen]) for i in range(5)])
    torch.testing.assert_close(made(seen), alone)


def test_before_training_the_ratio_is_one():
    assert torch.equal(Discriminator([8, 6, 4], 0)(features(3)), torch.zeros(3))


def test_the_seed_decides_the_weights_and_nothing_else_is_disturbed():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = Discriminator([8], 5), Discriminator([8], 5), Discriminator([8], 6)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.heads[0].each[0].weight, other.heads[0].each[0].weight)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 features came for 3 heads"):
        woken()(features(2)[:2])
    with pytest.raises(ValueError, match="widths is empty"):
        Discriminator([], 0)
