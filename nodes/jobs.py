"""Training as a process of its own, which outlives the queue and ComfyUI: start it, look at it, collect its LoRA."""

from __future__ import annotations

import time
from pathlib import Path

from ..files.atomic import checked_name
from ..files.folder import inside
from ..files.log_file import METRICS, column, thinned
from ..hosts.api import ExecutionBlocker, host, io, latest_runs, run_graph, starter, ui
from ..trainers.chart import draw
from ..trainers.export import read_lora
from ..trainers.job import refuse_reward
from ..trainers.job_watch import Status, has_status, read_status, send
from ..trainers.methods import METHODS, needing
from ..trainers.watch import checkpoints, latest_preview, open_picture, read_picture
from .checks import Asked, CheckedNode, at
from .inputs import PROMPTED, completed, number, schema
from .preference import PREFERENCES, asked, check_pairs
from .training import ALIASES, CATEGORY, NOTHING, TRAINER_ALIASES, check_training, config_of, one, read
from .training_inputs import (
    EXPERTS,
    SETTINGS,
    common_inputs,
    image_inputs,
    late_inputs,
    method_input,
    other_expert_input,
    reference_input,
    sources,
)

COMMANDS = [NOTHING, "sample", "save", "stop"]
LOOK_EVERY = 0.5
MOST_NAMED = 5  # runs in a message
MOST_ROWS = 10_000  # of a long log in a chart, which is not as wide


def folder_of(run: str) -> Path:
    """The folder of a run by its name. ValueError for a name that leads elsewhere, or that no run has."""
    folder = host.runs_folder() / checked_name(run)
    if not folder.is_dir():
        known = latest_runs(host.runs_folder(), MOST_NAMED)
        there = f", but {', '.join(known)}: type one of these, or" if known else ":"
        raise ValueError(
            f"run: there is no run called {run!r} in {host.runs_folder()}{there} connect the trainer's `run`"
        )
    inside(folder).refuse_links()
    return folder


def _of_pairs(joined: str) -> str:
    """The methods that learn from pairs, as a sentence lists them."""
    *others, last = needing("comparisons")
    return f"{', '.join(others)} {joined} {last}"


def check_run(given: Asked) -> None:
    """ValueError for a run's name that leads elsewhere; one that nobody has yet may be started by the same prompt."""
    if given.knows("run"):
        with at("run"):
            checked_name(given["run"])


def _status(run: str) -> Status | None:
    folder = host.runs_folder() / checked_name(run)
    return read_status(folder) if has_status(folder) else None


