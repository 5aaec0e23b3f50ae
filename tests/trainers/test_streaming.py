"""Streamed weights: the same numbers to the bit as with all of them on the device, whatever the passes and formats.

Memory for a block's weights is filled with bytes of ones before each copy, which is NaN in every format of floating
point: a weight that is read too early shows.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import streamed
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retort.trainers import checkpointing, masters, transfers
from retort.trainers.adapters import Adapters
from retort.trainers.masters import Away
from retort.trainers.streaming import Ring, spread

Network, adapted, network, start = streamed.Network, streamed.adapted, streamed.network, streamed.start
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is NaN in every format; `alive` counts the buffers that anybody holds."""
    held: list[weakref.ref] = []

    def empty(self, size):
        flat = torch.full((size,), 0xFF, dtype=torch.uint8)
        held.append(weakref.ref(flat.untyped_storage()))
        most[0] = max(most[0], alive())
        return flat

    def alive():
        return sum(each() is not None for each in held)

    most = [0]
    monkeypatch.setattr(transfers.Copies, "empty", empty)
    monkeypatch.setattr(masters, "SMALL", 100)  # biases and scales are gathered, other weights stay where they lie
    empty.alive, empty.most = alive, most
    return empty


def passes(made: Network, adapters: Adapters) -> dict[str, Tensor]:
    """What trainings do: passes without a graph, with one, with two at once, half a pass, one checkpointed twice."""
    x, out = start(made.enter.weight.dtype), {}
    with torch.no_grad():
        for name in ("student", "fake", None):
            adapters.switch(name)
            out[f"{name} forward"] = made(x)
        out["half"] = made(x, stop=3)
    gradients = {"x": x.clone().requires_grad_()}
    adapters.switch("student")
    for name, p in adapters.parameters("student").items():
        gradients[name] = p
    made(gradients["x"]).square().mean().backward()
    (made(x).square().mean() * made(-x).square().mean()).backward()
    made(x, stop=3).square().mean().backward()
    checkpoint(made, checkpoint(made, x, use_reentrant=False), use_reentrant=False).square().mean().backward()
    out |= {f"gradient {name}": p.grad.clone() for name, p in gradients.items()}
    adapters.switch("fake")
    (made(x) - out["student forward"]).square().mean().backward()
    out |= {f"gradient fake {name}": p.grad.clone() for name, p in adapters.parameters("fake").items()}
    adapters.switch(None)
    return out


@pytest.fixture(scope="module")
def resident():
    """kind -> what a network with all weights in place computes, with checkpoints and without."""
    known = {}

    def make(kind: str) -> dict[str, Tensor]:
        if kind not in known:
            made = network(kind)
            known[kind] = passes(made, adapted(made))
        return known[kind]

    return make


@pytest.mark.parametrize("kind", ["fp32", "bf16", "quantised"])
@pytest.mark.parametrize(("count", "buffers"), [(4, 1), (4, 2), (3, 2), (1, 2)])
def test_streamed_is_resident_to_the_bit(kind, count, buffers, resident, poisoned):
    expected = resident(kind)
    made = network(kind)
    adapters = adapted(made)
    ring = Ring(made, CPU, count, buffers=buffers)
    checkpointing.enable(made)
    for turn in range(2):  # a second step begins where the first left the ring
        made.zero_grad()
        for name, value in passes(made, adapters).items():
            assert not value.isnan().any(), (turn, name)
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")
    assert poisoned.most[0] <= buffers
    assert sum(isinstance(p, Away) for p in made.parameters()) >= 5 * (count - 1)
    # Put back: the network is whole in host memory and computes what it did.
    checkpointing.disable(made)
    ring.close()
    assert not any(isinstance(p, Away) for p in made.parameters()) and poisoned.alive() == 0
    made.zero_grad()
    assert passes(made, adapters)["gradient x"].equal(expected["gradient x"])


