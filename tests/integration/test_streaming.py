"""ComfyUI's own networks streamed block by block: forward and gradients to the bit, in each format of its weights."""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest
import tiny_training as tiny
import torch

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("poisoned")]
files, loaded, host, quantised, training = tiny.files, tiny.loaded, tiny.host, tiny.quantised, tiny.training
poisoned = tiny.poisoned

FORMATS = ("fp32", "bf16", "float8_e4m3fn", "int8_tensorwise", "nvfp4")


def built(comfy, layout: str, form: str) -> torch.nn.Module:
    """A Flux of two double and three single blocks, or a UNet laid out as SDXL's, with weights in a format."""
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    plain = form in ("fp32", "bf16")
    operations = comfy.ops.disable_weight_init if plain else comfy.ops.mixed_precision_ops({}, dtype)
    common = {"operations": operations, "dtype": dtype, "device": "cpu"}
    if layout == "flux":
        network = importlib.import_module("comfy.ldm.flux.model").Flux(
            image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=128,
            mlp_ratio=4.0, num_heads=4, depth=2, depth_single_blocks=3, axes_dim=[8, 12, 12], theta=10000,
            patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[], **common,
        )  # fmt: skip
    else:
        network = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=64, num_res_blocks=[1, 1], channel_mult=[1, 2],
            transformer_depth=[0, 2], transformer_depth_output=[0, 0, 1, 2], transformer_depth_middle=1, context_dim=64,
            num_heads=-1, num_head_channels=32, use_spatial_transformer=True, use_linear_in_transformer=True,
            adm_in_channels=32, num_classes="sequential", legacy=False, **common,
        )  # fmt: skip
    algorithms = importlib.import_module("comfy.quant_ops").QUANT_ALGOS
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, module in network.named_modules():
        for key, old in module.named_parameters(recurse=False):
            if old.ndim < 2:
                value = torch.ones(old.shape) if key in ("weight", "scale") else torch.zeros(old.shape)
                weights[f"{name}.{key}"] = (value + 0.02 * torch.randn(old.shape, generator=generator)).to(dtype)
                continue
            weights[f"{name}.{key}"] = (torch.randn(old.shape, generator=generator) / old[0].numel() ** 0.5).to(dtype)
        if type(module).__name__ == "Linear" and not plain and not hasattr(module, "weight"):
            value = torch.randn(module.out_features, module.in_features, generator=generator)
            value = (value / module.in_features**0.5).to(dtype)
            if "blocks" not in name or "emb_layers" in name:
                weights[f"{name}.weight"] = value
                continue
            options = {"scale": "recalculate"} if "float8" in form else {}
            kind = importlib.import_module("comfy.quant_ops").QuantizedTensor
            stored = kind.from_float(value, algorithms[form]["comfy_tensor_layout"], **options)
            weights |= {f"{name}.{part}": tensor for part, tensor in stored.state_dict("weight").items()}
            weights[f"{name}.comfy_quant"] = torch.tensor(
                list(json.dumps({"format": form}).encode()), dtype=torch.uint8
            )
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    return network


def ready(comfy, ours, layout: str, form: str):
    """The network as the host hands it over, with two adapters of random weights."""
    network = built(comfy, layout, form)
    for block in network.modules():
        if type(block).__name__ in ("DoubleStreamBlock", "SingleStreamBlock"):  # they write to their inputs
            ours("trainers.writes").forbid(block)
    ours("hosts.comfyui.exact").exact_layers(network)
    kinds = ours("hosts.comfyui.own_network").linear_kinds(network)
    adapters = ours("trainers.adapters").Adapters(network.eval(), kinds)
    for seed, name in enumerate(("student", "fake")):
        adapters.add(name, ours("trainers.adapters").LoraConfig(rank=4), seed)
        generator = torch.Generator().manual_seed(7 + seed)
        with torch.no_grad():
            for weight in adapters.parameters(name).values():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return network, adapters


