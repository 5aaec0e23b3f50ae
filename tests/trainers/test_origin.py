"""A run knows what it was started on again, bits lost in encoding it anew apart."""

from __future__ import annotations

import json
import re

import pytest
import torch

from retort.files.atomic import check_writable
from retort.trainers.dataset import Dataset, one_for_each
from retort.trainers.origin import ORIGIN, alike, origin, recognise


def entry(seed, changed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 77, 64, generator=generator) * 0.1
    # Prompts share most of their states: padding, and the words before the one that differs.
    tokens[:, :changed] += torch.randn(1, changed, 64, generator=generator) * 0.1
    return tokens, {}


def started(entries, **values):
    made = origin("base", Dataset(entries, [], **{"shape": (4, 8, 8), **values}), None)
    return json.loads(json.dumps(made))


def test_the_same_encoded_again_is_recognised_and_another_prompt_or_picture_is_not():
    before = started([entry(1), entry(2)], negative=entry(3))
    again = [(t + 1e-3 * t.abs() * torch.randn_like(t), e) for t, e in (entry(1), entry(2))]
    assert all(alike(before[k], v) for k, v in started(again, negative=entry(3)).items())
    other = started([entry(1), entry(2, 4)], negative=entry(4))
    assert [k for k, v in other.items() if not alike(before[k], v)] == ["prompts", "negative"]
    assert not alike(before["prompts"], started([entry(1)])["prompts"])
    pictures = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with_pictures = started([entry(1)], latents=pictures)
    rounded = started([entry(1)], latents=[p.half().float() for p in pictures])
    other = started([entry(1)], latents=[*pictures[:2], -pictures[2]])
    assert alike(with_pictures["latents"], rounded["latents"])
    assert not alike(with_pictures["latents"], other["latents"])
    # One prompt is marked once, however many pictures it serves.
    assert len(with_pictures["prompts"]) == 3


def test_a_run_that_goes_on_must_have_begun_alike(tmp_path):
    recognise(tmp_path, started([entry(1)]), False)
    recognise(tmp_path, started([entry(1)]), True)
    with pytest.raises(ValueError, match="name: the run .* other prompts.*another name"):
        recognise(tmp_path, started([entry(2)]), True)
    recognise(tmp_path, started([entry(2)]), False)  # nothing of the first is left to go on with
    (tmp_path / ORIGIN).write_text("{")
    with pytest.raises(ValueError, match="origin.json: it is no JSON.*another name"):
        recognise(tmp_path, started([entry(2)]), True)


def test_more_pairs_than_it_began_with_are_counted(tmp_path):
    pictures = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def pairs(count):
        return started(
            [entry(i) for i in range(count)], latents=pictures[:count], losers=pictures[-count:],
            strengths=[1.0] * count, references=pictures[:count],
        )  # fmt: skip

    recognise(tmp_path / "taste", pairs(2), False)
    said = "the run 'taste' was started with other pairs (2, now 3) and other references (2, now 3): give this run"
    with pytest.raises(ValueError, match=re.escape(said)):
        recognise(tmp_path / "taste", pairs(3), True)


def test_buckets_come_apart_and_plain_lists_stay():
    a, b, c = ([entry(i)] for i in range(3))
    pair = {"samples": torch.zeros(2, 4, 8, 8)}
    assert one_for_each([a + b, c], [pair, {"samples": torch.zeros(1, 4, 8, 8)}]) == [a, b, c]
    assert one_for_each([a], [pair]) == [a] and one_for_each([a, b], [pair]) == [a, b]


def test_trying_a_folder_leaves_nothing(tmp_path):
    check_writable(tmp_path / "to" / "be")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="cannot write to .*file"):
        check_writable(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
