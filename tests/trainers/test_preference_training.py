"""Sets of preferences: what is read of a hostile or torn file, appending, splits, ranks, and training on pairs."""

from __future__ import annotations

import json
import math
import multiprocessing
import os

import pytest
import saved
import torch
from watchers import StopsAt

from retort.preferences import store as preferences
from retort.sampling.path import VE
from retort.trainers.adapters import LoraConfig
from retort.trainers.config import RunConfig, TrainingConfig
from retort.trainers.data import Data
from retort.trainers.dataset import Dataset
from retort.trainers.loop import Stopped, Trainer
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from retort.trainers.objectives.mapo import MaPO, MaPOConfig
from retort.trainers.objectives.parts.contract import LOSER, STRENGTH, Batch, Draws
from retort.trainers.objectives.smpo import SmPO, SmPOConfig
from retort.trainers.origin import alike, origin


@pytest.fixture
def names(tmp_path):
    """Four pictures of the set in tmp_path, by name."""
    return [preferences.keep_image(tmp_path, torch.full((4, 6, 3), i / 4)) for i in range(4)]


def line(winner, loser, prompt="a seven", strength=None, by="me", **more):
    return {"prompt": prompt, "winner": winner, "loser": loser, "strength": strength, "by": by, **more}


def write(folder, *rows, end="\n"):
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / preferences.PAIRS).write_text("\n".join(texts) + end, encoding="utf-8")
    return preferences.read(folder)


def test_what_is_appended_is_read(tmp_path, names):
    a, b, c, _ = names
    assert preferences.append(tmp_path, [line(a, b, strength=1.5), line(c, a, by="judge")]) == 2
    assert preferences.append(tmp_path, []) == 0
    assert preferences.append(tmp_path, [line(b, c, strength=0)]) == 1
    found = preferences.read(tmp_path)
    assert [(p.line, p.winner, p.loser, p.strength, p.by) for p in found.pairs] == [
        (1, a, b, 1.5, "me"), (2, c, a, None, "judge"), (3, b, c, 0.0, "me"),
    ]  # fmt: skip
    assert [p.certainty for p in found.pairs] == [1.5, math.inf, 0] and not found.problems


def test_files_have_the_name_of_their_content(tmp_path):
    image = torch.rand(5, 7, 3)
    name = preferences.keep_image(tmp_path, image)
    assert preferences.keep_image(tmp_path, image) == name and not preferences.is_latent(name)
    assert (preferences.load_image(tmp_path / name) - image).abs().max() <= 0.5 / 255 + 1e-6
    latent = torch.randn(4, 3, 3)
    name = preferences.keep_latent(tmp_path, latent)
    assert torch.equal(preferences.load_latent(tmp_path / name), latent) and preferences.is_latent(name)


def test_an_unfinished_line_waits_and_is_closed_by_the_next_writer(tmp_path, names):
    a, b, c, _ = names
    whole = json.dumps(line(a, b))
    found = write(tmp_path, whole, whole[:40], end="")
    assert len(found.pairs) == 1 and found.problems == ("line 2: it is not finished, or longer than 65536 bytes",)
    preferences.append(tmp_path, [line(c, a)])
    found = preferences.read(tmp_path)
    assert [p.line for p in found.pairs] == [1, 3] and found.problems[0].startswith("line 2: it is no JSON")


