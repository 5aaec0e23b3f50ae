"""Core's loaders of folders see what was changed in a folder, in a server that goes on."""

from __future__ import annotations

import pytest
import training_server as server
from PIL import Image

pytestmark = [pytest.mark.integration, pytest.mark.slow]
files, app = server.files, server.app


def test_a_folder_that_has_changed_is_read_again(app):
    """A picture that is taken out, a caption that is edited in place and one in a subfolder; unchanged, it is kept."""
    folder = app.base / "input" / "shapes"
    (folder / "2_more").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"caption {i}")
    Image.new("RGB", (16, 16)).save(folder / "2_more" / "a.png")
    nodes = {
        "load": {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": "shapes"}},
        "seen": {"class_type": "PreviewAny", "inputs": {"source": ["load", 1]}},
    }

    def texts():
        return sorted(text for text in server.succeeded(app.run(nodes))["outputs"]["seen"]["text"])

    first = texts()
    assert first == texts() and "caption 2" in first
    (folder / "2.png").rename(folder / "2.png.taken_out")
    assert "caption 2" not in texts()
    (folder / "1.txt").write_text("another one")
    assert "another one" in texts()
    (folder / "2_more" / "a.txt").write_text("in a subfolder")
    assert "in a subfolder" in texts()
    # A dead link hides no change of the others.
    (folder / "notes.md").symlink_to(folder / "nowhere")
    texts()
    (folder / "0.txt").write_text("once more")
    assert "once more" in texts()
