"""On a GPU: memory and time of trainings at true size, resident and streamed, sampling beside core's, bf16.

`python -m retort.benchmarks.gpu --comfyui DIR [--small] [--minutes 10] [--only TEXT]`, in ComfyUI's environment. The
networks are ComfyUI's own classes at their published sizes (`layouts.TRUE`), with random weights that are written to a
temporary folder (up to 12 GB at a time): no file from outside is needed. The rows of one network share a process; one
that ends, or a row that takes too long, costs that row alone, and what time does not suffice for is named. Every row
that is finished is in RESULTS.md's section "On a GPU" from then on. --small runs the same code on the processor, with
tiny networks of the same classes, and writes nothing but what is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from .gpu_rows import Row
from .report import Figure, Report
from .timing import ratio

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "## On a GPU"
METHODS = ("flow", "dmd2", "tdm", "dpo")
NETWORKS = ("SDXL", "Flux fp8", "Z-Image")
PRESET, SEARCH = "dmd2_sdxl_4step", "DTS*"
GIGABYTE = 2**30
START = 240.0  # seconds for a process to come up and to write its network's file
ROW = 90.0  # seconds for one row


def groups() -> list[list[Row]]:
    """The rows, those of one process together, what matters most first."""
    found = []
    for methods in (METHODS[:2], METHODS[2:]):
        for network in NETWORKS:
            found.append([Row("training", network, m, streamed) for m in methods for streamed in (True, False)])
        if methods[0] == "flow":
            found.append([Row("sampling", "SDXL", method) for method in (PRESET, SEARCH)])
            found.append([Row("embedded", kind, method) for kind in ("flow", "eps") for method in METHODS])
    return found


class Process:
    """A child that measures rows; `lines` yields what it says, and None when it has said nothing for too long."""

    def __init__(self, checkout: Path, folder: Path, small: bool, rows: list[tuple[int, Row]]):
        request = {"small": small, "rows": [(number, dataclasses.asdict(row)) for number, row in rows]}
        command = [sys.executable, "-m", f"{__package__}.gpu_rows", str(checkout), str(folder), json.dumps(request)]
        self._log, self._words = tempfile.TemporaryFile("w+", encoding="utf-8"), ""  # noqa: SIM115
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self._said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._said.put(line)
        self._said.put(None)

    def line(self, limit: float) -> dict[str, Any] | None:
        """What it says next, None when it has ended. TimeoutError after `limit` seconds."""
        until = time.monotonic() + limit
        while True:
            try:
                said = self._said.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if said is None:
                return None
            try:
                found = json.loads(said)
            except ValueError:
                continue  # a library's words
            if isinstance(found, dict):
                return found

    def end(self) -> str:
        """Stop it, and the last line of what it had to say for itself."""
        if not self._log.closed:
            self._child.kill()
            self._child.wait()
            self._log.seek(0)
            words = [line for line in self._log.read().splitlines() if line.strip()]
            self._log.close()
            self._words = words[-1][:300] if words else f"exit code {self._child.returncode}"
        return self._words


class Bench:
    """All rows, those that have been measured, and why others were not."""

    def __init__(self, checkout: Path, small: bool, minutes: float, rows: list[list[Row]]):
        self.checkout, self.small, self.minutes, self.groups = checkout, small, minutes, rows
        self.rows = [row for group in self.groups for row in group]
        self.card: dict[str, Any] = {}
        self.found: dict[int, dict[str, Any]] = {}
        self.missing = {number: "the time was over" for number in range(len(self.rows))}

    def of(self, row: Row) -> dict[str, Any] | None:
        """What was measured of a row."""
        return self.found.get(self.rows.index(row)) if row in self.rows else None

    def why(self, row: Row) -> str:
        """Why a row was not measured."""
        return self.missing[self.rows.index(row)]

    def run(self) -> Iterator[Row]:
        """Measure; each row when it is over, whatever came of it."""
        end = time.monotonic() + 60 * self.minutes
        with tempfile.TemporaryDirectory(prefix="retort-gpu-") as folder:
            first = 0
            for group in self.groups:
                numbered = [(first + i, row) for i, row in enumerate(group)]
                first += len(group)
                while numbered and time.monotonic() < end:
                    done = yield from self._process(numbered, Path(folder), end)
                    numbered = numbered[done:]

    def _process(self, rows: list[tuple[int, Row]], folder: Path, end: float) -> Generator[Row, None, int]:
        """Measure rows in one process until one of them ends it; how many are over."""
        child = Process(self.checkout, folder, self.small, rows)
        over, limit, began = 0, START, False
        try:
            while over < len(rows):
                number, row = rows[over]
                try:
                    said = child.line(min(limit, end - time.monotonic()))
                except TimeoutError:
                    late = time.monotonic() < end
                    self.missing[number] = f"it took more than {limit:.0f} seconds" if late else "the time was over"
                    over += 1
                    yield row
                    return over
                if said is None:
                    # One that does not come up will not do so for the next row either.
                    gone = rows[over : over + 1] if began else rows
                    self.missing |= {each: f"its process ended: {child.end()}" for each, _ in gone}
                    for _, lost in gone:
                        yield lost
                    return over + len(gone)
                if "card" in said:
                    self.card = said["card"]
                elif "begun" in said:
                    # The first row of a network waits for its file.
                    limit, began = ROW if began else START, True
                else:
                    if "failed" in said:
                        self.missing[number] = said["failed"]
                    else:
                        self.found[number] = said
                        del self.missing[number]
                    over += 1
                    yield row
            return over
        finally:
            child.end()


# ---- what is written ---------------------------------------------------------------------------------------------


def figures(bench: Bench) -> dict[str, Figure]:
    """All that was measured, by name."""
    found: dict[str, Figure] = {}
    for number, row in enumerate(bench.rows):
        one = bench.found.get(number)
        if one is None:
            continue
        if row.part == "training":
            found |= _trained(bench, row, one)
        elif row.part == "sampling":
            found[f"{row}: time a call over core's"] = ratio(one["ours"], one["core"], 1.05)
        else:
            found[f"{row}: bf16, a step"] = Figure(1e3 * one["seconds bf16"], "ms")
            found[f"{row}: fp32, a step"] = Figure(1e3 * one["seconds fp32"], "ms")
    return found


def _trained(bench: Bench, row: Row, one: dict[str, Any]) -> dict[str, Figure]:
    found = {
        f"{row}: a step": Figure(one["seconds"], "s"),
        f"{row}: peak": Figure(one["peak"] / GIGABYTE, "GB"),
    }
    if one["estimate"]:
        found[f"{row}: estimate over peak"] = Figure(one["estimate"] / one["peak"])
    if row.streamed:
        found[f"{row}: transfer hidden"] = Figure(100 * hidden(one, bench.card["bandwidth"]), "%")
        resident = bench.of(dataclasses.replace(row, streamed=False))
        if resident is not None:
            found[f"{row}: a step over resident"] = Figure(one["seconds"] / resident["seconds"])
    return found


def hidden(one: dict[str, Any], bandwidth: float) -> float:
    """Share of the copies' time in which the device went on computing."""
    copying = one["copied"] / bandwidth
    return max(0.0, 1 - one["stall"] / copying) if copying else 1.0