class RetortTrainingJob(CheckedNode):
    """Start a training in a process of its own and return at once."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortTrainingJob",
            display_name="Training Job",
            category=CATEGORY,
            description=(
                "Starts a training that runs beside ComfyUI and goes on when ComfyUI ends; the queue is free at once. "
                "Queue it again to go on with a job that was stopped. ComfyUI gives up what it "
                "holds of the GPU when it starts."
            ),
            search_aliases=[
                *TRAINER_ALIASES, "fine-tune", "dreambooth", "kohya", "distil", "dmd2", "dpo", "background",
                "multi gpu", "accelerate",
            ],
            is_input_list=True,
            hidden=[*PROMPTED],
            is_output_node=True,
            inputs=[
                *sources(),
                method_input(name for name, each in METHODS.items() if "reward" not in each.objective.needs),
                *common_inputs("my_job", 1000, 64),
                number(
                    "processes", 1, 1, 1024,
                    "GPUs that share each step (`accelerate launch`); batch_size x accumulation is their sum.",
                ),
                PREFERENCES.Input(
                    "pairs", optional=True, tooltip=f"{_of_pairs('and')}: the pairs to learn from, instead of images."
                ),
                *image_inputs(),
                *late_inputs(experts=True),
                reference_input(),
                other_expert_input(),
            ],
            outputs=[
                io.String.Output(id="run", display_name="run", tooltip="For Job Result and Loss Chart."),
                io.String.Output(id="status", display_name="status", tooltip="Where the job stands."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name="", **given):
        """A job that does not go on, and has not finished, is to be started again."""
        status = _status(one(name)) if one(name) else None
        return "there" if status is not None and (status.going or status.state == "finished") else time.time()

    @classmethod
    def check(cls, given):
        """See the base."""
        method = given["method"]["method"]
        if given.knows("method", *SETTINGS, *EXPERTS):
            refuse_reward(config_of(given))
        if "comparisons" in METHODS[method].objective.needs:
            if given.connected("references"):
                raise ValueError(f"references: {method} learns from pairs, which bring their own; disconnect them")
            check_pairs(given)
        elif given.connected("pairs"):
            raise ValueError(f"pairs: {method} learns from none; choose {_of_pairs('or')}, or disconnect them")
        else:
            check_training(given)
        if given.knows("processes"):
            starter.require_accelerate(given["processes"])

    @classmethod
    def execute(cls, **given):
        settings = completed(cls, one(given))
        problems: list[str] = []
        processes, start, method = settings["processes"], settings["start_from"], settings["method"]["method"]
        cls.check(Asked(settings))
        if "comparisons" in METHODS[method].objective.needs:
            request, problems = asked(settings)
        else:
            settings, request = read(cls, given)
        run = checked_name(request.name)
        folder = host.runs_folder() / run
        status = _status(run)
        if status is None or not status.going:
            starter.write_job(
                host, folder, settings["model"], request, settings.get("vae"), "" if start == NOTHING else start,
                settings.get("other_expert"),
            )
            run_graph.keep(folder, cls.hidden)
            host.make_room()  # the job is another process, and would find only what is left
            starter.start(folder, host.job_arguments(), processes)
            status = read_status(folder)
        return io.NodeOutput(run, str(status), ui=ui.PreviewText("\n".join([f"{run}: {status}", *problems])))


class RetortCollectJob(CheckedNode):
    """Look at a job, tell it something, take its LoRA."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortCollectJob",
            display_name="Job Result",
            category=CATEGORY,
            description=(
                "Takes the LoRA of a job: the finished one, or the latest checkpoint while it goes on; before the "
                "first one the nodes that need the LoRA are left out. Cancelling this node ends the waiting, not the "
                "job."
            ),
            search_aliases=[*ALIASES, "job", "status", "stop"],
            is_output_node=True,
            inputs=[
                io.String.Input("run", default="my_job", tooltip="Name of the run, or Training Job's output."),
                io.Boolean.Input("wait", default=True, tooltip="Wait until the job ends, showing how far it is."),
                io.Combo.Input(
                    "command",
                    options=COMMANDS,
                    default=NOTHING,
                    tooltip="sample: draw previews now. save: write a checkpoint now. stop: save and end.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(id="lora", display_name="lora", tooltip="For Load LoRA Model."),
                io.LossMap.Output(id="loss", display_name="loss", tooltip="The student's loss at each step."),
                io.String.Output(id="file", display_name="file", tooltip="The finished LoRA's name in models/loras."),
                io.Image.Output(id="preview", display_name="preview", tooltip="The latest preview."),
                io.String.Output(id="status", display_name="status", tooltip="Where the job stands."),
                io.String.Output(id="run", display_name="run", tooltip="For Loss Chart, which then waits too."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, run="", **given):
        """Again whenever the job has moved; always where the name is connected, which is not known here."""
        if not isinstance(run, str):
            return time.time()
        status = _status(run) if run else None
        if status is None:
            return "none"
        # A job that was trained anew, to as many steps, has another time.
        return f"{status.state} {status.step} {time.time() if status.going else status.time} {status.lora}"

    @classmethod
    def check(cls, given):
        """See the base."""
        check_run(given)

    @classmethod
    def execute(cls, run, wait=True, command=NOTHING):
        folder = folder_of(run)
        status = read_status(folder)
        if command != NOTHING and status.going:
            send(folder, command)
        progress = host.progress(max(1, status.steps))
        shown = None
        while wait and status.going:
            host.check_cancelled()
            time.sleep(LOOK_EVERY)
            status = read_status(folder)
            latest = latest_preview(folder)
            progress.step(
                status.step, preview=None if latest in (None, shown) else open_picture(latest), text=str(status)
            )
            shown = latest
        if status.state in ("failed", "died"):
            raise ValueError(f"run {run!r} {status}\n{status.log}".rstrip())
        finished = status.state == "finished"
        text = f"{run}: {status}"
        log = inside(folder) / METRICS
        if not finished and not checkpoints(folder):
            if not status.going:
                raise ValueError(
                    f"run {run!r} {status}, and there is no checkpoint of it: queue Training Job again to go on, with "
                    "`keep` above 0"
                )
            # Nothing to hand on yet, which is no mistake: what needs the LoRA waits for the next time.
            nothing = ExecutionBlocker(None)
            text += "\nThere is no checkpoint yet, so the nodes behind this one were left out: press Run again later"
            latest = latest_preview(folder)
            return io.NodeOutput(
                nothing, nothing, "", nothing if latest is None else read_picture(latest), text,
                run if log.is_file() else nothing, ui=ui.PreviewText(text),
            )  # fmt: skip
        lora = read_lora(_finished(status.lora, run) if finished else checkpoints(folder)[-1].checked())
        losses = column(log, "student_loss")
        image = read_picture(latest_preview(folder))
        return io.NodeOutput(lora, {"loss": losses}, status.lora, image, text, run, ui=ui.PreviewText(text))


def _finished(name: str, run: str) -> Path:
    """The file of a finished job. A stranger's status may name any: it must be one of the folder of LoRAs itself."""
    try:
        if f"{checked_name(name)}.safetensors" != name:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"run {run!r} says that its LoRA is {name!r:.140}, which is no file's name: Retort did not write that. "
            "Start the job again to go on"
        ) from None
    return host.loras_folder() / name


class RetortLossChart(CheckedNode):
    """A run's log as a picture."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortLossChart",
            display_name="Loss Chart",
            category=CATEGORY,
            description="Draws every number of a run over its steps, also of one that still goes on, or that failed.",
            search_aliases=[*ALIASES, "loss", "graph", "plot", "metrics"],
            is_output_node=True,
            inputs=[
                io.String.Input("run", default="my_student", tooltip="Name of the run, or a trainer's output."),
                io.Int.Input(
                    "smoothing", default=25, min=1, max=10_000, tooltip="Steps that the strong line averages."
                ),
                io.Boolean.Input("log_scale", default=False, tooltip="Logarithmic, where all values are positive."),
            ],
            outputs=[io.Image.Output(tooltip="The chart.")],
        )

    @classmethod
    def fingerprint_inputs(cls, run="", **given):
        """Again whenever the log has grown; always where the name is connected, which is not known here."""
        if not isinstance(run, str):
            return time.time()
        return (inside(host.runs_folder() / checked_name(run)) / METRICS).changed() if run else 0

    @classmethod
    def check(cls, given):
        """See the base."""
        check_run(given)

    @classmethod
    def execute(cls, run, smoothing=25, log_scale=False):
        rows, each = thinned(inside(folder_of(run)) / METRICS, MOST_ROWS)
        image = draw(rows, smoothing / each, log_scale)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
