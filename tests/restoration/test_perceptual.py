"""The feature distance in closed form, VGG16's layout, and files that are another network's."""

from __future__ import annotations

import pytest
import torch

from retort.restoration.perceptual import VGG16, feature_distance, lpips_weights_from, vgg16_from


def test_equal_features_are_at_no_distance_and_opposite_ones_at_four():
    one = [torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    torch.testing.assert_close(feature_distance(one, one), torch.zeros(2))
    # |u - (-u)|^2 = 4 for unit vectors, at each of three depths; lengths do not matter.
    torch.testing.assert_close(feature_distance(one, [-3 * f for f in one]), torch.full((2,), 12.0))


def test_orthogonal_features_are_at_two_where_they_differ():
    a, b = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    a[:, 0], b[:, 0] = 1, 1
    b[:, 0, 0, 0], b[:, 1, 0, 0] = 0, 1  # one place of four
    torch.testing.assert_close(feature_distance([a], [b]), torch.tensor([0.5]))


def test_gradients_flow_to_the_first_and_stay_finite_at_nothing():
    a = torch.zeros(1, 3, 2, 2, requires_grad=True)
    feature_distance([a], [torch.ones(1, 3, 2, 2)]).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_vgg16_is_torchvisions():
    """Names, shapes, and the places of its features: before each pooling, and the last."""
    network = VGG16()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    layers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert list(shapes) == [f"features.{i}.{part}" for i in layers for part in ("weight", "bias")]
    assert shapes["features.0.weight"] == (64, 3, 3, 3) and shapes["features.28.weight"] == (512, 512, 3, 3)
    found = network(torch.rand(1, 32, 48, 3))
    assert [tuple(f.shape) for f in found] == [
        (1, 64, 32, 48), (1, 128, 16, 24), (1, 256, 8, 12), (1, 512, 4, 6), (1, 512, 2, 3)
    ]  # fmt: skip


def test_weights_are_read_with_or_without_a_classifier():
    state = VGG16().state_dict() | {"classifier.0.weight": torch.zeros(1)}
    again = vgg16_from(state, "vgg16.safetensors")
    torch.testing.assert_close(again.state_dict()["features.5.bias"], state["features.5.bias"])


@pytest.mark.parametrize("change", ["missing", "of another size"])
def test_another_networks_file_is_refused(change):
    state = dict(VGG16().state_dict())
    if change == "missing":
        del state["features.28.bias"]
    else:
        state["features.28.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"x\.safetensors is not torchvision's VGG16: features\.28\.bias is {change}"):
        vgg16_from(state, "x.safetensors")


def test_learnt_weights_weigh_channels():
    a, b = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    a[:, 0], b[:, 1] = 2, 5
    torch.testing.assert_close(feature_distance([a], [b], [torch.tensor([0.25, 0.5])]), torch.tensor([0.75]))


def test_lpips_weights_are_read_by_their_names():
    channels = (64, 128, 256, 512, 512)
    state = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    assert [tuple(w.shape) for w in lpips_weights_from(state, "x")] == [(c,) for c in channels]
    del state["lin3.model.1.weight"]
    with pytest.raises(
        ValueError, match=r"x does not hold LPIPS's weights for VGG16: lin3\.model\.1\.weight is missing"
    ):
        lpips_weights_from(state, "x")
