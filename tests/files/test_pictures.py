"""Pictures load as a viewer shows them, whatever wrote them."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from retort.files import pictures
from retort.files.errors import UsageError
from retort.preferences import store

WIDTH, HEIGHT = 12, 8


def saved(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Red above blue."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0))
    picture.paste((0, 0, 255), (0, HEIGHT // 2, WIDTH, HEIGHT))
    return picture.convert(mode)


def upright() -> torch.Tensor:
    return torch.from_numpy(np.asarray(halves(), dtype=np.float32) / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_upright(orientation, format):
    back = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    turned = halves() if back is None else halves().transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(turned, format, exif=exif, **({"quality": 100, "subsampling": 0} if format == "JPEG" else {}))
    colours, alpha = pictures.decode(data)
    assert alpha is None and colours.shape == (1, HEIGHT, WIDTH, 3)
    assert (colours[0, 1] - upright()[1]).abs().max() < 0.1 and (colours[0, -2] - upright()[-2]).abs().max() < 0.1
    if format != "TIFF":
        assert torch.equal(store.load_image(data), colours[0])


def test_a_phone_photograph_with_a_depth_map_is_one_picture(tmp_path):
    data = saved(halves(), "MPO", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9))])
    colours, _ = pictures.decode(data)
    assert len(colours) == 1 and colours[0, 0, 0, 0] > 0.9
    assert torch.equal(store.load_image(data), colours[0])
    path = tmp_path / "phone.jpg"
    path.write_bytes(data)
    assert pictures.load_image(path)[0].shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(("format", "count"), [("GIF", 3), ("PNG", 3), ("WEBP", 3), ("TIFF", 1)])
def test_animations_are_batches_and_pages_are_not(format, count):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (80 * i, 0, 0)) for i in range(3)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert len(pictures.decode(data)[0]) == count


def test_the_still_picture_of_an_animated_png_is_no_frame():
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (80 * i, 0, 0)) for i in range(3)]
    data = saved(Image.new("RGB", (WIDTH, HEIGHT), "white"), save_all=True, default_image=True, append_images=frames)
    colours, _ = pictures.decode(data)
    assert len(colours) == 3 and float(colours[0].max()) == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "PA"])
def test_every_mode_of_pixels(mode):
    grey = mode in ("1", "L", "LA")
    picture = halves("RGB")
    if mode == "LAB":
        change = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        picture = ImageCms.applyTransform(picture, change)
    else:
        picture = picture.convert("P").convert("PA") if mode == "PA" else picture.convert(mode)
    format = {"CMYK": "TIFF", "YCbCr": "TIFF", "LAB": "TIFF", "HSV": None, "PA": None}.get(mode, "PNG")
    if format is None:  # no common file holds it, but a reader may give it
        colour, _ = pictures._numbers(picture)
        colours = colour.unsqueeze(0)
    else:
        colours, _ = pictures.decode(saved(picture, format))
    want = upright() if not grey else torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
    # Eight bits of Lab hold a saturated blue to a tenth.
    assert (colours[0] - want).abs().max() < (0.1 if mode == "LAB" else 0.01)


def test_sixteen_bits_of_grey_keep_their_steps():
    ramp = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)
    for data in (saved(Image.fromarray(ramp)), saved(Image.fromarray(ramp), "TIFF")):
        colours, alpha = pictures.decode(data)
        assert alpha is None
        assert torch.allclose(colours[0, ..., 1], torch.from_numpy(ramp.astype(np.float32) / 65535), atol=1e-6)


def test_floats_are_cut_to_their_range():
    ramp = np.linspace(-0.5, 1.0, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)
    ramp[0, 0] = np.nan
    colours, _ = pictures.decode(saved(Image.fromarray(ramp), "TIFF"))
    assert torch.allclose(colours[0, ..., 0], torch.from_numpy(ramp).nan_to_num(0).clamp(0, 1))


def test_light_without_end_leaves_the_rest_as_it_is():
    ramp = np.linspace(0, 4, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)
    bright = ramp.copy()
    bright[0, :3] = np.inf, -np.inf, np.nan
    plain, colours = (pictures.decode(saved(Image.fromarray(each), "TIFF"))[0] for each in (ramp, bright))
    assert torch.equal(plain[0, 1:], colours[0, 1:]) and colours[0, 0, :3, 0].tolist() == [1.0, 0.0, 0.0]
    assert float(plain.max()) == 1.0


NO_PICTURES = {
    b"": "it is empty", b"%PDF-1.4": "a PDF file", b'<svg xmlns=""/>': "an SVG drawing", b"\n<html>": "a web page",
    b"\0\0\0\x18ftypheic": "of the kind of HEIC and MP4", b'{"a": 1}': "a JSON file", b"hello": "damaged, or no kind",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF": "an EPS drawing",
}  # fmt: skip


@pytest.mark.parametrize(("data", "kind"), NO_PICTURES.items())
def test_what_is_no_picture_is_named(data, kind):
    with pytest.raises(ValueError, match=kind) as refusal:
        pictures.decode(data)
    assert "object at 0x" not in str(refusal.value)
    with pytest.raises(ValueError, match=kind.replace("no kind", "no PNG or EPS")):
        pictures.decode(data, formats=("PNG", "EPS"))


def test_transparent_palettes_have_alpha():
    picture = halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    picture.info["transparency"] = picture.getpixel((0, 0))
    colours, alpha = pictures.decode(saved(picture))
    assert alpha is not None
    assert float(alpha[0, 0, 0]) == 0 and float(alpha[0, -1, 0]) == 1
    assert torch.equal(pictures.decode_opaque(saved(picture))[0, 0], torch.ones(3))


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_more_text_than_pillow_allows_is_no_reason_to_refuse(tmp_path, kind):
    blob = zlib.compress(b"x" * (4 << 20))
    info = PngInfo()
    if kind == "text":
        info.add(b"zTXt", b"note\0\0" + blob)
    else:
        info.add(b"iCCP", b"name\0\0" + blob)
    path = tmp_path / "big.png"
    path.write_bytes(saved(halves(), pnginfo=info))
    assert torch.equal(pictures.load_image(path)[0][0], upright())
    assert torch.equal(store.load_image(path.read_bytes()), upright())


@pytest.mark.parametrize("cut", [0, 4, 20, 60])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, cut, format):
    path = tmp_path / "cut.png"
    path.write_bytes(saved(halves(), format)[:cut])
    with pytest.raises(UsageError, match=r"cut\.png is not an image that can be read \(.+\); save it again as PNG"):
        pictures.load_image(path)


def test_tags_that_are_no_tags_turn_nothing():
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08" + b"\xff" * 40
    colours, _ = pictures.decode(saved(halves(), exif=exif))
    assert torch.equal(colours[0], upright())


def test_a_picture_of_too_many_pixels_is_refused():
    with pytest.raises(ValueError, match="it has 12 x 8 pixels, more than 50"):
        pictures.decode(saved(halves()), most_pixels=50)


@pytest.mark.parametrize("format", ["WEBP", "JPEG"])
def test_workflows_in_exif_are_found(tmp_path, format):
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = 'prompt:{"1": {}}', 'Workflow: {"nodes": []}'
    path = tmp_path / "drawn"
    path.write_bytes(saved(halves(), format, exif=exif))
    assert pictures.read_texts(path) == {"prompt": '{"1": {}}', "workflow": '{"nodes": []}'}


def test_settings_of_another_program_are_named(tmp_path):
    info = PngInfo()
    info.add_text("parameters", "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler")
    path = tmp_path / "other.png"
    path.write_bytes(saved(halves(), pnginfo=info))
    assert pictures.read_texts(path) == {} and pictures.other_texts(path) == "AUTOMATIC1111"
