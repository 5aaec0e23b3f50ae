"""The quick start, run and measured: a labelled contact sheet and a table of what each number of steps costs and gives.

`python -m retort.benchmarks.demo [--quick] [--json FILE] [--out DIR]`. Runs the workflow of the teacher and its three
students without ComfyUI, then measures the same model on prompts of its own. Fréchet distances of few images are high:
the last row is what as many real digits get.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from ..graphs.run import run
from ..hosts.headless.folders import Folders
from ..models import evaluate, loader
from .distillation import RUNS
from .report import Figure, Report, arguments

WORKFLOW = Path(__file__).resolve().parents[1] / "workflows" / "Distil - A teacher and three students.json"
# The workflow's rows, and which of the embedded students draws each.
ROWS = (
    ("teacher", 50, ""),
    ("dmd2", 4, "flow_dmd2_4step"),
    ("tdm", 4, "flow_tdm_4step"),
    ("dmd2", 1, "flow_dmd2_1step"),
)
TITLES = {"teacher": "teacher", "dmd2": "DMD2", "tdm": "TDM"}
ZOOM = 2


def contact_sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """One labelled row of images each."""
    font = ImageFont.load_default(16)
    first = next(iter(rows.values()))
    width, height = (side * ZOOM for side in first[0].size)
    sheet = Image.new("RGB", (len(first) * (width + 4) + 4, len(rows) * (height + 30) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (label, images) in enumerate(rows.items()):
        top = r * (height + 30) + 4
        pen.text((6, top), label, fill="black", font=font)
        for i, image in enumerate(images):
            sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC), (4 + i * (width + 4), top + 24))
    return sheet


def main() -> None:
    """Run, draw, measure."""
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="folder of the images and the sheet")
    options = parser.parse_args()
    console = Console()
    began = time.perf_counter()
    with console.status(f"running {WORKFLOW.stem}"):
        outcome = run(WORKFLOW, where=Folders(output=options.out))
    console.print(f"quick start: {len(outcome.saved)} images in {time.perf_counter() - began:.1f} s")
    rows = {
        f"{TITLES[who]}, {steps} {'steps' if steps > 1 else 'step'}": sorted(
            path for path in outcome.saved if path.name.startswith(f"{who}_{steps}_")
        )
        for who, steps, _ in ROWS
    }
    options.out.mkdir(parents=True, exist_ok=True)
    sheet = options.out / "contact_sheet.png"
    contact_sheet({label: [Image.open(p).convert("RGB") for p in paths] for label, paths in rows.items()}).save(sheet)

    count = 32 if options.quick else 48
    report = Report("demo")
    table = Table(title=f"embedded flow model, {count} prompts each; {report.machine}")
    for column in ("", "steps", "network calls", "seconds per image", "Fréchet distance", "prompt right"):
        table.add_column(column, justify="right")
    with console.status("measuring"):
        for who, steps, student in ROWS:
            loras = ((loader.load_student(student), 1.0),) if student else ()
            network = loader.load_transformer("flow", loras).network
            mode = RUNS[student].mode if student else None
            measured, _ = evaluate.figures("flow", network, steps, student=mode, count=count)
            calls = steps * (1 if student else 2)
            cells = steps, calls, f"{measured.seconds:.4f}", f"{measured.frechet:.2f}", f"{measured.prompt:.0%}"
            table.add_row(TITLES[who], *map(str, cells))
            row = f"{TITLES[who]}, {steps}"
            report.figures |= {
                f"{row}: seconds per image": Figure(measured.seconds, "s"),
                f"{row}: Fréchet distance": Figure(measured.frechet),
                f"{row}: prompt right": Figure(measured.prompt, better="higher"),
            }
    table.add_row("held-out digits", "", "", "", f"{evaluate.floor(count):.2f}", "")
    console.print(table)
    console.print(f"contact sheet: {sheet}")
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
