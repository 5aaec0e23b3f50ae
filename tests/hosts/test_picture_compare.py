"""LPIPS beside PSNR and SSIM: told where the user has VGG16, with or without LPIPS's weights, of any size."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from retort.hosts.headless.folders import Folders, use
from retort.hosts.headless.host import host
from retort.hosts.restoration import compare as picture_compare
from retort.restoration.perceptual import VGG16, feature_distance


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return VGG16().eval()


@pytest.fixture
def folder(network, tmp_path):
    """models/rewards with VGG16 in half precision."""
    where = tmp_path / "models" / "rewards"
    where.mkdir(parents=True)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, where / "vgg16.safetensors")
    with use(Folders(models=(tmp_path / "models",), output=tmp_path / "out")):
        yield where


def pictures(height, width, seed):
    return torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_it_is_told_where_the_file_is(folder, network):
    before, after = pictures(40, 48, 0), pictures(40, 48, 1)
    found = picture_compare.compare(before, after, distance=picture_compare.lpips(host))
    half = VGG16().eval()
    half.load_state_dict({k: v.half().float() for k, v in network.state_dict().items()})
    with torch.no_grad():
        expected = feature_distance(half(after), half(before)).mean()
    assert f", LPIPS (VGG16, all channels alike) {float(expected):.4f}" in found.text
    same = picture_compare.compare(before, before, distance=picture_compare.lpips(host))
    assert same.text.endswith("0.0000")


def test_with_lpips_weights_it_is_the_published_measure(folder):
    before, after = pictures(32, 32, 0), pictures(32, 32, 1)
    plain = picture_compare.lpips(host)(after, before)
    weights = {f"lin{i}.model.1.weight": torch.full((1, c, 1, 1), 0.5) for i, c in enumerate((64, 128, 256, 512, 512))}
    save_file(weights, folder / "lpips_vgg.safetensors")
    learnt = picture_compare.lpips(host)
    assert learnt.name == "LPIPS (VGG16)"
    torch.testing.assert_close(learnt(after, before), 0.5 * plain)


def test_large_and_tiny_pictures(folder, monkeypatch):
    monkeypatch.setattr(picture_compare, "PIECE", 32)
    measure = picture_compare.lpips(host)
    a, b = pictures(32, 64, 2), pictures(32, 64, 3)
    halves = (measure(a[:, :, :32], b[:, :, :32]) + measure(a[:, :, 32:], b[:, :, 32:])) / 2
    torch.testing.assert_close(measure(a, b), halves)
    assert torch.isfinite(measure(a[:, :1, :1], b[:, :1, :1])).all()


def test_without_the_file_nothing_is_said_and_another_file_is_refused(tmp_path):
    where = tmp_path / "models" / "rewards"
    where.mkdir(parents=True)
    with use(Folders(models=(tmp_path / "models",), output=tmp_path / "out")):
        assert picture_compare.lpips(host) is None
        save_file({"features.0.weight": torch.zeros(1)}, where / "vgg16.safetensors")
        with pytest.raises(ValueError, match=r"vgg16\.safetensors is not torchvision's VGG16: features\.0\.weight"):
            picture_compare.lpips(host)


def test_a_clean_picture_of_another_shape_is_another_picture():
    small, large, other = torch.rand(1, 32, 48, 3), torch.rand(1, 65, 96, 3), torch.rand(1, 48, 48, 3)
    assert picture_compare.compare(small, large, small).text.startswith("against clean")
    for before, after in ((small, other), (other, small), (other, other)):
        with pytest.raises(ValueError, match="clean: it has 48 x 32 pixels and .* 48 x 48, so that it is another"):
            picture_compare.compare(before, after, small)
    assert picture_compare.compare(small, other).text
