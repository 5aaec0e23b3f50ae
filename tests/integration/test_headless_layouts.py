"""Published layouts run the same here and in ComfyUI: networks, text encoders and VAEs of random weights."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.integration, pytest.mark.slow]


def module(name: str):
    return importlib.import_module(name)


def filled(network: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a size that keeps activations in range."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, value in network.state_dict().items():
        if value.ndim >= 2:
            weights[key] = torch.randn(value.shape, generator=generator) * min(0.2, value[0].numel() ** -0.5)
        elif key.endswith(("weight", "scale")):
            weights[key] = 1 + 0.1 * torch.randn(value.shape, generator=generator)
        else:
            weights[key] = 0.1 * torch.randn(value.shape, generator=generator)
    return weights


def unet(comfy, **changes):
    kind = module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    plain = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1],
        "channel_mult": [1, 1], "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0],
        "transformer_depth_middle": 1, "context_dim": 768, "num_heads": 8, "num_head_channels": -1,
        "use_spatial_transformer": True, "legacy": False, "operations": comfy.ops.disable_weight_init,
        "dtype": torch.float32, "device": "cpu",
    }  # fmt: skip
    return kind(**plain | changes)


def sd3(comfy):
    return module("comfy.ldm.modules.diffusionmodules.mmdit").OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=2, adm_in_channels=48, num_patches=256,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        pos_embed_max_size=16, qk_norm="rms", x_block_self_attn_layers=[0], operations=comfy.ops.disable_weight_init,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip


def flux(comfy, guidance):
    return module("comfy.ldm.flux.model").Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=48, context_in_dim=64, hidden_size=128,
        mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=guidance, txt_ids_dims=[], operations=comfy.ops.disable_weight_init,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip


NETWORKS = {
    "SD1.5": (unet, (77, 768), None, 4),
    "SD3": (sd3, (12, 64), 48, 16),
    "Flux dev": (lambda comfy: flux(comfy, True), (12, 64), 48, 16),
    "Flux schnell": (lambda comfy: flux(comfy, False), (12, 64), 48, 16),
}


@pytest.mark.parametrize(("kind", "sampler"), [*((kind, "euler") for kind in NETWORKS), ("SD3", "dpmpp_2m")])
def test_a_network_file_samples_alike(comfy, ours, tmp_path, kind, sampler):
    """50 guided steps (4 of the UNet, which cannot be small), uneven picture, prompts of unlike length."""
    steps = 4 if kind == "SD1.5" else 50
    make, context, pooled, channels = NETWORKS[kind]
    weights = filled(make(comfy))
    save_file(weights, tmp_path / "network.safetensors")
    generator = torch.Generator().manual_seed(2)

    def condition(length):
        extra = {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=generator)}
        return [[torch.randn(1, length, context[1], generator=generator), extra]]

    positive = condition(context[0])
    negative = condition(2 * context[0] if kind == "SD1.5" else context[0])
    latent = {"samples": torch.zeros(2, channels, 12, 8)}

    model = comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in weights.items()})
    with torch.inference_mode():
        theirs = comfy.nodes.common_ksampler(
            model, 9, steps, 3.0, sampler, "simple", positive, negative, latent
        )[0]["samples"]  # fmt: skip
    loaded = ours("hosts.headless.diffusers_loader").load_diffusion_model(tmp_path / "network.safetensors")
    node = ours("graphs.core.sampling").KSampler
    mine = node.execute(loaded, 9, steps, 3.0, sampler, "simple", positive, negative, latent).args[0]["samples"]
    # Random networks send latents far out; rounding grows with them.
    scale = max(1.0, float(theirs.abs().max()))
    assert theirs.std() > 0.1
    assert float((mine - theirs).abs().max()) <= 1e-4 * scale


def test_sdxls_unet_answers_alike(comfy, ours, tmp_path):
    """The smallest SDXL that ComfyUI itself loads has 2.5 billion parameters, so the bare networks are compared."""
    make = {
        "model_channels": 64, "num_res_blocks": [2, 2], "channel_mult": [1, 2], "transformer_depth": [0, 0, 2, 2],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2], "transformer_depth_middle": 2, "context_dim": 96,
        "num_head_channels": 64, "num_heads": -1, "use_linear_in_transformer": True, "num_classes": "sequential",
        "adm_in_channels": 48 + 6 * 256,
    }  # fmt: skip
    theirs = unet(comfy, **make)
    weights = filled(theirs)
    theirs.load_state_dict(weights)
    save_file(weights, tmp_path / "network.safetensors")
    loaded = ours("hosts.headless.diffusers_loader").load_diffusion_model(tmp_path / "network.safetensors")
    x, tokens, pooled = torch.randn(2, 4, 16, 8), torch.randn(2, 77, 96), torch.randn(1, 48)
    t = torch.tensor([999.0, 12.0])
    made = loaded.network.conditions(tokens, {"pooled_output": pooled}, x.shape)
    with torch.no_grad():
        mine = loaded.network(x, t, **{k: v.expand(2, *v.shape[1:]) for k, v in made.items()})
        sizes = module("comfy.ldm.modules.diffusionmodules.openaimodel")
        embed = module("comfy.ldm.modules.diffusionmodules.util").timestep_embedding
        numbers = torch.cat([embed(torch.tensor([float(n)]), 256) for n in (128, 64, 0, 0, 128, 64)]).flatten()[None]
        y = torch.cat([pooled, numbers], 1).expand(2, -1)
        answer = theirs(x, t, context=tokens, y=y)
    assert sizes is not None and float((mine - answer).abs().max()) <= 1e-4


def test_text_encoders_answer_alike(comfy, ours, comfyui, monkeypatch):
    """CLIP-L and OpenCLIP G in miniature behind ComfyUI's own tokenizer: weights, long prompts, SDXL's combination."""
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    clip, xl = module("comfy.sd1_clip"), module("comfy.sdxl_clip")
    small = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1,
        "projection_dim": 64,
    }  # fmt: skip
    options = {"clip_l_model_config": small, "clip_g_model_config": small}
    theirs = xl.SDXLClipModel(model_options=options)
    first, second = (filled(m.transformer, seed) for seed, m in enumerate((theirs.clip_l, theirs.clip_g)))
    theirs.clip_l.transformer.load_state_dict(first)
    theirs.clip_g.transformer.load_state_dict(second)
    plain = clip.SD1CheckpointClipModel(model_options=options)
    plain.transformer.load_state_dict(first)
    encoders = ours("hosts.headless.text_encoders")
    words = ours("hosts.headless.tokenizers").find("clip")
    clip_l = encoders.clip_encoder(first, words, "quick_gelu", hidden="penultimate")
    last_l = encoders.clip_encoder(first, words, "quick_gelu", hidden="last")
    clip_g = encoders.clip_encoder(second, words, "gelu", hidden="penultimate", projected=True)
    tokenizer = xl.SDXLTokenizer()
    prompts = ["", "a photo of a cat", "a ((very:1.2) bold) (seven:0.6), \\(1989\\)", "one two three four " * 40]
    for prompt in prompts:
        pairs = tokenizer.tokenize_with_weights(prompt)
        with torch.no_grad():
            tokens, pooled = theirs.encode_token_weights(pairs)
            mine, extra = encoders.sdxl(clip_l, clip_g).encode(prompt)[0]
            assert torch.allclose(mine, tokens, atol=1e-4), prompt
            assert torch.allclose(extra["pooled_output"], pooled, atol=1e-4), prompt
            tokens, pooled = plain.encode_token_weights(pairs["l"])
            mine, extra = encoders.sd15(last_l).encode(prompt)[0]
            assert torch.allclose(mine, tokens, atol=1e-4), prompt
            assert torch.allclose(extra["pooled_output"], pooled, atol=1e-4), prompt


def test_t5_answers_alike(comfy, ours, comfyui, monkeypatch):
    """T5 v1.1 in miniature, padded to 77 as SD3 does."""
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    t5 = module("comfy.text_encoders.sd3_clip")
    small = {"d_model": 64, "d_ff": 96, "num_heads": 2, "d_kv": 32, "num_layers": 2}
    theirs = t5.T5XXLModel(model_options={"t5xxl_model_config": small})
    weights = filled(theirs.transformer)
    theirs.transformer.load_state_dict(weights)
    encoders = ours("hosts.headless.text_encoders")
    words = ours("hosts.headless.tokenizers").find("t5")
    encoder = encoders.t5_encoder(weights, words, least=77)
    for prompt in ("", "a photo of a cat", "a (bold:1.4) seven"):
        with torch.no_grad():
            tokens, _ = theirs.encode_token_weights(t5.T5XXLTokenizer().tokenize_with_weights(prompt))
            assert torch.allclose(encoder.encode(prompt, ())[0], tokens, atol=1e-4), prompt


@pytest.mark.parametrize("channels", [4, 16])
def test_vaes_answer_alike(comfy, ours, channels):
    """AutoencoderKL in both directions, pictures cut to multiples of 8."""
    kind = module("comfy.ldm.models.autoencoder")
    config = {
        "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    if channels == 4:
        network = kind.AutoencoderKL(ddconfig=config, embed_dim=4)
    else:
        part = "comfy.ldm.modules.diffusionmodules.model"
        network = kind.AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": f"{part}.Encoder", "params": config},
            decoder_config={"target": f"{part}.Decoder", "params": config},
        )
    weights = filled(network)
    network.load_state_dict(weights)
    vae = ours("hosts.headless.vaes").from_state(weights)
    image = torch.rand(2, 50, 68, 3)
    with torch.inference_mode():
        latent = vae.encode(image)
        cut = image[:, 1:49, 2:66].movedim(-1, 1)
        assert torch.allclose(latent, network.encode(cut * 2 - 1), atol=1e-4)
        picture = ((network.decode(latent) + 1) / 2).clamp(0, 1).movedim(1, -1)
        assert torch.allclose(vae.decode(latent), picture, atol=1e-4)
