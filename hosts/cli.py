"""The command line: `retort run`, `search`, `train`, `plan`, `job`, `lora`, `nodes` and `doctor`.

Mistakes that the user can mend are one message on stderr and exit code 2; --debug adds where they arose.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from ..files.errors import UsageError
from ..graphs import registry
from ..graphs.run import Runner
from ..graphs.run import run as run_workflow
from ..graphs.search_prompts import read_prompts, search_prompts
from ..trainers import job_watch
from ..trainers.job import checked_folder
from ..trainers.loop import TrainingFailed
from ..trainers.parallel import place
from ..trainers.watch import Silent
from . import workflow_doctor
from .contract import Host
from .headless import device, extra_paths, folders
from .headless import doctor as headless_doctor
from .headless.folders import Folders
from .headless.host import host
from .inprocess.find import find as find_comfyui
from .inprocess.session import Session
from .job import enter_comfyui
from .jobs.process import run_job
from .lora_convert import Rows
from .lora_convert import convert as convert_lora
from .terminal import Plain, cell
from .training import plan_report

app = typer.Typer(
    help="Run ComfyUI workflows from the command line: by a ComfyUI that is there, or without one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
job_app = typer.Typer(help="Look at a training job, and tell it what to do.", no_args_is_help=True)
app.add_typer(job_app, name="job")
lora_app = typer.Typer(help="Change LoRA files.", no_args_is_help=True)
app.add_typer(lora_app, name="lora")
_out, _err = Plain(soft_wrap=True), Plain(stderr=True, soft_wrap=True)

Models = Annotated[
    list[Path] | None,
    typer.Option("--models", help="Folder laid out as ComfyUI's models folder; may be given more than once."),
]


Inputs = Annotated[
    list[Path] | None,
    typer.Option("--input", help="Folder of images; the built-in host takes several. ComfyUI's own is the default."),
]
Configs = Annotated[
    list[Path] | None,
    typer.Option(
        extra_paths.OPTION,
        help="Further folders of models, as ComfyUI's extra_model_paths.yaml names them; the file of that name beside "
        "a --models folder is read too. May be given more than once.",
    ),
]


ComfyUI = Annotated[
    Path | None,
    typer.Option(
        "--comfyui",
        help="Folder of the ComfyUI to run on, with all its nodes; else that of COMFYUI_PATH, or the one whose "
        "custom_nodes holds Retort.",
    ),
]
BuiltIn = Annotated[bool, typer.Option("--built-in", help="Run without ComfyUI, even where there is one.")]
Theirs = Annotated[list[str] | None, typer.Argument(metavar="[-- ARGUMENTS]", help="ComfyUI's own arguments.")]
CANCELLED = 130  # as shells say it of a program that Ctrl-C ended


def _folders(models: list[Path] | None, configs: list[Path] | None, **more: Any) -> Folders:
    environment = Folders.from_environment()
    return Folders(models=(*(models or []), *environment.models), configs=tuple(configs or ()), **more)


class Bars:
    """Progress on stderr, for runs that take longer than a second; a progress.Watcher."""

    def __init__(self) -> None:
        self._started = self._drawn = time.monotonic()
        self._progress: Progress | None = None
        self._node = self._title = (0, 1, "")

    def node(self, done: int, total: int, title: str) -> None:
        """A node begins."""
        self._node = (done, total, title)
        self._draw(0, None)

    def step(self, done: int, total: int) -> None:
        """A step of it is done."""
        now = time.monotonic()
        # Drawing costs a millisecond; steps may take less.
        if now - self._drawn > 0.1 or done == total:
            self._draw(done, total)

    def close(self) -> None:
        """Take the bars away."""
        if self._progress is not None:
            self._progress.stop()

    def _draw(self, done: int, total: int | None) -> None:
        self._drawn = time.monotonic()
        if self._progress is None:
            if self._drawn - self._started < 1.0:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=_err, transient=True)
            self._nodes = self._progress.add_task("nodes")
            self._steps = self._progress.add_task("")
            self._progress.start()
        at, of, title = self._node
        self._progress.update(self._nodes, completed=at, total=of)
        self._progress.update(self._steps, description=title, completed=done, total=total, visible=total is not None)


@contextmanager
def _bars(mistake: type[ValueError], debug: bool) -> Iterator[Bars]:
    """Bars that are closed in the end; a mistake ends the command with its message, and with debug its traceback.

    Ctrl-C ends it at once, whatever is in files by then.
    """
    bars = Bars()
    # In place of Python's own handler, which asyncio would replace by one that waits for nodes to end.
    before = signal.signal(signal.SIGINT, _interrupted)
    try:
        yield bars
    except KeyboardInterrupt:
        bars.close()
        _err.print("cancelled", style="yellow")
        raise typer.Exit(CANCELLED) from None
    except mistake as error:
        bars.close()
        if debug:
            _err.print_error()
        _fail(str(error))
    finally:
        signal.signal(signal.SIGINT, before)
        bars.close()


def _interrupted(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@app.command()
def run(
    workflow: Annotated[Path, typer.Argument(help="Workflow JSON (UI or API format), or a PNG that carries one.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NODE.INPUT=VALUE", help="Change a value; NODE is an id or a title."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the images.")] = Path("output"),
    seed: Annotated[int | None, typer.Option("--seed", help="Give every seed this value.")] = None,
    models: Models = None,
    configs: Configs = None,
    inputs: Inputs = None,
    comfyui: ComfyUI = None,
    built_in: BuiltIn = False,
    arguments: Theirs = None,
    previews: Annotated[
        bool,
        typer.Option("--previews", help="On ComfyUI: keep what a node shows while it works in OUT/preview, by step."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    """Run a workflow and save its images; Ctrl-C ends it and keeps those that are finished."""
    started = time.monotonic()
    with _bars(UsageError, debug) as bars:
        runner, session = _runner(comfyui, built_in, arguments, models, configs, previews)
        # ComfyUI has an input folder of its own.
        beside = _inputs_beside(workflow) if session is None else ()
        where = _folders(models, configs, inputs=tuple(inputs or beside), output=out)
        outcome = runner(workflow, where=where, sets=set_ or (), seed=seed, watcher=bars)
    for note in outcome.notes:
        _err.print(note, style="yellow", markup=False, highlight=False)
    for text in outcome.texts:
        _out.print(text, markup=False, highlight=False)
    for path in outcome.saved:
        _out.print(str(path), markup=False, highlight=False)
    seconds = time.monotonic() - started
    stopped = ", then cancelled" if outcome.cancelled else ""
    _err.print(f"{len(outcome.saved)} images in {seconds:.1f} s{stopped}", style="dim", highlight=False)
    if outcome.cancelled:
        raise typer.Exit(CANCELLED)


def _runner(
    comfyui: Path | None, built_in: bool, arguments: list[str] | None, models: list[Path] | None,
    configs: list[Path] | None, previews: bool = False,
) -> tuple[Runner, Session | None]:  # fmt: skip
    """What runs workflows, and ComfyUI, where it is that."""
    folder = None if built_in else find_comfyui(comfyui)
    if folder is None:
        if arguments:
            raise UsageError(f"{' '.join(arguments)}: these would be ComfyUI's arguments, and none is used here")
        if previews:
            raise UsageError("--previews: only ComfyUI draws while it samples: name one by --comfyui, or leave it out")
        return run_workflow, None
    session = Session(folder, arguments or (), _folders(models, configs))
    # It imports ComfyUI's modules, which can be imported now.
    from .inprocess.run import run as run_there

    return functools.partial(run_there, session, previews=previews), session


def _inputs_beside(workflow: Path) -> tuple[Path, ...]:
    return (workflow.parent / "input", workflow.parent, *Folders.from_environment().inputs)


@app.command()
def search(
    workflow: Annotated[Path, typer.Argument(help="Workflow with a search, as `run` takes it.")],
    prompts: Annotated[Path, typer.Argument(help="Text file with a prompt in each line.")],
    at: Annotated[
        list[str] | None,
        typer.Option("--at", metavar="NODE.INPUT", help="Where prompts go; else the String node of the search."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NODE.INPUT=VALUE", help="As in `run`.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for a folder of each prompt.")] = Path("output"),
    seed: Annotated[int | None, typer.Option("--seed", help="Give every seed this value.")] = None,
    models: Models = None,
    configs: Configs = None,
    comfyui: ComfyUI = None,
    built_in: BuiltIn = False,
    arguments: Theirs = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    """Search for each prompt of a list; under `accelerate launch` processes share the list. Goes on where it ended."""
    with _bars(ValueError, debug) as bars:
        listed, share = read_prompts(prompts), place()
        runner, session = _runner(comfyui, built_in, arguments, models, configs)
        if session is None:
            device.take(int(os.environ.get("LOCAL_RANK", "0")))
        beside = _inputs_beside(workflow) if session is None else ()
        where = _folders(models, configs, inputs=beside, output=out)
        for row in search_prompts(
            workflow, listed, where=where, at=at or (), sets=set_ or (), seed=seed, share=share, watcher=bars,
            known=None if session is None else session.known, runner=runner,
        ):  # fmt: skip
            text = "\n".join(row.texts)
            _out.print(f"{row.folder}: {row.prompt}\n{text}".rstrip(), markup=False, highlight=False)


@app.command()
def nodes(models: Models = None, configs: Configs = None) -> None:
    """List the nodes that `retort run` knows."""
    with folders.use(_folders(models, configs)):
        known = asyncio.run(registry.everything())
    columns = (Column("node", no_wrap=True), *(Column(c, overflow="fold") for c in ("category", "inputs", "outputs")))
    table = Table(*columns, box=None, header_style="bold")
    for schema in sorted(known, key=lambda s: (not s.node_id.startswith("Retort"), s.category, s.node_id)):
        inputs = ", ".join(f"[{i.id}]" if i.optional else i.id for i in schema.inputs)
        outputs = ", ".join(o.display_name or o.get_io_type() for o in schema.outputs)
        table.add_row(schema.node_id, schema.category, cell(inputs), outputs)
    _out.print(table)


@app.command()
def doctor(
    workflow: Annotated[Path | None, typer.Argument(help="Workflow whose nodes and files are looked for.")] = None,
    arguments: Theirs = None,
    models: Models = None,
    configs: Configs = None,
    inputs: Inputs = None,
    comfyui: ComfyUI = None,
    built_in: BuiltIn = False,
) -> None:
    """Show what is installed, what is missing and how to get it; of a workflow, what it runs on and lacks there."""
    beside = () if workflow is None else _inputs_beside(workflow)
    where = _folders(models, configs, inputs=tuple(inputs or beside))
    with _bars(UsageError, False), folders.use(where):
        if workflow is None:
            findings = headless_doctor.examine()
        else:
            _, session = _runner(comfyui, built_in, arguments, models, configs)
            known = asyncio.run(registry.everything()) if session is None else session.known
            host = "the built-in host" if session is None else f"the ComfyUI in {session.folder}"
            kind = (lambda options: "of its kind") if session is None else session.folder_of
            findings = workflow_doctor.examine(workflow, known, host, kind)
    table = Table(*(Column(overflow="fold") for _ in range(4)), show_header=False, box=None)
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[yellow]--[/]"
        table.add_row(mark, cell(finding.name), cell(finding.detail), cell(finding.remedy))
    _out.print(table)


class TrainingBar(Silent):
    """A training on stderr; a trainers.watch.Watcher."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=_err, transient=True)
        self._task = self._progress.add_task("loading", total=None)

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        loss = metrics.get("student_loss")
        title = "training" if loss is None else f"loss {loss:.4g}"
        self._progress.update(self._task, completed=done, total=total, description=title)

    def says(self, text: str) -> None:
        """Beside the bar."""
        self._progress.update(self._task, description=cell(text))

    def phase(self, name: str, done: int, total: int) -> None:
        """On the bar, until the first step."""
        self._progress.update(self._task, completed=done, total=total, description=name)


