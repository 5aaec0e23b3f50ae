"""Colours under alpha 0 reach nothing that is visible, through filters, networks, resizing and rewards."""

from __future__ import annotations

import pytest
import torch

from retort.hosts import api
from retort.hosts.restoration.run import pictures
from retort.hosts.rewards import kinds
from retort.nodes.restoration import RetortRestore
from retort.nodes.restoration_parts import RetortColorFix, RetortDegrade
from retort.restoration.hidden import GREY, filled
from retort.rewards.scoring import score

HIDDEN = {"green": (0.0, 1.0, 0.0), "magenta": (1.0, 0.0, 1.0), "black": (0.0, 0.0, 0.0)}


def cutout(name, size=48, soft=False):
    """A disc of noisy grey on a hidden colour, (1, size, size, 4)."""
    place = torch.arange(size) - size / 2 + 0.5
    far = (place[:, None].square() + place.square()).sqrt()
    alpha = (size / 3 - far).clamp(0, 4 if soft else 0.1).div(4 if soft else 0.1)
    noise = torch.rand(size, size, 1, generator=torch.Generator().manual_seed(0)) * 0.3
    colour = torch.where(alpha[..., None] > 0, 0.4 + noise, torch.tensor(HIDDEN[name]))
    return torch.cat([colour, alpha[..., None]], -1)[None]


@pytest.mark.parametrize("soft", [False, True])
def test_hidden_colours_are_the_nearest_visible_ones(soft):
    green, magenta = (cutout(name, soft=soft) for name in ("green", "magenta"))
    one, two = filled(green), filled(magenta)
    shown = green[..., 3] > 0
    assert torch.equal(one, two) and torch.equal(one[..., 3], green[..., 3])
    assert torch.equal(one[shown], green[shown])
    assert float(one[..., :3].min()) >= 0.4 and float(one[..., :3].max()) <= 0.7
    row = torch.tensor([[[1.0, 1.0, 1.0, 0.0], [0.2, 0.3, 0.4, 1.0], [1.0, 0.0, 0.0, 0.0]]])[None]
    assert torch.equal(filled(row)[0, 0, :, :3], torch.tensor([0.2, 0.3, 0.4]).expand(3, 3))


def test_pictures_that_hide_nothing_or_everything():
    whole = torch.rand(2, 8, 8, 4, generator=torch.Generator().manual_seed(0)).clamp_min(0.1)
    assert filled(whole) is whole
    plain = whole[..., :3]
    assert filled(plain) is plain
    nothing = torch.cat([whole[..., :3], torch.zeros(2, 8, 8, 1)], -1)
    mixed = filled(torch.cat([whole[:1], nothing[:1]]))
    assert torch.equal(mixed[0], whole[0])
    assert bool((mixed[1, ..., :3] == GREY).all()) and not mixed[1, ..., 3].any()


@pytest.fixture(scope="module")
def restorer():
    return api.host.embedded("photographs")


@pytest.mark.parametrize("settings", [{"scale": 2.0, "tile": 0}, {"scale": 1.0, "tile": 32, "overlap": 8}])
def test_restored_cutouts_do_not_show_them(restorer, settings):
    with torch.inference_mode():
        one, two = (
            RetortRestore.execute(*restorer, cutout(name), caption="colour photograph", **settings).args[0]
            for name in ("green", "magenta")
        )
    opaque = one[..., 3] > 0.99
    assert torch.equal(one[..., 3], two[..., 3]) and bool(opaque.any())
    assert float((one - two)[..., :3].abs().amax(-1)[opaque].max()) < 0.02


def test_neither_do_damage_colours_latents_and_rewards(restorer):
    pair = [cutout(name) for name in ("green", "black")]
    source = torch.rand(1, 48, 48, 3, generator=torch.Generator().manual_seed(1))
    fixed = [RetortColorFix.execute(picture, source).args[0] for picture in pair]
    assert torch.equal(fixed[0], fixed[1]) and torch.equal(fixed[0][..., 3], pair[0][..., 3])
    damaged = [RetortDegrade.execute(picture, {"kind": "infrared"}, seed=3).args[0] for picture in pair]
    assert torch.equal(damaged[0], damaged[1])
    latents = [api.host.encode_images(restorer[2], picture)["samples"] for picture in pair]
    assert torch.equal(latents[0], latents[1])
    reward = kinds.make(api.host, "sharpness", {})
    assert torch.equal(*(score(reward, picture, "a disc") for picture in pair))
    assert pictures(pair[0]).shape == pair[0].shape