def test_bad_lines_are_named_and_the_good_ones_used(tmp_path, names):
    a, b, *_ = names
    (tmp_path.parent / "other.png").write_bytes((tmp_path / a).read_bytes())
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "other.png")
    (tmp_path / "note.txt").write_text("no picture")
    bad = {
        "is no JSON": ['{"prompt": "a'],
        "nested too deep": ["[" * 60_000, "[" * 40 + "]" * 40],
        "is too large": ['{"prompt": ' + "9" * 6000 + "}", line(a, b, strength=10**400)],
        "half a character": [line(a, b, prompt="\ud800")],
        "is no object": ["[1]"],
        "not finished, or longer": [json.dumps(line(a, b, prompt="x" * 10_000_000))],
        "prompt must be a text": [{"winner": a, "loser": b}, line(a, b, prompt="x" * 8193), line(a, b, prompt=3)],
        "winner must be a text": [line(None, b), line(["x"], b)],
        "strength must be": [
            line(a, b, strength=-1), line(a, b, strength=True), line(a, b, strength="1"),
            line(a, b, strength=math.nan), line(a, b, strength=math.inf),
        ],
        "same picture": [line(a, a)],
        "leads out": [
            line("../other.png", b), line(str(tmp_path / a), b), line(a, "images/../../other.png"),
            line("C:\\a.png", b), line("a\x00.png", b),
        ],
        "no picture": [line("note.txt", b), line(a, "pairs.jsonl")],
        "is missing": [line("images/none.png", b)],
        "is a link, or lies behind one": [line(a, "link.png")],
        "undo must be": [line(a, b, undo=1)],
    }  # fmt: skip
    rows = [(reason, row) for reason, given in bad.items() for row in given]
    found = write(tmp_path, line(a, b), *(row for _, row in rows), line(b, a, by="you"))
    assert [p.line for p in found.pairs] == [1, len(rows) + 2]
    assert len(found.problems) == len(rows)
    for number, ((reason, _), problem) in enumerate(zip(rows, found.problems, strict=True), start=2):
        assert problem.startswith(f"line {number}: ") and reason in problem and len(problem) < 250, problem


def test_no_json_is_deep_enough_to_end_the_reader(tmp_path, names):
    found = write(tmp_path, '{"a":' * 12_000 + "1" + "}" * 12_000, line(*names[:2]))
    assert [p.line for p in found.pairs] == [2] and len(found.problems) == 1


def test_a_judge_may_change_its_mind_and_take_it_back(tmp_path, names):
    a, b, c, _ = names
    found = write(tmp_path, line(a, b), line(a, c), line(b, a), line(a, c, undo=True), line(a, b, by="you"))
    assert [(p.line, p.winner) for p in found.pairs] == [(3, b), (5, a)]
    assert found.problems == ("line 1: me said the opposite in line 3",)
    assert "2 pairs, 1 prompts, 2 pictures, 0 ties, 1 judged both ways" in found.statistics()
    # The same said twice is said once, as in the end.
    assert [p.strength for p in write(tmp_path, line(a, b, strength=1), line(a, b, strength=2)).pairs] == [2.0]


def test_nothing_is_appended_that_no_reader_would_take(tmp_path, names):
    a, b, *_ = names
    preferences.append(tmp_path, [line(a, b)])
    for row in (line(a, "images/none.png"), line(a, a), line(a, b, prompt="x" * 9000), line(a, "../x.png")):
        with pytest.raises(ValueError):
            preferences.append(tmp_path, [line(b, a, by="you"), row])
    assert len((tmp_path / preferences.PAIRS).read_text().splitlines()) == 1


def _append_many(folder, names, by):
    for number in range(60):
        preferences.append(folder, [line(*names, prompt=f"p{number}", by=by)])


def test_writers_and_a_reader_at_once(tmp_path, names):
    writers = [
        multiprocessing.get_context("fork").Process(target=_append_many, args=(tmp_path, names[:2], by)) for by in "xy"
    ]
    preferences.append(tmp_path, [line(*names[:2])])
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        found = preferences.read(tmp_path)
        assert all("not finished" in problem for problem in found.problems)
        seen.append(len(found.pairs))
    for writer in writers:
        writer.join()
    assert seen == sorted(seen) and len(preferences.read(tmp_path).pairs) == 121


def test_filter(tmp_path, names):
    a, b, c, d = names
    found = write(
        tmp_path, line(a, b, strength=2.0, by="judge A"), line(b, c, strength=0.5, by="judge B", prompt="a red two"),
        line(c, d), line(a, d, strength=0),
    )  # fmt: skip

    def lines(**given):
        return [p.line for p in found.filtered(**given).pairs]

    assert lines() == [1, 2, 3, 4] and lines(by="judge*") == [1, 2] and lines(prompt="RED") == [2]
    assert lines(least=1.0) == [1, 3] and lines(ties=False) == [1, 2, 3]


