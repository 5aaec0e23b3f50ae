"""Bases in each of ComfyUI's quantised formats: the gradient is that of their numbers, and core reads the LoRA."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
_spec = importlib.util.spec_from_file_location("retort_tiny_training", Path(__file__).with_name("tiny_training.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)
_saved = importlib.util.spec_from_file_location("retort_saved", Path(__file__).parents[1] / "saved.py")
saved = importlib.util.module_from_spec(_saved)
_saved.loader.exec_module(saved)
files, loaded, host = tiny.files, tiny.loaded, tiny.host
addresses, gradients, ready, x_of = tiny.addresses, tiny.gradients, tiny.ready, tiny.x_of

TURNED = {"convrot_groupsize": 64}
# By a name: format, how core makes such weights, and what a layer in a file says of them besides.
FORMATS = {
    "fp8_scaled": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "fp8_scaled e5m2": ("float8_e5m2", {"scale": "recalculate"}, {}),
    "scaled_fp8": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "mxfp8": ("mxfp8", {}, {}),
    "nvfp4": ("nvfp4", {}, {}),
    "int8": ("int8_tensorwise", {}, {}),
    "int8 by channel": ("int8_tensorwise", {"per_channel": True}, {}),
    "int8_convrot": ("int8_tensorwise", {"per_channel": True, "convrot": True, **TURNED}, {"convrot": True, **TURNED}),
    "convrot_w4a4": ("convrot_w4a4", TURNED, TURNED),
    "asym_w4a8_int8": ("asym_w4a8_int8", TURNED, TURNED),
}


def quantised(comfy, weights, kind):
    """A file's weights in one of ComfyUI's formats, and the same numbers multiplied out."""
    if kind == "plain fp8":
        out = {name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}
        return out, {name: value.float() for name, value in out.items()}
    core = importlib.import_module("comfy.quant_ops")
    form, made, said = FORMATS[kind]
    out, exact = dict(weights), dict(weights)
    for name, value in weights.items():
        if value.ndim != 2 or "block" not in name or value.shape[0] % 64 or value.shape[1] % 64:
            continue
        value = value.bfloat16() if form in ("nvfp4", "mxfp8") else value
        small = core.QuantizedTensor.from_float(value, core.QUANT_ALGOS[form]["comfy_tensor_layout"], **made)
        layer = name.removesuffix("weight")
        exact[name] = small.dequantize().float()
        del out[name]
        out |= {key: part.contiguous() for key, part in small.state_dict(name).items()}
        if kind == "scaled_fp8":
            out[f"{layer}scale_weight"] = out.pop(f"{layer}weight_scale")
            continue
        told = json.dumps({"format": form, **said}).encode()
        out[f"{layer}comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
    if kind == "scaled_fp8":
        out["scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    return out, exact


def bits(value):
    return value.reshape(-1).contiguous().view(torch.uint8)


@pytest.fixture
def model_in(comfy, files, loaded, tmp_path):
    """model_in(kind, exact=False) -> MODEL and CONDITIONING of the SD3 layout from a file in a format."""

    def load(kind, exact=False):
        path = tmp_path / f"{kind} {exact}.safetensors"
        save_file(quantised(comfy, load_file(files("sd3")), kind)[exact], path)
        options = {"dtype": torch.float8_e4m3fn} if kind == "plain fp8" and not exact else {}
        with torch.inference_mode():
            return comfy.sd.load_diffusion_model(str(path), options), loaded("sd3")[1]

    return load


@pytest.mark.parametrize("kind", [*FORMATS, "plain fp8"])
def test_the_gradient_on_small_weights_is_that_of_their_numbers(comfy, ours, host, files, model_in, kind):
    found = []
    with host.training_session():
        for exact in (False, True):
            model, positive = model_in(kind, exact)
            denoiser, one = ready(ours, host, model, positive, "sd3")
            if not exact:
                layers = [m for m in denoiser.network.modules() if ours("hosts.comfyui.exact").small(m)]
                assert len(layers) > 8
                assert addresses(denoiser.network) & addresses(model.model.diffusion_model)
                memory = ours("trainers.memory")
                # In one storage for each part: numbers, and scales.
                state = quantised(comfy, load_file(files("sd3")), kind)[0]
                total = sum(v.nbytes for k, v in state.items() if not k.endswith("comfy_quant"))
                base = memory.weights(denoiser.network) - sum(
                    w.nbytes for w in denoiser.adapters.parameters("student").values()
                )
                assert abs(base - total) < 0.02 * total + 4096
            found.append(gradients(denoiser, one, "sd3"))
            denoiser.release()
    ours_, true = (torch.cat([g.flatten() for g in grads.values()]).double() for grads in found)
    assert float(torch.cosine_similarity(ours_, true, 0)) > (0.999 if "int8" in kind else 0.9999)
    assert float((ours_ - true).norm() / true.norm()) < 0.02


@pytest.mark.parametrize("kind", [*FORMATS, "plain fp8"])
def test_a_training_on_such_a_base_gives_a_lora_that_core_reads(
    comfy, ours, host, model_in, monkeypatch, tmp_path, kind
):
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path / "loras")
    model, positive = model_in(kind)
    stored = {name: torch.clone(value) for name, value in model.model.diffusion_model.state_dict().items()}
    (tokens, extra), shape = positive[0], x_of("sd3").shape[1:]
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    data = ours("trainers.dataset").Dataset([(tokens, extra)] * 2, [], None, latents)
    settings = {"steps": 2, "batch_size": 1, "warmup": 0, "learning_rate": 0.01, "preview_every": 0}
    config = {"method": "flow", "objective": {}, "training": settings, "lora": {"rank": 2}}
    request = ours("hosts.training.run").Request("small", ours("trainers.methods").read_config(config), data)
    with torch.inference_mode():
        result = ours("hosts.training.run").run(
            host, model, request, watcher=ours("trainers.watch").Silent(), folder=tmp_path / "run"
        )
        known = comfy.lora.model_lora_keys_unet(model.model, {})
        loaded = comfy.lora.load_lora(dict(load_file(result.path)), known, log_missing=False)
    assert set(result.lora) == {key for adapter in loaded.values() for key in adapter.loaded_keys} and len(loaded) > 8
    after = model.model.diffusion_model.state_dict()
    assert all(torch.equal(bits(value), bits(after[name])) for name, value in stored.items())


def test_small_weights_are_exact_also_where_a_card_has_kernels_for_them(comfy, ours, host, files, loaded, tmp_path):
    """Such kernels round the inputs: 3 to 9 % of the output, and gradients to match."""
    weights = quantised(comfy, load_file(files("sd3")), "fp8_scaled")[0]
    save_file(weights, tmp_path / "small.safetensors")
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(tmp_path / "small.safetensors"))
    _, positive = loaded("sd3")
    found = []
    for native in (False, True):
        for layer in model.model.diffusion_model.modules():
            if ours("hosts.comfyui.exact").small(layer):
                layer._full_precision_mm = not native
        with host.training_session():
            denoiser, one = ready(ours, host, model, positive, "sd3")
            with (count := saved.SavedBytes(denoiser.network)):
                got = gradients(denoiser, one, "sd3")
            denoiser.release()
        found.append((got, count.count))
    (first, kept), (second, again) = found
    assert all(torch.equal(first[name], second[name]) for name in first) and kept == again
