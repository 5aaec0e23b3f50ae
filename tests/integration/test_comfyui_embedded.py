"""RetortEmbeddedModel in real ComfyUI, on stand-in weights and on the real ones where there are any."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.integration

VARIANTS = ["flow", "eps", "flow early", "eps early"]
PROMPT = "a bold (blue:1.3) seven on yellow paper"


@pytest.fixture(scope="module")
def folder(stand_ins, tmp_path_factory) -> Path:
    """A models folder with random weights under the embedded files' names."""
    return stand_ins(tmp_path_factory.mktemp("models"))


@pytest.fixture
def embedded(comfy, ours, folder, monkeypatch):
    """embedded(variant) -> MODEL, CLIP, VAE of the node, run as ComfyUI runs nodes."""
    monkeypatch.setattr(ours("hosts.comfyui.embedded"), "FOLDER", folder)

    def load(variant: str):
        with torch.inference_mode():
            return comfy.plugin["RetortEmbeddedModel"].execute(variant).args

    return load


def encoded(comfy, clip, text):
    with torch.inference_mode():
        return comfy.nodes.CLIPTextEncode().encode(clip, text)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_nodes_run_it(comfy, embedded, variant):
    model, clip, vae = embedded(variant)
    positive, negative = encoded(comfy, clip, PROMPT), encoded(comfy, clip, "")
    latent = {"samples": torch.zeros(2, 16, 8, 8)}
    with torch.inference_mode():
        out = comfy.nodes.common_ksampler(model, 3, 2, 4.0, "euler", "simple", positive, negative, latent)[0]
        image = vae.decode(out["samples"])
        assert image.shape == (2, 64, 64, 3)
        assert vae.encode(image).shape == (2, 16, 8, 8)
    assert torch.isfinite(out["samples"]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_latent_of_usual_size_is_refused_with_the_size_to_take(comfy, embedded, variant):
    model, clip, _ = embedded(variant)
    prompt = encoded(comfy, clip, PROMPT)
    with torch.inference_mode(), pytest.raises(ValueError, match="are 768 x 512: set width and height .* to 64"):
        latent = {"samples": torch.zeros(1, 4, 64, 96)}
        comfy.nodes.common_ksampler(model, 3, 2, 4.0, "euler", "simple", prompt, prompt, latent)


def test_flow_is_what_the_stock_loader_gives(comfy, embedded, folder):
    model, _, vae = embedded("flow")
    stock, clip, stock_vae, _ = comfy.sd.load_checkpoint_guess_config(
        str(folder / "checkpoints" / "digits_flow.safetensors")
    )
    assert clip is None
    assert model.get_model_object("model_sampling").shift == stock.get_model_object("model_sampling").shift == 3.0
    for (key, mine), theirs in zip(model.model.state_dict().items(), stock.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
    latent = torch.randn(1, 16, 8, 8)
    with torch.inference_mode():
        assert torch.equal(vae.decode(latent), stock_vae.decode(latent))


def test_eps_has_stable_diffusions_schedule_and_whole_timesteps(comfy, ours, embedded, recording):
    model, clip, _ = embedded("eps")
    sampling = model.get_model_object("model_sampling")
    assert torch.equal(sampling.sigmas, comfy.model_sampling.ModelSamplingDiscrete().sigmas)
    assert ours("hosts.comfyui.coordinates").path_of(sampling).kind == "VE"
    positive = encoded(comfy, clip, PROMPT)
    with torch.inference_mode(), recording(model) as seen:
        comfy.nodes.common_ksampler(
            model, 3, 4, 1.0, "euler", "simple", positive, positive, {"samples": torch.zeros(1, 16, 8, 8)}
        )
    assert [float(t) for t in torch.cat(seen.timesteps)] == [999.0, 749.0, 499.0, 249.0]


def test_clip_shapes_weights_and_pooled_state(comfy, ours, embedded):
    _, clip, _ = embedded("flow")
    plain, extra = encoded(comfy, clip, "a bold blue seven on yellow paper")[0]
    assert plain.shape == (1, 16, 128) and extra["pooled_output"].shape == (1, 128)
    assert plain.dtype == torch.float32
    heavy, empty = encoded(comfy, clip, PROMPT)[0][0], encoded(comfy, clip, "")[0][0]
    blue = ours("models.text").WordTokenizer().encode(PROMPT)[1].index(1.3)
    assert torch.allclose(heavy[0, blue], empty[0, blue] + 1.3 * (plain[0, blue] - empty[0, blue]), atol=1e-6)
    others = [i for i in range(16) if i != blue]
    assert torch.equal(heavy[0, others], plain[0, others])
    assert torch.equal(clip.clone().patcher.model.encoder.words.weight, clip.cond_stage_model.encoder.words.weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_deep_copies_read_the_file_again(comfy, embedded, variant):
    model, clip, _ = embedded(variant)
    with torch.inference_mode(False), torch.enable_grad():
        copy = model.clone(force_deepcopy=True)
        assert copy.model is not model.model
        assert type(copy.get_model_object("model_sampling")).__mro__[2] is type(model.model.model_sampling).__mro__[2]
        assert torch.equal(copy.get_model_object("model_sampling").sigmas, model.model.model_sampling.sigmas)
        network = copy.model.diffusion_model.float()
        weight = network.joint_blocks[0].x_block.attn.qkv.weight.requires_grad_(True)
        x = torch.randn(1, 16, 8, 8)
        network(x, torch.tensor([500.0]), context=torch.randn(1, 16, 128), y=torch.randn(1, 128)).sum().backward()
        assert weight.grad is not None and weight.grad.abs().sum() > 0
    again = clip.patcher.cached_patcher_init
    assert again[0](*again[1]).model.encoder.words.weight.shape == clip.cond_stage_model.encoder.words.weight.shape


@pytest.mark.parametrize("variant", ["flow", "eps"])
def test_loras_reach_it_and_the_distilled_sampler(comfy, embedded, sample, variant):
    model, clip, _ = embedded(variant)
    positive = encoded(comfy, clip, PROMPT)
    generator = torch.Generator().manual_seed(3)
    width = model.model.diffusion_model.joint_blocks[0].x_block.attn.proj.weight.shape[0]
    name = "transformer.transformer_blocks.0.attn.to_out.0"  # as diffusers and PEFT spell it
    lora = {
        f"{name}.lora_A.weight": torch.randn(4, width, generator=generator),
        f"{name}.lora_B.weight": torch.randn(width, 4, generator=generator),
    }
    outputs = {}
    for strength in (0.0, 1.0):
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)
        setup = comfy.plugin["RetortDistilledSetup"].execute(patched, positive, f"digits_{variant}", 1).args
        outputs[strength] = sample(*setup[1:4], {"samples": torch.zeros(1, 16, 8, 8)})
    plain = comfy.plugin["RetortDistilledSetup"].execute(model, positive, f"digits_{variant}", 1).args
    assert torch.equal(outputs[0.0], sample(*plain[1:4], {"samples": torch.zeros(1, 16, 8, 8)}))
    assert (outputs[1.0] - outputs[0.0]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["flow", "eps"])
def test_core_trains_a_lora_on_it(comfy, embedded, variant):
    model, clip, _ = embedded(variant)
    positive = encoded(comfy, clip, PROMPT)
    train = importlib.import_module("comfy_extras.nodes_train").TrainLoraNode
    one = {
        "batch_size": 1, "grad_accumulation_steps": 1, "steps": 2, "learning_rate": 1e-3, "rank": 2,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 1, "training_dtype": "fp32", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    with torch.inference_mode():
        lora, losses, _ = train.execute(
            model=[model], latents=[{"samples": torch.randn(1, 16, 8, 8)}], positive=[positive],
            **{k: [v] for k, v in one.items()},
        ).args  # fmt: skip
    assert len(losses["loss"]) == 2 and lora


def test_memory_is_asked_for_in_proportion(embedded):
    model, _, _ = embedded("eps")
    assert model.model.memory_required([2, 16, 8, 8]) < 64 * 1024**2


def test_a_missing_file_is_named(comfy, ours, monkeypatch, tmp_path):
    monkeypatch.setattr(ours("hosts.comfyui.embedded"), "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"digits_eps\.safetensors.*retort\.models\.build"):
        comfy.plugin["RetortEmbeddedModel"].execute("eps")


def test_an_unknown_variant_is_named(comfy):
    with pytest.raises(ValueError, match="'huge'.*flow early"):
        comfy.plugin["RetortEmbeddedModel"].execute("huge")


def test_stock_loaders_see_the_models_folder(comfy, ours):
    folder = ours("models.loader").FOLDER
    for kind in ("checkpoints", "loras"):
        assert comfy.folders.get_folder_paths(kind).count(str(folder / kind)) == 1
    if (folder / "checkpoints" / "digits_flow.safetensors").is_file():
        assert "digits_flow.safetensors" in comfy.folders.get_filename_list("checkpoints")
        with torch.inference_mode():
            model, clip, vae = comfy.nodes.CheckpointLoaderSimple().load_checkpoint("digits_flow.safetensors")
        assert type(model.model).__name__ == "SD3" and clip is None and vae.latent_channels == 16
