"""Files of tensors that are made one after another: what the library reads is what was made, and one is alive."""

from __future__ import annotations

import json
import os
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from retort.files.atomic import write_tensors
from retort.files.in_turn import DTYPES, write_in_turn

MADE = {
    "a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5, 3).T, "c": torch.tensor(True), "d": torch.empty(0),
    "e": torch.randn(7).to(torch.float8_e4m3fn), "f": torch.randn(2, 1, 3).bfloat16(), "ü": torch.arange(4),
    "one of a column": torch.randn(4, 11)[:1, 5],
}  # fmt: skip


def dtypes():
    return {name: tensor.dtype for name, tensor in MADE.items()}


def test_the_library_reads_what_was_made_and_one_is_alive_at_a_time(tmp_path):
    path, held = tmp_path / "made.safetensors", []

    def made(name):
        assert all(one() is None for one in held)
        tensor = MADE[name].clone()
        held.append(weakref.ref(tensor))
        return tensor

    write_in_turn(path, dtypes(), made)
    found = load_file(path)
    assert found.keys() == MADE.keys() and len(held) == len(MADE)
    for name, tensor in MADE.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_a_shape_may_be_another_than_was_thought_and_a_type_may_not(tmp_path):
    path = tmp_path / "made.safetensors"
    write_in_turn(path, {"x": torch.float32}, lambda name: torch.ones((10**6,) + (1,) * 7))
    assert load_file(path)["x"].shape == (10**6, 1, 1, 1, 1, 1, 1, 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="x is of torch.float16, and torch.float32 was said"):
        write_in_turn(path, {"x": torch.float32}, lambda name: torch.ones(2).half())
    with pytest.raises(ValueError, match="complex64, which a safetensors file does not hold"):
        write_in_turn(path, {"x": torch.complex64}, lambda name: torch.ones(2))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_types_have_the_librarys_names(tmp_path):
    path = tmp_path / "types.safetensors"
    write_in_turn(path, {name: dtype for name, dtype in DTYPES.items()}, lambda name: torch.zeros(3).to(DTYPES[name]))
    with safe_open(path, "pt") as file:
        assert {name: file.get_slice(name).get_dtype() for name in DTYPES} == {name: name for name in DTYPES}
        assert {name: file.get_tensor(name).dtype for name in DTYPES} == DTYPES
    header = path.read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


def test_the_very_file_is_synced_and_others_may_read_it(tmp_path, monkeypatch):
    """A file that is renamed over the synced one could be empty after a power failure."""
    synced, sync = {}, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.update({os.fstat(handle).st_ino: os.fstat(handle).st_size}), sync(handle))
    )
    path, mask = tmp_path / "state.safetensors", os.umask(0o022)
    try:
        write_tensors(path, MADE, {"step": "3"})
    finally:
        os.umask(mask)
    written = path.stat()
    assert synced[written.st_ino] == written.st_size and list(tmp_path.iterdir()) == [path]
    if os.name == "posix":
        assert written.st_mode & 0o777 == 0o644
    found = load_file(path)
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in MADE.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "3"} and {*file.keys()} == {*MADE}
