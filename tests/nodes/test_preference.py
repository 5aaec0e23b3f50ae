"""The preference nodes on the headless host: labels by the embedded judge, sets, training with each method, a job."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

pytest.importorskip("peft")

from retort.hosts import api
from retort.hosts.jobs import starter  # noqa: E402
from retort.hosts.jobs.process import run_job  # noqa: E402
from retort.hosts.rewards import kinds as rewards
from retort.nodes import jobs, preference  # noqa: E402
from retort.nodes.preference import (  # noqa: E402
    RetortLabelPairs,
    RetortPreferenceSet,
    RetortTrainPreference,
)
from retort.preferences import store as preferences  # noqa: E402
from retort.trainers import job_watch
from retort.trainers.watch import METRICS, read_metrics  # noqa: E402

QUICK = {"steps": 2, "batch_size": 2, "rank": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0, "seed": 3}


@pytest.fixture
def digits(where):
    """MODEL, CLIP and VAE of the embedded model."""
    return dict(zip(("model", "clip", "vae"), api.host.embedded("flow"), strict=True))


class Brightness:
    """A reward that anybody can check: the mean of a picture."""

    name, differentiable, range = "brightness", False, (0.0, 1.0)

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1)


def pictures(*values, size=64):
    return torch.stack([torch.full((size, size, 3), v) for v in values])


def filled(node, **given):
    defaults = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
    return node.execute(**{**defaults, **given})


def label(**given):
    return filled(RetortLabelPairs, **{"reward": Brightness(), "name": "set", "prompt": "a one", **given})


def trained(method, digits, pairs, **given):
    options = next(i for i in RetortTrainPreference.define_schema().inputs if i.id == "method").options
    settings = {i.id: i.default for i in next(o for o in options if o.key == method).inputs}
    chosen = {"method": method, **settings, **given.pop("chosen", {})}
    return filled(RetortTrainPreference, **{**digits, **QUICK, "pairs": pairs, "method": chosen, **given})


def test_a_reward_labels_pictures(where):
    found, added, text = label(images=pictures(0.2, 0.6, 0.4)).args
    assert added == 3 and text.startswith("3 pairs added to set")
    assert [p.strength for p in found.pairs] == pytest.approx([0.2, 0.4, 0.2], abs=1e-6)
    means = [[preferences.load_image(found.folder / n).mean().item() for n in (p.winner, p.loser)] for p in found.pairs]
    assert all(winner > loser for winner, loser in means)
    assert {(p.by, p.prompt) for p in found.pairs} == {("brightness", "a one")}
    assert found.folder == where.output / "retort_preferences" / "set"
    # Once more, and another prompt: the same pairs count once.
    label(images=pictures(0.2, 0.6, 0.4))
    found, added, _ = label(images=pictures(0.1, 0.6), prompt="a two").args
    assert added == 1 and len(found.pairs) == 4


def test_candidates_are_compared_with_those_of_the_same_reference(where, digits):
    """And each pair is trained beside its own, encoded by the VAE."""
    references = pictures(0.9, 0.9, 0.5, 0.5)
    found, added, _ = label(images=pictures(0.2, 0.6, 0.3, 0.4), reference=references).args
    assert added == 2 and [p.strength for p in found.pairs] == pytest.approx([0.4, 0.1], abs=1e-6)
    data, problems = preference.dataset(found, digits["clip"], digits["vae"])
    assert not problems and len(data.references) == 2
    for pair, reference, value in zip(found.pairs, data.references, (0.9, 0.5), strict=True):
        kept = preferences.load_image(found.folder / pair.reference)
        assert torch.allclose(kept, torch.full_like(kept, value), atol=1 / 255)
        assert torch.equal(reference, api.host.encode_images(digits["vae"], kept[None])["samples"][0])
    one, added, _ = label(name="one", images=pictures(0.2, 0.6, 0.3), reference=pictures(0.7)).args
    assert added == 3 and len({pair.reference for pair in one.pairs}) == 1
    # A pair without one cannot be trained beside those.
    label(images=pictures(0.1, 0.7))
    data, problems = preference.dataset(preferences.read(found.folder), digits["clip"], digits["vae"])
    assert len(data.references) == 2 and "has no reference picture" in problems[0]
    with pytest.raises(ValueError, match="reference holds 2 pictures, and there are 3 candidates"):
        label(images=pictures(0.2, 0.6, 0.3), reference=pictures(0.1, 0.2))


def test_ties_under_the_margin_make_no_pair(where):
    with pytest.raises(ValueError, match=r"no two of the 2 candidates differ by more than 0\.1"):
        label(images=pictures(0.5, 0.55), margin=0.1)
    found, added, _ = label(images=pictures(0.2, 0.25, 0.8), margin=0.1).args
    assert added == 2 == len(found.pairs)
    assert label(images=pictures(0.5, 0.55), margin=0.1).args[1] == 0


def test_each_prompt_has_its_own_pairs(where):
    found, added, _ = label(
        images=pictures(0.1, 0.2, 0.3, 0.4), prompt="a one\na two\na one\na two", prompt_per_line=True
    ).args
    assert added == 2 and [p.prompt for p in found.pairs] == ["a one", "a two"]
    assert label(images=pictures(*(i / 20 for i in range(16))), name="b", pairing="halves").args[1] == 8
    assert label(images=pictures(*(i / 20 for i in range(16))), name="c", pairing="best_worst").args[1] == 1


def test_latents_are_kept_as_they_are(where, digits):
    latents = {"samples": torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))}
    found, added, _ = label(latents=latents, vae=digits["vae"]).args
    assert added == 3 and all(preferences.is_latent(p.winner) for p in found.pairs)
    kept = {n: preferences.load_latent(found.folder / n) for p in found.pairs for n in (p.winner, p.loser)}
    assert all(any(torch.equal(row, k) for k in kept.values()) for row in latents["samples"])
    # The set alone is enough to train on.
    lora = trained("mapo", {**digits, "vae": None}, found, name="latents").args[0]
    assert any(v.abs().max() > 0 for v in lora.values())


def test_a_video_is_judged_by_the_mean_of_its_frames_and_learnt_whole(where):
    latents = {"samples": torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    frames = pictures(0.9, 0.1, 0.2, 0.5, 0.5, 0.5, size=16)
    found, added, _ = label(latents=latents, images=frames).args
    assert added == 1 and found.pairs[0].strength == pytest.approx(0.1, abs=1e-6)
    winner = preferences.load_latent(found.folder / found.pairs[0].winner)
    assert winner.shape == (4, 3, 8, 8) and torch.equal(winner, latents["samples"][1])
    with pytest.raises(ValueError, match="there are 5 images and 2 latents"):
        label(latents=latents, images=frames[:5])


def test_a_ranking_needs_no_reward(where):
    found, added, _ = label(images=pictures(0.5, 0.1, 0.9), reward=None).args
    assert added == 3 and {(p.strength, p.by) for p in found.pairs} == {(None, "ranking")}
    means = [[round(preferences.load_image(found.folder / n).mean().item(), 1) for n in (p.winner, p.loser)]
             for p in found.pairs]  # fmt: skip
    assert means == [[0.5, 0.1], [0.5, 0.9], [0.1, 0.9]]


def test_what_makes_no_pair_is_not_kept(where):
    found, _, _ = label(images=pictures(0.2, 0.25, 0.8), margin=0.58).args
    assert len(list((found.folder / "images").iterdir())) == 2 and len(found.pairs) == 1


def test_what_cannot_be_labelled_is_said(where, digits):
    latents = {"samples": torch.ones(2, 16, 8, 8)}
    for given, message in (
        ({}, "nothing to judge: connect images or latents"),
        ({"latents": latents}, "a reward looks at pictures: connect `images`, or `vae`"),
        ({"images": pictures(0.1, 0.2), "reward": None, "margin": 0.1}, r"margin 0\.1 compares scores"),
        ({"latents": {"samples": torch.zeros(2, 16, 8, 8)}, "vae": digits["vae"]}, "latents are empty"),
        ({"latents": latents, "images": pictures(0.1, 0.2, 0.3)}, "3 images and 2 latents"),
        ({"images": pictures(0.1, 0.2), "prompt": "a", "prompt_per_line": True}, "1 lines for 2 candidates"),
        ({"images": pictures(0.1, 0.2), "name": "../set"}, "cannot be a file's name"),
    ):
        with pytest.raises(ValueError, match=message):
            label(**given)


@pytest.fixture
def judged(where):
    """A set of 30 prompts with a pair each, by two judges."""
    for i in range(30):
        reward = Brightness()
        reward.name = f"judge {'AB'[i % 2]}"
        found = label(images=pictures(0.2, 0.3 + i / 60, size=64), prompt=f"prompt {i}", reward=reward).args[0]
    return found


def test_a_set_is_filtered_split_and_counted(judged):
    train, out, prompts, text = filled(RetortPreferenceSet, name="set", held_out=0.3, by="judge A").args
    assert len(train.pairs) + len(out.pairs) == 15 and len(out.pairs) > 0
    assert sorted(prompts.splitlines()) == sorted({p.prompt for p in out.pairs})
    assert text.startswith("15 pairs, 15 prompts, 16 pictures, 0 ties") and "by judge A: 15" in text
    assert f"{len(train.pairs)} pairs to train on, {len(out.pairs)} held out" in text
    again = filled(RetortPreferenceSet, name="", pairs=train, prompt="PROMPT 1").args[0]
    assert set(again.pairs) == {p for p in train.pairs if p.prompt.startswith("prompt 1")}
    for given, message in (
        ({"name": "set", "least": 5.0}, "none of the 30 pairs is kept"),
        ({"name": "none"}, "the set 'none' is empty .there are pairs in set.: choose .*Picker first"),
        ({"name": "../set"}, "cannot be a file's name"),
        ({"name": "set", "import_from": "../../etc"}, "cannot be a file's name"),
        ({"name": "set", "import_from": "nothing"}, "neither a folder"),
        ({"pairs": judged, "import_from": "x"}, "disconnect `pairs`"),
    ):
        with pytest.raises(ValueError, match=message):
            filled(RetortPreferenceSet, **given)


def test_the_sets_that_an_empty_one_names_are_no_blind_tests(judged):
    label(images=pictures(0.2, 0.6, size=64), prompt="one", reward=Brightness(), name="mine")
    label(images=pictures(0.2, 0.6, size=64), prompt="one", reward=Brightness(), name="tested")
    file = judged.folder.parent / "tested" / preferences.PAIRS
    row = json.loads(file.read_text())
    file.write_text(json.dumps(row | {"by": "blind a against b"}) + "\n")
    with pytest.raises(ValueError, match="the set 'none' is empty .there are pairs in mine, set.:"):
        filled(RetortPreferenceSet, name="none")


def test_bad_lines_are_shown(judged):
    with open(judged.folder / preferences.PAIRS, "a") as handle:
        handle.write('{"prompt": "torn\n')
    assert "line 31: it is no JSON" in filled(RetortPreferenceSet, name="set").args[3]


def test_a_set_goes_out_and_comes_in(judged):
    text = filled(RetortPreferenceSet, name="set", export="folder").args[3]
    assert "30 pairs exported to set_export" in text
    found, _, _, text = filled(RetortPreferenceSet, name="other", import_from="set_export").args
    assert "30 pairs imported from set_export" in text and len(found.pairs) == 30
    assert {p.by for p in found.pairs} == {"import set_export"}


def test_it_runs_again_when_the_set_has_grown(judged):
    before = RetortPreferenceSet.fingerprint_inputs(name="set")
    assert before == RetortPreferenceSet.fingerprint_inputs(name="set")
    os.utime(judged.folder / preferences.PAIRS, ns=(1, 1))
    assert before != RetortPreferenceSet.fingerprint_inputs(name="set")
    assert RetortPreferenceSet.fingerprint_inputs(name="none") == 0


@pytest.mark.parametrize("variant", ["flow", "eps"])
@pytest.mark.parametrize("method", ["dpo", "smpo", "mapo"])
def test_each_method_trains(judged, where, method, variant):
    digits = dict(zip(("model", "clip", "vae"), api.host.embedded(variant), strict=True))
    chosen = {"smpo": {"inversion_steps": 2}, "dpo": {"beta": 500.0}, "mapo": {}}[method]
    lora, loss, file, name = trained(method, digits, judged, name=method, chosen=chosen).args
    assert (file, name, len(loss["loss"])) == (f"{method}.safetensors", method, 2)
    assert any(v.abs().max() > 0 for v in lora.values())
    if method != "mapo":
        assert loss["loss"][0] == pytest.approx(math.log(2), abs=1e-4)
    rows = read_metrics(where.output / "retort" / method / METRICS)
    assert {"margin", "accuracy", "winner"} <= set(rows[0])


def test_ties_are_for_soft_labels_alone(judged, digits):
    folder = judged.folder
    pair = judged.pairs[0]
    row = {"prompt": "even", "winner": pair.winner, "loser": pair.loser, "strength": 0, "by": "me"}
    preferences.append(folder, [row])
    found = preferences.read(folder)
    for labels, count in (("weight", 30), ("soft", 31)):
        given = {"method": {"method": "smpo", "labels": labels}, "pairs": found, "name": "x", "start_from": "none"}
        request, problems = preference.asked({**digits, **given})
        assert len(request.dataset.prompts) == count == len(request.dataset.strengths) and not problems


def test_pairs_that_cannot_be_used_are_listed_and_the_others_used(judged, digits):
    small = preferences.keep_image(judged.folder, torch.rand(32, 32, 3))
    (judged.folder / "images/bad.png").write_bytes(b"no picture")
    pair = judged.pairs[0]
    rows = [{"prompt": "a", "winner": pair.winner, "loser": n} for n in (small, "images/bad.png")]
    preferences.append(judged.folder, rows)
    found = preferences.read(judged.folder)
    done = trained("dpo", digits, found, name="some")
    shown = done.ui["text"]
    assert "line 31: winner and loser differ in size" in shown[1] and "line 32: " in shown[2]
    assert "bad.png cannot be read" in shown[2]
    with pytest.raises(ValueError, match=r"none of the pairs can be trained on:\nline 31"):
        trained("dpo", digits, found.filtered(prompt="a").split(0, 0)[0].filtered(by=""), name="none")
    said = r"on:\nlines 1, 2, 3, 4, 5 and 25 more: it is a pair of pictures, which a VAE encodes: connect `vae`$"
    with pytest.raises(ValueError, match=said):
        trained("dpo", {**digits, "vae": None}, judged, name="none")


def test_a_job_learns_from_pairs(judged, digits, where, monkeypatch):
    started, roomy = [], []
    monkeypatch.setattr(jobs.host, "make_room", lambda: roomy.append(not started))
    monkeypatch.setattr(starter, "start", lambda folder, arguments, processes: started.append(folder))
    monkeypatch.setattr(jobs, "read_status", lambda folder: job_watch.Status("queued"))
    given = {**digits, **QUICK, "method": {"method": "dpo", "beta": 500.0}, "pairs": judged, "name": "job"}
    inputs = jobs.RetortTrainingJob.define_schema().inputs
    defaults = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}

    def queue(**more):
        return jobs.RetortTrainingJob.execute(**{k: [v] for k, v in {**defaults, **given, **more}.items()})

    assert queue().args[0] == "job" and roomy == [True]
    monkeypatch.undo()
    assert run_job(api.host, started[0]).state == "finished"
    job = jobs.RetortCollectJob.execute("job").args
    assert json.loads((started[0] / "config.json").read_text())["method"] == "dpo"
    # The node's own training gives the same LoRA.
    lora = trained("dpo", digits, judged, name="node", chosen={"beta": 500.0}).args[0]
    assert all(torch.equal(job[0][k], lora[k]) for k in lora)
    with pytest.raises(ValueError, match="connect `pairs` and `clip`"):
        queue(pairs=None)
    with pytest.raises(ValueError, match="pairs: flow learns from none"):
        queue(method={"method": "flow"})


def test_the_embedded_judge_labels_what_it_likes(where):
    judge = rewards.make(api.host, "embedded_judge", {"boldness": 1.0})
    found, added, _ = label(reward=judge, images=torch.rand(4, 64, 64, 3), prompt="a blue seven").args
    assert added == 6 and {p.by for p in found.pairs} == {judge.name}
