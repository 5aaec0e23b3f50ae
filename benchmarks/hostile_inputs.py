"""What a user hands to `retort run`, damaged: workflows, pictures and LoRA files, for `benchmarks.hostile`.

Beside the bytes that `hostile.mutants` changes, files are cut, get the beginning of another kind of file or a header
that says they are huge, and hold NaN. What is refused must be refused in one sentence, and before anything is written.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from ..files import pictures
from ..graphs import registry, run, validate, workflow
from ..graphs.graph import Node
from ..graphs.registry import Registry
from ..trainers.export import read_lora
from .report import Figure, Report

WORKFLOWS, OTHERS = 500, 300
SHIPPED = Path(__file__).resolve().parents[1] / "workflows"
LONGEST = 1500  # characters of a sentence; some list what there is instead
MAGIC = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x10\x00\x00\x00WEBPVP8 ", b"GIF89a", b"PK\x03\x04",
    b"\x80\x04\x95", b"\x00\x00\x00\x20ftypavif", b'{"a":', b"\x7fELF",
)  # fmt: skip
Mutants = Callable[[bytes, random.Random], Iterator[bytes]]


class Page(Registry):
    """The nodes of the built-in host, whose workflows are read as ComfyUI's page reads them."""

    strict = False


def shaped(data: bytes, draw: random.Random) -> Iterator[bytes]:
    """Files that were like this one, cut, with another beginning, or with numbers that say they are huge."""
    while True:
        made = bytearray(data)
        kind = draw.randrange(4)
        if kind == 0:
            del made[draw.randrange(len(made)) :]
        elif kind == 1:
            begin = draw.choice(MAGIC)
            made[: len(begin) * draw.randrange(2)] = begin
        elif kind == 2:
            # Where sizes stand: safetensors' first eight bytes, PNG's width and height, a RIFF's length.
            at = draw.choice((0, 4, 16, 20, 33))
            made[at : at + 4] = draw.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x00\x40", b"\x00" * 4))
            if made.startswith(MAGIC[0]) and at in (16, 20):
                made[29:33] = struct.pack(">I", zlib.crc32(made[12:29]))  # so that the size itself is believed
        else:
            at = draw.randrange(len(made))
            made[at:at] = draw.randbytes(draw.choice((1, 8, 4096)))
        yield bytes(made)


def drawn() -> list[bytes]:
    """A picture in every format that is read, one of them with a workflow."""
    image = Image.effect_noise((24, 16), 60).convert("RGB")
    info = PngInfo()
    info.add_text("prompt", json.dumps(API))
    found = []
    for kind, more in (("PNG", {"pnginfo": info}), ("JPEG", {}), ("WEBP", {}), ("GIF", {}), ("TIFF", {}), ("BMP", {})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **more)
        found.append(buffer.getvalue())
    return found


def loras() -> list[bytes]:
    """Small LoRA files, whole and with what are no numbers."""
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    bad = torch.full((2, 4), float("nan")), torch.full((4, 2), float("inf"))
    named = [("a.lora_A.weight", "a.lora_B.weight"), ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight")]
    files = [{one: d, two: u} for one, two in named for d, u in ((down, up), bad)]
    return [save(tensors) for tensors in files] + [save({"a.lora_A.weight": down.int(), "a.lora_B.weight": up})]


API = {
    "1": {"class_type": "RetortEmbeddedModel", "inputs": {"variant": "flow"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a seven", "clip": ["1", 1]}},
    "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {"class_type": "KSampler", "inputs": {
        "model": ["1", 0], "seed": 5, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
        "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "denoise": 1.0}},
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "x"}},
}  # fmt: skip


def try_inputs(report: Report, folder: Path, mutants: Mutants, seed: int) -> None:
    """Workflows up to the point where they would run, pictures and LoRA files up to their tensors."""
    known = asyncio.run(registry.everything())
    page = Page([known.cls(Node("", name, name)) for name in known.names()])

    def workflow_of(path: Path) -> None:
        for nodes in (known, page):
            graph = run.prepared(path, nodes, (), None)
            validate.validate(graph, nodes)

    def picture_of(path: Path) -> None:
        pictures.load_image(path)
        workflow.read(path, known)

    files = [path.read_bytes() for path in sorted(SHIPPED.glob("*.json"))] + [json.dumps(API).encode(), drawn()[0]]
    kinds: dict[str, tuple[int, list[bytes], Callable[[Path], Any]]] = {
        "workflows": (WORKFLOWS, files, workflow_of),
        "pictures": (OTHERS, drawn(), picture_of),
        "LoRA files": (OTHERS, loras(), read_lora),
    }
    for number, (what, (count, whole, read)) in enumerate(kinds.items()):
        draw = random.Random(seed + number)
        pairs = [zip(mutants(one, draw), shaped(one, draw), strict=False) for one in whole]
        made = [itertools.chain.from_iterable(pair) for pair in pairs]
        faults: Counter[str] = Counter()
        slowest = refused = 0.0
        for at in range(count):
            path = folder / "given"
            path.write_bytes(next(made[at % len(made)]))
            begun = time.perf_counter()
            try:
                read(path)
            except (ValueError, OSError) as error:
                refused += 1
                if not one_sentence(str(error)):
                    faults[f"{what}, not one sentence: {str(error)[:80]!r}"] += 1
            except BaseException as error:
                faults[f"{what}: {type(error).__name__}: {str(error)[:60]}"] += 1
            slowest = max(slowest, time.perf_counter() - begun)
        written = [path.name for path in folder.iterdir() if path.name != "given"]
        report.figures[f"{what}: mutants"] = Figure(count)
        report.figures[f"{what}: refused"] = Figure(refused)
        report.figures[f"{what}: not refused in one sentence"] = Figure(sum(faults.values()), target=0)
        report.figures[f"{what}: files left behind"] = Figure(len(written), target=0)
        report.figures[f"{what}: slowest"] = Figure(slowest, "s", 5.0)
        report.figures |= {name: Figure(times) for name, times in faults.items()}


def one_sentence(text: str) -> bool:
    """Whether a message is a line of text for people."""
    return 0 < len(text) <= LONGEST and "\n" not in text and "Traceback" not in text and text.isprintable()
