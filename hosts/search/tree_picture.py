"""A search tree as a picture: noise above, finished latents below, each way in the colour of the value it leads to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...sampling.tree import ROOT, Tree

HEIGHT, LEFT, TOP, BOTTOM = 300, 64, 30, 26
GRID, INK, BEST = (58, 62, 70), (205, 210, 218), (130, 215, 140)
LOW, HIGH = np.array((52, 74, 120)), np.array((255, 176, 92))


def columns(tree: Tree) -> np.ndarray:
    """(size,) in [0, 1]: finished latents side by side in the order of a walk through the tree, the rest above them."""
    place, leaves = np.zeros(tree.size), 0
    waiting = [ROOT]
    while waiting:
        node = waiting.pop()
        kids = tree.children(node)
        if len(kids):
            waiting.extend(kids[::-1].tolist())
        else:
            place[node], leaves = leaves, leaves + 1
    place = (place + 0.5) / max(leaves, 1)
    # A node's number is above its parent's, so that children are placed before their parent.
    for node in range(tree.size - 1, -1, -1):
        kids = tree.children(node)
        if len(kids):
            place[node] = (place[kids[0]] + place[kids[-1]]) / 2
    return place


def draw(pen: Any, tree: Tree, top: int, width: int, best: Sequence[int]) -> None:
    """Draw into HEIGHT rows from `top`; best: numbers of the candidates to mark with their ranks, best first."""
    last = len(tree.stops) - 1
    levels = np.linspace(top + TOP, top + HEIGHT - BOTTOM, last + 2)
    x = LEFT + columns(tree) * (width - LEFT - 14)
    y = levels[tree.place + 1]
    text = f"{tree.size - 1} latents, {len(tree.leaves)} of them finished; bright: high reward"
    pen.text((LEFT, top + 6), text, fill=INK)
    for place, step in enumerate(tree.stops):
        height = levels[place + 1]
        pen.line([(LEFT, height), (width - 14, height)], fill=GRID)
        pen.text((8, height - 6), f"{tree.setting['sigmas'][step]:.3g}", fill=INK)
    pen.text((8, levels[0] - 6), "sigma", fill=INK)
    value = tree.value
    low, high = np.quantile(value[1:], (0.02, 0.98)) if tree.size > 1 else (0.0, 1.0)
    share = np.clip((value - low) / max(high - low, 1e-12), 0, 1)[:, None]
    colours = (LOW + share * (HIGH - LOW)).astype(int)
    for node in np.argsort(value[1:], kind="stable") + 1:  # the best are drawn over the rest
        parent = tree.parent[node]
        pen.line([(x[parent], y[parent]), (x[node], y[node])], fill=tuple(colours[node].tolist()))
    finished = {int(tree.number[leaf]): int(leaf) for leaf in tree.leaves}
    for rank, number in reversed(list(enumerate(best, 1))):
        node = finished[number]
        pen.text((x[node] - 3, y[node] + 5), str(rank), fill=BEST)
        while node != ROOT:
            parent = int(tree.parent[node])
            pen.line([(x[parent], y[parent]), (x[node], y[node])], fill=BEST, width=2 if rank == 1 else 1)
            node = parent