def test_split_keeps_a_prompts_pairs_together_and_its_choice_as_the_set_grows(tmp_path, names):
    a, b, c, _ = names
    rows = [line(*pair, prompt=f"prompt {i}") for i in range(200) for pair in ((a, b), (b, c))]
    train, held = write(tmp_path, *rows[:300]).split(0.2, 5)
    assert not {p.prompt for p in train.pairs} & {p.prompt for p in held.pairs}
    assert len(train.pairs) + len(held.pairs) == 300 and 0.1 < len(held.pairs) / 300 < 0.3
    more_train, more_held = write(tmp_path, *rows).split(0.2, 5)
    assert set(train.pairs) <= set(more_train.pairs) and set(held.pairs) <= set(more_held.pairs)
    assert [len(part.pairs) for part in write(tmp_path, *rows).split(0.0, 5)] == [400, 0]
    assert [len(part.pairs) for part in write(tmp_path, *rows).split(1.0, 5)] == [0, 400]
    with pytest.raises(ValueError, match="0 to 1"):
        train.split(1.5, 0)


def test_ranks_become_pairs():
    scores = [0.1, 0.9, 0.5, 0.4]
    assert [p[:2] for p in preferences.ranked_pairs(scores, "all", 0.0)] == [
        (1, 2), (1, 3), (1, 0), (2, 3), (2, 0), (3, 0),
    ]  # fmt: skip
    assert preferences.ranked_pairs(scores, "best_worst", 0.0) == [(1, 0, pytest.approx(0.8))]
    assert [p[:2] for p in preferences.ranked_pairs(scores, "halves", 0.0)] == [(1, 3), (2, 0)]
    assert [p[:2] for p in preferences.ranked_pairs([*scores, 0.0], "halves", 0.0)] == [(1, 0), (2, 4)]
    assert (3, 0) not in [p[:2] for p in preferences.ranked_pairs(scores, "all", 0.35)]
    assert preferences.ranked_pairs([0.5, 0.5], "all", 0.0) == preferences.ranked_pairs([1.0], "best_worst", 0.0) == []


def test_a_picture_that_is_none_is_refused(tmp_path):
    path = tmp_path / "bad.png"
    for data in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(40), os.urandom(200)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.png cannot be read"):
            preferences.load_image(path)
    from safetensors.torch import save_file

    for state in (
        {"other": torch.zeros(4, 2, 2)},
        {"latent": torch.zeros(4)},
        {"latent": torch.full((4, 2, 2), math.inf)},
    ):
        save_file(state, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match="latent .*bad.safetensors"):
            preferences.load_latent(tmp_path / "bad.safetensors")


# ---- training on them ------------------------------------------------------------------------------


def pairs_of_numbers(n=5, shape=(1, 4, 4)):
    generator = torch.Generator().manual_seed(0)
    latents, losers = ([torch.randn(shape, generator=generator) for _ in range(n)] for _ in range(2))
    entry = (torch.zeros(1, 2, 3), {})
    return Dataset([entry] * n, [], None, latents, None, losers, [0.5, math.inf, 1.0, 0.0, 2.0][:n])


def data_of(dataset):
    columns = {LOSER: dataset.losers, STRENGTH: [torch.tensor(s) for s in dataset.strengths]}
    return Data([{"mean": torch.zeros(1)}] * len(dataset.latents), latents=dataset.latents, columns=columns)


