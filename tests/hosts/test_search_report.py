"""The report's tree: every finished latent has a place of its own, and what leads to it stands above."""

from __future__ import annotations

import numpy as np
import torch

from retort.hosts.search import report as search_report
from retort.hosts.search import tree_picture
from retort.sampling.tree import Tree, TreeConfig

SETTING = {
    "sigmas": [1.0, 0.5, 0.0],
    "transition": {"kind": "ancestral"},
    "shape": [1, 2, 2],
    "branch": [1],
    "half": False,
}


def grown(ways: int) -> Tree:
    """A tree of `ways` children of the root with two finished latents each, of rising reward."""
    tree = Tree(SETTING, TreeConfig(branch=(1,)), 4)
    latent = torch.zeros(1, 2, 2)
    for i in range(ways):
        node = tree._add(0, 0, 0.0, 2 * i, latent)
        for j in range(2):
            tree._add(node, 1, float(2 * i + j), 2 * i + j, latent)
            tree.best.offer(latent[None], [float(2 * i + j)], [2 * i + j], i + 1)
    return tree


def test_columns_are_a_walk_through_the_tree():
    tree = grown(3)
    place = tree_picture.columns(tree)
    assert np.allclose(place[tree.leaves], (np.arange(6) + 0.5) / 6)
    for node in (1, 4, 7):
        kids = tree.children(node)
        assert place[node] == place[kids].mean()
    assert place[0] == (place[1] + place[7]) / 2


def test_a_report_holds_curve_tree_and_pictures():
    tree = grown(40)
    tree.ledger.calls = 40
    pictures = [search_report.thumbnail(image) for image in torch.rand(4, 8, 8, 3)]
    picture = search_report.draw(tree, pictures, "title", 1)
    height = (
        search_report.HEIGHT + tree_picture.HEIGHT + search_report.SIDE + search_report.LABEL + 2 * search_report.GAP
    )
    assert picture.shape == (1, height, search_report.WIDTH, 3)
    drawn = (picture[0, search_report.HEIGHT : search_report.HEIGHT + tree_picture.HEIGHT] * 255).round().int()
    best = torch.tensor(tree_picture.BEST)
    rows = (drawn == best).all(-1).any(1)
    # The way to the best goes through all levels.
    assert rows[tree_picture.TOP + 1 : tree_picture.HEIGHT - tree_picture.BOTTOM].all()


def test_a_reward_is_spelt_in_decimals():
    spelt = [search_report.spelt(reward) for reward in (-2.6226e-6, 0.123456, 2.0, -1234567.0, float("-inf"))]
    assert spelt == ["-0.000002623", "0.1235", "2", "-1235000", "-inf"]
