"""The reward nodes as workflows run them, and DI* trained towards the embedded judge."""

from __future__ import annotations

import pytest
import torch

from retort.graphs.api import io
from retort.nodes import NODES
from retort.nodes.rewards import KINDS, RetortCombineRewards, RetortReward, RetortScoreImages

CLASSES = [c for c in (RetortReward, RetortCombineRewards, RetortScoreImages) if c not in NODES]
GIVEN: dict = {}


class Pictures(io.ComfyNode):
    """Three flat pictures: dark grey, red, white."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Pictures", inputs=[], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls):
        colours = torch.tensor([[0.2, 0.2, 0.2], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        return io.NodeOutput(colours.view(3, 1, 1, 3).expand(3, 32, 48, 3).clone())


class Keep(io.ComfyNode):
    """Hands everything to the test."""

    @classmethod
    def define_schema(cls):
        names = {"scores": io.Float, "ranking": io.Int, "best": io.Image, "sheet": io.Image, "text": io.String}
        inputs = [kind.Input(name) for name, kind in names.items()]
        return io.Schema(node_id="Keep", inputs=inputs, outputs=[], is_output_node=True, is_input_list=True)

    @classmethod
    def execute(cls, **given):
        GIVEN.update(given)
        return io.NodeOutput()


def step(name, /, **inputs):
    return {"class_type": name, "inputs": inputs}


def scored(**score):
    names = ("scores", "ranking", "best", "sheet", "text")
    return {
        "i": step("Pictures"),
        "s": step("RetortScoreImages", **{"images": ["i", 0], "prompt": "", "prompt_per_line": False, "batch_size": 2,
                                          "columns": 2, "reward": ["r", 0], **score}),
        "k": step("Keep", **{name: ["s", i] for i, name in enumerate(names)}),
    }  # fmt: skip


@pytest.fixture
def run(go):
    def start(workflow):
        GIVEN.clear()
        go(workflow, *CLASSES, Pictures, Keep)
        return GIVEN

    return start


def test_score_images(run):
    given = run({"r": step("RetortReward", kind="colourfulness"), **scored()})
    scores = given["scores"]
    assert scores == pytest.approx([0, 0.3 * (255**2 + 127.5**2) ** 0.5, 0], abs=1e-3)
    assert given["ranking"][0] == 1 and sorted(given["ranking"]) == [0, 1, 2]
    (best,), (sheet,), (text,) = given["best"], given["sheet"], given["text"]
    assert best.shape == (1, 32, 48, 3) and best[0, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3 and sheet.min() >= 0 and sheet.max() <= 1
    assert text.startswith("colourfulness: mean") and "1. 85.53  image 1" in text


def test_combined(run):
    weights = {f"weight_{i}": 1.0 for i in (1, 2, 3, 4)}
    combine = step(
        "RetortCombineRewards",
        **{**weights, "reward_1": ["a", 0], "reward_2": ["b", 0], "weight_2": 10.0, "standardise": "none",
           "limit": 50.0, "veto_on": "reward_1", "veto_below": 10.0, "calibration_prompt": ""},
    )  # fmt: skip
    parts = {
        "a": step("RetortReward", kind="colourfulness"),
        "b": step("RetortReward", **{"kind": "jpeg", "kind.prefer": "large", "kind.quality": 80}),
        "r": combine,
    }
    scores = run({**parts, **scored()})["scores"]
    assert scores[0] == scores[2] and scores[0] < scores[1] and 50 < scores[1] < 70
    combine["inputs"] |= {"standardise": "calibrated", "calibration": ["i", 0], "veto_on": "none", "limit": 0.0}
    combine["inputs"]["weight_2"] = 0.0
    scores = run({**parts, **scored()})["scores"]
    assert sum(scores) == pytest.approx(0, abs=1e-3)
    assert torch.tensor(scores).std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("reward", "score", "match"),
    [
        ({"kind": "pick_score", "kind.model": ""}, {}, "PickScore_v1"),
        ({"kind": "pick_score", "kind.model": "../secret"}, {}, "leaves its folder"),
        ({"kind": "deqa", "kind.model": ""}, {}, "type the name of a folder"),
        ({"kind": "clip_score", "kind.model": "clip.pth"}, {}, "pickle"),
        ({"kind": "sharpness"}, {"prompt": "a\nb", "prompt_per_line": True}, "2 lines for 3 images"),
        ({"kind": "embedded_judge", "kind.boldness": 0.0}, {"prompt": "a portrait"}, "no digit and no colour"),
    ],
)
def test_what_is_wrong_is_said(run, reward, score, match):
    with pytest.raises(ValueError, match=match):
        run({"r": step("RetortReward", **reward), **scored(**score)})


def test_kinds_of_node_and_host_are_the_same():
    from retort.hosts.rewards.kinds import KINDS as known

    assert list(KINDS) == list(known)


def test_di_star_learns_from_the_judge(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    from retort.hosts.headless import folders
    from retort.hosts.headless.host import host
    from retort.hosts.rewards import kinds as rewards
    from retort.hosts.training import run as training
    from retort.trainers.dataset import Dataset, entries_of
    from retort.trainers.methods import read_config
    from retort.trainers.watch import Silent

    asked: list[tuple] = []
    judge = rewards.make(host, "embedded_judge", {"boldness": 0.5})

    class Watched:
        name, differentiable, range = judge.name, judge.differentiable, judge.range

        def __call__(self, images, prompts):
            scores = judge(images, prompts)
            if images.requires_grad:
                gradient = torch.autograd.grad(scores.sum(), images, retain_graph=True)[0]
                asked.append((tuple(images.shape), list(prompts), gradient.abs().max().item()))
            return scores

    prompts = ["a bold blue seven on yellow paper", "a red three on white paper"]
    made = {}
    with folders.use(folders.Folders(models=(tmp_path,), output=tmp_path)):
        model, clip, vae = host.embedded("flow")
        data = Dataset(
            entries_of([host.encode_text(clip, p) for p in prompts], "positive"), prompts,
            entries_of([host.encode_text(clip, "")], "negative")[0], None, (16, 8, 8),
        )  # fmt: skip
        for weight, reward in ((0.0, None), (1.0, Watched())):
            config = read_config(
                {
                    "method": "di_star",
                    "objective": {"ratio": 1, "cfg": 2.0, "alpha_rew": weight},
                    "training": {"steps": 2, "batch_size": 2, "warmup": 0, "learning_rate": 1e-3, "preview_every": 0},
                    "lora": {"rank": 2},
                }
            )
            request = training.Request(f"judged_{weight:g}", config, data)
            made[weight] = training.run(host, model, request, watcher=Silent(), vae=vae, reward=reward)
    assert made[1.0].steps == 2 and made[1.0].path.is_file()
    assert len(asked) >= 2 and all(shape == (2, 64, 64, 3) and slope > 0 for shape, _, slope in asked)
    assert {p for _, words, _ in asked for p in words} <= set(prompts)
    assert any((made[0.0].lora[k] - made[1.0].lora[k]).abs().max() > 1e-6 for k in made[0.0].lora)
