"""Rewards: choose one, combine several, score pictures with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..files import texts
from ..hosts.api import host, io, rewards, ui
from ..rewards.combine import Combined, RunningScore, Term, statistics
from ..rewards.scoring import score
from .checks import Asked, CheckedNode, about, within
from .inputs import chosen, number, schema

CATEGORY = "model/rewards/retort"
ALIASES = ["retort", "reward", "score", "preference", "aesthetic", "quality", "best of n", "ranking"]
REWARD = io.Custom("REWARD")
NO_VETO = "none"
STANDARDS = ["none", "calibrated", "running"]
SLOTS = (1, 2, 3, 4)


def _model(tooltip: str) -> Any:
    return io.String.Input("model", default="", tooltip=tooltip)


def _published(folder: str) -> Any:
    return _model(
        f"Empty: models/rewards/{folder}. Else another folder there, or a Hugging Face id to download "
        "(safetensors only)."
    )


def _free(what: str) -> Any:
    return _model(f"{what}: a folder in models/rewards, or a Hugging Face id to download (safetensors only).")


KINDS: dict[str, Callable[[], list]] = {
    "embedded_judge": lambda: [
        number(
            "boldness", 0.0, -10.0, 10.0,
            "Weight of a bold stroke beside digit and colours; 0 scores the prompt alone.", step=0.1,
        )
    ],
    "pick_score": lambda: [_published("PickScore_v1")],
    "hps_v2": lambda: [_published("HPSv2-hf")],
    "image_reward": lambda: [
        _model("Empty: models/rewards/ImageReward, its safetensors and the tokenizer of bert-base-uncased.")
    ],
    "clip_score": lambda: [_published("clip-vit-large-patch14")],
    "aesthetic": lambda: [
        _published("clip-vit-large-patch14, or the aesthetics-predictor"),
        io.String.Input(
            "head",
            default="",
            tooltip="Its head in models/rewards; empty: sac+logos+ava1-l14-linearMSE.safetensors, or the model's own.",
        ),
    ],
    "deqa": lambda: [_free("A vision-language model, which is asked how good the picture is")],
    "classifier": lambda: [
        _free("An image classifier"),
        io.String.Input("label", default="", tooltip="Name or number of the class that is wished for."),
        io.Combo.Input(
            "measure",
            options=["log probability", "probability", "logit"],
            default="log probability",
            tooltip="What counts: the logarithm keeps telling unlikely pictures apart.",
        ),
    ],
    "likeness": lambda: [
        io.Image.Input("reference", tooltip="What pictures are to be like; of several, the mean likeness counts."),
        io.String.Input(
            "model",
            default="",
            tooltip="Empty: by pixels. Else CLIP, DINOv2 or the like in models/rewards, or a Hugging Face id.",
        ),
    ],
    "jpeg": lambda: [
        io.Combo.Input(
            "prefer", options=["small", "large"], default="small", tooltip="small: smooth pictures. large: detail."
        ),
        io.Int.Input("quality", default=95, min=1, max=100, tooltip="JPEG quality; 95 is the published choice."),
    ],
    "sharpness": lambda: [],
    "colourfulness": lambda: [],
    "remote": lambda: [
        io.String.Input(
            "url",
            default="http://127.0.0.1:8399",
            tooltip="A reward server on this machine, for models that need packages of their own; see the help page.",
        )
    ],
}


class RetortReward(CheckedNode):
    """What is better."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortReward",
            display_name="Reward",
            category=CATEGORY,
            description=(
                "A score for pictures, given their prompt: preference models (PickScore, HPSv2, ImageReward), "
                "agreement with the prompt, beauty, quality, a classifier, likeness, or plain measures. Searches look "
                "for pictures that score high, trainers teach a model to make them."
            ),
            search_aliases=[*ALIASES, "pickscore", "hpsv2", "imagereward", "clipscore", "deqa", "classifier"],
            inputs=[
                io.DynamicCombo.Input(
                    "kind",
                    options=[io.DynamicCombo.Option(name, inputs()) for name, inputs in KINDS.items()],
                    tooltip="Who judges; the help page says what each is good for and where its files go.",
                )
            ],
            outputs=[
                REWARD.Output(id="reward", display_name="reward", tooltip="For searches, trainers, Score Images.")
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("kind.model", "kind.head"):
            settings = dict(given["kind"])
            with about(*within("kind", settings)):
                rewards.check_files(host, settings.pop("kind"), settings)

    @classmethod
    def execute(cls, kind=None):
        settings = chosen(cls, "kind", kind)
        return io.NodeOutput(rewards.make(host, settings.pop("kind"), settings))


class RetortCombineRewards(CheckedNode):
    """Several judges, one score."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortCombineRewards",
            display_name="Combine Rewards",
            category=CATEGORY,
            description=(
                "A weighted sum of up to four rewards; chain this node for more. Standard scores make rewards of "
                "different scales comparable, limits keep one from drowning the others, a veto refuses pictures."
            ),
            search_aliases=[*ALIASES, "weighted sum", "z-score", "limit", "veto"],
            inputs=[
                *(
                    REWARD.Input(
                        f"reward_{i}", optional=i > 1, tooltip=f"{'The first' if i == 1 else 'Another'} reward."
                    )
                    for i in SLOTS
                ),
                *(
                    number(
                        f"weight_{i}", 1.0, -1e6, 1e6,
                        f"What reward_{i} counts; below 0 it is to be low.", step=0.05, round=1e-6,
                    )
                    for i in SLOTS
                ),
                io.Combo.Input(
                    "standardise",
                    options=STANDARDS,
                    default="none",
                    tooltip=(
                        "none: scores as they are. calibrated: mean and deviation are taken once, on the calibration "
                        "images. running: on all pictures seen before; for training, not for searches."
                    ),
                ),
                number(
                    "limit", 0.0, 0.0, 1e6,
                    "Above 0, each (standardised) score is held between -limit and limit.", step=0.1,
                ),
                io.Combo.Input(
                    "veto_on",
                    options=[NO_VETO, *(f"reward_{i}" for i in SLOTS)],
                    default=NO_VETO,
                    tooltip="Refuse pictures by this reward's own score, whatever the others say.",
                ),
                number(
                    "veto_below", 0.0, -1e9, 1e9,
                    "Pictures that score less than this in it are refused.", step=0.1, round=1e-6,
                ),
                io.String.Input(
                    "calibration_prompt", default="", multiline=True, tooltip="Prompt of the calibration images."
                ),
                io.Image.Input(
                    "calibration",
                    optional=True,
                    tooltip="Two or more usual pictures, better sixteen, for standard scores.",
                ),
            ],
            outputs=[
                REWARD.Output(id="reward", display_name="reward", tooltip="The combination, a reward like others.")
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if given["standardise"] == "calibrated" and not given.connected("calibration"):
            raise ValueError("standardise is calibrated and nothing is connected to `calibration`: connect pictures")
        veto = given["veto_on"]
        if veto != NO_VETO and not given.connected(veto):
            raise ValueError(f"veto_on is {veto}, which is not connected: connect it, or choose {NO_VETO}")

    @classmethod
    def execute(
        cls,
        standardise="none",
        limit=0.0,
        veto_on=NO_VETO,
        veto_below=0.0,
        calibration_prompt="",
        calibration=None,
        **given,
    ):
        cls.check(Asked({**given, "standardise": standardise, "calibration": calibration, "veto_on": veto_on}))
        terms = []
        for i in SLOTS:
            reward = given.get(f"reward_{i}")
            if reward is None:
                continue
            mean, std = 0.0, 1.0
            if standardise == "calibrated":
                mean, std = statistics(reward, calibration, calibration_prompt)
            low, high = (-limit, limit) if limit else (-float("inf"), float("inf"))
            vetoes = veto_on == f"reward_{i}"
            if vetoes and standardise == "running":
                # The border is in the reward's own scores.
                terms.append(Term(reward, 0.0, veto=veto_below))
                vetoes = False
            judge = RunningScore(reward) if standardise == "running" else reward
            terms.append(Term(judge, given[f"weight_{i}"], mean, std, low, high, veto_below if vetoes else None))
        return io.NodeOutput(Combined(tuple(terms)))


class RetortScoreImages(CheckedNode):
    """Scores, ranking and the best of a batch."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Scores a batch of images with a reward, ranks them, and picks the best.",
            search_aliases=[*ALIASES, "evaluate", "pick best", "compare"],
            is_output_node=True,
            inputs=[
                REWARD.Input("reward", tooltip="From Reward or Combine Rewards."),
                io.Image.Input("images", tooltip="What is scored."),
                io.String.Input("prompt", default="", multiline=True, tooltip="What the images should show."),
                io.Boolean.Input(
                    "prompt_per_line",
                    default=False,
                    tooltip="Each line is the prompt of one image, instead of the whole text for all.",
                ),
                io.Int.Input(
                    "batch_size", default=8, min=1, max=4096, tooltip="Images at once; changes memory, not scores."
                ),
                io.Int.Input("columns", default=4, min=1, max=64, tooltip="Pictures in a row of the sheet."),
            ],
            outputs=[
                io.Float.Output(
                    id="scores",
                    display_name="scores",
                    is_output_list=True,
                    tooltip="One for each image, in their order.",
                ),
                io.Int.Output(
                    id="ranking",
                    display_name="ranking",
                    is_output_list=True,
                    tooltip="Places in the batch, best first.",
                ),
                io.Image.Output(id="best", display_name="best", tooltip="The image with the highest score."),
                io.Image.Output(id="sheet", display_name="sheet", tooltip="All images with their scores, best first."),
                io.String.Output(id="text", display_name="text", tooltip="The scores as a table."),
            ],
        )

    @classmethod
    def execute(cls, reward, images, prompt="", prompt_per_line=False, batch_size=8, columns=4):
        prompts = texts.lines(prompt) if prompt_per_line else [prompt] * len(images)
        if len(prompts) != len(images):
            raise ValueError(
                f"prompt has {len(prompts)} lines for {len(images)} images: write one for each, or switch "
                "prompt_per_line off"
            )
        progress, parts = host.progress(len(images)), []
        with torch.no_grad():
            for begin in range(0, len(images), batch_size):
                host.check_cancelled()
                end = min(begin + batch_size, len(images))
                parts.append(score(reward, images[begin:end], prompts[begin:end]))
                progress.step(end)
        scores = torch.cat(parts).tolist()
        ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        sheet = rewards.sheet(images, scores, columns)
        text = rewards.table(scores, [p.replace("\n", " ") for p in prompts], reward.name)
        best = images[ranking[0] : ranking[0] + 1]
        return io.NodeOutput(scores, ranking, best, sheet, text, ui=ui.PreviewImage(sheet, cls=cls))
