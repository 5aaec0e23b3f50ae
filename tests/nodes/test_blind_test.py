"""Blind Test on the headless host: the pairs of Compare Models, asked without saying which is which, counted apart."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("peft")

from random_loras import random_loras  # noqa: E402

from retort.graphs.core.sampling import grid  # noqa: E402
from retort.hosts import api  # noqa: E402
from retort.hosts.headless.folders import Folders, use  # noqa: E402
from retort.hosts.headless.model import Lora  # noqa: E402
from retort.hosts.headless.samplers import StandardSampler  # noqa: E402
from retort.nodes.compare import RetortBlindTest  # noqa: E402
from retort.preferences import store as preferences  # noqa: E402
from retort.preferences import tickets  # noqa: E402

PROMPTS = "a blue seven on yellow paper\n\na thin red two"


@pytest.fixture(scope="module", params=["flow", "eps"])
def parts(request):
    """model, the same with a random LoRA, clip, vae."""
    model, clip, vae = api.host.embedded(request.param)
    (lora,) = random_loras(model, 1)
    return model, model.with_lora(Lora("random", lora, 1.0)), clip, vae


@pytest.fixture
def folder(tmp_path):
    with use(Folders(models=(tmp_path / "models",), output=tmp_path)):
        yield tmp_path / "retort_preferences" / "blind_test"


def run(parts, base, tuned, **given):
    clip, vae = parts[2:]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    given = {"prompts": PROMPTS, "cfg": 2.0, "per_prompt": 3, "seed": 5, **given}
    return RetortBlindTest.execute(base, tuned, clip, vae, StandardSampler("euler"), grid(base, "simple", 4), latent,
                                   **given)  # fmt: skip


def alone(parts, model, prompt, seed):
    """A picture by the guider itself."""
    clip, vae = parts[2:]
    guider = api.host.cfg_guider(model, clip.encode(prompt), clip.encode(""), 2.0)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    done = guider.sample(noise, torch.zeros_like(noise), StandardSampler("euler"), grid(parts[0], "simple", 4),
                         seed=seed)  # fmt: skip
    return vae.decode(done)[0]


def test_both_models_draw_each_prompt_and_seed_and_the_tuned_ones_wins_are_counted(parts, folder):
    model, tuned = parts[:2]
    done = run(parts, model, tuned)
    (by,) = done.ui["by"]
    assert done.args == (6, "6 of 6 pairs wait, 0 are judged") and done.ui["set"] == ("blind_test",)
    with tickets.at(folder, by) as state:
        asked = list(state.waiting)
        assert state.blind and state.votes() == ({}, 0)
    assert [ticket.prompt for ticket in asked] == ["a blue seven on yellow paper"] * 3 + ["a thin red two"] * 3
    # The fourth pair is the second prompt's first seed, by each model's own sampling.
    for name, which in zip(asked[3].candidates, asked[3].models, strict=True):
        expected = alone(parts, {"base": model, "tuned": tuned}[which], "a thin red two", 5).clamp(0, 1)
        assert torch.allclose(preferences.load_image(folder / name), expected, atol=2.1 / 255)
    # Tuned four times, base once, a tie.
    for number, ticket in enumerate(asked[:5]):
        tickets.answer(folder, ticket.id, ticket.models.index("tuned" if number < 4 else "base"), by)
    tickets.answer(folder, asked[5].id, "tie", by)
    with tickets.at(folder, by) as state:
        assert state.votes() == ({"tuned": 4, "base": 1}, 1) and not state.waiting
    tickets.take_back(folder, asked[0].id, by)
    with tickets.at(folder, by) as state:
        assert state.votes() == ({"tuned": 3, "base": 1}, 1)
    # Read anew, and as pairs that a training can use.
    assert tickets.TicketState(folder, by).votes() == ({"tuned": 3, "base": 1}, 1)
    assert len(preferences.read(folder).pairs) == 5


def test_the_order_says_nothing(parts, folder):
    """The side of each model is that of its picture's name, whichever input it came by."""
    by = run(parts, *parts[:2]).ui["by"][0]
    other = run(parts, *parts[1::-1]).ui["by"][0]
    assert by != other
    rows = [json.loads(line) for line in (folder / tickets.TICKETS).read_text().splitlines()]
    assert all(row["candidates"] == sorted(row["candidates"]) for row in rows)
    sides = {who: [row["models"] for row in rows if row["by"] == who] for who in (by, other)}
    swap = {"base": "tuned", "tuned": "base"}
    assert sides[other] == [[swap[one] for one in row] for row in sides[by]]


def test_another_training_is_another_test_and_the_same_one_goes_on(parts, folder):
    model, tuned = parts[:2]
    first = run(parts, model, tuned)
    with tickets.at(folder, first.ui["by"][0]) as state:
        tickets.answer(folder, state.waiting[0].id, 0, first.ui["by"][0])
    again = run(parts, model, tuned)
    assert again.ui["by"] == first.ui["by"] and again.args == (5, "5 of 6 pairs wait, 1 are judged")
    assert run(parts, model, tuned, seed=6).args[0] == 6


def test_equal_pictures_are_left_out_and_bad_input_is_named(parts, folder):
    model, tuned = parts[:2]
    left_out = "6 pairs were left out, since both models drew the same picture"
    assert run(parts, model, model).args == (0, f"0 of 0 pairs wait, 0 are judged; {left_out}")
    with pytest.raises(ValueError, match="prompts is empty: write one in each line"):
        run(parts, model, tuned, prompts=" \n")
    with pytest.raises(ValueError, match="cannot be a file's name"):
        run(parts, model, tuned, name="../x")