@app.command()
def train(
    job: Annotated[Path, typer.Argument(help="job.json, or its folder.")],
    models: Models = None,
    configs: Configs = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the LoRA when no --models is given.")] = Path("output"),
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    """Do a training job, or go on with one; Ctrl+C saves it and leaves."""
    try:
        with folders.use(_folders(models, configs, output=out)), TrainingBar() as bar:
            status = run_job(host, job, bar)
            lora = host.loras_folder() / status.lora
    except (ValueError, OSError, ImportError, TrainingFailed) as error:
        if debug:
            _err.print_error()
        _fail(str(error))
    if status.state != "finished":
        _err.print(str(status), style="yellow", markup=False, highlight=False)
        raise typer.Exit(3)
    _out.print(str(lora), markup=False, highlight=False)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="File of a model, or a pipeline's folder; only its header is read.")],
    method: Annotated[str, typer.Option("--method", help="Training method, such as flow, dmd2 or dpo.")] = "flow",
    width: Annotated[int, typer.Option("--width", min=16, help="Pixels.")] = 1024,
    height: Annotated[int, typer.Option("--height", min=16, help="Pixels.")] = 1024,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Of a video.")] = 1,
    rank: Annotated[int, typer.Option("--rank", help="Size of the LoRA.")] = 16,
    batch: Annotated[int, typer.Option("--batch", help="Samples on the GPU at once.")] = 1,
    optimiser: Annotated[str, typer.Option("--optimiser", help="adamw, adamw8bit, adafactor or prodigy.")] = "adamw",
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="Length of a prompt; 0 for the usual one.")] = 0,
    cards: Annotated[str, typer.Option("--cards", help="Sizes in GB, with commas between.")] = plan_report.CARDS,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting of the run, such as precision=fp32."),
    ] = None,
    comfyui: Annotated[
        Path | None, typer.Option("--comfyui", help="Folder of ComfyUI, which knows more models.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    """Say what a training would take in memory, and on which cards it fits; no weight is read."""
    try:
        found: Host = host
        if comfyui is not None:
            # Without a card of its own ComfyUI does not start but so, and a plan is for others.
            enter_comfyui(comfyui, None, [], [] if torch.accelerator.is_available() else ["--cpu"])
            found = importlib.import_module("..hosts.comfyui.host", __package__).host
        if not model.exists():
            raise ValueError(f"there is no {model}")
        made, entry, shape = found.from_header(model, width, height, frames, tokens)
        config = plan_report.settings(method, rank, batch, optimiser, set_ or ())
        judged = plan_report.stand_ins(found, config)
        dataset = plan_report.sample(method, entry, shape)
        text = plan_report.report(found, made, config, dataset, plan_report.sizes(cards), *judged)
    except (ValueError, OSError, ImportError) as error:
        if debug:
            _err.print_exception()
        _fail(str(error))
    _out.print(text, markup=False, highlight=False)


JobFolder = Annotated[Path, typer.Argument(help="Folder of the job.")]


@job_app.command()
def status(folder: JobFolder) -> None:
    """Show where a job stands; exit code 3 when it is neither finished nor going on."""
    with _told():
        found = job_watch.read_status(checked_folder(folder))
    _out.print(str(found), markup=False, highlight=False)
    if found.log:
        _err.print(found.log, style="dim", markup=False, highlight=False)
    if not found.going and found.state != "finished":
        raise typer.Exit(3)


@job_app.command()
def stop(folder: JobFolder) -> None:
    """Let a job save and end after the step that it is at."""
    _send(folder, "stop")


@job_app.command()
def save(folder: JobFolder) -> None:
    """Let a job save its state and a checkpoint now."""
    _send(folder, "save")


@job_app.command()
def sample(folder: JobFolder) -> None:
    """Let a job draw a preview now."""
    _send(folder, "sample")


def _send(folder: Path, command: str) -> None:
    with _told():
        found = job_watch.read_status(checked_folder(folder))
        if not found.going:
            raise ValueError(f"the job in {folder} is not going on: {found}")
        job_watch.send(checked_folder(folder), command)


@lora_app.callback()
def _lora() -> None:
    """Keeps `convert` a command of its own while there is no other."""


@lora_app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="LoRA under any published names, a safetensors file.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; by default one beside it.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="File of the model that it is for; only its header is read.")
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Alpha of layers whose file says none.")] = None,
    rows: Annotated[
        Rows | None,
        typer.Option(
            "--rows",
            help="For DiffSynth-Studio's LoRAs of MiniMax-H3: heads where they were trained on MiniMax's own files, "
            "parts where on ComfyUI's.",
        ),
    ] = None,
) -> None:
    """Write a LoRA under the names that ComfyUI and other loaders read, and say what has no place there."""
    with _told():
        made = convert_lora(file, out, model, alpha, rows)
    for text in made.told:
        _err.print(text, style="yellow", markup=False, highlight=False)
    _out.print(str(made.path), markup=False, highlight=False)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    _err.print(f"error: {message}", style="red", markup=False, highlight=False)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