def section(bench: Bench) -> str:
    """RESULTS.md's section."""
    card = bench.card
    driver = f", driver {card['driver']}" if card.get("driver") else ""
    where = "Nothing was measured."
    if card:
        where = (
            f"`{command()}`, {card['device']} ({card['memory'] / GIGABYTE:.0f} GB){driver}, torch {card['torch']}, "
            f"ComfyUI {card['comfyui']}, {date.today():%-d %B %Y}. Host to device: {card['bandwidth'] / 1e9:.1f} GB/s."
        )
    parts = [
        TITLE,
        where,
        "Random weights, batch 1, LoRAs of rank 16 on all layers, AdamW, gradient checkpointing; SDXL, Flux.1 dev in "
        "fp8 and Z-Image at their published sizes and 1024 x 1024 pixels. Peak: tensors on the card at their most, the "
        "base included; estimate: the forecast's over it, without what CUDA takes for itself, good from 0.95 to 1.08. "
        "Streamed: every block of the base waits in host memory. Hidden: the share of the "
        "copies' time in which the card went on computing.",
    ]
    for table in (_trainings(bench), _samplings(bench), _twins(bench)):
        if len(table) > 2:
            parts.append("\n".join(table))
    if bench.missing:
        parts.append(
            "\n".join(["Not measured:", "", *(f"* {bench.rows[n]}: {why}" for n, why in bench.missing.items())])
        )
    return "\n\n".join(parts) + "\n"