def passes(network, adapters, layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A step of distillation: sample, fake and teacher without a graph, student and fake with one."""
    generator = torch.Generator().manual_seed(3)
    channels, width = (16, 64) if layout == "flux" else (4, 64)
    x = torch.randn(1, channels, 8, 8, generator=generator).to(dtype)
    context, y = (torch.randn(1, *shape, generator=generator).to(dtype) for shape in ((5, width), (32,)))
    t = torch.full((1,), 0.5, dtype=dtype)

    def call(x):
        return network(x, t, context, y=y, transformer_options={"cond_or_uncond": [0]})

    out = {}
    with torch.no_grad():
        for name in ("student", "fake", None):
            adapters.switch(name)
            out[f"{name} forward"] = call(x)
    adapters.switch("student")
    (call(x).float() * (out["fake forward"] - out["None forward"]).float()).mean().mul(100).backward()
    adapters.switch("fake")
    (call(out["student forward"]).float() - x.float()).square().mean().backward()
    adapters.switch(None)
    for name in ("student", "fake"):
        out |= {f"{name} {key}": weight.grad for key, weight in adapters.parameters(name).items()}
    return out


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layout", ["flux", "sdxl"])
def test_streamed_is_resident_to_the_bit(comfy, ours, training, layout, form):
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    checkpointing, ring = ours("trainers.checkpointing"), ours("trainers.streaming").Ring
    network, adapters = ready(comfy, ours, layout, form)
    expected = passes(network, adapters, layout, dtype)
    assert all(bool(torch.isfinite(value).all()) for value in expected.values())
    moved = 0
    blocks = len(checkpointing.units(network))
    for count, buffers in ((blocks, 2), (blocks // 2, 1)):
        network, adapters = ready(comfy, ours, layout, form)
        streamed = ring(network, torch.device("cpu"), count, buffers=buffers)
        checkpointing.enable(network)
        found = passes(network, adapters, layout, dtype)
        for name, value in expected.items():
            assert found[name].equal(value), (count, buffers, name)
        away = ours("trainers.masters").Away
        stored = [p for name, p in network.named_parameters() if isinstance(p, away)]
        moved = max(moved, len(stored))
        streamed.close()
        if form not in ("fp32", "bf16"):
            kinds = {type(module.weight).__name__ for module in network.modules() if hasattr(module, "quant_format")}
            assert "QuantizedTensor" in kinds
    assert moved > 20


def test_sdxl_is_checkpointed_by_transformer_block(comfy, ours):
    """28 blocks of up to 0.65 GB become 87 of less than 0.1 GB; a discriminator goes on looking at the 28."""
    with torch.device("meta"):
        network = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2],
            channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10],
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10, context_dim=2048,
            num_heads=-1, num_head_channels=64, use_spatial_transformer=True, use_linear_in_transformer=True,
            adm_in_channels=2816, num_classes="sequential", legacy=False, dtype=torch.float16, device="meta",
            operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
    checkpointing = ours("trainers.checkpointing")

    def largest(found):
        return max(sum(p.nbytes for p in module.parameters()) for _, module in found) / 2**30

    outer, inner = checkpointing.blocks(network), checkpointing.units(network)
    assert len(outer) == 28 and 0.6 < largest(outer) < 0.7
    assert len(inner) == 87 and largest(inner) < 0.1


@pytest.mark.parametrize(("kind", "method"), [("flux", "dmd2"), ("sd15", "flow"), ("sd3 fp8", "dmd2")])
def test_a_run_with_a_streamed_base_writes_the_same_lora(
    ours, host, loaded, quantised, monkeypatch, tmp_path, kind, method
):
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path / "loras")
    model, positive = quantised if kind == "sd3 fp8" else loaded(kind)
    with torch.inference_mode():
        # A mapped file's weights begin anywhere, and some of the CPU's products differ by that in the last bit. A
        # device's memory, and the ring's, begin where they should.
        for module in model.model.diffusion_model.modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                setattr(module, key, torch.nn.Parameter(weight.clone(), requires_grad=False))
    entry, shape = tuple(positive[0]), tiny.x_of(kind.split()[0]).shape[1:]
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    data = ours("trainers.dataset").Dataset([entry] * 2, [], (entry[0] * 0, entry[1]), latents)
    written = {}
    for offload in ("none", "1", "99"):
        settings = {
            "steps": 2, "batch_size": 1, "warmup": 0, "learning_rate": 0.01, "gradient_checkpointing": True,
            "preview_every": 2, "previews": 1, "offload": offload,
        }  # fmt: skip
        config = {"method": method, "objective": {}, "training": settings, "lora": {"rank": 2}}
        name = f"{method}_{offload}"
        request = ours("hosts.training.run").Request(name, ours("trainers.methods").read_config(config), data)
        with torch.inference_mode():
            written[offload] = ours("hosts.training.run").run(
                host, model, request, watcher=ours("trainers.watch").Silent(), folder=tmp_path / name
            )
    for offload in ("1", "99"):
        for name, value in written["none"].lora.items():
            assert written[offload].lora[name].equal(value), (offload, name)
        before, after = ((tmp_path / f"{method}_{each}/previews/step_0000002.png") for each in ("none", offload))
        assert before.read_bytes() == after.read_bytes()
