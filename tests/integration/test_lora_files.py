"""LoRA files that come of training: in ComfyUI, in diffusers, and back; and the LoRAs that a MODEL already has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_training as tiny
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host, training, sampled = tiny.files, tiny.loaded, tiny.host, tiny.training, tiny.sampled
SHAPES, close, level, module, ready, x_of = tiny.SHAPES, tiny.close, tiny.level, tiny.module, tiny.ready, tiny.x_of


@pytest.mark.parametrize("kind", ["digits eps", "sd3", "sd15", "flux", "wan"])
def test_the_file_of_a_lora_does_in_comfyui_what_the_adapter_did(comfy, ours, host, loaded, sampled, tmp_path, kind):
    model, positive = loaded(kind)
    with host.training_session():
        denoiser, one = ready(ours, host, model, positive, kind)
        sigma, own = level(denoiser), denoiser.adapters.lora("student")
        with torch.no_grad(), denoiser.adapter("student"):
            expected = denoiser.predict_x0(x_of(kind), torch.tensor([sigma]), denoiser.join([one]))
        state = denoiser.to_file(own)
        back = denoiser.from_file(state)
        denoiser.release()
    assert back.keys() == own.keys() and all(torch.equal(back[k].view_as(v), v) for k, v in own.items())
    save_file(state, tmp_path / "student.safetensors")
    state = load_file(tmp_path / "student.safetensors")
    patched = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)[0]
    plain = sampled(model, positive, x_of(kind), sigma)
    assert not close(expected, plain, 1e-2)
    assert close(sampled(patched, positive, x_of(kind), sigma), expected, 1e-4)
    data = SimpleNamespace(latents=None, shape=x_of(kind).shape[1:], entries=[tuple(positive[0])])
    assert host.output_change(model, tmp_path / "student.safetensors", data) > 1e-3
    # Nothing that was done to the copy has reached the MODEL.
    assert torch.equal(plain, sampled(model, positive, x_of(kind), sigma))


@pytest.mark.parametrize("kind", ["sd3", "sd15", "flux"])
def test_the_same_file_does_the_same_in_diffusers(comfy, ours, host, loaded, files, kind):
    """diffusers' own classes with ComfyUI's weights, and the loaders of its pipelines."""
    diffusers = pytest.importorskip("diffusers")
    model, positive = loaded(kind)
    with host.training_session():
        denoiser, one = ready(ours, host, model, positive, kind)
        sigma = level(denoiser)
        with torch.no_grad(), denoiser.adapter("student"):
            expected = denoiser.predict_x0(x_of(kind), torch.tensor([sigma]), denoiser.join([one]))
        state = denoiser.to_file(denoiser.adapters.lora("student"))
        denoiser.release()
    headless = ours("hosts.headless.diffusers_loader").load_diffusion_model(module("pathlib").Path(files(kind)))
    network = headless.source.anew(())
    mixin = {
        "sd3": diffusers.StableDiffusion3Pipeline, "sd15": diffusers.StableDiffusionPipeline,
        "flux": diffusers.FluxPipeline,
    }[kind]  # fmt: skip
    if kind == "sd15":
        read, alphas = mixin.lora_state_dict(dict(state), unet_config=network.module.config)
        mixin.load_lora_into_unet(read, alphas, network.module, adapter_name="x")
    else:
        read = mixin.lora_state_dict(dict(state))
        given = {"network_alphas": None} if kind == "flux" else {}
        mixin.load_lora_into_transformer(read, transformer=network.module, adapter_name="x", **given)
    assert network.module.peft_config
    tokens, extra = positive[0]
    made = network.conditions(tokens.clone(), extra, x_of(kind).shape)
    x, s = x_of(kind), torch.tensor([sigma])
    with torch.no_grad():
        scaled = x / (sigma**2 + 1) ** 0.5 if kind == "sd15" else x
        raw = network(scaled, headless.schedule.timestep(s).float(), **made)
    assert close(x - sigma * raw, expected, 1e-4)


def test_a_lora_with_its_projections_apart_starts_a_student(comfy, ours, host, loaded):
    """Files of others have q, k and v with an A each, a part of them missing, alpha, and kohya's names."""
    model, positive = loaded("sd3")
    generator = torch.Generator().manual_seed(1)
    block = "lora_transformer_transformer_blocks_0_attn_"
    state = {}
    for name in ("to_q", "to_v"):
        state[f"{block}{name}.lora_down.weight"] = torch.randn(2, 128, generator=generator)
        state[f"{block}{name}.lora_up.weight"] = torch.randn(128, 2, generator=generator)
        state[f"{block}{name}.alpha"] = torch.tensor(1.0)
    with host.training_session():
        denoiser, _ = ready(ours, host, model, positive, "sd3", rank=4)
        named = denoiser.from_file(state)
        denoiser.release()
    name = "joint_blocks.0.x_block.attn.qkv"
    product = named[f"{name}.lora_B.weight"] @ named[f"{name}.lora_A.weight"]
    parts = [
        0.5 * state[f"{block}{n}.lora_up.weight"] @ state[f"{block}{n}.lora_down.weight"] for n in ("to_q", "to_v")
    ]
    assert named[f"{name}.lora_A.weight"].shape == (4, 128)
    assert close(product, torch.cat([parts[0], torch.zeros(128, 128), parts[1]]))
    with pytest.raises(ValueError, match="1 layers that this model lacks, such as transformer.nowhere"):
        denoiser.from_file({"transformer.nowhere.lora_A.weight": torch.zeros(1, 1),
                            "transformer.nowhere.lora_B.weight": torch.zeros(1, 1)})  # fmt: skip


