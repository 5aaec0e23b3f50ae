"""A safetensors file of tensors that are made one after another, so that no more than one of them is in memory for it.

The format is the library's own (https://github.com/huggingface/safetensors, README, "Format"): eight bytes with the
header's length, the header, which may end in spaces, and the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .folder import Inside, alone

# Types of tensors by their names in such files.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY = 256  # bytes of the header for a tensor besides its name: type, offsets, and a shape of up to eight sides


def write_in_turn(
    path: Path | Inside,
    dtypes: Mapping[str, torch.dtype],
    made: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, atomically: `made` is asked for each tensor by its name, and nothing keeps its answer.

    The library would write another file beside it, readable by its owner alone, and put that in the place of the one
    that is synced. dtypes: of the tensors by name. ValueError for a type that no such file holds, and for a tensor of
    another type than was said; OSError names the file.
    """
    for name, dtype in dtypes.items():
        if dtype not in _NAMES:
            raise ValueError(f"the tensor {name} is of {dtype}, which a safetensors file does not hold")
    # Wide types first, so that each tensor begins where its type may begin.
    order = sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Mapping[str, object]] = {"__metadata__": dict(metadata)} if metadata else {}
    length = len(json.dumps(header)) + sum(len(json.dumps(name)) + _ENTRY for name in order)
    room = -(-length // 8) * 8
    with alone(path).fresh() as handle:
        handle.write(room.to_bytes(8, "little") + b" " * room)
        end = 0
        for name in order:
            tensor = made(name)
            if tensor.dtype != dtypes[name]:
                raise ValueError(f"the tensor {name} is of {tensor.dtype}, and {dtypes[name]} was said")
            begin, end = end, end + tensor.numel() * tensor.itemsize
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            whole = tensor.detach().cpu().contiguous()
            # A single number counts as contiguous at any stride, and as bytes it is viewed at stride 1 alone.
            handle.write(whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data)
            del tensor, whole
        text = json.dumps(header).encode()
        assert len(text) <= room
        handle.seek(8)
        handle.write(text + b" " * (room - len(text)))
