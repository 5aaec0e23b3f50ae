"""Damaged and hostile files for readers, and requests of strangers for routes: seeded, bounded, and counted.

Each mutant is a whole file with bytes flipped, cut, doubled or exchanged, or with an odd value put in. A reader may
raise ValueError, OSError or UsageError; anything else is a fault, as is a mutant that takes five seconds, or a peak of
a gigabyte more memory than before.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..files.errors import UsageError
from ..files.log_file import METRICS
from ..graphs import workflow
from ..hosts import preference_view
from ..hosts.jobs import view as run_view
from ..hosts.search import view as search_view
from ..preferences import store as preferences
from ..preferences import tickets
from ..preferences.exchange import take_in
from ..trainers import watch
from ..trainers.dataset import Dataset
from ..trainers.export import read_lora
from ..trainers.job import Job
from ..trainers.job_watch import Status, read_status, write_status
from ..trainers.origin import recognise
from ..trainers.state import load as load_state
from . import hostile_files, hostile_headers, hostile_inputs
from .report import Figure, Report, arguments, finish

OURS = (ValueError, OSError, UsageError)
SLOWEST, MOST_MEMORY = 5.0, 1000.0  # s, MB
SEARCH = "20260101-000000-00000000"
ODD = (
    b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"9" * 5000, b"[" * 20_000, b"{}", b"[]", b"null", b'"\\ud800"',
    b'""', b'"' + b"x" * 100_000 + b'"', b"1099511627776", b"true", b'"../../x"', b'"\\u0000"', b"\xff\xfe", b"0.5",
    b'{"a":' * 2000, b"-10", b"-20", b"20", b'"inner"', b'"outer"', b'[[]]', b"[1]",
)  # fmt: skip


def mutants(data: bytes, draw: random.Random) -> Iterator[bytes]:
    """Files that were like this one, without end."""
    while True:
        made = bytearray(data)
        for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
            at = draw.randrange(len(made) + 1)
            kind = draw.randrange(6)
            if kind == 0 and made:
                made[at % len(made)] = draw.randrange(256)
            elif kind == 1:
                del made[at : at + draw.choice((1, 5, 100))]
            elif kind == 2:
                made[at:at] = made[max(0, at - 50) : at]
            elif kind == 3:
                del made[at:]
            elif kind == 4:
                made[at:at] = draw.choice(ODD)
            elif (numbers := [i for i, byte in enumerate(made) if byte in b":,"]) and len(made) < 200_000:
                # A value is exchanged.
                begin = draw.choice(numbers) + 1
                end = next((i for i in range(begin, len(made)) if made[i] in b",}]\n"), len(made))
                made[begin:end] = draw.choice(ODD)
        yield bytes(made)


def png(texts: dict[str, str]) -> bytes:
    """A picture that carries texts."""
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


class Files:
    """A whole file of each kind in a folder, and who reads it."""

    def __init__(self, folder: Path):
        self.runs, self.sets, self.records = folder / "retort", folder / "retort_preferences", folder / "records"
        run, self.set, search = self.runs / "mine", self.sets / "mine", self.records / SEARCH
        run.mkdir(parents=True)
        search.mkdir(parents=True)
        names = [preferences.keep_image(self.set, torch.full((8, 8, 3), value / 4)) for value in range(4)]
        preferences.append(
            self.set, [{"prompt": "a", "winner": names[0], "loser": names[1], "by": "x", "strength": 1.5}]
        )
        ids = tickets.ask(self.set, [tickets.Ticket(f"p{i}", tuple(names[i : i + 2]), by="pick") for i in range(3)])
        tickets.answer(self.set, ids[0], 1, "pick")
        tickets.answer(self.set, ids[1], "skip", "pick")
        write_status(run, Status("running", step=3, steps=9, message="m", machine="elsewhere"))
        rows = [{"step": i, "student_loss": 0.5, "rate": 1e-4} for i in range(1, 9)]
        (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        now: dict[str, Any] = {"model": "x", "prompts": [[[1, 2], 0.5, [0.1, 0.2, 0.3, 0.4]]], "size": [4, 8, 8]}
        recognise(run, now, False)
        (run / "config.json").write_text(json.dumps({"method": "dmd2", "training": {"steps": 9}}))
        (run / "result.json").write_text(
            json.dumps({"file": "a.safetensors", "timesteps": [1, 2], "base": {"kind": "x"}})
        )
        job = {"format": 1, "name": "mine", "base": {"kind": "embedded", "variant": "flow"}, "method": "flow"}
        (run / "job.json").write_text(json.dumps(job))
        item = {"method": "dts", "calls": 1, "rewards": 1, "seconds": 0.5, "history": [[1, 0.5]], "best": [[0, 0.5]],
                "kept": [[0, 0.5]], "tree": {"size": 2, "stops": 1, "sigmas": [1.0], "parent": [-1, 0],
                "place": [-1, 0], "value": [0.5, 0.5], "number": [-1, 0]}}  # fmt: skip
        view = {"pid": 0, "going": False, "prompt": "p", "reward": "r", "begun": 1.5, "items": [item]}
        (search / "view.json").write_text(json.dumps(view))
        self.lora = folder / "lora.safetensors"
        save_file({"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 2)}, self.lora)
        self.state = folder / "state.safetensors"
        save_file(
            {"a/b": torch.ones(3)},
            self.state,
            {"retort_state": "1", "counters": '{"done": 3, "position": 4}', "config": "{}"},
        )
        self.data = folder / "data.safetensors"
        entry = torch.ones(1, 2, 4), {"pooled": torch.ones(1, 4)}
        Dataset([entry], ["a"], latents=[torch.ones(4, 8, 8)]).save(self.data)
        source = self.sets / "source"
        (source / "train").mkdir(parents=True)
        line = {"jpg_0_file_name": "a.png", "jpg_1_file_name": "b.png", "caption": "c", "label_0": 1.0}
        for name in ("a.png", "b.png"):
            (source / "train" / name).write_bytes((self.set / names[0]).read_bytes())
        self.metadata = source / "train" / "metadata.jsonl"
        self.metadata.write_text(json.dumps(line) + "\n")
        api = {"1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
               "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "x"}}}  # fmt: skip
        self.api, self.ui, self.picture = folder / "api.json", folder / "ui.json", folder / "a.png"
        self.api.write_text(json.dumps(api))
        shipped = Path(__file__).resolve().parents[1]
        self.ui.write_bytes((shipped / "workflows" / "1 Quick start - 4 steps instead of 50.json").read_bytes())
        self.picture.write_bytes(png({"prompt": json.dumps(api)}))
        self.pictures = [(self.set / name).read_bytes() for name in names[:2]]
        self.run, self.view, self.now, self.folder = run, search / "view.json", now, folder

    def readers(self) -> dict[str, tuple[Path, Callable[[], Any]]]:
        """{what: (its file, who reads it)}."""
        from ..graphs import registry

        known, run, set_ = asyncio.run(registry.everything()), self.run, self.set
        new = self.folder / "retort_preferences" / "new"
        return {
            "status.json": (run / "status.json", lambda: (read_status(run), _shown(run_view.runs(self.runs)))),
            "metrics.jsonl": (
                run / METRICS,
                lambda: (watch.read_metrics(run / METRICS), _shown(run_view.log(run, 0, 0))),
            ),
            "metrics.jsonl, going on": (run / METRICS, lambda: watch.Metrics(run, 5).close()),
            "origin.json": (run / "origin.json", lambda: recognise(run, self.now, True)),
            "config.json": (run / "config.json", lambda: _shown(run_view.summary(run))),
            "result.json": (run / "result.json", lambda: _shown(run_view.summary(run))),
            "job.json": (run / "job.json", lambda: (_shown(run_view.summary(run)), Job.load(run))),
            "data.safetensors": (self.data, lambda: Dataset.load(self.data)),
            "state.safetensors": (self.state, lambda: load_state(self.state, None)),
            "LoRA": (self.lora, lambda: read_lora(self.lora)),
            "view.json": (self.view, lambda: _shown(search_view.record(self.records, SEARCH, 0))),
            "pairs.jsonl": (
                set_ / "pairs.jsonl",
                lambda: (preferences.read(set_), _shown(preference_view.one(self.sets, "mine"))),
            ),
            "pairs.jsonl, picker": (set_ / "pairs.jsonl", lambda: tickets.TicketState(set_, "pick")),
            "tickets.jsonl": (set_ / "tickets.jsonl", lambda: tickets.TicketState(set_, "pick")),
            "import": (self.metadata, lambda: take_in(self.metadata.parents[1], new, "import")),
            "workflow, API": (self.api, lambda: workflow.read(self.api, known)),
            "workflow, UI": (self.ui, lambda: workflow.read(self.ui, known)),
            "workflow, PNG": (self.picture, lambda: workflow.read(self.picture, known)),
            "picture": (self.picture, lambda: preferences.load_image(self.picture)),
            **hostile_files.searches(self.folder),
            **hostile_files.gaussians(self.folder),
            **hostile_files.parquet(self.folder, self.pictures),
            **hostile_files.subgraphs(self.folder, known),
        }


def _shown(answer: Any) -> int:
    text = json.dumps(answer, allow_nan=False)
    if len(text) > 1_000_000:
        raise AssertionError(f"an answer has {len(text)} characters")
    return len(text)


def memory() -> float:
    """The most that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def try_readers(report: Report, count: int, seed: int) -> None:
    """`count` mutants over all readers."""
    faults: dict[str, int] = {}
    slowest, tried = 0.0, 0
    with tempfile.TemporaryDirectory() as temporary:
        readers = Files(Path(temporary)).readers()
        for what, (path, read) in readers.items():
            with_whole = path.read_bytes()
            try:
                read()
            except OURS:
                # Our whole examples are small; a reader may miss the rest of them.
                report.figures[f"refused whole: {what}"] = Figure(1)
            path.write_bytes(with_whole)
        report.figures["files: kinds and readers"] = Figure(len(readers))
        before = memory()
        for number, (what, (path, read)) in enumerate(readers.items()):
            whole, draw = path.read_bytes(), random.Random(seed + number)
            found = mutants(whole, draw)
            for _ in range(-(-count // len(readers))):
                made = next(found)
                path.write_bytes(made)
                begun = time.perf_counter()
                try:
                    read()
                except OURS:
                    pass
                except BaseException as error:
                    name = f"{what}: {type(error).__name__}: {str(error)[:60]}"
                    faults[name] = faults.get(name, 0) + 1
                slowest, tried = max(slowest, time.perf_counter() - begun), tried + 1
            path.write_bytes(whole)
        report.figures["files: mutants"] = Figure(tried)
        report.figures["files: errors that are not ours"] = Figure(sum(faults.values()), target=0)
        report.figures |= {name: Figure(times) for name, times in faults.items()}
        report.figures["files: slowest mutant"] = Figure(slowest, "s", SLOWEST)
        report.figures["files: memory beyond that before"] = Figure(memory() - before, "MB", MOST_MEMORY)


def try_routes(report: Report) -> None:
    """Every route against every set of headers."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    from ..hosts.comfyui import picker_routes, preference_routes, run_routes, search_routes

    async def asked(files: Files) -> None:
        table, host = web.RouteTableDef(), "127.0.0.1:8188"
        run_routes.add(table, lambda: files.runs, lambda: files.folder)
        picker_routes.add(table, lambda: files.sets)
        preference_routes.add(table, lambda: files.sets)
        search_routes.add(table, lambda: files.records, lambda: files.folder, lambda: files.folder)
        application = web.Application()
        application.add_routes(table)
        routes = [route for route in table if isinstance(route, web.RouteDef)]
        wrong = tried = 0
        names = {"run": "mine", "set": "mine", "name": "mine", "search": SEARCH, "item": "0", "number": "0",
                 "picture": "step_0000001.png", "image": "0" * 32}  # fmt: skip
        async with TestClient(TestServer(application)) as client:
            for headers, own in hostile_headers.sets(host).values():
                for route in routes:
                    body: dict[str, Any] = {"json": {"id": "x", "choice": 0}} if route.method == "POST" else {}
                    path = route.path.format(**names)
                    answer = await client.request(route.method, path, headers={"Host": host} | headers, **body)
                    await answer.read()
                    # What passes meets the file, or that there is none.
                    passed = answer.status in (200, 404) or (route.method == "POST" and answer.status in (400, 409))
                    refused = answer.status == 403 or (not own and answer.status == 400 and "Host" in headers)
                    wrong, tried = wrong + (not (passed if own else refused)), tried + 1
        report.figures["routes: requests"] = Figure(tried)
        report.figures["routes: answered or refused wrongly"] = Figure(wrong, target=0)

    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(asked(Files(Path(temporary))))


def main() -> None:
    """Try and print."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("hostile")
    try_readers(report, 2000 if options.quick else 20_000, options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        hostile_inputs.try_inputs(report, Path(temporary), mutants, options.seed)
    try_routes(report)
    finish(report, options)


if __name__ == "__main__":
    main()
