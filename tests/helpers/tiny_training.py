"""Tiny networks as files, loaded as nodes load them, and what the tests of training compare them with."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

SHAPES = {"digits flow": 16, "digits eps": 16, "sd3": 16, "sd15": 4, "flux": 16, "wan": 16}
CONTEXTS = {"sd3": (8, 64), "sd15": (77, 768), "flux": (8, 64), "wan": (8, 4096)}


def module(name: str):
    return importlib.import_module(name)


def filled(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in network.state_dict().items():
        if value.ndim >= 2:
            weights[key] = torch.randn(value.shape, generator=generator) * min(0.2, value[0].numel() ** -0.5)
        else:
            weights[key] = torch.full(value.shape, float(key.endswith(("weight", "scale"))))
    return weights


def network(comfy, kind: str) -> torch.nn.Module:
    common = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}
    if kind == "sd3":
        text = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}
        return module("comfy.ldm.modules.diffusionmodules.mmdit").OpenAISignatureMMDITWrapper(
            input_size=None, patch_size=2, in_channels=16, depth=2, adm_in_channels=48, num_patches=256,
            context_embedder_config=text, pos_embed_max_size=16, qk_norm="rms", x_block_self_attn_layers=[0], **common,
        )  # fmt: skip
    if kind == "flux":
        return module("comfy.ldm.flux.model").Flux(
            image_model="flux", in_channels=16, out_channels=16, vec_in_dim=48, context_in_dim=64, hidden_size=128,
            mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000,
            patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **common,
        )  # fmt: skip
    if kind == "wan":
        return module("comfy.ldm.wan.model").WanModel(
            model_type="t2v", patch_size=(1, 2, 2), in_dim=16, dim=128, ffn_dim=256, freq_dim=256, out_dim=16,
            num_heads=1, num_layers=1, image_model="wan2.1", **common,
        )  # fmt: skip
    return module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1], channel_mult=[1],
        transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1, context_dim=768,
        num_heads=8, num_head_channels=-1, use_spatial_transformer=True, legacy=False, **common,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(comfy, tmp_path_factory):
    """files(kind) -> path of a network file."""
    folder = tmp_path_factory.mktemp("networks")

    def get(kind):
        path = folder / f"{kind}.safetensors"
        if not path.is_file():
            save_file(filled(network(comfy, kind)), path)
        return str(path)

    return get


@pytest.fixture(scope="module")
def loaded(comfy, files):
    """loaded(kind) -> MODEL and CONDITIONING, made as nodes make them."""
    made = {}

    def get(kind):
        if kind not in made:
            with torch.inference_mode():
                if kind.startswith("digits"):
                    model, clip, _ = comfy.plugin["RetortEmbeddedModel"].execute(kind.split()[1]).args
                    positive = comfy.nodes.CLIPTextEncode().encode(clip, "a bold blue seven on yellow paper")[0]
                else:
                    model = comfy.sd.load_diffusion_model(files(kind))
                    generator = torch.Generator().manual_seed(2)
                    extra = {"pooled_output": torch.randn(1, 48, generator=generator), "guidance": 2.5}
                    positive = [[torch.randn(1, *CONTEXTS[kind], generator=generator), extra]]
            made[kind] = model, positive
        return made[kind]

    return get


@pytest.fixture(scope="module")
def quantised(comfy, files, tmp_path_factory):
    """MODEL and CONDITIONING of the SD3 layout from a file with fp8 weights."""
    weights = load_file(files("sd3"))
    for name in [n for n in weights if n.endswith(("qkv.weight", "fc1.weight"))]:
        scale = weights[name].abs().max() / 448
        layer = name.removesuffix("weight")
        parts = {"weight": (weights.pop(name) / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        weights |= {layer + k: v for k, v in parts.items()}
        weights[layer + "comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    path = tmp_path_factory.mktemp("quantised") / "fp8.safetensors"
    save_file(weights, path)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(2)
        extra = {"pooled_output": torch.randn(1, 48, generator=generator)}
        return comfy.sd.load_diffusion_model(str(path)), [[torch.randn(1, 8, 64, generator=generator), extra]]


@pytest.fixture
def poisoned(ours, card, monkeypatch):
    """Fresh memory for streamed weights is NaN, and no tensor is so small that it is copied."""
    monkeypatch.setattr(ours("trainers.masters"), "SMALL", 1)
    if not card:
        monkeypatch.setattr(
            ours("trainers.transfers").Copies, "empty", lambda self, size: torch.full((size,), 0xFF, dtype=torch.uint8)
        )


@pytest.fixture(scope="module")
def host(ours):
    return ours("hosts.comfyui.host").host


@pytest.fixture
def training(host):
    with host.training_session():
        yield


@pytest.fixture(scope="module")
def sampled(comfy):
    """sampled(model, positive, x, sigma) -> x0 as sampling computes it: CFGGuider with cfg 1."""

    class Once(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
            return model_wrap(noise, sigmas[:1].to(noise.device).expand(len(noise)), **extra_args)

    def run(model, positive, x, sigma):
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        with torch.inference_mode():
            out = guider.sample(x, torch.zeros_like(x), Once(), torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
            return model.model.process_latent_in(out).clone().cpu()

    return run


def x_of(kind, batch=1):
    shape = (batch, SHAPES[kind], *((2, 8, 8) if kind == "wan" else (8, 8)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def level(denoiser):
    return float(denoiser.schedule.sigmas[len(denoiser.schedule.sigmas) // 2])


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def ready(ours, host, model, positive, kind, rank=3, targets="*", exclude=""):
    """A denoiser with an adapter of random weights, and the condition of one sample."""
    denoiser = host.trainable(model)
    config = ours("trainers.adapters").LoraConfig(rank=rank, alpha=2.0 * rank, targets=targets, exclude=exclude)
    denoiser.adapters.add("student", config, 0)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for key, weight in denoiser.adapters.parameters("student").items():
            if "lora_B" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.03)
    return denoiser, denoiser.encode(positive, x_of(kind).shape)


def addresses(network):
    return {p.data_ptr() for p in network.parameters()}


def gradients(denoiser, one, kind):
    if denoiser.device.type != "cpu" and denoiser.ring is None:
        denoiser.place(0)
    denoiser.rehearse(x_of(kind).shape[1:], denoiser.join([one]))
    with denoiser.adapter("student"):
        x, sigma = x_of(kind).to(denoiser.device), torch.tensor([level(denoiser)], device=denoiser.device)
        (denoiser.predict_x0(x, sigma, denoiser.join([one])) - 0.5).square().mean().backward()
    return {k: w.grad.cpu() for k, w in denoiser.adapters.parameters("student").items()}
