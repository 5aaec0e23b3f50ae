"""Large but ordinary files: a log of a million lines, a set of 100,000 pairs and as many tickets, 5,000 runs.

They are made in a temporary folder, every route is asked for them as the page asks it, and what nodes read of them is
read. Times are of the clock on the wall and, in brackets, of the processor in the thread that answers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..files import log_file
from ..files.folder import inside
from ..hosts import preference_view
from ..hosts.comfyui import guard, picker_routes
from ..hosts.jobs import view as run_view
from ..preferences import store as preferences
from ..preferences import tickets
from ..trainers import chart
from ..trainers.job_watch import STATUS
from .report import Figure, Report, arguments, finish

LINES, PAIRS, RUNS, PICTURES = 1_000_000, 100_000, 5_000, 2_000
SLOWEST, LARGEST, SLOWEST_NODE = 200.0, 1000.0, 3.0  # ms, kB, s
BY = "pick"


def write_log(folder: Path, lines: int) -> None:
    """metrics.jsonl as a distillation writes it."""
    folder.mkdir(parents=True)
    with open(folder / log_file.METRICS, "w", encoding="utf-8") as handle:
        for step in range(1, lines + 1):
            loss = 1 / step + step % 7 / 100
            row = {"step": step, "student_loss": round(loss, 6), "fake_loss": round(2 * loss, 6), "rate": 0.0001,
                   "seconds": 0.125, "data": 0.013, "memory": 1024.0}  # fmt: skip
            handle.write(json.dumps(row) + "\n")


def write_set(folder: Path, count: int, pictures: int) -> None:
    """`count` tickets of two, all answered but a hundred, in lines as `preferences.tickets` writes them."""
    (folder / "images").mkdir(parents=True)
    names = [f"images/{hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest()}.png" for i in range(pictures)]
    for name in names:
        (folder / name).write_bytes(b"a picture")
    with open(folder / tickets.TICKETS, "w") as asked, open(folder / preferences.PAIRS, "w") as said:
        for i in range(count):
            pair = names[i % pictures], names[(i * 7 + 1) % pictures]
            pair = pair if pair[0] != pair[1] else (pair[0], names[(i + 2) % pictures])
            ticket = tickets.Ticket(f"picture {i // 2}, in the words of somebody who paints", pair, (), BY)
            row: dict[str, Any] = {"id": ticket.id, "prompt": ticket.prompt, "candidates": pair, "by": BY}
            asked.write(json.dumps(row) + "\n")
            if i < count - 100:
                row = {"prompt": ticket.prompt, "winner": pair[0], "loser": pair[1], "strength": None, "by": BY,
                       "ticket": ticket.id, "turn": i + 1}  # fmt: skip
                said.write(json.dumps(row) + "\n")


def write_runs(folder: Path, runs: int) -> None:
    """Runs that have ended."""
    for i in range(runs):
        run = folder / f"run_{i:05d}"
        run.mkdir(parents=True)
        status = {"state": "finished", "step": 1000, "steps": 1000, "lora": f"run_{i:05d}.safetensors", "message": ""}
        (run / STATUS).write_text(json.dumps(status))
        (run / "config.json").write_text(json.dumps({"method": "dmd2", "training": {"steps": 1000}}))
        (run / "result.json").write_text(json.dumps({"file": f"run_{i:05d}.safetensors", "timesteps": [999.0, 500.0]}))
        (run / log_file.METRICS).write_text('{"step": 1000, "student_loss": 0.5}\n')


class Clock:
    """Times of one thing that is done again and again."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sizes: list[int] = []
        self.busy = self.late = 0.0

    def ask(self, work: Callable[[], Any]) -> Any:
        """Do it once; what it answers counts as JSON. None where it was not ready."""
        begun, busy = time.perf_counter(), time.thread_time()
        try:
            answer = work()
            # As the route makes it.
            self.sizes.append(len(guard.spelled(answer)))
        except BlockingIOError:
            answer = None
        self.busy = max(self.busy, time.thread_time() - busy)
        self.times.append(time.perf_counter() - begun)
        return answer

    def until(self, work: Callable[[], Any]) -> Any:
        """Ask until it is ready, as a page does."""
        begun = time.perf_counter()
        while (answer := self.ask(work)) is None:
            time.sleep(0.05)
        self.late = time.perf_counter() - begun
        return answer

    def told(self, what: str) -> dict[str, Figure]:
        """As figures."""
        found = {f"{what}: slowest of {len(self.times)}": Figure(1000 * max(self.times), "ms", SLOWEST)}
        found[f"{what}: (processor)"] = Figure(1000 * self.busy, "ms")
        found[f"{what}: largest"] = Figure(max(self.sizes) / 1000, "kB", LARGEST)
        if self.late > SLOWEST / 1000:
            found[f"{what}: read in the background for"] = Figure(self.late, "s")
        return found


