"""Files of random weights: whole, of the sizes that are published, and the same every time."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from retort.benchmarks.layouts import TABLE, Layout


def test_a_file_of_random_weights_is_read_back(tmp_path, monkeypatch):
    shapes = {
        "first.weight": torch.empty(300, 7000, device="meta"),  # longer than the table that it is drawn from
        "first.bias": torch.empty(300, device="meta"),
        "norm.weight": torch.empty(7, device="meta"),
        "kernel.weight": torch.empty(6, 4, 3, 3, device="meta"),
    }
    monkeypatch.setattr(Layout, "shapes", lambda self: shapes)
    for stored, plain in ((torch.float16, torch.float16), (torch.float8_e4m3fn, torch.bfloat16)):
        path = tmp_path / "network.safetensors"
        size = Layout("none", {}, (4, 8, 8), (8, 64), stored=stored).write(path)
        found = load_file(path)
        assert size == path.stat().st_size > sum(t.nbytes for t in found.values())
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in shapes.items()}
        assert found["first.weight"].dtype == stored and found["norm.weight"].dtype == plain
        weight = found["first.weight"].float()
        assert 0.9 < weight.std() * 7000**0.5 < 1.1
        assert len({tuple(row[:8].tolist()) for row in weight}) == 300
        assert not found["first.bias"].any() and found["norm.weight"].float().eq(1).all()
        # A table's end meets its start within a tensor.
        assert torch.equal(weight.flatten()[:1000], weight.flatten()[TABLE : TABLE + 1000])


def test_prompts_and_latents_have_the_layouts_sizes():
    layout = Layout("none", {}, (4, 6, 8), (77, 32), 12, {"guidance": 3.5})
    tokens, extra = layout.conditioning(torch.Generator().manual_seed(0))
    assert tokens.shape == (1, 77, 32) and extra["pooled_output"].shape == (1, 12) and extra["guidance"] == 3.5
    again, _ = layout.conditioning(torch.Generator().manual_seed(0))
    assert torch.equal(tokens, again)
    assert [t.shape for t in layout.latents(2, torch.Generator().manual_seed(0))] == [(4, 6, 8)] * 2
