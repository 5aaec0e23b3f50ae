"""Trainers: a MODEL and prompts in, a LoRA out. One node for few-step students, one for fine-tuning, one for style."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..files import texts
from ..files.atomic import checked_name
from ..files.pictures import rounded
from ..hosts.api import host, io, run_graph, training
from ..sampling.settings import declared, offered
from ..trainers.adapters import require_peft
from ..trainers.config import RunConfig
from ..trainers.dataset import NO_SIZE, Dataset, entries_of, latents_of, one_for_each, refuse_missing
from ..trainers.methods import METHODS, of_group, read_config
from ..trainers.objectives.parts.contract import Objective
from .checks import Asked, CheckedNode, about, at, is_empty, within
from .inputs import PROMPTED, completed, inputs_of, schema
from .training_inputs import (
    EXPERTS,
    NOTHING,
    SETTINGS,
    common_inputs,
    image_inputs,
    late_inputs,
    method_input,
    other_expert_input,
    reference_input,
    sources,
    training_settings,
)

CATEGORY = "model/training/retort"
LATELY = 10  # steps
EXPLODED = 1000.0  # times the loss of the beginning
ALIASES = ["retort", "train", "trainer", "lora"]
# What people type who want to train.
TRAINER_ALIASES = [*ALIASES, "train lora", "lora train", "lora training", "lora trainer"]
OUTPUTS = (
    (io.LoraModel, "lora", "The LoRA, for Load LoRA Model; it is also written to models/loras."),
    (io.LossMap, "loss", "The student's loss at each step, for the core loss graph."),
    (io.String, "file", "Name of the file in models/loras, as Load LoRA lists it."),
    (io.String, "run", "Folder of the run: metrics, previews, checkpoints, state. For Loss Chart."),
)


def one(value: Any) -> Any:
    """The single value of a widget; nodes that take lists get every input as one."""
    if isinstance(value, dict):
        return {k: one(v) for k, v in value.items()}
    return value[0] if isinstance(value, list) else value


def outputs() -> list:
    """What every trainer gives."""
    return [kind.Output(id=name, display_name=name, tooltip=tooltip) for kind, name, tooltip in OUTPUTS]


def trainer_schema(
    inputs: list, aliases: Sequence[str], sound: bool = True, references: bool = True, experts: bool = False,
    **facts: Any,
) -> io.Schema:  # fmt: skip
    """The schema of a trainer with these inputs; facts: its id and texts.

    sound, references, experts: whether it takes video with sound, pictures that a model is shown, one of two networks.
    """
    return schema(
        category=CATEGORY,
        search_aliases=[*TRAINER_ALIASES, *aliases],
        is_input_list=True,
        is_output_node=True,
        hidden=[*PROMPTED],
        inputs=[
            *inputs,
            *late_inputs(sound, experts),
            *([reference_input()] if references else []),
            *([other_expert_input()] if experts else []),
        ],
        outputs=outputs(),
        **facts,
    )


def dataset(
    settings: dict[str, Any], positive: list, latents: list, images: list, references: list, keep: bool = False
) -> Dataset:
    """What is trained on, from whichever inputs are connected, which `check_sources` finds enough; keep: the pictures
    too."""
    clip, vae, negative = (settings.get(name) for name in ("clip", "vae", "negative"))
    words = texts.captions(settings["prompts"])
    if words:
        positive = [host.encode_text(clip, prompt) for prompt in words]
    if negative is None and clip is not None:
        negative = host.encode_text(clip, "")
    if images:
        latents = [host.encode_images(vae, batch) for batch in images]
    rows, shape = latents_of(latents)
    positive = one_for_each(positive, latents)
    if shape is not None:
        # An empty latent of another model's channels still tells the size.
        shape = host.empty_latent_shape(settings["model"], latents[0]["samples"])
    empty = None if negative is None else entries_of([negative], "negative")[0]
    pictures = [picture for batch in images for picture in rounded(batch)] if keep else None
    given = latents_of(references)[0] or []
    shown = [each for each in given if isinstance(each, Tensor)]
    if references and (not shown or len(shown) < len(given)):
        raise ValueError("references are empty, or hold sound: connect pictures that VAE Encode encoded")
    told = entries_of(positive, "positive")
    return Dataset(told, words, empty, rows, shape, pictures=pictures, references=shown or None)



def check_sources(given: Asked, kind: type[Objective]) -> None:
    """ValueError for prompts and pictures that are missing, or there twice."""
    images, latents = given.connected("images"), given.connected("latents")
    if given.knows("prompts"):
        words, positive = texts.captions(given["prompts"]), given.connected("positive")
        if words and positive:
            raise ValueError("prompts are both typed and connected: clear the text, or disconnect `positive`")
        if words and not given.connected("clip"):
            raise ValueError("typed prompts need their text encoder: connect `clip`")
        if not words and not positive:
            raise ValueError("there are no prompts: type one in each line and connect `clip`, or connect `positive`")
    if images and latents:
        raise ValueError("both images and latents are connected: disconnect one of them")
    if "pictures" in kind.needs and not images:
        raise ValueError("a restorer learns from pictures, which it degrades and encodes: connect `images` and `vae`")
    if images and not given.connected("vae"):
        raise ValueError("images are encoded by a VAE: connect `vae`")
    if not images and not latents:
        refuse_missing(kind.name, kind.without_images, images=kind.needs_latents, empty=False)
        raise ValueError(NO_SIZE)


def check_settings(given: Asked, method: str = "") -> RunConfig | None:
    """What a trainer is told, where all is known. ValueError for settings that cannot be, and for a name in use."""
    require_peft()
    if given.knows("name"):
        with at("name"):
            checked_name(given["name"])
    if not given.knows(*SETTINGS, *EXPERTS, *(offered_names(method) if method else ("method",))):
        return None
    if not method:
        chosen = dict(given["method"])
        with about(*within("method", chosen)):
            METHODS[chosen.pop("method")].config(**chosen)
    config = config_of(given, method)
    if given.knows("name"):
        with at("name"):
            training.refuse_other_settings(host, given["name"], config)
    return config


def check_training(given: Asked, method: str = "") -> None:
    """What a trainer demands before anything is encoded. ValueError says what is missing, or cannot be."""
    kind = METHODS[method or given["method"]["method"]]
    check_sources(given, kind.objective)
    config = check_settings(given, method)
    reward = given.connected("reward")
    typed = not given.knows("prompts") or bool(texts.captions(given["prompts"]))
    training.refuse_rewards(kind.name, reward, given.connected("reward_2"), given.connected("vae"), typed)
    if config is None:
        return
    training.refuse_other_expert(config, given.connected("other_expert"))
    refusal = kind.objective.reward_refusal(config.objective)
    if refusal and not reward:
        raise ValueError(refusal)
    empty = not given.connected("images") and is_empty(given.links.get("latents"))
    compares = kind.objective.asks_uncond(config.objective) or config.training.prompt_dropout > 0
    refuse_missing(
        kind.objective.name,
        kind.objective.without_images,
        images=empty and kind.objective.asks_latents(config.objective),
        empty=compares and not (given.connected("negative") or given.connected("clip")),
    )


def offered_names(method: str) -> list[str]:
    """The settings of a method, by which a node that trains by it alone calls its inputs."""
    return [each.name for each in offered(METHODS[method].config)]


def config_of(given: Asked, method: str = "") -> RunConfig:
    """The configuration that a trainer's inputs spell; method: of a node that trains by one alone."""
    if method:
        objective = {name: given[name] for name in offered_names(method)}
    else:
        objective = dict(given["method"])
        method = objective.pop("method")
    more = {name: given[name] for name in EXPERTS if given[name] is not None}
    if more and "expert" in declared(METHODS[method].config):
        objective |= more
    elif more and more["expert"] != "whole":
        raise ValueError(f"expert {more['expert']!r}: {method} trains a network on all its levels; set it to whole")
    values = {name: given[name] for name in SETTINGS if given[name] is not None}
    return read_config({"method": method, "objective": objective, **training_settings(values)})


