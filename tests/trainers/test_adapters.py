"""Named LoRAs on one frozen network: which layers they cover, whose turn it is, and a student that begins as a LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retort.trainers.adapters import Adapters, LoraConfig


class Network(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.ModuleDict({"attn": nn.Linear(6, 6), "ff": nn.Linear(6, 5)})

    def forward(self, x):
        """(B, 3, H, W) -> (B, H, W, 5)."""
        return self.middle["ff"](self.middle["attn"](self.enter(x).movedim(1, -1)).tanh())


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def fill(adapters, name, std=0.3):
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for weight in adapters.parameters(name).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def result(adapters, name):
    with torch.no_grad(), adapters.active(name):
        return adapters.network(X)


@pytest.fixture
def adapters():
    return Adapters(Network())


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, {"enter", "middle.attn", "middle.ff"}),
        ({"convolutions": False}, {"middle.attn", "middle.ff"}),
        ({"targets": "*attn, enter"}, {"enter", "middle.attn"}),
        ({"exclude": "middle.*"}, {"enter"}),
    ],
)
def test_patterns_choose_layers(adapters, settings, layers):
    adapters.add("student", LoraConfig(rank=2, **settings), 0)
    assert {key.rpartition(".lora_")[0] for key in adapters.parameters("student")} == layers


def test_patterns_that_choose_nothing_are_named(adapters):
    with pytest.raises(ValueError, match=r"no layer's name fits '\*nowhere'.*such as enter"):
        adapters.add("student", LoraConfig(targets="*attn, *nowhere"), 0)
    with pytest.raises(ValueError, match=r"exclude '\*' leaves no layer"):
        adapters.add("student", LoraConfig(exclude="*"), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_fp32_on_any_base_and_begin_alike(dtype):
    rough, exact = Adapters(Network().to(dtype)), Adapters(Network())
    for adapters in (rough, exact):
        adapters.add("student", LoraConfig(rank=2), 5)
    for key, weight in exact.parameters("student").items():
        assert rough.parameters("student")[key].dtype == torch.float32
        assert torch.equal(rough.parameters("student")[key], weight)
    with rough.active("student"):
        assert rough.network(X.to(dtype)).dtype == dtype


def test_one_is_on_and_learns_and_the_base_never_does(adapters):
    base = result(adapters, None)
    for seed, name in enumerate(("student", "fake")):
        adapters.add(name, LoraConfig(rank=2, alpha=3.0), seed)
        assert torch.equal(result(adapters, name), base)  # lora_B begins as zero
        fill(adapters, name)
    assert torch.equal(result(adapters, None), base)
    student = result(adapters, "student")
    assert not torch.allclose(student, base) and not torch.allclose(student, result(adapters, "fake"))
    for name in ("student", "fake", None):
        with adapters.active(name):
            learning = {k for k, p in adapters.network.named_parameters() if p.requires_grad}
            assert all(f".{name}." in k for k in learning) and len(learning) == (6 if name else 0)
    with adapters.active("student"):
        with adapters.active("fake"):
            adapters.network(X).sum().backward()
        assert adapters.current == "student"
    assert adapters.current is None and all(p.grad is None for p in adapters.parameters("student").values())
    assert all(p.grad is not None for p in adapters.parameters("fake").values())
    # What is written does without alpha: W + B A is the adapted layer.
    lora = adapters.lora("student")
    layer = adapters.network.middle["attn"]
    weight = layer.base_layer.weight + lora["middle.attn.lora_B.weight"] @ lora["middle.attn.lora_A.weight"]
    x = torch.randn(4, 6)
    with torch.no_grad(), adapters.active("student"):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.base_layer.bias))


@pytest.mark.parametrize(("rank", "alpha"), [(2, 0.0), (5, 0.0), (5, 2.0)])
def test_a_student_begins_as_a_lora(adapters, rank, alpha):
    adapters.add("other", LoraConfig(rank=2, alpha=3.0), 0)
    fill(adapters, "other")
    adapters.add("student", LoraConfig(rank=rank, alpha=alpha), 1)
    adapters.load_lora("student", adapters.lora("other"))
    torch.testing.assert_close(result(adapters, "student"), result(adapters, "other"))


def test_a_lora_that_does_not_fit_is_refused(adapters):
    adapters.add("student", LoraConfig(rank=2, exclude="middle.ff"), 0)
    before = {k: v.clone() for k, v in adapters.parameters("student").items()}
    for lora, message in (
        ({"middle.ff.lora_A.weight": torch.zeros(2, 6)}, "1 layers that are not trained here.*widen targets"),
        ({"middle.attn.lora_A.weight": torch.zeros(3, 6)}, "rank 3 and the adapter 2: set rank to at least 3"),
        ({"middle.attn.lora_A.weight": torch.zeros(2, 8)}, r"of shape \(2, 8\) and takes \(2, 6\).*for this model"),
        ({"enter.lora_A.weight": torch.zeros(2, 3)}, r"takes \(2, 3, 3, 3\) here"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.load_lora("student", lora)
    assert all(torch.equal(before[k], v) for k, v in adapters.parameters("student").items())
