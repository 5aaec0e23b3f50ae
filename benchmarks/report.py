"""Shared by the benchmarks: figures with targets, the table they print, the JSON they write."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass(frozen=True)
class Figure:
    """One measured figure; `met` is None where there is no target. interval: a 95 % interval, or None."""

    value: float
    unit: str = ""
    target: float | None = None
    better: Literal["higher", "lower"] = "lower"
    interval: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value itself reaches the target, whatever its interval."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    @property
    def verdict(self) -> str:
        """`met` in words, with "within noise" where the interval reaches to the target's other side; "" without one."""
        if self.target is None:
            return ""
        low, high = self.interval or (self.value, self.value)
        ends = [end <= self.target if self.better == "lower" else end >= self.target for end in (low, high)]
        return ("yes" if self.met else "no") + ("" if all(end == self.met for end in ends) else ", within noise")


@dataclass
class Report:
    """Figures of one benchmark by name, and where they were measured."""

    name: str
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that printed this report."""
        return " ".join(["python -m", f"retort.benchmarks.{self.name}", *sys.argv[1:]])

    @property
    def machine(self) -> str:
        """Processor or GPU, threads and torch version."""
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        )
        return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}"

    def show(self, console: Console | None = None) -> None:
        """Print the table."""
        table = Table(title=f"{self.name}: {self.command}", caption=self.machine)
        for column in ("figure", "value", "95 % interval", "target", "met"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        for name, figure in self.figures.items():
            interval = f"{figure.interval[0]:.4g} .. {figure.interval[1]:.4g}" if figure.interval else ""
            sign = "<=" if figure.better == "lower" else ">="
            target = "" if figure.target is None else f"{sign} {figure.target:.4g}"
            table.add_row(name, f"{figure.value:.4g} {figure.unit}".strip(), interval, target, figure.verdict)
        (console or Console()).print(table)

    def write(self, path: Path) -> None:
        """Write the figures as JSON."""
        figures = {name: asdict(figure) | {"met": figure.met} for name, figure in self.figures.items()}
        content = {"command": self.command, "machine": self.machine, "figures": figures}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def rows(self) -> str:
        """The figures as a table of RESULTS.md, below the command and the machine."""
        lines = [f"`{self.command}`, {self.machine}:", "", "| figure | value | 95 % interval | target | met |"]
        lines.append("|---|---|---|---|---|")
        for name, figure in self.figures.items():
            value = f"{figure.value:,.0f}" if figure.value == round(figure.value) else f"{figure.value:,.3g}"
            sign = "at most" if figure.better == "lower" else "at least"
            unit = f" {figure.unit}" if figure.unit else ""
            target = "" if figure.target is None else f"{sign} {figure.target:,.4g}{unit}"
            interval = f"{figure.interval[0]:.4g} to {figure.interval[1]:.4g}" if figure.interval else ""
            lines.append(f"| {name} | {value}{unit} | {interval} | {target} | {figure.verdict} |")
        return "\n".join(lines)


def put(path: Path, mark: str, text: str) -> None:
    """Replace what stands between a file's two marks `<!-- mark -->`. ValueError where they are missing."""
    sign = f"<!-- {mark} -->"
    before, *rest = path.read_text(encoding="utf-8").split(sign)
    if len(rest) != 2:
        raise ValueError(f"{path} has not two marks {sign}")
    path.write_text(f"{before}{sign}\n\n{text}\n\n{sign}{rest[1]}", encoding="utf-8")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the same figures on fewer seeds, in at most five minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--write", action="store_true", help="put the table between RESULTS.md's marks of this name")
    return parser


def finish(report: Report, options: argparse.Namespace) -> None:
    """Print, and write where asked."""
    report.show()
    if options.json:
        report.write(options.json)
    if options.write:
        put(RESULTS, report.name, report.rows())