def read(
    node: type[io.ComfyNode], given: dict[str, Any], method: str = ""
) -> tuple[dict[str, Any], training.Request]:
    """(single values of all inputs, what is to be trained); method: of a node that trains by one alone."""
    several = {name: given.pop(name, None) or [] for name in ("positive", "latents", "images", "references")}
    settings = completed(node, {name: one(value) for name, value in given.items()})
    # Texts that are connected come one for each picture.
    if len(given.get("prompts") or ()) > 1:
        settings["prompts"] = given["prompts"]
    asked = Asked({**settings, **several})
    check_training(asked, method)
    config = config_of(asked, method)
    named = settings["start_from"]
    start, recipe = (None, "") if named == NOTHING else training.start_of(host, named)
    data = dataset(settings, **several, keep="pictures" in METHODS[config.method].objective.needs)
    return settings, training.Request(settings["name"], config, data, start, recipe)


def train(node: type[io.ComfyNode], given: dict[str, Any], method: str = "") -> io.NodeOutput:
    """Train here and now, whichever node asked; see `read`."""
    settings, request = read(node, given, method)
    vae, reward, second, other = (settings.get(name) for name in ("vae", "reward", "reward_2", "other_expert"))
    return run(node, settings["model"], request, vae, reward=reward, second=second, other=other)


class TrainingNode(CheckedNode):
    """What all nodes that train have in common. method: of one that trains by it alone."""

    method: ClassVar[str] = ""

    @classmethod
    def check(cls, given):
        """See the base."""
        check_training(given, cls.method)

    @classmethod
    def fingerprint_inputs(cls, name=None, **given):
        """A run that was stopped has handed out its LoRA so far, and goes on when it is queued again."""
        return training.handed_out(one(name))


