"""The network that is trained on: over the MODEL's own weights, in a precision that gradients survive, exact."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from types import SimpleNamespace

import pytest
import saved
import tiny_training as tiny
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host, sampled, quantised = tiny.files, tiny.loaded, tiny.host, tiny.sampled, tiny.quantised
addresses, gradients = tiny.addresses, tiny.gradients
close, level, ready, x_of = tiny.close, tiny.level, tiny.ready, tiny.x_of


@pytest.mark.parametrize("kind", ["digits eps", "sd3", "sd15", "flux", "wan"])
def test_the_base_lies_in_memory_once_and_the_model_stays_as_it_is(ours, host, loaded, sampled, kind):
    model, positive = loaded(kind)
    network = model.model.diffusion_model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    picture = sampled(model, positive, x_of(kind), 0.7)
    with torch.inference_mode(), host.training_session():
        denoiser, one = ready(ours, host, model, positive, kind)
        mine = {p.data_ptr() for n, p in denoiser.network.named_parameters() if ".lora_" not in n}
        assert mine == addresses(network)
        assert not [p for p in denoiser.network.parameters() if p.is_inference()]
        assert any(g.any() for g in gradients(denoiser, one, kind).values())
        ends = [weakref.ref(denoiser.network), *map(weakref.ref, denoiser.adapters.parameters("student").values())]
        denoiser.release()
        del denoiser, one
        assert not [end for end in ends if end() is not None]
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(sampled(model, positive, x_of(kind), 0.7), picture)


def test_gradients_pass_the_scale_of_latents_of_a_model_loaded_by_a_node(host, loaded):
    """Wan's and Qwen-Image's latents have means and deviations of their own, which a node makes in inference mode."""
    model, _ = loaded("wan")
    assert model.model.latent_format.latents_std.is_inference()
    with torch.inference_mode(), host.training_session():
        denoiser = host.trainable(model)
        x0 = x_of("wan").requires_grad_()
        made = denoiser.latents_out(x0)
        made.sum().backward()
        assert bool(x0.grad.all())
        expected = model.model.process_latent_out(x0.detach())
        assert torch.equal(made, expected) and torch.allclose(denoiser.latents_in(made.detach()), x0, atol=1e-5)
        denoiser.release()


def test_only_what_patches_change_is_new(comfy, ours, host, loaded, sampled):
    model, positive = loaded("sd3")
    with host.training_session():
        denoiser, _ = ready(ours, host, model, positive, "sd3", targets="*qkv")
        state = denoiser.to_file(denoiser.adapters.lora("student"))
        denoiser.release()
        patched = comfy.sd.load_lora_for_models(model, None, state, 0.7, 0.0)[0]
        expected = sampled(patched, positive, x_of("sd3"), 0.7)  # loaded with its patches in place
        denoiser = host.trainable(patched)
        new = addresses(denoiser.network) - addresses(model.model.diffusion_model)
        assert len(new) == len(patched.patches) > 0
        one = denoiser.encode(positive, x_of("sd3").shape)
        got = denoiser.predict_x0(x_of("sd3"), torch.tensor([0.7]), denoiser.join([one]))
        denoiser.release()
    assert close(got, expected)
    assert torch.equal(sampled(patched, positive, x_of("sd3"), 0.7), expected)


def test_a_model_that_is_streamed_from_its_file_is_read_once_more(comfy, ours, host, loaded, sampled, monkeypatch):
    """As ComfyUI does on NVIDIA's cards by default, where a patcher is dynamic: here only its answer is."""
    model, positive = loaded("sd3")
    expected = sampled(model, positive, x_of("sd3"), 0.7)
    factory, arguments, *which = model.cached_patcher_init

    def read(*given):
        made = factory(*given)
        layer = next(m for m in (made[which[0]] if which else made).model.modules() if isinstance(m, torch.nn.Linear))
        layer.weight_comfy_model_dtype = torch.float64  # into which ComfyUI would convert this one while it streams it
        return made

    monkeypatch.setattr(model, "cached_patcher_init", (read, arguments, *which))
    monkeypatch.setattr(model, "is_dynamic", lambda: True)
    base = ours("hosts.comfyui.own_network").own_network(model).model
    theirs = dict(model.model.diffusion_model.named_parameters())
    mine = dict(base.diffusion_model.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k].float(), v) for k, v in theirs.items())
    assert not addresses(base.diffusion_model) & addresses(model.model.diffusion_model)
    assert [weight.dtype for weight in mine.values()].count(torch.float64) == 1
    del base, mine
    assert torch.equal(sampled(model, positive, x_of("sd3"), 0.7), expected)
    monkeypatch.setattr(model, "cached_patcher_init", None)
    with pytest.raises(ValueError, match="model cannot be read a second time"):
        host.trainable(model)


