"""A step's calls of a real network as one: rows of several adapters, winners and losers, inputs in host memory."""

from __future__ import annotations

import pytest
import tiny_training as tiny
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host, training, quantised = tiny.files, tiny.loaded, tiny.host, tiny.training, tiny.quantised
SHAPES, level, x_of = tiny.SHAPES, tiny.level, tiny.x_of


@pytest.fixture
def denoiser(ours, host, loaded, training, request):
    """kind -> a denoiser with adapters that do something, and a batch's condition."""
    made = []

    def make(model, positive, shape):
        denoiser = host.trainable(model)
        made.append(denoiser)
        one = denoiser.encode(positive, shape)
        for seed, name in enumerate(("student", "fake")):
            denoiser.adapters.add(name, ours("trainers.adapters").LoraConfig(2), seed)
            for key, weight in denoiser.adapters.parameters(name).items():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        return denoiser, denoiser.join([one, one])

    yield make
    for one in made:
        one.release()


def calls(ours, denoiser, kind, cond):
    asked = ours("trainers.objectives.parts.contract").Asked
    sigma = torch.tensor([level(denoiser), 0.7 * level(denoiser)])
    x = x_of(kind, 6)
    return [asked(x[2 * i : 2 * i + 2], sigma * (1 - 0.1 * i), cond) for i in range(3)]


def near(one, other, rounding):
    return float((one - other).abs().max()) <= rounding * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("kind", list(SHAPES))
def test_rows_of_three_networks_are_three_calls(ours, denoiser, loaded, kind):
    model, positive = loaded(kind)
    made, cond = denoiser(model, positive, x_of(kind).shape)
    counted, call = [], made.call
    made.call = lambda *args: (counted.append(None), call(*args))[1]
    asked, names = calls(ours, made, kind, cond), ["fake", None, "student"]
    with torch.no_grad():
        together = made.predict_each(asked, names)
        assert len(counted) == 1 and made.adapters.mixes
        made.most_places = 0
        apart = made.predict_each(asked, names)
    assert not near(apart[0], apart[2], 1e-4)
    assert all(near(one, other, 2e-6) for one, other in zip(together, apart, strict=True))


def test_rows_of_a_quantised_network_agree_to_its_rounding(ours, denoiser, quantised):
    model, positive = quantised
    made, cond = denoiser(model, positive, x_of("sd3").shape)
    asked, names = calls(ours, made, "sd3", cond), ["fake", None, "student"]
    with torch.no_grad():
        together = made.predict_each(asked, names)
        made.most_places = 0
        apart = made.predict_each(asked, names)
    assert all(near(one, other, 2e-2) for one, other in zip(together, apart, strict=True))


@pytest.mark.parametrize("kind", list(SHAPES))
def test_inputs_in_host_memory_change_no_bit(ours, denoiser, loaded, kind):
    model, positive = loaded(kind)
    made, cond = denoiser(model, positive, x_of(kind).shape)
    ours("trainers.checkpointing").enable(made.network)
    one, found = calls(ours, made, kind, cond)[0], []
    made.rehearse(x_of(kind).shape[1:], made.chosen(one.cond, [0]))
    keeping = ours("trainers.host_inputs").HostInputs(made.device, least=256)
    weights = made.adapters.parameters("student").values()
    for host_inputs in (None, keeping):
        made.host_inputs = host_inputs
        with made.adapter("student"):
            made.predict_x0(*one).square().mean().backward()
        found.append([None if w.grad is None else w.grad.clone() for w in weights])
        for weight in weights:
            weight.grad = None
    ours("trainers.checkpointing").disable(made.network)
    assert keeping.moved > 0
    for plain, moved in zip(*found, strict=True):
        assert plain is moved is None or torch.equal(plain, moved)
