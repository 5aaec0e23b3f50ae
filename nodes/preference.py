"""Preferences: a set of pairs, labels by a reward, and a LoRA that learns them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import texts
from ..files.atomic import checked_name
from ..files.folder import inside
from ..hosts.api import host, io, training, ui
from ..preferences import exchange as preference_files
from ..preferences import store as preferences
from ..preferences.store import Preferences
from ..rewards.scoring import score
from ..sampling.parts import Latent, each_of, row, shape_of
from ..trainers.dataset import Dataset, Entry, entries_of, latents_of
from ..trainers.methods import of_group
from .checks import Asked, CheckedNode, at, is_empty
from .inputs import PROMPTED, completed, number, schema
from .rewards import REWARD
from .training import CATEGORY as TRAINING
from .training import NOTHING, TRAINER_ALIASES, TrainingNode, check_settings, config_of, outputs, run
from .training_inputs import common_inputs, image_inputs, late_inputs, method_input, other_expert_input

CATEGORY = "model/preference/retort"
ALIASES = ["retort", "preference", "dpo", "pick-a-pic", "taste", "rlhf", "pairs", "ranking"]
PREFERENCES = io.Custom("PREFERENCES")
PAIRINGS = ["all", "best_worst", "halves"]
EMPTY = "the latents are empty: connect those of finished pictures"
MOST_LINES = 5  # of a set that a message names
EXPORTS = ["none", "folder", "parquet"]
NAME = "my_taste"  # of a set until a user gives it another


def sets_folder() -> Path:
    """Where the sets lie, a folder each."""
    return host.runs_folder().with_name("retort_preferences")


def set_folder(name: str) -> Path:
    """The folder of a set by its name. ValueError for a name that leads elsewhere."""
    return sets_folder() / checked_name(name)


def references_of(pictures: Any, folder: Path, count: int, what: str) -> list[str]:
    """Of each of `count`, the file in a set of the picture (H, W, 3) that an edit model was shown; "" without any.

    pictures: one for all, or one for each. ValueError for another number; what: there are so many of.
    """
    if pictures is None:
        return [""] * count
    if len(pictures) not in (1, count):
        raise ValueError(
            f"reference holds {len(pictures)} pictures, and there are {count} {what}: connect one for all, or one for "
            "each"
        )
    kept = [preferences.keep_image(folder, picture) for picture in pictures]
    return kept * count if len(kept) == 1 else kept


class RetortPreferenceSet(CheckedNode):
    """Load, import, filter, split and export a set of preferences."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortPreferenceSet",
            display_name="Preference Set",
            category=CATEGORY,
            description=(
                "Loads pairs of a better and a worse picture from output/retort_preferences, keeps those you want, and "
                "holds some prompts out for a test. Bad lines are listed and left out."
            ),
            search_aliases=[*ALIASES, "load", "filter", "split", "statistics", "import", "export"],
            is_output_node=True,
            inputs=[
                PREFERENCES.Input("pairs", optional=True, tooltip="A set from another node, instead of `name`."),
                io.String.Input("name", default=NAME, tooltip="A folder in output/retort_preferences."),
                io.String.Input(
                    "by", default="*", tooltip="Only pairs of judges whose name fits this pattern, such as pick*."
                ),
                io.String.Input(
                    "prompt", default="", advanced=True, tooltip="Only pairs whose prompt holds this text."
                ),
                number(
                    "least", 0.0, 0.0, 1e9,
                    "Only pairs of at least this strength; those that a person chose have no bound.",
                    step=0.01, round=1e-6,
                ),
                io.Boolean.Input(
                    "ties", default=True, advanced=True, tooltip="Keep ties, of which only SmPO makes use."
                ),
                number(
                    "held_out", 0.0, 0.0, 1.0,
                    "Share of the prompts that is held out for a test, with all their pairs.", step=0.01,
                ),
                number(
                    "seed", 0, 0, 2**64 - 1,
                    "Which prompts are held out; a set that grows keeps its choice.", control_after_generate=False,
                    advanced=True,
                ),
                io.String.Input(
                    "import_from",
                    default="",
                    advanced=True,
                    tooltip=(
                        "A folder or .parquet file in output/retort_preferences with Pick-a-Pic's columns, whose pairs "
                        "are added to the set first."
                    ),
                ),
                io.Combo.Input(
                    "export",
                    options=EXPORTS,
                    default="none",
                    advanced=True,
                    tooltip="Write what is kept beside the set, as plain files or parquet that DPO scripts read.",
                ),
            ],
            outputs=[
                PREFERENCES.Output(id="pairs", display_name="pairs", tooltip="For Train Preference."),
                PREFERENCES.Output(id="held_out", display_name="held out", tooltip="The pairs of the other prompts."),
                io.String.Output(
                    id="prompts", display_name="prompts", tooltip="The prompts that are held out, one in each line."
                ),
                io.String.Output(id="text", display_name="text", tooltip="Numbers of the set, and its bad lines."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name=NAME, **given):
        """Again whenever the set has grown; always where the name is connected, which is not known here."""
        if not isinstance(name, str):
            return time.time()
        return (inside(set_folder(name)) / preferences.PAIRS).changed() if name else 0

    @classmethod
    def check(cls, given):
        """See the base."""
        if not given.knows("name", "import_from"):
            return
        if given.connected("pairs"):
            if given["import_from"]:
                raise ValueError(
                    "import_from adds to the set that `name` names: disconnect `pairs`, or clear import_from"
                )
            return
        with at("name"):
            folder = set_folder(given["name"])
            if not given["import_from"]:
                preferences.refuse_empty(folder)

    @classmethod
    def execute(
        cls, name=NAME, by="*", prompt="", least=0.0, ties=True, held_out=0.0, seed=0, import_from="", export="none",
        pairs=None,
    ):  # fmt: skip
        said = []
        cls.check(Asked({"pairs": pairs, "import_from": import_from, "name": name}))
        folder = set_folder(name) if pairs is None else pairs.folder
        if import_from:
            source = sets_folder() / checked_name(import_from)
            count, problems = preference_files.take_in(source, folder, f"import {source.name}"[:100])
            said = [f"{count} pairs imported from {source.name}", *problems[: preferences.SHOWN]]
        found = preferences.read(folder) if pairs is None else pairs
        kept = found.filtered(by, prompt, least, ties)
        if not kept.pairs:
            raise ValueError(f"none of the {len(found.pairs)} pairs is kept: by, prompt and least leave nothing")
        if export != "none":
            said.append(_export(kept, export))
        train, out = kept.split(held_out, seed)
        if held_out:
            said.append(f"{len(train.pairs)} pairs to train on, {len(out.pairs)} held out")
        text = "\n".join([kept.statistics(), *said])
        prompts = "\n".join(dict.fromkeys(p.prompt.replace("\n", " ") for p in out.pairs))
        return io.NodeOutput(train, out, prompts, text, ui=ui.PreviewText(text))


def _export(kept: Preferences, way: str) -> str:
    if way == "parquet":
        target = kept.folder.with_name(f"{kept.folder.name}.parquet")
        count = preference_files.write_parquet(kept, target)
    else:
        target = kept.folder.with_name(f"{kept.folder.name}_export")
        count = preference_files.write_folder(kept, target)
    return f"{count} pairs exported to {target.name}"


class RetortLabelPairs(CheckedNode):
    """Let a reward compare candidates, and add its judgements to a set."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortLabelPairs",
            display_name="Label Pairs",
            category=CATEGORY,
            description=(
                "Scores a batch of candidates for one prompt with a reward, and adds pairs of a better and a worse one "
                "to a set of preferences. Candidates that score alike make no pair."
            ),
            search_aliases=[*ALIASES, "label", "ai feedback", "judge", "reward"],
            is_output_node=True,
            inputs=[
                REWARD.Input(
                    "reward",
                    optional=True,
                    tooltip="Who judges, from Reward or Combine Rewards. Not connected: candidates come best first.",
                ),
                io.Image.Input("images", optional=True, tooltip="The candidates."),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="The candidates as latents, which are then what the set keeps; for one model's own use.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes `latents` for the judge where images are missing."),
                io.String.Input(
                    "name", default=NAME, tooltip="The set: a folder in output/retort_preferences, made if new."
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the candidates were to show, one prompt for all.",
                ),
                io.Boolean.Input(
                    "prompt_per_line",
                    default=False,
                    tooltip="Each line is the prompt of one candidate; pairs are made among those of equal prompts.",
                ),
                io.Combo.Input(
                    "pairing",
                    options=PAIRINGS,
                    default="all",
                    tooltip=(
                        "all: every two candidates. best_worst: one pair. halves: better half against worse half, each "
                        "candidate once."
                    ),
                ),
                number(
                    "margin", 0.0, 0.0, 1e9,
                    "Pairs whose scores differ by no more than this are ties, and left out.", step=0.01, round=1e-6,
                ),
                io.Int.Input(
                    "batch_size", default=8, min=1, max=4096, tooltip="Images judged at once; changes memory alone."
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip=(
                        "Edit models: the picture that the candidates are edits of, one for all or one for each. Pairs "
                        "are made among those of one picture, and training shows it to the model."
                    ),
                ),
            ],
            outputs=[
                PREFERENCES.Output(id="pairs", display_name="pairs", tooltip="The whole set, with what was added."),
                io.Int.Output(id="added", display_name="added", tooltip="Pairs that this batch gave."),
                io.String.Output(id="text", display_name="text", tooltip="Numbers of the set."),
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("name"):
            with at("name"):
                set_folder(given["name"])
        images, latents, reward = (given.connected(each) for each in ("images", "latents", "reward"))
        if is_empty(given.links.get("latents")):
            raise ValueError(EMPTY)
        if not images and not latents:
            raise ValueError("there is nothing to judge: connect images or latents")
        if given.knows("margin") and given["margin"] and not reward:
            raise ValueError(
                f"margin {given['margin']:g} compares scores, and nobody scores: connect `reward`, or set it to 0"
            )
        if reward and not images and not given.connected("vae"):
            raise ValueError("a reward looks at pictures: connect `images`, or `vae` to decode the latents")

    @classmethod
    def execute(
        cls, name, prompt="", prompt_per_line=False, pairing="all", margin=0.0, batch_size=8, reward=None, images=None,
        latents=None, vae=None, reference=None,
    ):  # fmt: skip
        cls.check(Asked({
            "name": name, "images": images, "latents": latents, "vae": vae, "reward": reward, "margin": margin,
        }))  # fmt: skip
        folder = set_folder(name)
        stored = None if latents is None else latents_of([latents])[0]
        if latents is not None and stored is None:
            raise ValueError(EMPTY)
        items = images if stored is None else stored
        prompts = texts.lines(prompt) if prompt_per_line else [prompt] * len(items)
        if len(prompts) != len(items):
            raise ValueError(
                f"prompt has {len(prompts)} lines for {len(items)} candidates: write one for each, or switch "
                "prompt_per_line off"
            )
        if reward is None:
            scores, by = [-float(place) for place in range(len(items))], "ranking"
        else:
            if images is None:
                assert stored is not None
                images = torch.cat([host.decode(vae, each_of(latent)[0][None]) for latent in stored])
            frames = _frames(items, len(images))
            asked = [words for words in prompts for _ in range(frames)]
            each = torch.tensor(_scores(reward, images, asked, batch_size), dtype=torch.float64)
            scores, by = each.view(-1, frames).mean(1).tolist(), reward.name[: preferences.NAME_LENGTH]
        judged = []
        told = list(zip(prompts, references_of(reference, folder, len(items), "candidates"), strict=True))
        for words, shown in dict.fromkeys(told):
            rows = [i for i, other in enumerate(told) if other == (words, shown)]
            for a, b, difference in preferences.ranked_pairs([scores[i] for i in rows], pairing, margin):
                pair = {"prompt": words, "strength": None if reward is None else difference, "by": by}
                pair |= {"reference": shown} if shown else {}
                judged.append((rows[a], rows[b], pair))
        used = {i for a, b, _ in judged for i in (a, b)}
        if stored is None:
            files = {i: preferences.keep_image(folder, images[i]) for i in used}
        else:
            files = {i: preferences.keep_latent(folder, stored[i]) for i in used}
        # Two candidates may be one picture, whose scores differ in the last bits.
        named = [{**pair, "winner": files[a], "loser": files[b]} for a, b, pair in judged if files[a] != files[b]]
        added = preferences.append(folder, named)
        if not (inside(folder) / preferences.PAIRS).is_file():
            raise ValueError(
                f"no two of the {len(items)} candidates differ by more than {margin:g}, and the set is new: lower "
                "margin, or connect more candidates for each prompt"
            )
        found = preferences.read(folder)
        text = f"{added} pairs added to {folder.name}\n{found.statistics()}"
        return io.NodeOutput(found, added, text, ui=ui.PreviewText(text))


def _frames(items: Any, images: int) -> int:
    """Pictures of each candidate: 1, or the frames of a video."""
    video = each_of(items[0])[0].ndim == 4
    if images % len(items) or (images != len(items) and not video):
        raise ValueError(f"there are {images} images and {len(items)} latents: connect those of one batch")
    return images // len(items)


def _scores(reward: Any, images: Tensor, prompts: list[str], batch_size: int) -> list[float]:
    progress, parts = host.progress(len(images)), []
    with torch.no_grad():
        for begin in range(0, len(images), batch_size):
            host.check_cancelled()
            end = min(begin + batch_size, len(images))
            parts.append(score(reward, images[begin:end], prompts[begin:end]))
            progress.step(end)
    return torch.cat(parts).tolist()


class RetortTrainPreference(TrainingNode):
    """A LoRA that makes what a set of preferences prefers."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortTrainPreference",
            display_name="Train Preference (DPO)",
            category=TRAINING,
            description=(
                "Teaches a LoRA to draw what wins and not what loses for a prompt: Diffusion-DPO, SmPO or MaPO. The "
                "model that comes in, with its LoRAs, is what dpo and smpo stay close to."
            ),
            search_aliases=[*TRAINER_ALIASES, *ALIASES[1:], "dpo lora", "smpo", "mapo", "alignment"],
            hidden=[*PROMPTED],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to train for; LoRAs that it carries become part of the base."
                ),
                io.Clip.Input("clip", tooltip="Text encoder for the set's prompts."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the set's pictures and decodes previews."),
                PREFERENCES.Input("pairs", tooltip="From Preference Set or Label Pairs."),
                method_input(of_group("preference")),
                *common_inputs("my_preference", 500, 16, fake=False, prompts=False),
                *image_inputs(),
                *late_inputs(experts=True),
                other_expert_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        check_pairs(given)

    @classmethod
    def execute(cls, **given):
        settings = completed(cls, given)
        request, problems = asked(settings)
        return run(cls, settings["model"], request, settings.get("vae"), problems, other=settings.get("other_expert"))


def check_pairs(given: Asked) -> None:
    """What a training on pairs demands. ValueError says what is missing, or cannot be."""
    if not (given.connected("pairs") and given.connected("clip")):
        raise ValueError(f"{given['method']['method']} learns from pairs for their prompts: connect `pairs` and `clip`")
    config = check_settings(given)
    if config is not None:
        training.refuse_other_expert(config, given.connected("other_expert"))


def asked(given: dict[str, Any]) -> tuple[training.Request, list[str]]:
    """(what is to be trained, pairs that cannot be used) from a node's inputs. ValueError says what is missing."""
    settings = Asked(given)
    check_pairs(settings)
    config = config_of(settings)
    named = given["start_from"]
    start, recipe = (None, "") if named == NOTHING else training.start_of(host, named)
    # A tie teaches something only where its evenness is learnt.
    kept = given["pairs"].filtered(ties=given["method"].get("labels") == "soft")
    found, problems = dataset(kept, given["clip"], given.get("vae"))
    return training.Request(given["name"], config, found, start, recipe), problems


def dataset(pairs: Preferences, clip: Any, vae: Any) -> tuple[Dataset, list[str]]:
    """(what is trained on, pairs that cannot be used); each prompt and picture is encoded once."""
    known: dict[str, Latent] = {}
    texts: dict[str, Entry] = {}
    rows: list[tuple[str, Latent, Latent, float]] = []
    shown: list[Tensor] = []
    edits = any(pair.reference for pair in pairs.pairs)
    wrong: dict[str, list[int]] = {}
    progress = host.progress(max(1, len(pairs.pairs)))
    for done, pair in enumerate(pairs.pairs):
        host.check_cancelled()
        try:
            if edits and not pair.reference:
                raise ValueError("it has no reference picture, and other pairs have one: train on either by itself")
            for name in (pair.winner, pair.loser, *([pair.reference] if edits else [])):
                if name not in known:
                    known[name] = _latent(pairs.folder, name, vae)
            winner, loser, before = known[pair.winner], known[pair.loser], known.get(pair.reference)
            if edits and not isinstance(before, Tensor):
                raise ValueError(f"its reference {pair.reference} is a latent of several parts, and no picture")
            if shape_of(winner) != shape_of(loser):
                raise ValueError(f"winner and loser differ in size, {shape_of(winner)} and {shape_of(loser)}")
        except ValueError as error:
            wrong.setdefault(str(error), []).append(pair.line)
            continue
        if pair.prompt not in texts:
            texts[pair.prompt] = entries_of([host.encode_text(clip, pair.prompt)], "prompt")[0]
        rows.append((pair.prompt, winner, loser, pair.certainty))
        shown += [before] if isinstance(before, Tensor) else []
        progress.step(done + 1)
    problems = [_of_lines(lines, why) for why, lines in list(wrong.items())[: preferences.SHOWN]]
    if not rows:
        raise ValueError("\n".join(["none of the pairs can be trained on:", *problems]))
    prompts, winners, losers, strengths = (list(column) for column in zip(*rows, strict=True))
    empty = entries_of([host.encode_text(clip, "")], "prompt")[0]
    entries = [texts[prompt] for prompt in prompts]
    data = Dataset(entries, prompts, empty, winners, None, losers, strengths, references=shown or None)
    return data, problems


def _of_lines(lines: list[int], why: str) -> str:
    """What is wrong with some lines of a set, once for all of them."""
    named = ", ".join(map(str, lines[:MOST_LINES]))
    rest = f" and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
    return f"line{'s' * (len(lines) > 1)} {named}{rest}: {why}"


def _latent(folder: Path, name: str, vae: Any) -> Latent:
    if preferences.is_latent(name):
        return preferences.load_latent(inside(folder) / name)
    image = preferences.load_image(inside(folder) / name)
    if vae is None:
        raise ValueError("it is a pair of pictures, which a VAE encodes: connect `vae`")
    return row(host.encode_images(vae, image[None])["samples"], 0)
