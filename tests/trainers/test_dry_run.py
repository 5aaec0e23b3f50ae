"""A dry run counts what a real run takes, shallow copies tell of deep ones, and nothing of a weight is read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import outlines

from retort.hosts.headless.outline import Outline  # noqa: E402
from retort.hosts.headless.training import HeadlessDenoiser  # noqa: E402
from retort.trainers import depths, dry_run, weightless  # noqa: E402
from retort.trainers.tracker import Tracker  # noqa: E402

SHAPE, TOKENS, POOLED = (16, 32, 32), (24, 64), 32


@pytest.fixture
def dataset():
    return outlines.dataset_of(SHAPE, TOKENS, POOLED)


def test_bytes_come_and_go_with_their_storages():
    with Tracker() as tracker:
        x = torch.empty(1000, 1000, device="meta")
        y = x.t()
        assert tracker.now == 4_000_256  # whole blocks of 512 bytes
        z = x @ y
        assert tracker.flops["start"] == 2 * 1000**3
        del x, z
        assert tracker.now == 4_000_256
        del y
    assert tracker.now == 0
    assert tracker.peaks == {"start": 8_000_512}


def test_numbers_read_from_a_weightless_tensor_are_ones():
    with Tracker():
        x = torch.empty(3, device="meta")
        assert x.tolist() == [1.0, 1.0, 1.0]
        assert float(x.sum()) == 1.0
        assert x.cpu().device.type == "cpu"
        assert torch.zeros(3).copy_(x).device.type == "cpu"


def test_attention_keeps_no_score_matrix():
    with weightless.as_on_the_card(), Tracker() as tracker:
        q = torch.empty(1, 2, 4096, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        before = tracker.now
        out = nn.functional.scaled_dot_product_attention(q, q, q)
        assert tracker.now - before == q.nbytes + 2 * 4096 * 4  # what comes out, and a number for each row
        out.sum().backward()
        assert q.grad.shape == q.shape


@pytest.mark.parametrize("method", ["flow", "dmd2"])
def test_counts_what_a_real_step_takes(monkeypatch, dataset, method):
    # On the CPU the norm is taken apart.
    monkeypatch.setattr(weightless, "_FUSED_NORM", False)
    config = outlines.run_config(method)
    trainer = outlines.trainer_of(config, dataset)
    model = outlines.model_of(outlines.FLUX, outlines.FLUX_SMALL, real=True)
    counted = dry_run.run(Outline(model), trainer)
    real = dry_run.measure(HeadlessDenoiser(model), trainer, Tracker("cpu"))
    assert (counted.base, counted.blocks) == (real.base, real.blocks)
    assert counted.calls == real.calls
    assert counted.operations == real.operations
    assert counted.beside == pytest.approx(real.beside, rel=0.02)


@pytest.mark.parametrize("method", ["flow", "dmd2"])
def test_shallow_copies_tell_of_the_deep_network(dataset, method):
    outline = Outline(outlines.model_of(outlines.FLUX, outlines.FLUX_SMALL))
    trainer = outlines.trainer_of(outlines.run_config(method), dataset)
    whole, quick = dry_run.run(outline, trainer), dry_run.count(outline, trainer)
    assert [kind.count for kind in depths.kinds(outline.network)] == [4, 5]
    assert (quick.base, quick.blocks, quick.adapters, quick.state) == (
        whole.base, whole.blocks, whole.adapters, whole.state,
    )  # fmt: skip
    assert quick.beside == pytest.approx(whole.beside, rel=1e-3)
    assert quick.operations == pytest.approx(whole.operations, rel=1e-6)
    assert quick.calls == whole.calls


def test_a_network_that_needs_all_its_blocks_is_run_whole():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(5))

        def forward(self, x):
            for i in range(5):
                x = self.blocks[i](x)
            return x

    network = Counting()
    found = depths.kinds(network)
    short = weightless.weightless_copy(network, without=depths.left_out(network, found, [2]))
    assert len(short.blocks) == 2
    with pytest.raises(IndexError):
        short(torch.empty(1, 8, device="meta"))


def test_a_weightless_copy_reads_nothing_and_leaves_the_network_alone():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).half()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    made = weightless.weightless_copy(network, lambda w: torch.bfloat16 if w.dtype == torch.float16 else None)
    assert weightless.bare(made)
    assert not weightless.bare(network)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
