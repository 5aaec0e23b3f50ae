"""Gradients of an objective on a network that has blocks to checkpoint."""

from __future__ import annotations

import torch

from retort.trainers import checkpointing
from retort.trainers.objectives.parts.contract import Batch, Draws


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


def gradients_with_gan(denoiser, objective, batch, checkpoints):
    """Gradients of student, fake and discriminator by name, from adapters and heads that are not zero."""
    for p in denoiser.adapters.parameters("fake").values():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    objective.prepare([batch])
    heads = objective.discriminator.double()
    for head in heads.heads:
        torch.nn.init.normal_(head.whole[-1].weight, generator=torch.Generator().manual_seed(1))
    if checkpoints:
        assert checkpointing.enable(denoiser.network) == 4
    for loss in objective.losses(batch, 0):
        with denoiser.adapter(loss.player):
            loss.value.backward()
    weights = [denoiser.adapters.parameters(n) for n in ("student", "fake")] + [dict(heads.named_parameters())]
    found = {f"{i}.{k}": p.grad for i, group in enumerate(weights) for k, p in group.items()}
    assert all(g is not None for g in found.values())
    return found


def assert_same(found, expected):
    """Compare two sets of gradients by name."""
    assert found.keys() == expected.keys()
    for key, each in expected.items():
        torch.testing.assert_close(found[key], each, rtol=1e-9, atol=1e-14, msg=key)


def three_latents() -> Batch:
    """Three small latents, for an objective that learns from them."""
    draws = Draws(4, 0, (0, 1, 2))
    latents = draws.normal("data", (3, 4, 4))
    return Batch(draws, (3, 4, 4), {"mean": torch.tensor([0.2, 0.5, 0.9])}, {"mean": torch.zeros(3)}, latents)


def affine_gradient(denoiser, loss):
    """d loss / d (w, c) of the student's affine part."""
    row = denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"]
    row.grad = None
    with denoiser.adapter("student"):
        loss.backward()
    return row.grad[0].clone()
