"""Latents of a set of preferences: whole, with their sound, and refused where they are none."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from retort.preferences import store


def test_all_parts_of_a_latent_are_kept_in_one_file(tmp_path):
    """Video with sound is read back whole and to the bit; a latent of one tensor is stored as it always was."""
    video, sound = torch.randn(3, 2, 4, 4), torch.randn(2, 5, 3)
    name = store.keep_latent(tmp_path, (video, sound))
    found = store.load_latent(tmp_path / name)
    assert isinstance(found, tuple) and torch.equal(found[0], video) and torch.equal(found[1], sound)
    assert store.keep_latent(tmp_path, (video, sound)) == name != store.keep_latent(tmp_path, video)
    assert torch.equal(store.load_latent(tmp_path / store.keep_latent(tmp_path, video)), video)
    broken = tmp_path / "latents" / "broken.safetensors"
    save_file({"latent": video, "latent_1": torch.full((2, 5, 3), float("nan"))}, broken)
    with pytest.raises(ValueError, match="NaN"):
        store.load_latent(broken)
    save_file({"latent": video, "sound": sound}, broken)
    with pytest.raises(ValueError, match="cannot be read"):
        store.load_latent(broken)
