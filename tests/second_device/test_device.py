"""The second device is as strict as a card, as forgetful as one, and right: what every other test here relies on."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

HERE, CPU = torch.device("second"), torch.device("cpu")


def on(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(HERE) for tensor in tensors]


# ---- strict ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, y: x + y,
        lambda x, y: y.add_(x),
        lambda x, y: x @ y.T,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: nn.functional.linear(x, y),
        lambda x, y: nn.functional.conv1d(x[None], y[:, :, None].repeat(1, 3, 1)[:, :3]),
        lambda x, y: nn.functional.scaled_dot_product_attention(x[None], y[None], x[None]),
        lambda x, y: y[x.argsort(1)[0]],
        lambda x, y: torch.empty_like(x).index_copy_(0, torch.tensor([0, 1, 2]), x),
        lambda x, y: torch._foreach_add([x], [y]),
    ],
)
def test_tensors_of_two_devices_never_meet(second, mixed):
    x, y = torch.randn(3, 4).to(HERE), torch.randn(3, 4)
    with pytest.raises((RuntimeError, NotImplementedError), match="device"):
        mixed(x, y)


def test_what_cuda_takes_from_the_cpu_is_taken(second):
    x = torch.arange(6.0).view(2, 3).to(HERE)
    assert (x * torch.tensor(2.0)).device.type == "second"
    assert x[torch.tensor([1, 0])].cpu().tolist() == [[3, 4, 5], [0, 1, 2]]
    assert x.add(1).cpu().numpy().sum() == 21
    with pytest.raises(TypeError, match="second"):
        x.numpy()


def test_random_numbers_come_from_its_own_generator(second):
    with pytest.raises(RuntimeError, match="enerator"):
        torch.randn(3, device=HERE, generator=torch.Generator().manual_seed(1))
    draws = [torch.randn(3, device=HERE, generator=torch.Generator(HERE).manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    torch.manual_seed(5)
    first = torch.randn(3, device=HERE)
    torch.manual_seed(5)
    assert torch.equal(first, torch.randn(3, device=HERE))


def test_empty_memory_is_no_number(second):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(4, 5, dtype=dtype, device=HERE).isnan().all()


# ---- right -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.attention, self.out = nn.Linear(8, 24), nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        x = nn.functional.silu(self.norm(self.conv(x))).flatten(2).mT
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.attention(x).chunk(3, -1))
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x) * self.scale


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_is_the_cpus_to_the_bit(second, fused):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 4, 6, 6)
    there = copy.deepcopy(net).to(HERE)
    assert {p.device.type for p in [*there.parameters(), *there.buffers()]} == {"second"}
    for one, batch in ((net, x), (there, x.to(HERE))):
        optimiser = torch.optim.AdamW(one.parameters(), lr=0.01, fused=fused)
        for _ in range(3):
            torch.utils.checkpoint.checkpoint(one, batch, use_reentrant=False).square().mean().backward()
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    for (name, a), b in zip(net.named_parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b.cpu()), name


def test_a_module_moves_in_place_and_is_copied(second):
    net = Net()
    held = [p for p in net.parameters()]
    net.to(HERE)
    assert [p is q for p, q in zip(held, net.parameters(), strict=True)] == [True] * len(held)
    held[0].data = torch.zeros(8, 4, 3, 3)
    assert net.conv.weight.device == CPU
    twin = copy.deepcopy(net.to(HERE))
    assert twin.out.weight.device.type == "second" and torch.equal(twin.out.weight, net.out.weight)
    twin.to(torch.bfloat16).cpu()(torch.randn(1, 4, 3, 3).bfloat16()).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision(second, dtype):
    net, x = Net().to(HERE), torch.randn(2, 4, 6, 6).to(HERE)
    with torch.autocast("second", dtype):
        assert net.out(net.conv(x).movedim(1, -1)).dtype == dtype and net(x).dtype == torch.float32


def test_views_and_resizes_share_memory_as_they_should(second):
    x = torch.arange(6.0, device=HERE)
    view = x.view(2, 3).T[1:]
    view.zero_()
    assert x.tolist() == [0, 0, 0, 3, 0, 0] and view.untyped_storage()._cdata == x.untyped_storage()._cdata
    grown = torch.empty(0, device=HERE)
    torch.arange(5, out=grown)
    assert grown.tolist() == [0, 1, 2, 3, 4]
    assert x.unfold(0, 2, 1).shape == (5, 2) and torch.view_as_real(torch.fft.rfft(x)).shape == (4, 2)
    with torch.inference_mode():
        y = x + 1
    assert y.is_inference() and y[:, None].is_inference() and y.view(2, 3).T.is_inference()
    assert not (y + 1).is_inference()


# ---- memory ------------------------------------------------------------------------------------


def test_memory_is_counted(second):
    gc.collect()
    began = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    x = torch.ones(256, 1024, device=HERE)
    assert torch.accelerator.memory_allocated() - began == 1 << 20
    del x
    y = torch.ones(1024, device=HERE) + 1
    assert torch.accelerator.memory_allocated() - began == 4096
    assert torch.accelerator.max_memory_allocated() - began == 1 << 20
    views = [y.view(32, 32).T, y[3:], y.expand(2, 1024)]
    assert torch.accelerator.memory_allocated() - began == 4096 and len(views) == 3
    free, total = torch.accelerator.get_memory_info()
    assert total - free == torch.accelerator.memory_allocated()


def test_memory_ends_at_the_limit(second, room):
    with room(1 << 20), pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2097152"):
        torch.ones(512, 1024, device=HERE)
    with room(5 << 19):
        x = torch.ones(512, 1024, device=HERE)
        with pytest.raises(torch.OutOfMemoryError):  # also where a kernel makes the result
            x @ x.T
    assert torch.ones(512, 1024, device=HERE).sum().item() == 512 * 1024


def test_pinned_memory_is_known(second):
    pinned = torch.empty(8).pin_memory()
    assert pinned.is_pinned() and pinned[3:].is_pinned() and not torch.empty(8).is_pinned()
    assert second.pinned() >= 32


def test_memory_can_be_pinned_where_it_lies(second):
    x, before = torch.arange(64.0), second.pinned()
    second.pin(x.data_ptr(), x.nbytes)
    assert x.is_pinned() and x[60:].is_pinned() and second.pinned() == before + 256
    with pytest.raises(RuntimeError, match="pinned already"):
        second.pin(x.data_ptr(), x.nbytes)
    second.reset_counts()
    there = torch.empty(64, device=HERE)
    there.copy_(x, non_blocking=True)
    assert second.counts()["late"] == 1 and there.sum().item() == 2016
    assert second.unpin(x.data_ptr()) and not second.unpin(x.data_ptr())
    assert not x.is_pinned() and second.pinned() == before


# ---- streams -----------------------------------------------------------------------------------


def copied(x: torch.Tensor, stream: torch.Stream) -> torch.Tensor:
    """A copy on the device, begun on another stream."""
    there = torch.empty_like(x, device=HERE)
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        there.copy_(x, non_blocking=True)
    return there


def test_a_copy_is_late_until_it_is_waited_for(second):
    x, stream = torch.arange(4.0).pin_memory(), torch.Stream(HERE)
    there = copied(x, stream)
    with pytest.raises(RuntimeError, match="race.*reads"):
        there + 1
    torch.accelerator.current_stream().wait_stream(stream)
    assert (there + 1).tolist() == [1, 2, 3, 4]


def test_a_late_copy_keeps_no_memory(second):
    before, stream = torch.accelerator.memory_allocated(), torch.Stream(HERE)
    with stream:
        there = torch.empty(1 << 18, device=HERE)
        there.copy_(torch.ones(1 << 18).pin_memory(), non_blocking=True)
        assert torch.accelerator.memory_allocated() - before == 1 << 20
        del there
        assert torch.accelerator.memory_allocated() == before
        assert torch.ones(1 << 18, device=HERE).sum().item() == 1 << 18
    stream.synchronize()


def test_a_staging_buffer_that_is_filled_again_too_early_shows(second):
    staging, stream = torch.zeros(4).pin_memory(), torch.Stream(HERE)
    first = copied(staging, stream)
    staging.fill_(7.0)  # nobody has waited for the copy
    torch.accelerator.current_stream().wait_stream(stream)
    assert first.tolist() == [7] * 4
    second_copy = copied(staging, stream)
    stream.synchronize()
    staging.fill_(8.0)
    assert second_copy.tolist() == [7] * 4


def test_memory_that_another_stream_still_reads_is_not_overwritten(second):
    x, stream = torch.arange(4.0).pin_memory(), torch.Stream(HERE)
    there = torch.ones(4, device=HERE)
    out = there * 2  # on the main stream
    with stream, pytest.raises(RuntimeError, match="race"):
        there.copy_(x, non_blocking=True)
    done = torch.Event(HERE)
    done.record()
    with stream:
        stream.wait_event(done)
        there.copy_(x, non_blocking=True)
        done.record(stream)
    done.synchronize()
    assert there.tolist() == [0, 1, 2, 3] and out.tolist() == [2] * 4


def test_what_comes_back_is_no_number_until_it_is_waited_for(second):
    x, back = torch.ones(4, device=HERE), torch.zeros(4).pin_memory()
    back.copy_(x, non_blocking=True)
    assert back.isnan().all()
    torch.accelerator.synchronize()
    assert back.tolist() == [1] * 4


def test_freeing_what_another_stream_works_on_is_noticed(second):
    stream, there = torch.Stream(HERE), torch.ones(4, device=HERE)
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        there.add_(1)
    del there
    with pytest.raises(RuntimeError, match="race.*takes memory that was freed"):
        torch.ones(4, device=HERE)
    stream.synchronize()
    there = torch.ones(4, device=HERE)
    assert there.sum().item() == 4
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        there.add_(1)
    there.record_stream(stream)
    del there
    assert torch.ones(4, device=HERE).sum().item() == 4
    # Memory of the copying stream goes back to it, and its next use waits for whoever has read it.
    with stream:
        there = torch.ones(4, device=HERE)
    torch.accelerator.current_stream().wait_stream(stream)
    there * 2
    del there
    with stream, pytest.raises(RuntimeError, match="race.*takes memory that was freed"):
        torch.ones(4, device=HERE)
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        assert torch.ones(4, device=HERE).sum().item() == 4


def test_autograd_works_across_streams(second):
    stream, x = torch.Stream(HERE), torch.ones(4, device=HERE, requires_grad=True)
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        y = x * 3
    torch.accelerator.current_stream().wait_stream(stream)
    (y * y).sum().backward()
    assert x.grad.tolist() == [18] * 4


def test_waits_are_counted(second):
    x = torch.ones(4, device=HERE)
    second.reset_counts()
    float((x * 2).sum())
    assert second.counts() == {"waits": 1, "to_host": 0, "to_device": 0, "late": 0}
    x.cpu(), torch.ones(2).to(HERE)
    assert second.counts() == {"waits": 3, "to_host": 1, "to_device": 1, "late": 0}