def test_steps_in_two_directions_fetch_each_block_once_and_in_time():
    made = Network(counts=(4, 3))
    adapters = adapted(made)
    ring = Ring(made, CPU, 7)
    checkpointing.enable(made)
    adapters.switch("student")
    made(start()).mean().backward()  # learns that the second list is run first, and guesses wrong once at its end
    assert ring.late <= 3
    begun, late = ring.copies, ring.late
    made(start()).mean().backward()
    # Up: 0 and 1 are still here; 2 to 6. Down: 6 and 5 are; 4 to 0.
    assert (ring.copies - begun, ring.late - late) == (10, 0)
    begun = ring.copies
    with torch.no_grad():
        for _ in range(2):
            made(start())
    # Each pass sends for the next one's first block; none is fetched late.
    assert (ring.copies - begun, ring.late - late) == (6 + 7, 0)
    late = ring.late
    made(start(), stop=3).mean().backward()  # left early: the way back begins in the middle
    assert ring.late - late <= 1


def test_gradients_without_checkpoints_are_refused():
    made = Network()
    Ring(made, CPU, 3)
    with torch.no_grad():
        made(start())
    with pytest.raises(RuntimeError, match="turn gradient_checkpointing on"):
        made(start())


def test_a_graph_that_outlives_its_block_keeps_its_weights(monkeypatch, poisoned):
    """Were there one without checkpoints after all, its numbers would still be right, and its memory the price."""
    made = Network()
    adapters = adapted(made)
    adapters.switch("student")
    x = start().requires_grad_()
    made(x).square().mean().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in adapters.parameters("student").values())]
    made.zero_grad()
    x.grad = None
    Ring(made, CPU, 4)
    monkeypatch.setattr(checkpointing, "checkpointed", lambda module: True)
    loss = made(x).square().mean()
    with torch.no_grad():
        made(-x)  # all blocks come and go
    assert poisoned.alive() == 6  # four that the graph holds, and two
    loss.backward()
    for value, wanted in zip(
        [x.grad, *(p.grad for p in adapters.parameters("student").values())], expected, strict=True
    ):
        assert value.equal(wanted)
    del loss
    assert poisoned.alive() == 2


def test_the_number_of_streamed_blocks_can_change(resident, poisoned):
    expected = resident("fp32")
    made = network("fp32")
    adapters = adapted(made)
    ring = Ring(made, CPU, 0)
    checkpointing.enable(made)
    assert ring.count == 0 and ring.streamed_bytes == 0

    def right():
        made.zero_grad()
        return all(value.equal(expected[name]) for name, value in passes(made, adapters).items())

    assert right() and ring.copies == 0
    for count in (1, 2, 3, 4):  # a quarter more each time
        assert ring.more() and ring.count == count and right()
    assert not ring.more() and ring.count == 4
    ring.stream(1)
    assert ring.count == 1 and right()


def test_nothing_is_left_when_it_is_closed(poisoned):
    made = Network()
    adapted(made).switch("student")
    ring = Ring(made, CPU, 4)
    checkpointing.enable(made)
    made(start()).mean().backward()
    gone = [weakref.ref(ring), *(weakref.ref(block.master) for block in ring.blocks if block.master)]
    gc.disable()
    try:
        ring.close()
        ring.close()
        del ring
        assert poisoned.alive() == 0 and not any(each() is not None for each in gone)
    finally:
        gc.enable()
    made(start()).mean().backward()


def test_a_network_without_blocks_cannot_be_streamed():
    with pytest.raises(ValueError, match="Linear has no list of blocks.*offload to none"):
        Ring(nn.Linear(4, 4).requires_grad_(False), CPU, 2)
    Ring(nn.Linear(4, 4), CPU, 0)


@pytest.mark.parametrize(("count", "among"), [(0, 5), (1, 5), (2, 5), (5, 5), (9, 5), (41, 57), (3, 57)])
def test_streamed_blocks_are_spread_evenly(count, among):
    chosen = spread(count, among)
    assert len(set(chosen)) == len(chosen) == min(count, among) and all(0 <= i < among for i in chosen)
    gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_preview_in_inference_mode_leaves_weights_that_can_be_trained_through(resident):
    expected = resident("fp32")
    made = network("fp32")
    adapters = adapted(made)
    Ring(made, CPU, 6)
    checkpointing.enable(made)
    with torch.inference_mode():
        made(start())
    assert passes(made, adapters)["gradient x"].equal(expected["gradient x"])