def command() -> str:
    """What was run, without where this machine keeps things."""
    return f"python -m {__package__}.gpu --comfyui DIR"


def _trainings(bench: Bench) -> list[str]:
    lines = [
        "| model | method | base | a step | over resident | peak | estimate | reserved | streamed | hidden |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(bench.rows):
        one = bench.found.get(number)
        if row.part != "training" or one is None:
            continue
        resident = bench.of(dataclasses.replace(row, streamed=False))
        over = f"{one['seconds'] / resident['seconds']:.2f}" if row.streamed and resident else ""
        guess = f"{one['estimate'] / one['peak']:.3f}" if one["estimate"] else ""
        share = f"{100 * hidden(one, bench.card['bandwidth']):.0f} %" if row.streamed else ""
        lines.append(
            f"| {row.network} | {row.method} | {'streamed' if row.streamed else 'resident'} | {one['seconds']:.2f} s | "
            f"{over} | {_size(one['peak'])} | {guess} | {_size(one['reserved'])} | {one['blocks'] or ''} | {share} |"
        )
    return lines


def _samplings(bench: Bench) -> list[str]:
    lines = ["| sampling | time a call over core's | 95 % interval |", "|---|---|---|"]
    for number, row in enumerate(bench.rows):
        if row.part == "sampling" and number in bench.found:
            one = ratio(bench.found[number]["ours"], bench.found[number]["core"], 1.05)
            low, high = one.interval or (one.value, one.value)
            lines.append(f"| {row} | {one.value:.3f} | {low:.3f} to {high:.3f} |")
    return lines


def _twins(bench: Bench) -> list[str]:
    lines = ["| embedded model | a step in bf16 | in fp32 | last loss in bf16 | in fp32 |", "|---|---|---|---|---|"]
    for number, row in enumerate(bench.rows):
        if row.part == "embedded" and number in bench.found:
            one = bench.found[number]
            seconds = [f"{1e3 * one[f'seconds {kind}']:.1f} ms" for kind in ("bf16", "fp32")]
            losses = [f"{one[f'loss {kind}'][-1]:.4g}" for kind in ("bf16", "fp32")]
            lines.append(f"| {row} | {' | '.join((*seconds, *losses))} |")
    return lines


def _size(count: int) -> str:
    return "" if not count else f"{count / GIGABYTE:.2f} GB" if count > 2**27 else f"{count / 2**20:.1f} MB"


def put(path: Path, text: str) -> None:
    """Put the section into RESULTS.md, in place of what it said before, else at its end."""
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    begin = whole.find(f"{TITLE}\n")
    if begin < 0:
        path.write_text(f"{whole.rstrip()}\n\n{text}".lstrip(), encoding="utf-8")
        return
    end = whole.find("\n## ", begin)
    rest = "" if end < 0 else whole[end:]
    path.write_text(f"{whole[:begin]}{text}{rest}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="DIR", help="a ComfyUI checkout")
    parser.add_argument("--small", action="store_true", help="tiny networks, on the processor")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it; the default is 10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the section into FILE, not RESULTS.md")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose names hold it, such as 'SDXL, flow'")
    return parser.parse_args()


def main() -> None:
    """Measure, write and print."""
    options, console = arguments(), Console()
    rows = [[row for row in group if options.only in str(row)] for group in groups()]
    bench = Bench(options.comfyui.resolve(), options.small, options.minutes, rows)
    # What is small or a part does not take the place of the whole.
    results = options.results or (None if options.small or options.only else RESULTS)
    for row in bench.run():
        console.print(f"{row}: {'done' if bench.of(row) else bench.why(row)}")
        if results:
            put(results, section(bench))
    report = Report("gpu", figures(bench))
    report.show(console)
    console.print(section(bench), markup=False)
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
