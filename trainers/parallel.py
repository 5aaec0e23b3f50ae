"""Several processes that train as one: `accelerate launch` starts them, here they add up their gradients."""

from __future__ import annotations

import os
from datetime import timedelta
from importlib.util import find_spec

import torch
from torch import Tensor

# The first process makes the teacher's pairs while the others wait; gloo and NCCL would give up after minutes.
PATIENCE = timedelta(days=7)


class AccelerateReducer:
    """The processes of an `accelerate launch`; see `processes.Reducer`."""

    def __init__(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        # Precision and devices are the network's own business: only the processes are accelerate's.
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )  # fmt: skip
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self._device = self._accelerator.device

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes (shares are weighted already), in place."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for (_, device), group in kinds.items():
            # One message for all: hundreds of small ones would wait for each other.
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group]).to(self._device)
            parts = self._accelerator.reduce(flat, "sum").to(device).split([tensor.numel() for tensor in group])
            with torch.no_grad():
                for tensor, part in zip(group, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether any process says so; also a point that all must reach."""
        count = torch.tensor([float(flag)], device=self._device)
        self.sum([count])
        return bool(count.item())

    def close(self) -> None:
        """Leave the group."""
        self._accelerator.end_training()


def place() -> tuple[int, int]:
    """(rank, number of processes) as they were launched; (0, 1) for a process alone.

    ValueError where `accelerate launch --cpu` was asked for several and started one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        raise ValueError(
            "accelerate was asked for several processes and started one, because on the CPU it leaves that to MPI: "
            "use `accelerate launch --multi_gpu --num_processes N`, which works on the CPU too"
        )
    return 0, 1


def launched() -> AccelerateReducer | None:
    """The reducer where several processes were launched, None for a process alone; errors as `place`.

    ImportError names the extra.
    """
    if place()[1] == 1:
        return None
    if find_spec("accelerate") is None:
        raise ImportError('training in several processes needs accelerate: python -m pip install "accelerate>=1.0"')
    return AccelerateReducer()
