"""The second device in this process: built once for each torch, registered once. README.md says what it is.

`ready()` says whether it can be built here, `install()` makes `torch.device("second")` exist. Everything else that a
test asks of it goes through torch (`torch.accelerator`, `torch.Stream`), or through what `install()` returns.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch

NAME = "second"
HERE = Path(__file__).resolve().parent
FLAGS = ["-O0", "-w"]  # compiling takes half as long, and CPU kernels do the work


def ready() -> str:
    """Why the device cannot be built here, empty where it can."""
    if sys.platform != "linux":
        return "the second device is built on Linux only"
    missing = [tool for tool in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(tool, path=_path()) is None]
    return f"the second device is built by {' and '.join(missing)}, which this machine lacks" if missing else ""


def _path() -> str:
    # A virtual environment's own tools, also where it is not activated.
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@cache
def extension() -> Any:
    """The compiled module. The first call for a version of torch takes about half a minute."""
    from torch.utils.cpp_extension import load

    version = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    root = Path(os.environ.get("SECOND_DEVICE_BUILD") or Path.home() / ".cache" / "retort")
    folder = root / f"second_device-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("PATH")
    os.environ["PATH"] = _path()
    try:
        with (folder / "building").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)  # torch's own, which outlives a build that was killed
            return load(
                "retort_second_device",
                [str(HERE / "second.cpp")],
                build_directory=str(folder),
                extra_cflags=FLAGS,
                with_cuda=False,
            )
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


@cache
def install() -> Any:
    """Register the device as `second` in this process, once and for good; returns the compiled module."""
    made = extension()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(made))
    torch.utils.generate_methods_for_privateuse1_backend(for_module=False, for_storage=True)
    _let_data_move(made)
    return made


def _module(made: Any) -> types.ModuleType:
    """`torch.second`, by the names that torch and others look for in a device's module."""
    generator, accelerator = made.default_generator(), torch.accelerator
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.init = module._lazy_init = module.set_device = lambda *_: None
    module._is_in_bad_fork = lambda: False
    module.device = lambda *_: contextlib.nullcontext()
    module.manual_seed = module.manual_seed_all = lambda seed: generator.manual_seed(seed % (1 << 63))
    module.get_rng_state = lambda device=0: generator.get_state()
    module.set_rng_state = lambda state, device=0: generator.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16, torch.float32]
    module.synchronize = lambda device=None: accelerator.synchronize()
    module.memory_allocated = lambda device=None: accelerator.memory_allocated(0)
    module.max_memory_allocated = lambda device=None: accelerator.max_memory_allocated(0)
    module.reset_peak_memory_stats = lambda device=None: accelerator.reset_peak_memory_stats(0)
    module.mem_get_info = lambda device=None: accelerator.get_memory_info(0)
    module.empty_cache = lambda: None
    module.current_stream = lambda device=None: accelerator.current_stream()
    module.Stream, module.Event = torch.Stream, torch.Event
    return module


def _let_data_move(made: Any) -> None:
    """`parameter.data = tensor` and `module.to(device)` across devices, as between the CPU and CUDA."""
    plain, compatible = torch.Tensor.data, torch._has_compatible_shallow_copy_type

    def known(a: torch.Tensor, b: torch.Tensor) -> bool:
        return {type(a), type(b)} <= {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer} and {
            a.device.type, b.device.type
        } <= {"cpu", NAME}  # fmt: skip

    def moved(self: torch.Tensor, other: torch.Tensor) -> None:
        if known(self, other) and self.device.type != other.device.type:
            made.set_data(self, other)
        else:
            plain.__set__(self, other)

    torch.Tensor.data = property(plain.__get__, moved)
    # Any arguments, since torch compares the signature with its own.
    torch._has_compatible_shallow_copy_type = lambda *args, **kwargs: known(*args) or compatible(*args, **kwargs)