def run(
    node: type[io.ComfyNode], model: Any, request: training.Request, vae: Any, problems: Sequence[str] = (),
    reward: Any = None, second: Any = None, other: Any = None,
) -> io.NodeOutput:  # fmt: skip
    """Train what is asked for; problems: what the node shows of data that were left out."""
    watcher = training.HostWatcher(host, request.config.training.steps)
    bare = run_graph.uncaptioned(node.hidden, host.input_folders()[0])
    for sentence in bare:
        host.say(sentence, warn=True)
    try:
        result = training.run_in_node(
            host, model, request, watcher=watcher, vae=vae, reward=reward, second=second, other=other
        )
    finally:
        run_graph.keep(host.runs_folder() / checked_name(request.name), node.hidden)
    assert result.path is not None
    # The page shows the run with its previews on the node, also where another node gives its name.
    wanted = request.config.training.steps
    ended = f" of {wanted}, stopped: {result.stopped}" if result.stopped else ""
    named = [result.renamed] if result.renamed else []
    more = [*training.longer(result, request.config), *named, *problems, *bare, *_grown(result.losses)]
    shows: dict[str, Any] = {
        "text": (f"{result.path.name}, {result.steps} steps{ended}", *more),
        "retort_run": (result.folder.name,),
    }
    return io.NodeOutput(result.lora, {"loss": result.losses}, result.path.name, result.folder.name, ui=shows)


def _grown(losses: Sequence[float]) -> list[str]:
    """A sentence where a loss ended far above where it began, of which no LoRA is any good."""
    if len(losses) < 2 * LATELY:
        return []
    before, after = (statistics.median(part) for part in (losses[:LATELY], losses[-LATELY:]))
    if after < EXPLODED * max(before, 1e-6):
        return []
    return [f"the loss has grown from {before:.3g} to {after:.3g}: lower learning_rate, under another name"]


class RetortTrainDistillation(TrainingNode):
    """Make a one-step or few-step LoRA of a model."""

    @classmethod
    def define_schema(cls):
        return trainer_schema(
            node_id="RetortTrainDistillation",
            display_name="Train Distillation",
            description=(
                "Teaches a LoRA to sample this model in one to four steps, guidance included. Needs prompts only; "
                "images make it better where a method has a discriminator. The model that comes in is the teacher, "
                "with its LoRAs. The queue waits until it is done: use Training Job for long runs."
            ),
            aliases=[
                "distil", "few step", "one step", "turbo", "lightning", "dmd", "dmd2", "tdm", "f-distill",
                "diff-instruct", "lcm", "sdxl lightning", "sdxl turbo", "lcm lora", "train lcm", "speed up",
            ],
            inputs=[*sources(), io.Custom("REWARD").Input(
                "reward", optional=True, tooltip="DI* only: a differentiable reward that the student learns to please."
            ), method_input(of_group("distillation")), *common_inputs("my_student", 500, 64)],
        )  # fmt: skip

    @classmethod
    def execute(cls, **given):
        return train(cls, given)


class RetortTrainFlow(TrainingNode):
    """Fine-tune a model on images with the loss that it was made with."""

    method = "flow"

    @classmethod
    def define_schema(cls):
        return trainer_schema(
            node_id="RetortTrainFlow",
            display_name="Train LoRA on Images (Flow Matching)",
            description=(
                "Fine-tunes a LoRA on images: flow matching for flow models, noise or velocity prediction for others, "
                "in the network's own loss space and with the levels that suit it."
            ),
            experts=True,
            aliases=[
                "fine-tune", "finetune", "fine tune", "dreambooth", "kohya", "flow matching", "lfm", "pfgm", "style",
                "character",
            ],
            inputs=[
                *sources(),
                *inputs_of(METHODS["flow"].config),
                *common_inputs("my_style", 500, 16, fake=False),
                *image_inputs(),
            ],
        )

    @classmethod
    def execute(cls, **given):
        return train(cls, given, cls.method)


class RetortFewShotAdapt(TrainingNode):
    """Learn a style from about ten images without copying them."""

    method = "few_shot"

    @classmethod
    def define_schema(cls):
        return trainer_schema(
            node_id="RetortFewShotAdapt",
            display_name="Few-Shot Adapt",
            description=(
                "Adapts a LoRA to about ten images: their style at fine detail, the model's own variety above it. A "
                "directional loss keeps what the model can draw."
            ),
            sound=False,
            references=False,
            aliases=["few shot", "style transfer", "ddc", "phasic"],
            inputs=[
                *sources(),
                *inputs_of(METHODS["few_shot"].config),
                *common_inputs("my_domain", 300, 16, fake=False),
                *image_inputs(),
            ],
        )

    @classmethod
    def execute(cls, **given):
        return train(cls, given, cls.method)
