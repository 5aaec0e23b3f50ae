"""Picking by hand: pictures wait for a person beside a set, and prompts come one after another while they do."""

from __future__ import annotations

import time

from ..files import texts
from ..hosts.api import io
from ..preferences import store as preferences
from ..preferences import tickets
from ..preferences.tickets import Ticket
from ..trainers.dataset import latents_of
from .checks import Asked, CheckedNode, at, batch_of
from .inputs import number, schema
from .preference import ALIASES, CATEGORY, references_of, set_folder


def _check_count(images: int, size: int) -> None:
    if images % size:
        raise ValueError(
            f"{images} images cannot be shared out in sets of {size}: set the batch_size of the latent to {size} or a "
            "multiple, or choose other candidates"
        )


class RetortPreferencePicker(CheckedNode):
    """Pictures that wait on the node for a click, and make pairs of a set."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortPreferencePicker",
            display_name="Preference Picker",
            category=CATEGORY,
            description=(
                "Shows two or four candidates of a prompt side by side, and adds what you click, or choose by a key, "
                "to a set of preferences. Nothing waits for you: what is drawn stays until it is judged."
            ),
            search_aliases=[*ALIASES, "pick", "click", "vote", "choose", "a/b", "human feedback"],
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="Candidates of one prompt: a batch of 2 or 4, or of several such sets in a row."
                ),
                io.Latent.Input(
                    "samples",
                    optional=True,
                    tooltip=(
                        "The same candidates as latents, which the pairs then name: training encodes nothing again, "
                        "but serves models with this VAE only."
                    ),
                ),
                io.String.Input("prompt", default="", tooltip="What the candidates were to show."),
                io.String.Input(
                    "name", default="my_taste", tooltip="The set: a folder in output/retort_preferences, made if new."
                ),
                io.Combo.Input(
                    "candidates",
                    options=["2", "4"],
                    default="2",
                    tooltip="How many are compared at once; the best of 4 makes three pairs.",
                ),
                io.String.Input(
                    "by",
                    default="pick",
                    tooltip="Who picks: stands beside each pair, and each name is asked for itself.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip=(
                        "Edit models: the picture that the candidates are edits of, one for all or one for each set. "
                        "It is shown above them, and training shows it to the model."
                    ),
                ),
            ],
            outputs=[
                io.Int.Output(id="waiting", display_name="waiting", tooltip="Sets of candidates that wait for you."),
                io.String.Output(id="text", display_name="text", tooltip="How many wait, are judged and were skipped."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **given):
        """Always again: what waits is in files, and pictures that were asked about already are not asked twice."""
        return time.time()

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("name"):
            with at("name"):
                set_folder(given["name"])
        count = batch_of(given.links.get("images"))
        if count is not None and given.knows("candidates"):
            with at("candidates"):
                _check_count(count, int(given["candidates"]))

    @classmethod
    def execute(cls, images, prompt="", name="my_taste", candidates="2", by="pick", samples=None, reference=None):
        folder, size = set_folder(name), int(candidates)
        _check_count(len(images), size)
        latents = None if samples is None else latents_of([samples])[0]
        if samples is not None and (latents is None or len(latents) != len(images)):
            raise ValueError(
                f"samples holds {len(latents or [])} pictures and images {len(images)}: connect what images was "
                "decoded from"
            )
        shown = references_of(reference, folder, len(images) // size, "sets of candidates")
        asked, alike = [], 0
        for begin in range(0, len(images), size):
            rows = range(begin, begin + size)
            files = [preferences.keep_image(folder, images[i]) for i in rows]
            if len(set(files)) < size:
                alike += 1
                continue
            kept = () if latents is None else tuple(preferences.keep_latent(folder, latents[i]) for i in rows)
            asked.append(Ticket(prompt, tuple(files), kept, by, shown[begin // size]))
        added = tickets.ask(folder, asked)
        with tickets.at(folder, by) as state:
            waiting = len(state.waiting)
            text = (
                f"{folder.name}: {waiting} waiting ({len(added)} new), {state.count(skipped=False)} judged, "
                f"{state.count(skipped=True)} skipped"
            )
            problems = state.problems[: preferences.SHOWN]
        if alike:
            text += f"\n{alike} sets held the same picture twice and were left out: sample with another seed"
        told = {"text": (text,), "tickets": added, "set": (folder.name,), "by": (by,)}
        return io.NodeOutput(waiting, "\n".join([text, *problems]), ui=told)


class RetortPromptQueue(CheckedNode):
    """One prompt of many, the next one each time."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortPromptQueue",
            display_name="Next Prompt of a List",
            category=CATEGORY,
            description=(
                "Gives one prompt of a list, the next one each time the workflow is queued. Preference Picker draws "
                "ahead through such a list, and stops at its end."
            ),
            search_aliases=[*ALIASES, "prompts", "list", "batch", "next", "wildcard", "lines"],
            inputs=[
                io.String.Input("prompts", default="", multiline=True, tooltip="One prompt in each line."),
                number(
                    "index", 0, 0, 2**31 - 1,
                    "Which prompt comes now, the first being 0; counts up by itself.",
                    control_after_generate=io.ControlAfterGenerate.increment,
                ),
                io.Boolean.Input(
                    "begin_again", default=False, tooltip="After the last prompt comes the first; otherwise it ends."
                ),
            ],
            outputs=[
                io.String.Output(id="prompt", display_name="prompt", tooltip="The prompt."),
                io.Int.Output(id="index", display_name="index", tooltip="Its place in the list, from 0."),
                io.Int.Output(id="count", display_name="count", tooltip="How many prompts there are."),
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if not given.knows("prompts"):
            return
        count, index = len(texts.prompts(given["prompts"])), given["index"]
        if not count:
            raise ValueError("prompts is empty: write one prompt in each line")
        if given.knows("index", "begin_again") and index >= count and not given["begin_again"]:
            raise ValueError(
                f"index {index}: all {count} prompts have been drawn; set index to 0, add prompts, or switch "
                "begin_again on"
            )

    @classmethod
    def execute(cls, prompts="", index=0, begin_again=False):
        cls.check(Asked({"prompts": prompts, "index": index, "begin_again": begin_again}))
        found = texts.prompts(prompts)
        place = index % len(found)
        return io.NodeOutput(found[place], place, len(found))
