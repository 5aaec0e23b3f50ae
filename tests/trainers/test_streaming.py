"""Streamed weights: the same numbers to the bit as with all of them on the device, whatever the passes and formats.

Memory for a block's weights is filled with bytes of ones before each copy, and again when the ring has let go of it and
nobody else holds it, so that a weight that is read too early or too late is NaN.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retort.trainers import checkpointing, transfers
from retort.trainers.adapters import Adapters, LoraConfig
from retort.trainers.masters import Away
from retort.trainers.streaming import Ring, spread

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
    empty.alive, empty.most = alive, most
    return empty


class Block(nn.Module):
    """Two layers, a norm, and a table that is no parameter."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("table", torch.rand(width))

    def forward(self, x: Tensor, options: dict) -> Tensor:
        """x (B, N, width)."""
        return x + self.second(torch.tanh(self.first(self.norm(x) * self.table))) * (1 + options["number"])


class Network(nn.Module):
    """Blocks of two sizes; the second list is registered last and run first. `entered` notes the order."""

    def __init__(self, dtype=torch.float32, counts=(2, 2), width=8):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        self.late = nn.ModuleList([Block(width, 12) for _ in range(counts[0])])
        self.early = nn.ModuleList([Block(width, 20) for _ in range(counts[1])])
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor, stop: int | None = None) -> Tensor:
        """x (B, N, width); stop: leave before the block of this number."""
        x, options = self.enter(x), {}
        for number, block in enumerate([*self.early, *self.late]):
            if number == stop:
                break
            options["number"] = number
            x = block(x, options)
        return self.leave(x)


class Halved(torch.Tensor):
    """A weight stored as whole numbers and a scale, as quantised ones are; it is put together for every product."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor):
        """codes (...) int8, scale ()."""
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, shape, stride):
        return Halved(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Halved(args[0].codes.detach(), args[0].scale.detach())
        plain = [a.codes.float() * a.scale if isinstance(a, Halved) else a for a in args]
        return func(*plain, **(kwargs or {}))


def network(kind: str, **given) -> Network:
    made = Network(torch.bfloat16 if kind == "bf16" else torch.float32, **given)
    if kind == "quantised":
        for module in made.modules():
            if isinstance(module, nn.Linear) and module not in (made.enter, made.leave):
                codes = (module.weight.detach() * 100).round().to(torch.int8)
                module.weight = nn.Parameter(Halved(codes, torch.tensor(0.01)), requires_grad=False)
    return made


def adapted(made: Network) -> Adapters:
    adapters = Adapters(made)
    for seed, name in enumerate(("student", "fake")):
        adapters.add(name, LoraConfig(rank=2), seed)
        for key, p in adapters.parameters(name).items():
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(key) + seed))
    return adapters


def start(dtype=torch.float32, seed=1) -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


def test_a_weight_that_is_away_refuses_to_be_read():
    made = Network()
    before = copy.deepcopy(made.state_dict())
    ring = Ring(made, CPU, 6)
    weight = made.late[0].first.weight
    assert isinstance(weight, nn.Parameter) and weight.shape == (12, 8) and weight.dtype == torch.float32
    assert not weight.requires_grad and "late.0.first.weight" in repr(weight)
    ways = (
        lambda: weight + 1, lambda: weight.sum(), lambda: nn.functional.linear(start(), weight), lambda: weight[0],
        lambda: weight.to("cpu"), lambda: weight.detach(), lambda: torch.cat([torch.ones(12, 8), weight]),
        lambda: weight.data, lambda: weight.untyped_storage(), lambda: weight.data_ptr(), lambda: weight.tolist(),
        lambda: weight.copy_(torch.ones(12, 8)), lambda: torch.ones(12, 8).copy_(weight), made.state_dict,
        lambda: copy.deepcopy(made), lambda: made.late.to(torch.bfloat16),
    )  # fmt: skip
    for way in ways:
        with pytest.raises(RuntimeError, match=r"(early|late)\.0\.first\.weight.*streamed"):
            way()
    ring.close()
    for name, value in made.state_dict().items():
        assert value.equal(before[name]), name


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
    whole = sum(block.size for block in ring.blocks)
    with ring.room(1):
        assert ring.count == 2 and right()
    with ring.room(10 * whole):
        assert ring.count == 4 and ring.streamed_bytes == whole and right()
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


def test_pinned_memory_is_given_back():
    pinned: list[int] = []

    def pin(flat: Tensor) -> bool:
        if len(pinned) == 2:
            return False  # no more is allowed
        pinned.append(flat.data_ptr())
        return True

    made = Network()
    ring = Ring(made, CPU, 4, pin=pin, unpin=lambda flat: pinned.remove(flat.data_ptr()))
    assert len(pinned) == 2
    ring.stream(0)
    assert not pinned
    ring.stream(6)
    assert len(pinned) == 2
    ring.close()
    assert not pinned


def test_shared_weights_and_those_of_unknown_classes_stay():
    class Unknown(torch.Tensor):
        """A class that does not say what it consists of."""

    made = Network()
    made.early[1].first = made.early[0].first  # in two blocks
    made.late[0].again = made.late[0].norm  # twice in one
    made.late[1].first.weight = nn.Parameter(torch.ones(12, 8).as_subclass(Unknown), requires_grad=False)
    made.requires_grad_(False)
    x = start()
    before = made(x)
    ring = Ring(made, CPU, 6)
    checkpointing.enable(made)
    assert not isinstance(made.early[0].first.weight, Away) and isinstance(made.early[0].second.weight, Away)
    assert made.late[0].again.weight is made.late[0].norm.weight and isinstance(made.late[0].norm.weight, Away)
    assert isinstance(made.late[1].first.weight, Unknown)
    assert made(x).equal(before)
    ring.close()
    assert made.late[0].again.weight is made.late[0].norm.weight


def test_strides_of_a_weight_are_kept():
    made = nn.ModuleDict({"blocks": nn.ModuleList([nn.Module()])})
    made["blocks"][0].conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    made["blocks"][0].wide = nn.Linear(4, 4)
    made["blocks"][0].wide.weight = nn.Parameter(torch.rand(4, 8)[:, ::2])
    made.requires_grad_(False)
    kept = [made["blocks"][0].conv.weight.clone(), made["blocks"][0].wide.weight.clone()]
    ring = Ring(made, CPU, 1)
    ring.enter(0)
    conv, wide = made["blocks"][0].conv.weight, made["blocks"][0].wide.weight
    assert conv.stride() == kept[0].stride() == (36, 1, 12, 4) and conv.equal(kept[0]) and wide.equal(kept[1])


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
