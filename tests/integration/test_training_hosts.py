"""ComfyUI's MODEL made trainable, on tiny networks of random weights."""

from __future__ import annotations

import importlib

import pytest
import tiny_training as tiny
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host, training, sampled = tiny.files, tiny.loaded, tiny.host, tiny.training, tiny.sampled
quantised = tiny.quantised
SHAPES, close, level, module, ready, x_of = tiny.SHAPES, tiny.close, tiny.level, tiny.module, tiny.ready, tiny.x_of


@pytest.mark.parametrize("kind", list(SHAPES))
def test_it_predicts_what_sampling_computes_and_a_batch_has_its_own_levels(host, loaded, sampled, training, kind):
    model, positive = loaded(kind)
    denoiser = host.trainable(model)
    one = denoiser.encode(positive, x_of(kind).shape)
    sigma, x = level(denoiser), x_of(kind)
    x0 = denoiser.predict_x0(x, torch.tensor([sigma]), denoiser.join([one]))
    expected = sampled(model, positive, x, sigma)
    assert x0.dtype == torch.float32 and expected.std() > 1e-3 and close(x0, expected)
    both = x_of(kind, 2)
    levels = torch.tensor([sigma, 0.6 * sigma])
    together = denoiser.predict_x0(both, levels, denoiser.join([one, one]))
    for i in range(2):
        assert close(together[i : i + 1], denoiser.predict_x0(both[i : i + 1], levels[i : i + 1], denoiser.join([one])))
    denoiser.release()


@pytest.mark.parametrize("kind", list(SHAPES))
def test_gradients_flow_under_a_nodes_inference_mode_and_checkpoints_change_nothing(ours, host, loaded, kind):
    model, positive = loaded(kind)
    checkpointing = ours("trainers.checkpointing")
    with torch.inference_mode(), host.training_session():
        denoiser, one = ready(ours, host, model, positive, kind)
        denoiser.rehearse(x_of(kind).shape[1:], denoiser.join([one]))
        found = []
        for on in (False, True):
            if on:
                assert checkpointing.enable(denoiser.network)
            with denoiser.adapter("student"):
                x0 = denoiser.predict_x0(x_of(kind), torch.tensor([level(denoiser)]), denoiser.join([one]))
                x0.square().mean().backward()
            weights = denoiser.adapters.parameters("student")
            found.append({k: w.grad.clone() for k, w in weights.items() if w.grad is not None})
            for weight in weights.values():
                weight.grad = None
        checkpointing.disable(denoiser.network)
        assert sum(bool(g.any()) for g in found[0].values()) > len(weights) // 2
        assert found[0].keys() == found[1].keys()
        assert all(close(found[1][k], g, 1e-4) for k, g in found[0].items())
        assert not [n for n, p in denoiser.network.named_parameters() if p.grad is not None and "lora_" not in n]
        denoiser.release()


@pytest.mark.parametrize("kind", ["digits flow", "sd15", "flux"])
def test_features_have_the_widths_that_are_said(ours, host, loaded, training, kind):
    model, positive = loaded(kind)
    denoiser = host.trainable(model)
    one = denoiser.encode(positive, x_of(kind).shape)
    denoiser.adapters.add("student", ours("trainers.adapters").LoraConfig(rank=2), 0)
    denoiser.rehearse(x_of(kind).shape[1:], denoiser.join([one]))
    cond = denoiser.join([one] * 2)
    x, sigma = x_of(kind, 2).requires_grad_(True), torch.full((2,), level(denoiser))
    features = denoiser.features(x, sigma, cond)
    widths = denoiser.feature_widths(x, sigma, cond)
    assert features and [f.shape[-1] if f.ndim == 3 else f.shape[1] for f in features] == widths
    sum(f.sum() for f in features).backward()
    assert x.grad.any()
    denoiser.release()


def test_a_released_network_is_gone(ours, host, loaded, training):
    model, positive = loaded("digits flow")
    denoiser, _ = ready(ours, host, model, positive, "digits flow")
    held = module("weakref").ref(denoiser.network)
    assert held() is not model.model.diffusion_model
    denoiser.release()
    assert held() is None


def test_quantised_layers_carry_adapters(ours, host, quantised, sampled):
    """A file with fp8 weights: ComfyUI's mixed-precision Linear is no torch Linear."""
    model, positive = quantised
    with torch.inference_mode():
        denoiser = host.trainable(model)
    # Without blocks there would be no checkpoints, and memory would end for no reason that anybody sees.
    assert len(ours("trainers.checkpointing").blocks(denoiser.network)) == 2
    assert denoiser.adapters.linear and not issubclass(denoiser.adapters.linear[0], torch.nn.Linear)
    with host.training_session():
        sigma, x = level(denoiser), x_of("sd3")
        cond = denoiser.join([denoiser.encode(positive, x.shape)])
        plain = denoiser.predict_x0(x, torch.tensor([sigma]), cond)
        assert close(plain, sampled(model, positive, x, sigma), 1e-4)
        denoiser.adapters.add("student", ours("trainers.adapters").LoraConfig(2, targets="*qkv"), 0)
        with denoiser.adapter("student"):
            denoiser.predict_x0(x, torch.tensor([sigma]), cond).square().mean().backward()
        grads = [w.grad for k, w in denoiser.adapters.parameters("student").items() if "lora_B" in k]
        assert grads and all(g is not None and g.any() for g in grads)
        denoiser.release()