@pytest.mark.parametrize("kind", ["digits flow", "sd15"])
def test_the_users_lora_and_shift_stay_in_force(comfy, ours, host, loaded, sampled, training, kind):
    model, positive = loaded(kind)
    denoiser, one = ready(ours, host, model, positive, kind)
    state = denoiser.to_file(denoiser.adapters.lora("student"))
    denoiser.release()
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(model, None, state, 0.7, 0.0)[0]
        if kind == "digits flow":
            patched = host.with_shift(patched, 1.7)
    denoiser, one = ready(ours, host, patched, positive, kind)
    sigma, x = level(denoiser), x_of(kind)
    got = denoiser.predict_x0(x, torch.tensor([sigma]), denoiser.join([one]))
    assert close(got, sampled(patched, positive, x, sigma))
    assert not close(got, sampled(model, positive, x, sigma), 1e-3)
    if kind == "digits flow":
        assert denoiser.schedule.shift == 1.7 and denoiser.schedule is not patched.get_model_object("model_sampling")
    denoiser.release()


def test_adapters_before_the_patches_would_lose_the_users_lora(comfy, ours, host, loaded, training):
    """Why `reread` loads first: PEFT renames the layers, and the patches no longer find theirs."""
    model, positive = loaded("digits flow")
    denoiser, _ = ready(ours, host, model, positive, "digits flow")
    state = denoiser.to_file(denoiser.adapters.lora("student"))
    denoiser.release()
    patched = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)[0]
    late = patched.clone(disable_dynamic=True, force_deepcopy=True)
    ours("trainers.adapters").Adapters(late.model.diffusion_model).add("x", ours("trainers.adapters").LoraConfig(2), 0)
    names = {f"diffusion_model.{n}" for n, _ in late.model.diffusion_model.named_parameters()}
    assert late.patches and not set(late.patches) & names


def test_a_base_is_named_or_merged(comfy, ours, host, loaded, sampled, tmp_path):
    base = ours("hosts.comfyui.base")
    for kind in ("digits flow", "digits eps", "sd15", "wan"):
        model, positive = loaded(kind)
        what = base.describe(model)
        x = x_of(kind)
        again = base.load_described(what)
        assert torch.equal(sampled(again, positive, x, 0.7), sampled(model, positive, x, 0.7)), kind
        with host.training_session():
            denoiser, _ = ready(ours, host, model, positive, kind)
            state = denoiser.to_file(denoiser.adapters.lora("student"))
            denoiser.release()
        patched = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)[0]
        if kind == "digits flow":
            patched = host.with_shift(patched, 2.5)
            assert base.describe(host.with_shift(model, 2.5))["shift"] == 2.5
        assert base.describe(patched) is None
        merged = base.save_merged(patched, tmp_path / f"{kind}.safetensors")
        again = base.load_described(merged)
        assert close(sampled(again, positive, x, 0.7), sampled(patched, positive, x, 0.7)), kind
        assert base.describe(again) == merged
    discrete = (
        module("comfy_extras.nodes_model_advanced").ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    )
    with pytest.raises(ValueError, match="more than a timestep shift"):
        base.describe(discrete)


def test_a_lora_of_no_layer_is_refused_and_one_of_some_is_counted(comfy, ours, host, loaded, monkeypatch):
    model, _ = loaded("sd3")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    fitting = {f"{layer}.lora_A.weight": torch.ones(2, 128), f"{layer}.lora_B.weight": torch.ones(128, 2)}
    strange = {"nowhere.to_q.lora_A.weight": torch.ones(2, 128), "nowhere.to_q.lora_B.weight": torch.ones(128, 2)}
    said = []
    monkeypatch.setattr(type(host), "say", lambda self, text, warn=False: said.append((text, warn)))
    monkeypatch.setattr(type(host), "lora_metadata", lambda self, name: {})
    for state in (strange, {"emb_params": torch.ones(4, 8)}):
        monkeypatch.setattr(type(host), "read_lora", lambda self, name, state=state: state)
        with pytest.raises(ValueError, match="(none of the 2|is none: it holds 1) tensors (of|such as 'emb)"):
            host.with_lora(model, "it", 0.5)
    for state, notes in ((fitting, 0), (fitting | strange, 1)):
        monkeypatch.setattr(type(host), "read_lora", lambda self, name, state=state: state)
        patched = host.with_lora(model, "it", 0.5)
        assert sum(map(len, patched.patches.values())) == 1 and len(said) == notes
    assert said[0][1] and said[0][0] == (
        "2 tensors of the LoRA it are left out ('nowhere.to_q.lora_A.weight', 'nowhere.to_q.lora_B.weight': the model "
        "has no such layer)"
    )
