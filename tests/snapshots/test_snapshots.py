"""Schemas of every node, and latents of the workflows that take a second or two, are what they were committed as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import snapshots

pytest.importorskip("diffusers")
pytest.importorskip("peft")


# Searches and trainings turn on which of two near numbers is larger: `snapshots.py` alone runs them.
QUICK = [
    "3 Teach it your taste", "Distil - A student by its parts", "1 Quick start - 4 steps instead of 50",
    "Distil - A teacher and three students",
    "Distil - A noise-prediction model", "Reflect - Guided against unguided", "6 Reflect - More of what a LoRA adds",
    "Reflect - A model against an earlier one", "Restore - A caption for each tile", "Restore - Digits in one step",
    "Restore - Infrared with spectral guidance",
]  # fmt: skip


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_schemas_are_what_saved_workflows_expect() -> None:
    """A change that is meant: run `snapshots.py --write` and say in the changelog what it does to saved workflows."""
    found = json.loads(json.dumps(snapshots.schemas()))
    assert not list(snapshots.differences(found, read(snapshots.SCHEMAS)))


def test_every_workflow_that_runs_anywhere_has_a_snapshot() -> None:
    assert sorted(read(snapshots.LATENTS)) == snapshots.names()
    assert set(QUICK) <= set(snapshots.names())


@pytest.mark.parametrize("name", QUICK)
def test_latents(name) -> None:
    kept = read(snapshots.LATENTS)[name]
    ((_, found),) = snapshots.fingerprints([name])
    assert found.keys() == kept.keys()
    assert all(snapshots.same(found[key], kept[key]) for key in kept), (found, kept)


def test_other_latents_are_told_apart() -> None:
    """A thousandth of a deviation in one place of a latent is rounding; a tenth everywhere is not."""
    torch = pytest.importorskip("torch")
    latent = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = snapshots.fingerprint(latent)
    near, other = latent.clone(), latent + 0.1 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    near[0, 0, 0, 0] += 1e-3
    assert snapshots.same(snapshots.fingerprint(near), kept)
    assert not snapshots.same(snapshots.fingerprint(other), kept)
    assert not snapshots.same(snapshots.fingerprint(latent[:1]), kept)


def test_a_schema_that_changed_is_named() -> None:
    before = {"Node": {"inputs": [{"id": "a", "default": 1}]}}
    after = {"Node": {"inputs": [{"id": "a", "default": 2}]}}
    assert list(snapshots.differences(after, before)) == ["Node.inputs[0].default: 1 became 2"]
