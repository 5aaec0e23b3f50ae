"""The JPEG of the degradations against Pillow's, which is the Independent JPEG Group's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from retort.restoration.jpeg import jpeg, tables


def picture(height, width):
    """Smooth colours, an edge and a little texture."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, 0.5 + 0.4 * torch.sin(9 * x + 5 * y)], -1)
    image[height // 2 :, : width // 3] = torch.tensor([0.1, 0.7, 0.3])
    return image * 0.9 + 0.1 * torch.rand(image.shape, generator=torch.Generator().manual_seed(1))


def pillows(image, quality):
    file = io.BytesIO()
    Image.fromarray((image * 255).round().byte().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(file)).copy()) / 255


@pytest.mark.parametrize("quality", [1, 10, 30, 49, 50, 75, 95, 100])
@pytest.mark.parametrize("size", [(64, 80), (37, 51)])
def test_it_is_pillows_within_a_level(size, quality):
    image = picture(*size)
    difference = (jpeg(image, quality) - pillows(image, quality)).abs() * 255
    # A coefficient on the edge between two steps can fall to either side, and moves its block by one step.
    assert float(difference.mean()) < 0.7


def test_the_tables_are_those_in_pillows_files():
    for quality in (5, 30, 50, 80, 100):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
        found = Image.open(file).quantization
        assert [sorted(found[i]) for i in (0, 1)] == [sorted(t.flatten().int().tolist()) for t in tables(quality)]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 3)])
def test_any_size_and_a_flat_picture_stays_flat(size):
    out = jpeg(torch.full((*size, 3), 0.4), 75)
    assert out.shape == (*size, 3) and float((out - 0.4).abs().max()) < 3 / 255


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_outside_the_scale_is_refused(quality):
    with pytest.raises(ValueError, match="between 1 and 100"):
        jpeg(torch.zeros(8, 8, 3), quality)
