"""LoRA Grid on the headless host: which checkpoints are drawn, how strong, and from which noise."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from random_loras import random_loras  # noqa: E402

from retort.files.atomic import write_tensors  # noqa: E402
from retort.graphs.core.sampling import grid  # noqa: E402
from retort.hosts import api, lora_grid  # noqa: E402
from retort.hosts.headless.samplers import StandardSampler  # noqa: E402
from retort.nodes.lora_grid import RetortLoraGrid  # noqa: E402
from retort.trainers.loop import STATE  # noqa: E402

PROMPT = "a blue seven on yellow paper"


@pytest.fixture(scope="module", params=["flow", "eps"])
def parts(request):
    """model, clip, vae, and two LoRAs' tensors."""
    model, clip, vae = api.host.embedded(request.param)
    return model, clip, vae, random_loras(model, 2)


@pytest.fixture
def run(parts, tmp_path, monkeypatch):
    """run(**inputs) -> sheet, images; of a run that has kept checkpoints of steps 10 and 20."""
    monkeypatch.setattr(type(api.host), "runs_folder", lambda self: tmp_path)
    for step, lora in zip((10, 20), parts[3], strict=True):
        write_tensors(tmp_path / "mine" / "checkpoints" / f"step_{step:07d}.safetensors", lora)

    def one(**given):
        model, clip, vae, _ = parts
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        given = {"run": "mine", "prompt": PROMPT, "cfg": 2.0, "seed": 5, **given}
        sigmas = grid(model, "simple", 3)
        return RetortLoraGrid.execute(model, clip, vae, StandardSampler("euler"), sigmas, latent, **given).args

    return one


def alone(parts, lora, strength, cfg=2.0):
    """The same picture without the node: RandomNoise's of the seed, the LoRA patched in by the host."""
    model, clip, vae, _ = parts
    patched = api.host.with_weights(model, lora, "x", strength)
    guider = api.host.cfg_guider(patched, clip.encode(PROMPT), clip.encode(""), cfg)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    sampler = StandardSampler("euler")
    return vae.decode(guider.sample(noise, torch.zeros_like(noise), sampler, grid(model, "simple", 3), seed=5))


def test_each_picture_is_a_checkpoint_at_a_strength(parts, run):
    """Rows are checkpoints, columns strengths; at strength 0 all are the model alone; noise is the same for all."""
    sheet, images = run(strengths="0, 0.5, 1")
    assert images.shape[0] == 6 and sheet.shape[2] == 3 * (256 + 8) + 8
    for row, lora in enumerate(parts[3]):
        for column, strength in enumerate((0.0, 0.5, 1.0)):
            expected = alone(parts, lora, strength)
            torch.testing.assert_close(images[3 * row + column : 3 * row + column + 1], expected, rtol=0, atol=1e-5)
    assert torch.equal(images[0], images[3]) and not torch.allclose(images[2], images[5], atol=1e-3)


def test_the_model_alone_comes_first_where_no_strength_is_zero(parts, run):
    sheet, images = run(strengths="0.5, 1")
    _, with_zero = run(strengths="0, 0.5, 1")
    assert sheet.shape[2] == 3 * (256 + 8) + 8 and torch.equal(images, with_zero)
    _, elsewhere = run(strengths="1, 0")
    assert elsewhere.shape[0] == 4 and torch.equal(elsewhere[1], images[0])


def test_few_points_are_the_last_and_evenly_spread(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for step in range(1, 11):
        (folder / "checkpoints" / f"step_{step:07d}.safetensors").write_bytes(b"")
    steps = {count: [int(path.name[5:12]) for path in lora_grid.chosen(folder, count)] for count in (1, 2, 3, 10, 99)}
    assert steps == {1: [10], 2: [5, 10], 3: [4, 7, 10], 10: list(range(1, 11)), 99: list(range(1, 11))}


def test_what_cannot_be_drawn_is_refused_with_its_remedy(run, tmp_path):
    for text in ("", "a", "1,,2", "nan", "1e9", ", ".join(["1"] * 17)):
        with pytest.raises(ValueError, match="strengths must be 1 to 16 numbers"):
            lora_grid.strengths_of(text)
    with pytest.raises(ValueError, match="there is no run called 'other'"):
        run(run="other")
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="kept no checkpoint; train with `keep` above 0"):
        run(run="new")
    with pytest.raises(ValueError, match="cannot be a file's name"):
        run(run="../mine")


def test_it_draws_again_when_the_run_has_saved_again(run, tmp_path):
    """And not before; a stranger's checkpoints are not followed elsewhere."""
    before = RetortLoraGrid.fingerprint_inputs(run="mine")
    assert RetortLoraGrid.fingerprint_inputs(run="mine") == before
    (tmp_path / "mine" / STATE).write_bytes(b"saved")
    assert RetortLoraGrid.fingerprint_inputs(run="mine") != before
    (tmp_path / "mine" / "checkpoints" / "step_0000030.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((ValueError, OSError)):
        run()
