"""Bases in each of ComfyUI's quantised formats: the gradient is that of their numbers, and core reads the LoRA."""

from __future__ import annotations

import pytest
import saved
import tiny_training as tiny
import torch
from safetensors.torch import load_file, save_file

from retort.benchmarks.stored_formats import FORMATS, quantised

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host = tiny.files, tiny.loaded, tiny.host
addresses, gradients, ready, x_of = tiny.addresses, tiny.gradients, tiny.ready, tiny.x_of


def bits(value):
    return value.reshape(-1).contiguous().view(torch.uint8)


@pytest.fixture
def model_in(comfy, files, loaded, tmp_path):
    """model_in(kind, exact=False) -> MODEL and CONDITIONING of the SD3 layout from a file in a format."""

    def load(kind, exact=False):
        path = tmp_path / f"{kind} {exact}.safetensors"
        save_file(quantised(load_file(files("sd3")), kind)[exact], path)
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
                state = quantised(load_file(files("sd3")), kind)[0]
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
    weights = quantised(load_file(files("sd3")), "fp8_scaled")[0]
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
