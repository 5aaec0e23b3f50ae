"""LoRA products in the input's precision: PEFT's to the bit in fp32, close in bf16, and less kept for backward."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn
from torch.nn import functional

from retort.trainers.adapters import Adapters, LoraConfig
from retort.trainers.tracker import Tracker

WIDTH = 64


class Gated(nn.Module):
    """q, k and v of one tensor, and a convolution before them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "out")}) for _ in range(4)
        )

    def forward(self, x):
        """(B, N, C) -> the same."""
        x = x + self.enter(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = functional.layer_norm(x, (WIDTH,))
            q, k, v = (block[name](x) for name in "qkv")
            x = x + block["out"](q.tanh() * k.sigmoid() * v)
        return x


X = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1))
FP32_COPY = X.numel() * 4


def ours(dtype):
    network = Gated().to(dtype)
    adapters = Adapters(network)
    adapters.add("student", LoraConfig(rank=4, alpha=3.0), 0)
    return network, adapters.parameters("student"), adapters


def pefts(dtype, like):
    """PEFT's own branch, which computes in fp32, with the same adapter."""
    network = Gated().to(dtype).requires_grad_(False)
    config = PeftConfig(r=4, lora_alpha=3, target_modules="enter|.*\\.(q|k|v|out)")
    inject_adapter_in_model(config, network, adapter_name="student")
    weights = {}
    for name, parameter in network.named_parameters():
        if ".student." in name:
            parameter.data = parameter.data.float()
            weights[name.replace(".student", "")] = parameter
    for key, parameter in weights.items():
        parameter.data.copy_(like[key])
    return network, weights


def fill(weights):
    generator = torch.Generator().manual_seed(2)
    for weight in weights.values():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def backward(network, dtype, kept=None):
    """The output and the sizes of what autograd keeps."""

    def pack(tensor):
        if kept is not None:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.untyped_storage().nbytes())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(X.to(dtype))
        out.float().square().mean().backward()
    return out


def both(dtype):
    """Our network with its weights and adapters, and PEFT's with the same."""
    network, weights, adapters = ours(dtype)
    fill(weights)
    return network, weights, adapters, *pefts(dtype, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_is_half_precision_the_result_is_pefts_to_the_bit(dtype):
    network, weights, adapters, other, others = both(dtype)
    with adapters.active("student"):
        assert torch.equal(backward(network, dtype), backward(other, dtype))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key].grad, others[key].grad) for key in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gradients_are_fp32_and_point_where_pefts_do(dtype):
    network, weights, adapters, other, others = both(dtype)
    with adapters.active("student"):
        assert backward(network, dtype).dtype == backward(other, dtype).dtype == dtype
    assert all(weight.grad.dtype == weight.dtype == torch.float32 for weight in weights.values())
    mine, theirs = (torch.cat([w.grad.flatten() for w in some.values()]) for some in (weights, others))
    assert float(functional.cosine_similarity(mine, theirs, dim=0)) >= 0.9996


def test_small_gradients_do_not_vanish_in_fp16():
    """lora_B is nearly zero at first: in fp16 what passes it to lora_A would be below the smallest number."""
    network, weights, adapters = ours(torch.float16)
    fill(weights)
    for key, weight in weights.items():
        weight.data.mul_(1e-4 if "lora_B" in key else 1)
    with adapters.active("student"):
        (1e-3 * network(X.half()).float().square().mean()).backward()
    assert all(float(weight.grad.abs().max()) > 0 for weight in weights.values())


def test_no_fp32_copy_of_an_input_is_kept():
    network, weights, adapters = ours(torch.bfloat16)
    kept, theirs = {}, {}
    with adapters.active("student"):
        backward(network, torch.bfloat16, kept)
        other, _ = pefts(torch.bfloat16, weights)
        backward(other, torch.bfloat16, theirs)

    def copies(found):
        return sum(dtype == torch.float32 and size >= FP32_COPY for dtype, size in found.values())

    # What the loss itself keeps is one of them.
    assert copies(kept) == 1
    assert copies(theirs) == 1 + 4 * 4 + 1


class HostsConv1d(nn.Conv1d):
    """A host's own convolution, as ComfyUI's is, of which PEFT makes the adapter too."""

    def reset_parameters(self):
        """Nothing: weights come from a file."""


def test_a_hosts_own_convolutions_are_adapted_alike():
    network, host = Gated(), Gated()
    host.enter.__class__ = HostsConv1d
    for one in (network, host):
        adapters = Adapters(one)
        adapters.add("student", LoraConfig(rank=4), 0)
        fill(adapters.parameters("student"))
    assert type(host.enter.lora_A["student"]) is type(network.enter.lora_A["student"]) is not nn.Conv1d
    assert torch.equal(network(X), host(X))


class Wide(nn.Module):
    """A layer that makes much of little, and one that does the reverse."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16 * WIDTH), nn.Linear(16 * WIDTH, WIDTH)

    def forward(self, x):
        """(N, C) -> the same."""
        return self.down(self.up(x))


def test_a_layer_has_one_output_and_one_gradient_of_its_input_at_a_time():
    network = Wide().to("meta", torch.bfloat16)
    adapters = Adapters(network)
    adapters.add("student", LoraConfig(rank=2, alpha=3.0), 0)
    x = torch.empty(4096, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    wide = 4096 * 16 * WIDTH * 2
    with Tracker() as tracker, adapters.active("student"):
        tracker.enter("forward")
        before = tracker.now
        loss = network(x).sum()
        assert tracker.peaks["forward"] - before < 1.5 * wide
        tracker.enter("backward")
        loss.backward()
        # What lora_A of the second layer keeps, and the gradient that goes to the first.
        assert tracker.peaks["backward"] - before < 2.5 * wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_a_batch_are_adapted_each_as_it_would_be_alone(dtype):
    network, weights, adapters = ours(dtype)
    fill(weights)
    adapters.add("fake", LoraConfig(rank=2), 1)
    fill(adapters.parameters("fake"))
    names, x = ("student", None, "fake"), torch.randn(3, 24, WIDTH).to(dtype)
    with torch.no_grad():
        with adapters.rows(names):
            together = network(x)
        for row, name in enumerate(names):
            with adapters.active(name):
                torch.testing.assert_close(together[row : row + 1], network(x[row : row + 1]))


@pytest.mark.parametrize("given", ["frozen", "learning"])
def test_in_bf16_sums_are_rounded_once(given):
    """Against the same weights in fp64, a layer's output and gradients are as near as bf16 can say."""
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(WIDTH, 48), torch.randn(2, 24, WIDTH)), (nn.Conv2d(8, 12, 3), torch.randn(2, 8, 9, 9))):
        results = []
        for dtype in (torch.bfloat16, torch.float64):
            network = nn.Sequential(copy.deepcopy(layer).to(torch.bfloat16).to(dtype))
            adapters = Adapters(network)
            adapters.add("student", LoraConfig(rank=4, alpha=3.0), 0)
            weights = adapters.parameters("student")
            fill(weights)
            for weight in weights.values():
                weight.data = weight.data.to(torch.bfloat16).to(weight.dtype)
            inner = x.to(torch.bfloat16).to(dtype).requires_grad_(given == "learning")
            with adapters.active("student"):
                out = network(inner)
                (
                    out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape).to(torch.bfloat16)
                ).sum().backward()
            gradients = [weight.grad for weight in weights.values()]
            results.append(
                [each.double() for each in (out, *gradients, *([inner.grad] if inner.requires_grad else []))]
            )
        for rough, exact in zip(*results, strict=True):
            assert float((rough - exact).norm()) < 6e-3 * float(exact.norm())