def test_prompts_of_unlike_length_take_calls_of_their_own(host, loaded, training):
    model, positive = loaded("sd3")
    longer = [[torch.cat([positive[0][0]] * 2, 1).flip(1), positive[0][1]]]
    denoiser = host.trainable(model)
    short, long = (denoiser.encode(c, x_of("sd3").shape) for c in (positive, longer))
    x, sigma = x_of("sd3", 3), torch.full((3,), level(denoiser))
    joined = denoiser.join([short, long, short])
    assert [rows for rows, _ in joined.groups] == [(0, 2), (1,)]
    whole = denoiser.predict_x0(x, sigma, joined)
    for i, cond in enumerate((short, long, short)):
        assert close(whole[i : i + 1], denoiser.predict_x0(x[i : i + 1], sigma[:1], denoiser.join([cond])))
    seen = denoiser.features(x, sigma, joined)
    for i, cond in enumerate((short, long, short)):
        alone = denoiser.features(x[i : i + 1], sigma[:1], denoiser.join([cond]))
        assert all(close(a[i : i + 1], b) for a, b in zip(seen, alone, strict=True))
    denoiser.release()


def test_what_cannot_be_trained_is_refused_by_name(comfy, host, loaded):
    model, positive = loaded("digits flow")
    denoiser = host.trainable(model)
    shape = x_of("digits flow").shape
    tokens, extra = positive[0]
    for conditioning, message in (
        ([], "negative is empty"),
        (positive * 2, "negative has 2 entries.*ConditioningCombine"),
        ([[tokens, {**extra, "mask": torch.ones(1, 8, 8)}]], "negative carries 'mask'"),
        ([[tokens, {**extra, "start_percent": 0.5}]], "'start_percent' = 0.5"),
        ([[tokens.repeat(2, 1, 1), extra]], "2 prompts in one tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            denoiser.encode(conditioning, shape, "negative")
    with pytest.raises(ValueError, match="4 channels and the model takes 16.*VAE"):
        denoiser.latents_in(torch.zeros(1, 4, 8, 8))
    denoiser.release()
    wrapped = model.clone()
    wrapped.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "cache", lambda run, *a, **k: run(*a))
    with pytest.raises(ValueError, match="a wrapper around the network .cache."):
        host.trainable(wrapped)
    replaced = model.clone()
    replaced.add_object_patch("diffusion_model.final_layer", torch.nn.Identity())
    with pytest.raises(ValueError, match="an object in place of diffusion_model.final_layer"):
        host.trainable(replaced)
    model.model.diffusion_model.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="a function in place of diffusion_model.forward"):
        host.trainable(model)
    del model.model.diffusion_model.forward


def test_latents_go_in_and_out_and_a_vae_takes_gradients(comfy, host):
    with torch.inference_mode():
        model, _, vae = comfy.plugin["RetortEmbeddedModel"].execute("flow").args
        stored = host.encode_images(vae, torch.rand(2, 64, 64, 3))["samples"]
        denoiser = host.trainable(model)
        latents = denoiser.latents_in(stored)
    assert not latents.is_inference() and close(denoiser.latents_out(latents), stored)
    assert host.decode(vae, stored).shape == (2, 64, 64, 3) and not host.decode(vae, stored).is_inference()
    assert denoiser.preview(latents).shape == (2, 8, 8, 3)
    assert host.empty_latent_shape(model, torch.zeros(1, 4, 8, 8)) == (16, 8, 8)
    with host.training_session():
        latents = latents.clone().requires_grad_(True)
        images = host.differentiable_decoder(vae)(denoiser.latents_out(latents))
        images.mean().backward()
    assert latents.grad.any() and close(images.detach(), host.decode(vae, stored), 1e-4)
    assert comfy.model_management.in_training is False
    denoiser.release()


def test_precision_is_the_networks_own_unless_it_is_asked_for(host, loaded, training):
    model, positive = loaded("digits flow")
    exact, rough = host.trainable(model), host.trainable(model, torch.bfloat16)
    cond = [d.join([d.encode(positive, x_of("digits flow").shape)]) for d in (exact, rough)]
    sigma = torch.tensor([level(exact)])
    a, b = (d.predict_x0(x_of("digits flow"), sigma, c) for d, c in zip((exact, rough), cond, strict=True))
    assert b.dtype == torch.float32 and 1e-5 < float((a - b).abs().max()) < 0.2
    exact.release(), rough.release()


def test_progress_folders_and_cancelling(comfy, ours, host, monkeypatch):
    bar = host.progress(3)
    bar.step(1, None, "one")
    assert host.free_memory() is None
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("meta"))
        patch.setattr(comfy.model_management, "get_free_memory", lambda device: 8 * 2**30)
        assert host.free_memory() == 8 * 2**30
        given = importlib.import_module("comfy.cli_args").args
        patch.setattr(given, "reserve_vram", 1.5)
        assert host.free_memory() == int(6.5 * 2**30)
        patch.setattr(given, "reserve_vram", 9.0)
        assert host.free_memory() == 0
    assert host.loras_folder().name == "loras" and host.runs_folder().name == "retort"
    assert host.loras_folder() != ours("models.loader").FOLDER / "loras"
    host.check_cancelled()
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        host.check_cancelled()