def routes(output: Path) -> Iterator[dict[str, Figure]]:
    """Every route of the page that answers with what these files hold."""
    runs, sets, long = output / "retort", output / "retort_preferences", output / "long"
    clock, offset, step = Clock(), 0, 0
    while True:
        answer = clock.ask(partial(run_view.log, long / "mine", offset, step))
        offset, step = answer["offset"], (answer["steps"] or [step])[-1]
        if not answer["more"]:
            break
    yield clock.told("GET runs/RUN/log, from its beginning to its end")
    clock = Clock()
    for _ in range(5):
        with open(long / "mine" / log_file.METRICS, "a") as handle:
            handle.write(json.dumps({"step": step + 1, "student_loss": 0.5}) + "\n")
        answer = clock.ask(partial(run_view.log, long / "mine", offset, step))
        offset, step = answer["offset"], answer["steps"][-1]
    yield clock.told("GET runs/RUN/log, one line more")
    clock = Clock()
    for _ in range(5):
        clock.ask(lambda: run_view.runs(runs))
    yield clock.told("GET runs")
    clock = Clock()
    for _ in range(5):
        clock.ask(lambda: preference_view.every(sets))
    yield clock.told("GET preferences")
    clock = Clock()
    clock.until(lambda: preference_view.one(sets, "mine"))
    yield clock.told("GET preferences/SET, first")
    clock = Clock()
    for _ in range(5):
        clock.until(lambda: preference_view.one(sets, "mine"))
    yield clock.told("GET preferences/SET, again")
    routes = picker(sets)
    clock = Clock()
    clock.until(lambda: routes["look"](set="mine", by=BY))
    yield clock.told("GET picker/SET/tickets, first")
    for what, act in (("answer", routes["answer"]), ("take_back", routes["take_back"])):
        clock = Clock()
        for _ in range(5):
            shown = routes["look"](set="mine", by=BY)
            body = {"id": shown["tickets"][0]["id"], "choice": 0} if what == "answer" else {"id": shown["last"]["id"]}
            clock.until(partial(act, set="mine", by=BY, body=body))
        yield clock.told(f"POST picker/SET/{what}")
    clock = Clock()
    for _ in range(5):
        clock.ask(lambda: routes["look"](set="mine", by=BY))
    yield clock.told("GET picker/SET/tickets, again")


def picker(sets: Path) -> dict[str, Callable[..., Any]]:
    """The picker's routes by name, without a server."""
    found: dict[str, Callable[..., Any]] = {}
    kept = picker_routes.guarded
    picker_routes.guarded = lambda work, lasting=False: found.setdefault(work.__name__, work)
    plain = SimpleNamespace(get=lambda path: lambda work: work, post=lambda path: lambda work: work)
    try:
        picker_routes.add(plain, lambda: sets)  # type: ignore[arg-type]
    finally:
        picker_routes.guarded = kept
    return found


def nodes(output: Path) -> Iterator[dict[str, Figure]]:
    """What the nodes do that read these files, each as in a process that has not looked at them before."""
    long, folder = output / "long" / "mine", output / "retort_preferences" / "mine"

    def timed(what: str, work: Callable[[], Any]) -> dict[str, Figure]:
        begun, busy = time.perf_counter(), time.thread_time()
        work()
        figure = Figure(time.perf_counter() - begun, "s", SLOWEST_NODE)
        return {what: figure, f"{what} (processor)": Figure(time.thread_time() - busy, "s")}

    def drawn() -> None:
        rows, each = log_file.thinned(long / log_file.METRICS, 10_000)
        chart.draw(rows, 25 / each)

    def picked() -> None:
        shown = tickets.TicketState(folder, BY)
        shown.count(skipped=False)

    def listed() -> None:
        found = preferences.Book(inside(folder)).preferences().filtered("*", "", 0.0, True)
        train, out = found.split(0.1, 0)
        found.statistics()
        "\n".join(dict.fromkeys(p.prompt for p in out.pairs))

    yield timed("Loss Chart", drawn)
    yield timed("Collect Job (all losses)", lambda: log_file.column(long / log_file.METRICS, "student_loss"))
    yield timed("Preference Set", listed)
    yield timed("Preference Picker", picked)


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__).parse_args()
    share = 0.1 if options.quick else 1.0
    torch.set_num_threads(1)
    report = Report("large")
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        write_log(output / "long" / "mine", round(share * LINES))
        write_set(output / "retort_preferences" / "mine", round(share * PAIRS), round(share * PICTURES))
        write_runs(output / "retort", round(share * RUNS))
        for found in (*nodes(output), *routes(output)):
            report.figures.update(found)
    finish(report, options)


if __name__ == "__main__":
    main()
