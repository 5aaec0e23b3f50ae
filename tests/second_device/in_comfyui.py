"""ComfyUI on the second device: its model management takes it for the card of this machine, in every process of a test.

Nothing of the plugin knows. README.md says which forms there are.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# plain: a card of 24 GB and networks in fp32. little: a card of 1 GB, too small for ComfyUI to load networks whole.
# bf16: ComfyUI finds that the card computes in bf16, and loads networks so.
FORMS = ("plain", "little", "bf16")
LITTLE = 2**30


def form() -> str:
    """The form that RETORT_SECOND_DEVICE names, empty where it is not set. ValueError for any other word."""
    given = os.environ.get("RETORT_SECOND_DEVICE", "")
    if given and given not in FORMS:
        raise ValueError(f"RETORT_SECOND_DEVICE is one of {', '.join(FORMS)}, got {given!r}")
    return given


def begin() -> None:
    """Give ComfyUI the device in this process, once it is imported, and in the processes that this one starts."""
    if not form():
        return
    sys.meta_path.insert(0, _Finder())
    site = str(HERE / "site")
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if site not in known:
        _device().extension()  # before others ask for it
        os.environ["PYTHONPATH"] = os.pathsep.join([site, *filter(None, known)])


class _Finder(importlib.abc.MetaPathFinder):
    """Sees comfy.model_management being imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "comfy.model_management":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        plain = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            plain(module)
            _take(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _device() -> Any:
    spec = importlib.util.spec_from_file_location("second_device", HERE / "device.py")
    assert spec is not None and spec.loader is not None
    if spec.name not in sys.modules:
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[spec.name]


def _take(management: Any) -> None:
    """What comfy.model_management knows of cards, for this one. It was imported with --cpu."""
    import torch

    made = _device().install()
    here = torch.device(_device().NAME, 0)
    if form() == "little":
        made.set_limit(LITTLE)

    def on_card(device: Any) -> bool:
        return device is None or device.type == here.type

    def asks(place: int, plain: Any) -> Any:
        """Free (0) or total (1) memory, and how much of it torch has to give."""

        def memory(dev: Any = None, *both: bool, **named: bool) -> Any:
            if not on_card(dev):
                return plain(dev, *both, **named)
            count = torch.accelerator.get_memory_info(0)[place]
            return (count, count) if any((*both, *named.values())) else count

        return memory

    def pin(tensor: Any) -> bool:
        if tensor.device.type != "cpu" or tensor.is_pinned() or not tensor.is_contiguous() or not tensor.nbytes:
            return False
        made.pin(tensor.data_ptr(), tensor.nbytes)
        return True

    management.cpu_state = management.CPUState.GPU
    management.vram_state = management.set_vram_to = management.VRAMState.NORMAL_VRAM
    management.ENABLE_PYTORCH_ATTENTION = True
    management.get_torch_device = management.text_encoder_device = lambda: here
    management.is_nvidia = management.is_amd = lambda: False
    management.get_free_memory = asks(0, management.get_free_memory)
    management.get_total_memory = asks(1, management.get_total_memory)
    management.should_use_fp16 = lambda *_, **__: False
    management.should_use_bf16 = lambda device=None, *_, **__: form() == "bf16" and on_card(device)
    management.synchronize = torch.accelerator.synchronize
    management.pin_memory = pin
    management.unpin_memory = lambda tensor: made.unpin(tensor.data_ptr())