def test_a_data_set_of_pairs_is_saved_whole(tmp_path):
    given = pairs_of_numbers()
    given.save(tmp_path / "data.safetensors")
    found = Dataset.load(tmp_path / "data.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(found.losers, given.losers, strict=True))
    assert found.strengths == given.strengths
    with pytest.raises(ValueError, match="same size"):
        Dataset(given.entries, [], None, given.latents, None, [t[:, :2] for t in given.losers], given.strengths)
    with pytest.raises(ValueError, match="strength"):
        Dataset(given.entries, [], None, given.latents, None, given.losers, [1.0])


def test_other_pairs_are_another_origin():
    first, swapped, weaker = pairs_of_numbers(), pairs_of_numbers(), pairs_of_numbers()
    swapped.losers = swapped.losers[::-1]
    weaker.strengths = [1.0] * 5
    marks = [json.loads(json.dumps(origin("base", d, None))) for d in (first, first, swapped, weaker)]
    other = [[k for k, v in m.items() if not alike(marks[0][k], v)] for m in marks]
    assert other == [[], [], ["losers"], ["strengths"]]


def test_each_loser_stays_with_its_winner(affine):
    dataset, denoiser = pairs_of_numbers(), affine(VE)
    batch = data_of(dataset).batch(denoiser, [3, 1], [0, 1], 7, 0, 0.0)
    assert torch.equal(batch.images, torch.stack([dataset.latents[3], dataset.latents[1]]))
    assert torch.equal(batch.columns[LOSER], torch.stack([dataset.losers[3], dataset.losers[1]]))
    assert batch.columns[STRENGTH].tolist() == [0.0, math.inf]
    dataset.losers[2][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="loser 2 holds NaN"):
        data_of(dataset)


@pytest.mark.parametrize(("objective", "config"), [(DPO, DPOConfig), (SmPO, SmPOConfig), (MaPO, MaPOConfig)])
def test_a_step_on_pairs_keeps_what_twice_as_many_images_keep(tiny, objective, config):
    denoiser, generator = tiny(VE), torch.Generator().manual_seed(0)
    latents, losers = (torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2))

    def kept(made, count, columns):
        cond = {"mean": torch.zeros(count)}
        images = torch.cat([latents, losers])[:count]
        batch = Batch(Draws(0, 0, tuple(range(count))), (3, 16, 16), cond, None, images, columns=columns)
        with (count := saved.SavedBytes(denoiser.network)):
            loss = next(iter(made.losses(batch, 0)))
        assert loss.value.requires_grad
        return count.count

    plain = kept(FlowMatching(FlowMatchingConfig(), denoiser), 8, {})
    pairs = kept(objective(config(), denoiser), 4, {LOSER: losers, STRENGTH: torch.ones(4)})
    assert 0.9 * plain < pairs < 1.15 * plain


@pytest.mark.parametrize(
    ("kind", "objective", "config"), [("dpo", DPO, DPOConfig(beta=20.0)), ("smpo", SmPO, SmPOConfig(beta=2.0))]
)
def test_a_resumed_run_is_the_uninterrupted_one(affine, tmp_path, kind, objective, config):
    settings = TrainingConfig(steps=6, batch_size=2, accumulation=2, learning_rate=1e-2, warmup=0, preview_every=0)

    def trainer(folder, watcher=None):
        denoiser = affine(VE)
        run = RunConfig(kind, config, settings, LoraConfig(rank=1))
        return Trainer(denoiser, objective(config, denoiser), data_of(pairs_of_numbers()), run, folder, watcher)

    whole = trainer(tmp_path / "whole").train()
    with pytest.raises(Stopped):
        trainer(tmp_path / "parts", StopsAt(3)).train()
    parts = trainer(tmp_path / "parts").train()
    assert all(torch.equal(parts[k], whole[k]) for k in whole) and any(v.abs().max() > 1e-3 for v in whole.values())


def test_single_images_are_refused_before_anything_is_learnt(affine, tmp_path):
    denoiser, data = affine(VE), Data([{"mean": torch.zeros(1)}], latents=[torch.zeros(1, 4, 4)])
    config = RunConfig("dpo", DPOConfig(), TrainingConfig(steps=1), LoraConfig(rank=1))
    with pytest.raises(ValueError, match="learns from pairs"):
        Trainer(denoiser, DPO(DPOConfig(), denoiser), data, config, tmp_path).train()
