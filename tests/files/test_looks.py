"""Sizes and perceptual hashes of many pictures."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageDraw

from retort.files import looks
from retort.files.folder import inside


def drawn(seed: int, size=(96, 64)) -> Image.Image:
    """A picture of rectangles that depend on the seed."""
    image = Image.new("RGB", size, (30 * seed % 255, 90, 200))
    pen = ImageDraw.Draw(image)
    for i in range(5):
        x, y = (37 * seed + 29 * i * (seed + 1)) % size[0], (53 * seed + 31 * i) % size[1]
        pen.rectangle([x, y, x + size[0] // 4, y + size[1] // 3], fill=(60 * i, 255 - 50 * i, 40 * seed % 255))
    return image


def data(image: Image.Image, kind="PNG", **more) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **more)
    return made.getvalue()


def apart(a: looks.Look, b: looks.Look) -> int:
    return bin(a.hash ^ b.hash).count("1")


def test_a_copy_in_another_size_and_format_is_near_and_another_picture_is_not():
    first = looks.look(data(drawn(1)))
    assert (first.width, first.height) == (96, 64)
    for copy in (data(drawn(1).resize((192, 128))), data(drawn(1), "JPEG", quality=60), data(drawn(1), "WEBP")):
        assert apart(first, looks.look(copy)) <= looks.NEAR
    assert all(apart(first, looks.look(data(drawn(seed)))) > looks.NEAR for seed in (2, 3, 5, 8))


def test_the_same_shapes_in_other_colours_are_another_picture():
    pictures = []
    for colour in ("blue", "teal", "blue"):
        image = Image.new("RGB", (128, 128), (250, 245, 230))
        ImageDraw.Draw(image).ellipse([40, 30, 84, 74], fill=colour, outline="black", width=4)
        pictures.append(looks.look(data(image.resize((96, 96)) if len(pictures) == 2 else image)))
    blue, teal, copy = pictures
    assert apart(blue, teal) <= looks.NEAR
    assert looks.alike(blue, copy) and not looks.alike(blue, teal)


def test_where_most_are_of_one_size_another_is_marked(tmp_path):
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(data(drawn(i, (96, 72) if i == 5 else (96, 64))))
    found = looks.Looks(inside(tmp_path))
    found.ask(names)
    found.settled(20)
    assert [name for name in names if ["size", ""] in found.marks(name)] == ["5.png"]
    # Three of twelve may be of another size; among four there is no usual one.
    for count, few in ((12, names), (4, names[3:7])):
        for i, name in enumerate(names[:4]):
            (tmp_path / name).write_bytes(data(drawn(i, (90, 64))))
        found = looks.Looks(inside(tmp_path))
        found.ask(few)
        found.settled(20)
        assert not any(kind == "size" for name in few for kind, _ in found.marks(name)), count


def test_a_turned_picture_has_the_size_that_viewers_show():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = looks.look(data(drawn(1), "JPEG", exif=exif))
    assert (found.width, found.height) == (64, 96)


def test_a_flat_picture_looks_like_nothing_and_rubbish_is_said(tmp_path):
    assert looks.look(data(Image.new("RGB", (40, 40), "white"))).hash is None
    for bad in (b"", b"rubbish", data(drawn(1), "GIF")):
        with pytest.raises(ValueError, match="it is no PNG, JPEG or WebP"):
            looks.look(bad)
    with pytest.raises(ValueError):
        looks.look(data(drawn(1))[:60])


def test_duplicates_and_odd_sizes_are_marked(tmp_path):
    names = []
    for name, image in (
        ("a.png", drawn(1)), ("b.png", drawn(2)), ("c.png", drawn(1).resize((192, 128))), ("d.png", drawn(3, (30, 20))),
        ("e.png", drawn(4, (300, 64))), ("f.png", drawn(5)),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data(image))
        names.append(name)
    (tmp_path / "g.png").write_bytes(b"no picture")
    names.append("g.png")
    found = looks.Looks(inside(tmp_path))
    assert found.ask(names) == 0
    found.settled(20)
    assert found.ask(names) == 7
    marks = {name: [kind for kind, _ in found.marks(name)] for name in names}
    assert marks == {"a.png": [], "b.png": [], "c.png": ["like"], "d.png": ["small"], "e.png": ["long"], "f.png": [],
                     "g.png": ["bad"]}  # fmt: skip
    assert found.marks("c.png") == [["like", "a.png"]]
    assert found.marked() == ["c.png", "d.png", "e.png", "g.png"]
    # Where the first is gone its copy is nobody's.
    assert found.ask(names[1:]) == 0
    found.settled(20)
    assert found.marks("c.png") == []
