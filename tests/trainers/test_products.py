"""LoRA products in the input's precision: PEFT's to the bit in fp32, close in bf16, and less kept for backward."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn
from torch.nn import functional

from retort.trainers.adapters import Adapters, LoraConfig

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_is_half_precision_the_result_is_pefts_to_the_bit(dtype):
    network, weights, adapters = ours(dtype)
    fill(weights)
    other, others = pefts(dtype, weights)
    with adapters.active("student"):
        assert torch.equal(backward(network, dtype), backward(other, dtype))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key].grad, others[key].grad) for key in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gradients_are_fp32_and_point_where_pefts_do(dtype):
    network, weights, adapters = ours(dtype)
    fill(weights)
    other, others = pefts(dtype, weights)
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
