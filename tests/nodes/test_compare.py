"""Compare Models on the headless host: same noise for both, honest counts, and a sheet with both pictures."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from random_loras import random_loras  # noqa: E402

from retort.graphs.core.sampling import grid  # noqa: E402
from retort.hosts import api
from retort.hosts.headless.model import Lora  # noqa: E402
from retort.hosts.headless.samplers import StandardSampler  # noqa: E402
from retort.hosts.rewards import kinds as rewards  # noqa: E402
from retort.nodes.compare import RetortCompareModels  # noqa: E402

PROMPTS = "a blue seven on yellow paper\n\na thin red two"


@pytest.fixture(scope="module", params=["flow", "eps"])
def parts(request):
    """model, the same with a random LoRA, clip, vae."""
    model, clip, vae = api.host.embedded(request.param)
    (lora,) = random_loras(model, 1)
    return model, model.with_lora(Lora("random", lora, 1.0)), clip, vae


def run(parts, base, tuned, reward=None, **given):
    clip, vae = parts[2:]
    judge = reward or rewards.make(api.host, "embedded_judge", {"boldness": 1.0})
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    given = {"prompts": PROMPTS, "cfg": 2.0, "per_prompt": 3, "seed": 5, "shown": 4, **given}
    sampler = given.pop("sampler", StandardSampler("euler"))
    return RetortCompareModels.execute(
        base, tuned, clip, vae, judge, sampler, grid(base, "simple", 4), latent, **given
    ).args


def test_a_model_ties_with_itself(parts):
    rate, low, high, sheet, text = run(parts, parts[0], parts[0])
    assert (rate, low, high) == (0.5, 0.0, 1.0)
    assert "wins 0 of 0" in text and "6 ties" in text and len(text.splitlines()) == 2 + 6
    assert sheet.shape == (1, 2 * (256 + 30 + 8) + 8, 4 * (256 + 8) + 8, 3)


def test_both_ways_round_agree(parts):
    model, tuned = parts[:2]
    rate, low, high, _, text = run(parts, model, tuned)
    other, other_low, other_high, _, _ = run(parts, tuned, model)
    assert rate == pytest.approx(1 - other) and (low, high) == (
        pytest.approx(1 - other_high), pytest.approx(1 - other_low)
    )  # fmt: skip
    assert 0 <= low <= rate <= high <= 1 and "tuned against base by embedded judge" in text


def test_a_pair_is_the_sample_of_its_seed(parts):
    # One seed of the three alone, by the guider itself.
    clip, vae = parts[2:]
    judge = rewards.make(api.host, "embedded_judge", {"boldness": 1.0})
    guider = api.host.cfg_guider(parts[0], clip.encode("a thin red two"), clip.encode(""), 2.0)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(6))
    sigmas = grid(parts[0], "simple", 4)
    alone = guider.sample(noise, torch.zeros_like(noise), StandardSampler("euler"), sigmas, seed=6)
    score = float(judge(vae.decode(alone), "a thin red two").detach())
    line = run(parts, *parts[:2])[-1].splitlines()[2 + 4]
    assert line.startswith("5. ") and line.endswith("a thin red two")
    assert float(line.split()[1]) == pytest.approx(score, rel=1e-3)


def test_other_samplers_serve_and_no_prompt_is_refused(parts):
    sampler = StandardSampler("euler_ancestral")
    assert run(parts, *parts[:2], sampler=sampler, cfg=1.0, per_prompt=1)[3].shape[-1] == 3
    with pytest.raises(ValueError, match="prompts is empty"):
        run(parts, *parts[:2], prompts="\n \n")
