"""Real checkpoint layouts on tiny networks: single files and folders, text encoders, VAEs and LoRAs.

Independent witnesses: diffusers' own converters, and its pipelines' `encode_prompt`.
"""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_pipelines as tiny
import torch

from retort.files.errors import UsageError
from retort.graphs.core.sampling import grid, sample_latent
from retort.hosts.headless import folders
from retort.hosts.headless.guider import Guider
from retort.hosts.headless.model import Lora
from retort.hosts.headless.noise import RandomNoise
from retort.hosts.headless.samplers import StandardSampler
from retort.models.layouts import dit as layout_dit
from retort.models.layouts import text as layout_text
from retort.models.layouts import unet as layout_unet
from retort.models.layouts import vae as layout_vae

pytest.importorskip("diffusers")

KINDS = ("SD1.5", "SDXL", "SD3", "Flux dev", "Flux schnell")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """pipelines(kind) -> (diffusers pipeline, its folder, the same as a single file), made once."""
    root = tmp_path_factory.mktemp("models")
    made = {}

    def get(kind):
        if kind not in made:
            name = kind.replace(" ", "_")
            pipe = tiny.pipeline(kind, root / "diffusers" / name)
            (root / "checkpoints").mkdir(exist_ok=True)
            tiny.single_file(kind, pipe, root / "checkpoints" / f"{name}.safetensors")
            made[kind] = pipe, root / "diffusers" / name, root / "checkpoints" / f"{name}.safetensors"
        return made[kind]

    (root / "tokenizers").mkdir()
    tiny.clip_tokenizer(root / "tokenizers" / "clip")
    tiny.t5_tokenizer().save_pretrained(root / "tokenizers" / "t5")
    get.root = root
    return get


@pytest.fixture
def loaded(pipelines):
    """loaded(kind) -> ((model, clip, vae) of the file, those of the folder)."""
    from retort.hosts.headless.diffusers_folder import load_folder
    from retort.hosts.headless.diffusers_loader import load_checkpoint

    def load(kind):
        _, folder, file = pipelines(kind)
        with folders.use(folders.Folders(models=(pipelines.root,))):
            single = load_checkpoint(file)
            single[1].encode("warm")  # reads the tokenizers while the folders are known
            return single, load_folder(folder)

    return load


def close(a, b, tolerance=1e-4):
    """Equal but for rounding, relative to the largest number: random networks send latents far out."""
    return (a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max()))


