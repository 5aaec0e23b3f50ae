"""Model families that once could not be trained, or were searched wrongly: tiny networks of ComfyUI's real classes.

`benchmarks.families` asks the same of all families, and more of each.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration

WORKS = {
    "HunyuanVideo": ("flow", "lora"),  # once taken for Flux by the names of two weights
    "LTXV": ("flow", "exact"),  # its blocks write to their inputs
    "PixelDiTT2I": ("flow", "exact"),  # to a norm's output, and to slices
    "LTXAV_video_only": ("flow",),  # most of its adapters are the sound's, and learn nothing
    "ErnieImage": ("flow", "lora"),  # positions by an operator without a backward pass
    "Stable_Cascade_C": ("flow",),  # a convolution for each channel by itself
    "SeedVR2": ("flow", "gan"),  # fills a cache as it runs; its tokens have no batch
    "WAN_Animate2": ("flow", "exact", "gan"),  # calls its blocks by names of its own
    "QwenImage_4D": ("flow", "lora"),  # pictures as latents of a video model, without a frame
    "HunyuanVideo15_SR_Distilled": ("search",),  # MeanFlow: one level for the whole batch
    "HiDreamO1": ("flow", "exact"),  # writes by `out`, and keeps keys and values from call to call
    "CosmosT2V": ("sampler", "flow"),  # EDM's continuous levels
    "CosmosT2IPredict2": ("sampler", "reflection", "search", "flow", "exact", "lora"),  # a flow in VE's coordinates
    "HunyuanImage21Refiner": ("flow", "lora"),  # two stored frames are one of the network's
    "ACEStep15": ("search", "gan"),  # mixes the references of a batch; beside its blocks are encoders of the prompt
    "MiniMaxH3": ("flow", "gan"),  # video with sound, one at a time
}
SOUND = ("sampler", "reflection", "search", "flow", "dmd2", "lora")  # its reward looks at a picture of the numbers
WORKS |= dict.fromkeys(("ACEStep", "ACEStep15", "StableAudio", "StableAudio3"), SOUND)
REFUSED = {
    ("SVD_img2vid", "search"): "the guider's model (SVD_img2vid) takes a batch for the frames of one video",
    ("SVD_img2vid", "flow"): "model (SVD_img2vid) takes a batch for the frames of one video",
    ("HunyuanVideo15_SR_Distilled", "flow"): "model (HunyuanVideo15_SR_Distilled) is a MeanFlow model",
    ("LotusD", "sampler"): "this model samples in coordinates of its own (model_sampling: IMG_TO_IMG)",
    ("WAN21_FlowRVS", "flow"): "this model samples in coordinates of its own (model_sampling: IMG_TO_IMG_FLOW)",
}


@pytest.fixture(scope="module")
def rows(comfy, ours):
    return ours("benchmarks.family_networks").families()


@pytest.fixture
def tried(ours, rows, tmp_path, monkeypatch):
    """tried(family, cells) -> what came of each, one training step a run."""
    host = ours("hosts.comfyui.host").host
    (tmp_path / "loras").mkdir()
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path / "loras")

    def run(name, cells):
        trial = ours("benchmarks.family_trials").Trial(rows[name], ours, tmp_path, steps=1)
        return dict(trial.run(cells))

    return run


@pytest.mark.parametrize("name", list(WORKS))
def test_it_works_and_is_exact(tried, name):
    assert set(tried(name, WORKS[name]).values()) == {"ok"}


@pytest.mark.parametrize(("name", "cell"), list(REFUSED))
def test_it_is_refused_by_name(tried, name, cell):
    found = tried(name, (cell,))[cell]
    assert found.startswith(f"refused: {REFUSED[name, cell]}")


def test_operators_are_put_back_after_a_training(comfy, ours):
    kitchen = ours("hosts.comfyui.eager").comfy_kitchen
    host, before = ours("hosts.comfyui.host").host, dict(vars(kitchen))
    with pytest.raises(RuntimeError, match="on the way"), host.training_session():
        assert kitchen.rms_rope is not before["rms_rope"] and kitchen.rms_adaln is not before["rms_adaln"]
        raise RuntimeError("on the way")
    assert all(vars(kitchen)[name] is value for name, value in before.items())


def test_a_refiners_latents_are_as_its_vae_stores_them(ours, rows):
    model, work = rows["HunyuanImage21Refiner"].model().model, ours("hosts.comfyui.work")
    form = model.latent_format
    assert work.stored_channels(form) == 32 and form.latent_channels == 64
    for shape in ((32, 4, 4), (32, 1, 4, 4), (64, 4, 4), (64, 1, 4, 4)):
        assert work.whole(form, shape) == (64, 1, 4, 4)
    samples = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(work.process_in(model, samples), form.process_in(samples[:, :, None]))
    with pytest.raises(ValueError, match="the latents have 64 channels and the model takes 32"):
        work.process_in(model, torch.zeros(1, 64, 1, 4, 4))


@pytest.mark.parametrize("name", ["ACEStep15", "LTXAV", "MiniMaxH3"])
def test_samples_of_a_batch_do_not_depend_on_each_other(ours, rows, name):
    """ACE-Step 1.5 mixes the references of a batch, LTX-2 opens its gates by a batch's highest level."""
    row, host, parts = rows[name], ours("hosts.comfyui.host").host, ours("sampling.parts")
    with host.training_session(), torch.no_grad():
        denoiser = host.trainable(row.model())
        start = parts.parts_of(row.start(4, 2))
        made = parts.Parts(parts.Parts.of(start).shapes, (), denoiser.gains)
        x, levels = made.pack(start), torch.tensor([0.9, 0.3])
        conds = [denoiser.encode(row.prompt(seed), (1, *x.shape[1:]), parts=made) for seed in (1, 3)]
        both = denoiser.predict_x0(x, levels, denoiser.join(conds))
        for i, cond in enumerate(conds):
            alone = denoiser.predict_x0(x[i : i + 1], levels[i : i + 1], denoiser.join([cond]))
            assert torch.equal(both[i : i + 1], alone)
        seen, x0 = denoiser.features_and_x0(x, levels, denoiser.join(conds))
        assert torch.equal(x0, both) and all(len(part) == 2 for part in seen)
        denoiser.release()


def test_every_model_of_comfyui_has_a_row_or_is_named(ours, rows):
    unknown = set(ours("benchmarks.family_networks").unknown())
    kinds = {kind.__name__ for kind in ours("benchmarks.family_networks").models()}
    assert unknown < kinds and {row.kind for row in rows.values()} <= kinds
