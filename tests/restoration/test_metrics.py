"""PSNR and SSIM: closed forms, and the definition written out for one window."""

from __future__ import annotations

import math

import pytest
import torch

from retort.restoration.metrics import psnr, ssim


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr():
    a = draw(2, 20, 30, 3)
    torch.testing.assert_close(psnr(a, a + 0.1), torch.full((2,), 20.0), atol=1e-4, rtol=0)
    assert torch.isinf(psnr(a, a)).all()


def test_ssim_of_constants_and_of_itself():
    a = draw(2, 20, 30, 3)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    x, y = 0.3, 0.6
    got = ssim(torch.full((1, 16, 16, 3), x), torch.full((1, 16, 16, 3), y))
    assert float(got) == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4), abs=1e-6)


def test_ssim_of_one_window_by_its_definition():
    a, b = draw(1, 11, 11, 1), draw(1, 11, 11, 1, seed=1)
    weight = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    w = torch.tensor(weight, dtype=torch.float64)
    w /= w.sum()
    x, y = a[0, :, :, 0].double(), b[0, :, :, 0].double()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, c = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert float(ssim(a, b)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (11, 11)])
def test_small_pictures(size):
    a = draw(1, *size, 3)
    assert float(ssim(a, a)) == pytest.approx(1, abs=1e-6)
    assert torch.isfinite(ssim(a, 1 - a)).all()


def test_eight_at_once():
    a, b = draw(8, 16, 20, 3), draw(8, 16, 20, 3, seed=1)
    torch.testing.assert_close(ssim(a, b), torch.cat([ssim(a[i : i + 1], b[i : i + 1]) for i in range(8)]))


def test_other_sizes():
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="resize one"):
            metric(draw(1, 4, 4, 3), draw(1, 4, 5, 3))