def draw(model, clip, steps=2, cfg=3.0, prompt="a seven"):
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    guider = Guider(model, clip.encode(prompt), clip.encode("ink"), cfg)
    sigmas = grid(model, "simple", steps)
    return sample_latent(guider, RandomNoise(3), StandardSampler("euler"), sigmas, latent, 3)[0]["samples"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_and_a_folder_are_the_same_model(loaded, kind):
    (model, clip, vae), (model_2, clip_2, vae_2) = loaded(kind)
    assert model.prediction == model_2.prediction and model.schedule == model_2.schedule
    for prompt in ("a seven", "(a bold:1.3) seven on [yellow] paper", "x " * 90):
        (tokens, extra), (tokens_2, extra_2) = clip.encode(prompt)[0], clip_2.encode(prompt)[0]
        assert torch.allclose(tokens, tokens_2, atol=1e-5)
        assert torch.allclose(extra["pooled_output"], extra_2["pooled_output"], atol=1e-5)
    a, b = draw(model, clip), draw(model_2, clip_2)
    assert close(a, b) and a.std() > 0.1
    image = vae.decode(a)
    assert image.shape == (1, 64, 64, 3) and close(image, vae_2.decode(a))
    assert close(vae.encode(image), vae_2.encode(image))


def test_layouts_agree_with_diffusers_own_converters(pipelines):
    from diffusers.loaders import single_file_utils as theirs

    for kind in ("SD1.5", "SDXL"):
        unet = pipelines(kind)[0].unet
        original = tiny.published(unet, layout_unet.layout(unet.config))
        converted = theirs.convert_ldm_unet_checkpoint(
            {f"model.diffusion_model.{k}": v for k, v in original.items()}, unet.config
        )
        assert converted.keys() == unet.state_dict().keys()
        assert all(torch.equal(v, unet.state_dict()[k]) for k, v in converted.items())
        assert layout_unet.config({k: tuple(v.shape) for k, v in original.items()}).items() <= {
            **unet.config, "transformer_layers_per_block": [1, 2] if kind == "SDXL" else [1, 1],
        }.items()  # fmt: skip
    transformer = pipelines("SD3")[0].transformer
    original = tiny.published(transformer, layout_dit.sd3_layout(transformer.config))
    converted = theirs.convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert converted.keys() == transformer.state_dict().keys()
    assert all(torch.equal(v, transformer.state_dict()[k]) for k, v in converted.items())
    vae = pipelines("SDXL")[0].vae
    original = tiny.published(vae, layout_vae.layout(vae.config))
    converted = theirs.convert_ldm_vae_checkpoint(original, vae.config)
    assert converted.keys() == vae.state_dict().keys()
    assert all(torch.equal(v.squeeze(), vae.state_dict()[k].squeeze()) for k, v in converted.items())


@pytest.mark.parametrize("prompt", ["a bold blue seven", ""])
def test_text_encoders_agree_with_diffusers_pipelines(pipelines, loaded, prompt):
    with torch.no_grad():
        pipe = pipelines("SD1.5")[0]
        theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        assert torch.allclose(loaded("SD1.5")[0][1].encode(prompt)[0][0], theirs, atol=1e-5)
        pipe = pipelines("SDXL")[0]
        theirs, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        tokens, extra = loaded("SDXL")[0][1].encode(prompt)[0]
        assert torch.allclose(tokens, theirs, atol=1e-5)
        assert torch.allclose(extra["pooled_output"], pooled, atol=1e-5)
        pipe = pipelines("Flux dev")[0]
        theirs, pooled, _ = pipe.encode_prompt(prompt, prompt, device="cpu", max_sequence_length=256)
        tokens, extra = loaded("Flux dev")[0][1].encode(prompt)[0]
        assert torch.allclose(tokens, theirs, atol=1e-5)
        assert torch.allclose(extra["pooled_output"], pooled, atol=1e-5)
        pipe = pipelines("SD3")[0]
        theirs, _, pooled, _ = pipe.encode_prompt(
            prompt, prompt, prompt, device="cpu", do_classifier_free_guidance=False, max_sequence_length=77
        )
        tokens, extra = loaded("SD3")[0][1].encode(prompt)[0]
        assert torch.allclose(tokens, theirs, atol=1e-5)
        # ComfyUI takes CLIP-L's pooled state before its projection, diffusers after it.
        assert torch.allclose(extra["pooled_output"][:, 64:], pooled[:, 64:], atol=1e-5)


def test_weights_move_tokens_from_the_empty_prompt(loaded):
    clip = loaded("SD1.5")[0][1]
    plain, heavy, none = (clip.encode(p)[0][0] for p in ("ab", "(ab:2.0)", "(ab:0.0)"))
    empty = clip.encode("")[0][0]
    assert torch.allclose(heavy[:, 1:3], 2 * plain[:, 1:3] - empty[:, 1:3], atol=1e-4)
    assert torch.allclose(none[:, 1:3], empty[:, 1:3], atol=1e-5)
    assert torch.equal(heavy[:, 0], plain[:, 0])
    assert clip.encode("x " * 90)[0][0].shape == (1, 154, 64)


def lora(names, shapes, style):
    """Random rank-2 factors for modules (name, (out, in, ...)), in a style of file."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, (out, inner, *kernel) in zip(names, shapes, strict=True):
        down = torch.randn(2, inner, *kernel, generator=generator) * 0.2
        up = torch.randn(out, 2, *([1] * len(kernel)), generator=generator) * 0.2
        if style == "kohya":
            flat = "lora_unet_" + name.replace(".", "_")
            state |= {
                f"{flat}.lora_down.weight": down,
                f"{flat}.lora_up.weight": up,
                f"{flat}.alpha": torch.tensor(1.0),
            }
        else:
            state |= {f"{style}{name}.lora_A.weight": down, f"{style}{name}.lora_B.weight": up}
    return state


CASES = [
    ("SD1.5", "unet.", ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv1"],
     [(64, 64), (64, 64, 3, 3)]),
    ("SD1.5", "kohya", ["input_blocks.1.1.transformer_blocks.0.attn2.to_k", "input_blocks.1.0.in_layers.2"],
     [(64, 64), (64, 64, 3, 3)]),
    ("SDXL", "diffusion_model.", ["middle_block.1.transformer_blocks.1.attn1.to_q", "middle_block.1.proj_in"],
     [(128, 128), (128, 128)]),
    ("SD3", "diffusion_model.", ["joint_blocks.1.x_block.attn.qkv", "final_layer.adaLN_modulation.1"],
     [(384, 128), (256, 128)]),
    ("SD3", "transformer.", ["transformer_blocks.1.attn.to_q"], [(128, 128)]),
    ("Flux dev", "kohya", ["single_blocks.1.linear1", "double_blocks.0.img_attn.qkv"], [(896, 128), (384, 128)]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "style", "names", "shapes"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_lora_equals_its_product_merged_into_the_file(pipelines, loaded, tmp_path, kind, style, names, shapes):
    from safetensors.torch import load_file, save_file

    from retort.hosts.headless.diffusers_loader import load_checkpoint

    model, clip, _ = loaded(kind)[0]
    table = model.network._adapters.table
    state = lora(names, shapes, style)
    patched = model.with_lora(Lora("tiny", state, 0.7))
    plain = draw(model, clip)
    # Merged by hand into the published layout; names in diffusers' layout are looked up in the table.
    weights = load_file(pipelines(kind)[2])
    backwards = {targets[0]: original for original, targets in table.modules.items()}
    for name, key in zip(names, [k for k in state if k.endswith(("lora_A.weight", "lora_down.weight"))], strict=True):
        down, up = state[key], state[key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")]
        delta = 0.7 * (0.5 if style == "kohya" else 1.0) * (up.flatten(1) @ down.flatten(1))
        target = f"model.diffusion_model.{name if name in table.modules else backwards[name]}.weight"
        rows = delta.shape[0]  # a part of a fused projection stands first in it
        weights[target][:rows] += delta.view(rows, *weights[target].shape[1:])
    save_file(weights, tmp_path / "merged.safetensors")
    merged = load_checkpoint(tmp_path / "merged.safetensors")[0]
    with_lora = draw(patched, clip)
    assert (with_lora - plain).abs().max() > 1e-3
    assert close(with_lora, draw(merged, clip))
    assert torch.equal(draw(model, clip), plain)  # the same weights, without it again
    both = patched.with_lora(Lora("tiny", state, -0.7))
    assert close(draw(both, clip), plain)


def test_a_lora_on_the_text_encoder(loaded):
    clip = loaded("SD1.5")[0][1]
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    state = {
        "lora_te_text_model_encoder_layers_0_mlp_fc2.lora_down.weight": torch.randn(2, 96),
        "lora_te_text_model_encoder_layers_0_mlp_fc2.lora_up.weight": up,
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": down,
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": up,
    }
    plain = clip.encode("a seven")[0][0]
    changed = clip.with_lora(Lora("tiny", state, 0.5)).encode("a seven")[0][0]
    assert (changed - plain).abs().max() > 1e-3 and torch.equal(clip.encode("a seven")[0][0], plain)


def test_a_lora_of_another_model_is_refused_by_name(loaded):
    model = loaded("SD1.5")[0][0]
    for state, message in (
        (
            lora(["joint_blocks.0.x_block.attn.qkv"], [(384, 128)], "diffusion_model."),
            "this model lacks, such as diffu",
        ),
        ({"x.hada_w1_a": torch.zeros(2, 2)}, "LoHa, LoKr"),
        ({"x.weight": torch.zeros(2, 2)}, "this is no LoRA"),
        ({"x.lora_A.weight": torch.zeros(2, 2)}, "has no second half"),
    ):
        with pytest.raises(UsageError, match=message):
            model.with_lora(Lora("tiny", state, 1.0)).network  # noqa: B018


def test_conditioning_of_another_model_is_refused(loaded):
    model, other = loaded("SDXL")[0][0], loaded("SD1.5")[0][1]
    with pytest.raises(UsageError, match="tokens of 64 numbers and the model takes 128"):
        Guider(model, other.encode("x")).denoiser(torch.Size((1, 4, 8, 8)))


def test_other_models_are_refused_by_name(tmp_path, pipelines):
    from safetensors.torch import load_file, save_file

    from retort.hosts.headless.diffusers_loader import load_checkpoint, load_vae

    weights = load_file(pipelines("SD1.5")[2])
    network = "model.diffusion_model."

    def refused(change, message, load=load_checkpoint):
        changed = dict(weights)
        change(changed)
        save_file(changed, tmp_path / "x.safetensors")
        with pytest.raises(UsageError, match=message):
            model = load(tmp_path / "x.safetensors")[0]
            model.network  # noqa: B018

    refused(lambda w: w.update({f"{network}input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)}), "takes 9 channels")
    refused(lambda w: w.update({"edm_mean": torch.zeros(1)}), "EDM model")
    refused(lambda w: w.pop(f"{network}input_blocks.0.0.weight"), "no model that the headless host knows")
    refused(lambda w: w.pop(f"{network}out.0.weight"), "conv_norm_out.weight is missing")
    refused(lambda w: w.pop("first_stage_model.decoder.conv_in.bias"), "the VAE lacks 1 tensors")
    refused(lambda w: [w.pop(k) for k in list(w) if "stage" in k], "no VAE of", lambda p: [load_vae(p)])


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_index_names_no_pickle_in_a_folder(pipelines, tmp_path, part):
    from safetensors.torch import load_file, save_file

    from retort.hosts.headless.diffusers_folder import load_folder

    _, folder, _ = pipelines("SD1.5")
    shutil.copytree(folder, tmp_path / "folder")
    stem = "diffusion_pytorch_model" if part == "unet" else "model"
    weights = load_file(tmp_path / "folder" / part / f"{stem}.safetensors")
    (tmp_path / "folder" / part / f"{stem}.safetensors").unlink()
    save_file(weights, tmp_path / "folder" / part / "some.safetensors", {"format": "pt"})
    torch.save(weights, tmp_path / "folder" / part / "all.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "all.bin")}
    (tmp_path / "folder" / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"names 'all\.bin', and only safetensors files beside it are read"):
        load_folder(tmp_path / "folder")[0].network  # noqa: B018 (read at its first use)


def test_a_file_without_a_text_encoder_has_no_clip(tmp_path, pipelines):
    from safetensors.torch import load_file, save_file

    from retort.hosts.headless.diffusers_loader import load_checkpoint

    weights = {k: v for k, v in load_file(pipelines("SD1.5")[2]).items() if k.startswith("model.")}
    save_file(weights, tmp_path / "x.safetensors")
    model, clip, vae = load_checkpoint(tmp_path / "x.safetensors")
    assert clip is None and vae is None and model.prediction == "eps"
    save_file({**weights, "v_pred": torch.tensor([])}, tmp_path / "v.safetensors")
    assert load_checkpoint(tmp_path / "v.safetensors")[0].prediction == "v"


def test_missing_tokenizers_say_where_to_get_them(pipelines, monkeypatch, tmp_path):
    from retort.hosts.headless.diffusers_loader import load_checkpoint

    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    clip = load_checkpoint(pipelines("SD1.5")[2])[1]
    with folders.use(folders.Folders(models=(tmp_path,))), pytest.raises(UsageError, match="hf download openai/clip"):
        clip.encode("x")


def test_a_real_layout_runs_from_a_workflow(go, api, pipelines, where):
    """CheckpointLoaderSimple and DiffusersLoader, from prompt to PNG."""
    from dataclasses import replace

    from retort.graphs import run

    here = replace(where, models=(pipelines.root,))
    pipelines("SD1.5")
    api["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "SD1.5.safetensors"}}
    assert len(run.run(api, where=here).saved) == 1
    api["1"] = {"class_type": "DiffusersLoader", "inputs": {"model_path": "SD1.5"}}
    assert len(run.run(api, where=here).saved) == 1


def test_open_clip_names(pipelines):
    module = pipelines("SDXL")[0].text_encoder_2
    converted = layout_text.from_open_clip(tiny.open_clip(module))
    own = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
    assert converted.keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in converted.items())
