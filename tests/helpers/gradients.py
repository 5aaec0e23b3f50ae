"""Gradients of an objective on a network that has blocks to checkpoint."""

from __future__ import annotations

import torch

from retort.trainers import checkpointing


def tiny_gradients(objective, batch, step=0):
    """Every weight's gradient of every player, on a network that has blocks to checkpoint."""
    denoiser, found = objective.denoiser, {}
    for loss in objective.losses(batch, step):
        with denoiser.adapter(loss.player):
            loss.value.backward()
    for player in objective.players:
        for key, p in denoiser.adapters.parameters(player).items():
            found[player, key], p.grad = p.grad, None
    return found


def same_with_checkpoints(objective, batch):
    """Compare every gradient without checkpoints to those with them; a third of them at least are not zero."""
    before = tiny_gradients(objective, batch)
    assert checkpointing.enable(objective.denoiser.network) == 4
    after = tiny_gradients(objective, batch)
    assert all(torch.allclose(after[key], before[key], rtol=1e-9, atol=0) for key in before)
    assert sum(float(v.abs().sum()) > 0 for v in before.values()) > len(before) / 3