def test_a_job_finds_the_memory_that_comfyui_held(comfy, host, loaded, sampled):
    model, positive = loaded("sd3")
    sampled(model, positive, x_of("sd3"), 0.7)
    assert comfy.model_management.current_loaded_models
    host.make_room()
    assert not comfy.model_management.current_loaded_models


def test_looking_at_the_loras_effect_takes_no_second_set_of_weights(comfy, ours, host, loaded, tmp_path, monkeypatch):
    model, positive = loaded("sd3")
    with host.training_session():
        denoiser, _ = ready(ours, host, model, positive, "sd3")
        lora = denoiser.adapters.lora("student")
        save_file(denoiser.to_file(lora), tmp_path / "some.safetensors")
        save_file(denoiser.to_file({k: torch.zeros_like(v) for k, v in lora.items()}), tmp_path / "none.safetensors")
        denoiser.release()
    network = model.model.diffusion_model
    kept, seen = sum(p.nbytes for p in network.parameters()), []
    training = ours("hosts.comfyui.training")

    class Looking(training.ComfyDenoiser):
        def call(self, *args):
            made = super().call(*args)
            seen.append(sum(p.nbytes for p in self.network.parameters() if p.data_ptr() not in addresses(network)))
            return made

    monkeypatch.setattr(training, "ComfyDenoiser", Looking)
    data = SimpleNamespace(latents=None, shape=x_of("sd3").shape[1:], entries=[tuple(positive[0])])
    assert host.output_change(model, tmp_path / "some.safetensors", data) > 1e-3
    assert host.output_change(model, tmp_path / "none.safetensors", data) == 0
    assert len(seen) == 4 and max(seen) < 0.1 * kept


def test_nothing_stays_of_a_merged_network(comfy, ours, host, loaded, tmp_path):
    """It was a second network on the card while the job started, until the garbage collector came by."""
    model, positive = loaded("sd3")
    with host.training_session():
        denoiser, _ = ready(ours, host, model, positive, "sd3")
        state = denoiser.to_file(denoiser.adapters.lora("student"))
        denoiser.release()
    patched = comfy.sd.load_lora_for_models(model, None, state, 0.7, 0.0)[0]
    base, made = ours("hosts.comfyui.base"), []
    own = base.own_network

    def noted(given, **how):
        patcher = own(given, **how)
        made.append(weakref.ref(patcher.model))
        return patcher

    gc.collect()
    gc.disable()
    try:
        base.own_network = noted
        base.save_merged(patched, tmp_path / "merged.safetensors")
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()
        base.own_network = own


@pytest.mark.parametrize("small", [False, True], ids=["plain", "fp8"])
def test_a_merged_file_is_written_weight_by_weight(comfy, ours, host, loaded, quantised, tmp_path, monkeypatch, small):
    """With every layer patched, no two patched weights are in memory at once; the file is as if all had been."""
    model, positive = quantised if small else loaded("sd3")
    with host.training_session():
        denoiser, _ = ready(ours, host, model, positive, "sd3")
        state = denoiser.to_file(denoiser.adapters.lora("student"))
        denoiser.release()
    patched = comfy.sd.load_lora_for_models(model, None, state, 0.7, 0.0)[0]
    base, alive, most = ours("hosts.comfyui.base"), set(), []
    bake = base.with_patches

    def noted(patcher, name):
        weight = bake(patcher, name)
        alive.add(name)
        weakref.finalize(weight, alive.discard, name)
        most.append(len(alive))
        return weight

    monkeypatch.setattr(base, "with_patches", noted)
    base.save_merged(patched, tmp_path / "merged.safetensors")
    # A weight in fp8 is several tensors of the file, and made before.
    assert len(most) == len(patched.patches) > 10 and (small or max(most) == 1)
    whole = ours("hosts.comfyui.own_network").own_network(patched).model
    expected = whole.state_dict_for_saving(whole.diffusion_model.state_dict())
    found = load_file(tmp_path / "merged.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in found)


@pytest.fixture
def half(comfy, files, monkeypatch):
    """A MODEL that ComfyUI holds and computes in fp16, as it does on every GPU for Stable Diffusion."""
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "should_use_fp16", lambda *args, **kwargs: True)
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model(files("sd15"))
    assert model.model.get_dtype() == model.model.get_dtype_inference() == torch.float16
    return model


