"""Files of strangers in ComfyUI: what its own readers would open and ours do not."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.integration


def test_loras_are_safetensors_only(comfy, ours, tmp_path):
    folder_paths = importlib.import_module("folder_paths")
    lora = {"a.lora_up.weight": torch.ones(2, 1)}
    save_file(lora, tmp_path / "good.safetensors")
    for name in ("good.pt", "good.ckpt", "good.bin"):
        torch.save(lora, tmp_path / name)
    (tmp_path / "renamed.safetensors").write_bytes((tmp_path / "good.pt").read_bytes())
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    host = ours("hosts.comfyui.host").host
    assert {name for name in host.lora_names() if name.startswith(("good", "renamed"))} == {
        "good.safetensors", "renamed.safetensors",
    }  # fmt: skip
    assert torch.equal(host.read_lora("good.safetensors")["a.lora_up.weight"], torch.ones(2, 1))
    for name in ("good.pt", "good.ckpt", "good.bin"):
        with pytest.raises(ValueError, match="is no safetensors file: other kinds can run code"):
            host.read_lora(name)
    with pytest.raises(ValueError, match="renamed.safetensors is a pickle"):
        host.read_lora("renamed.safetensors")
