"""What a run shows of itself."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from retort.trainers.watch import save_sheet


@pytest.mark.parametrize(("count", "across", "down"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (7, 3, 3), (8, 4, 2)])
def test_a_sheet_is_about_as_wide_as_high(tmp_path, count, across, down):
    """Strips show it small, where a long row could not be seen."""
    pictures = torch.stack([torch.full((10, 20, 3), (i + 1) / 8) for i in range(count)])
    save_sheet(pictures, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (20 * across, 10 * down)
        for i in range(count):
            value = sheet.getpixel((20 * (i % across) + 5, 10 * (i // across) + 5))[0]
            assert abs(value - 255 * (i + 1) / 8) <= 1