@pytest.mark.parametrize(("able", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_fp16_is_loaded_once_in_a_precision_that_gradients_survive(
    comfy, host, half, loaded, monkeypatch, able, wanted
):
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *args, **kwargs: able)
    _, positive = loaded("sd15")
    with host.training_session():
        denoiser = host.trainable(half)
        assert {p.dtype for p in denoiser.network.parameters()} == {wanted}
        assert not [m for m in denoiser.network.modules() if getattr(m, "comfy_cast_weights", False)]
        one = denoiser.encode(positive, x_of("sd15").shape)
        got = denoiser.predict_x0(x_of("sd15"), torch.tensor([level(denoiser)]), denoiser.join([one]))
        assert got.dtype == torch.float32 and got.isfinite().all()
        marks = denoiser.base_hash
        denoiser.release()
        exact = host.trainable(half, torch.float32)
        assert exact.base_hash == marks  # of the weights as they are stored
        expected = exact.predict_x0(x_of("sd15"), torch.tensor([level(exact)]), exact.join([one]))
        exact.release()
    assert close(got, expected, 0.05) and torch.equal(got, expected) == (wanted == torch.float32)
    assert {p.dtype for p in half.model.diffusion_model.parameters()} == {torch.float16}


def test_bf16_is_asked_of_comfyui(comfy, ours, host, loaded, monkeypatch):
    """On a machine with a card, `--cpu` trained in bf16, and so did cards that only emulate it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    assert host.bf16() is False
    config = ours("trainers.config")
    training = ours("hosts.training.run")
    run = config.RunConfig("flow", ours("trainers.methods").METHODS["flow"].config())
    assert training.precision(run) is None
    model, _ = loaded("sd15")
    with host.training_session():
        denoiser = host.trainable(model, training.precision(run))
        assert {p.dtype for p in denoiser.network.parameters()} == {torch.float32}
        denoiser.release()


def test_a_session_undoes_what_cores_trainer_leaves_set(comfy, host, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "training_fp8_bwd", True)
    with host.training_session():
        assert comfy.model_management.in_training and not comfy.model_management.training_fp8_bwd
    assert comfy.model_management.training_fp8_bwd and not comfy.model_management.in_training


def test_a_decoder_forgets_its_blocks(comfy, ours, host):
    """Stable Diffusion's own decoder, narrow: the same gradient to the bit, a small part kept."""
    model = importlib.import_module("comfy.ldm.models.autoencoder")
    settings = {
        "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    network = model.AutoencoderKL(ddconfig=settings, embed_dim=4).requires_grad_(False).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    decoder = ours("trainers.decoder").Decoder(network, network.decode)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    grads, counts = [], []
    for decode in (network.decode, decoder):
        x = z.clone().requires_grad_()
        with (count := saved.SavedBytes(network)):
            out = decode(x)
        counts.append(count.count)
        out = decode(x)
        out.square().mean().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and counts[1] < 0.3 * counts[0]


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_no_cast_weight_waits_for_the_backward_pass(comfy, ours, host, loaded, files, monkeypatch, kind):
    """In fp32 it would be twice a 16-bit base, whatever is outside the checkpoints for the whole of a step."""
    _, positive = loaded(kind)
    with torch.inference_mode():
        half = comfy.sd.load_diffusion_model(files(kind), {"dtype": torch.bfloat16})

    def found():
        kept, network = {}, []

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        with host.training_session():
            denoiser, one = ready(ours, host, half, positive, kind)
            network = {p.untyped_storage().data_ptr() for p in denoiser.network.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                made = gradients(denoiser, one, kind)
            denoiser.release()
        return made, sum(size for where, size in kept.items() if where not in network)

    ours_, less = found()
    monkeypatch.setattr(ours("hosts.comfyui.exact"), "cast", lambda layer: False)
    theirs, more = found()
    weights = sum(p.nbytes for p in half.model.diffusion_model.parameters())
    assert more - less > 1.8 * weights
    assert ours_.keys() == theirs.keys() and all(torch.equal(ours_[k], g) for k, g in theirs.items())
