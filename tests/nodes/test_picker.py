"""Preference Picker and Next Prompt of a List, headless: what waits, what is not asked twice, and bad input."""

from __future__ import annotations

import pytest
import torch

from retort.hosts.headless.folders import Folders, use
from retort.nodes.picker import RetortPreferencePicker, RetortPromptQueue
from retort.preferences import store as preferences
from retort.preferences import tickets


@pytest.fixture
def where(tmp_path):
    found = Folders(models=(tmp_path / "models",), output=tmp_path)
    with use(found):
        yield tmp_path / "retort_preferences" / "my_taste"


def pictures(*values):
    return torch.stack([torch.full((6, 8, 3), v) for v in values])


def drawn(*values, **given):
    return RetortPreferencePicker.execute(pictures(*values), **{"prompt": "a seven", **given})


def test_candidates_wait_until_they_are_judged(where):
    done = drawn(0.1, 0.2, 0.3, 0.4)
    assert done.args[0] == 2 and done.ui["text"] == ("my_taste: 2 waiting (2 new), 0 judged, 0 skipped",)
    first, second = done.ui["tickets"]
    assert done.ui["set"] == ("my_taste",) and done.ui["by"] == ("pick",)
    tickets.answer(where, first, 1, "pick")
    tickets.answer(where, second, "skip", "pick")
    assert drawn(0.1, 0.2, 0.3, 0.4).args == (0, "my_taste: 0 waiting (0 new), 1 judged, 1 skipped")
    (pair,) = preferences.read(where).pairs
    better = preferences.load_image(where / pair.winner)
    assert (pair.prompt, pair.by, pair.strength) == ("a seven", "pick", None)
    assert torch.allclose(better, torch.full_like(better, 0.2), atol=1 / 255)


def test_the_same_pictures_wait_once_for_each_prompt_and_person(where):
    assert drawn(0.1, 0.2).args[0] == drawn(0.1, 0.2).args[0] == drawn(0.2, 0.1).args[0] == 1
    assert drawn(0.1, 0.2, prompt="a two").args[0] == 2
    assert drawn(0.1, 0.2, by="you").args[0] == 1
    assert drawn(0.1, 0.2, 0.3, 0.4, candidates="4").args[0] == 3


def test_latents_are_kept_with_their_pictures(where):
    latents = torch.arange(4 * 4 * 2 * 2).view(4, 4, 2, 2).float()
    done = drawn(0.1, 0.2, 0.3, 0.4, samples={"samples": latents})
    for id, rows in zip(done.ui["tickets"], (latents[:2], latents[2:]), strict=True):
        tickets.answer(where, id, 0, "pick")
        pair = next(p for p in preferences.read(where).pairs if torch.equal(
            preferences.load_latent(where / p.winner), rows[0]))  # fmt: skip
        assert torch.equal(preferences.load_latent(where / pair.loser), rows[1])


def test_candidates_of_an_edit_are_asked_with_the_picture_before(where):
    """It is a part of the question, and is kept with each pair; without one, questions and pairs are as ever."""
    plain = drawn(0.1, 0.2).ui["tickets"]
    done = drawn(0.1, 0.2, 0.3, 0.4, reference=pictures(0.8, 0.9))
    first, second = done.ui["tickets"]
    assert done.args[0] == 3 and not {first, second} & set(plain)
    assert drawn(0.1, 0.2, 0.3, 0.4, reference=pictures(0.8, 0.9)).args[0] == 3
    for id in (*plain, first, second):
        tickets.answer(where, id, 0, "pick")
    found = preferences.read(where).pairs
    assert [bool(pair.reference) for pair in found] == [False, True, True]
    assert len({pair.key for pair in found}) == 3
    for pair, value in zip(found[1:], (0.8, 0.9), strict=True):
        shown = preferences.load_image(where / pair.reference)
        assert torch.allclose(shown, torch.full_like(shown, value), atol=1 / 255)
    # What was said of the same pictures as edits of another is another word.
    tickets.take_back(where, first, "pick")
    assert [pair.reference for pair in preferences.read(where).pairs] == ["", found[2].reference]
    (where / found[2].reference).unlink()
    with tickets.at(where, "pick") as state:
        assert second in state.tickets
    left = preferences.read(where)
    assert len(left.pairs) == 1 and "is missing" in " ".join(left.problems)
    with pytest.raises(ValueError, match="reference holds 3 pictures, and there are 1 sets of candidates"):
        drawn(0.1, 0.2, reference=pictures(0.1, 0.2, 0.3))


def test_what_cannot_be_asked_is_explained(where):
    for given, message in (
        ((0.1,), "1 images cannot be shared out in sets of 2"),
        ((0.1, 0.2, 0.3), "set the batch_size of the latent to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(*given)
    with pytest.raises(ValueError, match="sets of 4"):
        drawn(0.1, 0.2, candidates="4")
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"samples holds {count} pictures and images 2"):
            drawn(0.1, 0.2, samples={"samples": torch.ones(count, 4, 2, 2)})
    with pytest.raises(ValueError, match="samples holds 0 pictures"):
        drawn(0.1, 0.2, samples={"samples": torch.zeros(2, 4, 2, 2)})
    for more, message in (({"name": "../x"}, "cannot be a file's name"), ({"prompt": "x" * 9000}, "at most 8192")):
        with pytest.raises(ValueError, match=message):
            drawn(0.1, 0.2, **more)
    assert not (where / tickets.TICKETS).exists()


def test_equal_candidates_are_left_out_and_told(where):
    done = drawn(0.1, 0.1, 0.2, 0.3)
    assert done.args[0] == 1 and "1 sets held the same picture twice" in done.args[1]


def test_it_always_runs(where):
    assert RetortPreferencePicker.fingerprint_inputs() != RetortPreferencePicker.fingerprint_inputs()


def test_prompts_come_one_after_another():
    text = "a\n\n  b \r\nc"
    assert [RetortPromptQueue.execute(text, i).args for i in range(3)] == [("a", 0, 3), ("b", 1, 3), ("c", 2, 3)]
    assert RetortPromptQueue.execute(text, 7, True).args == ("b", 1, 3)
    with pytest.raises(ValueError, match="all 3 prompts have been drawn"):
        RetortPromptQueue.execute(text, 3)
    with pytest.raises(ValueError, match="prompts is empty"):
        RetortPromptQueue.execute(" \n", 0)
