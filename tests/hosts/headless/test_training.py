"""Headless MODELs made trainable: the embedded model and tiny networks of every family."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import ended
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny

from retort.files.errors import UsageError  # noqa: E402
from retort.hosts.headless import embedded, folders  # noqa: E402
from retort.hosts.headless.guider import Guider  # noqa: E402
from retort.hosts.headless.host import host  # noqa: E402
from retort.hosts.headless.model import Lora  # noqa: E402
from retort.hosts.training import conditions  # noqa: E402
from retort.hosts.training import run as training  # noqa: E402
from retort.trainers import checkpointing  # noqa: E402
from retort.trainers.adapters import LoraConfig  # noqa: E402
from retort.trainers.dataset import Dataset  # noqa: E402
from retort.trainers.loop import Stopped, TrainingFailed  # noqa: E402
from retort.trainers.methods import read_config  # noqa: E402
from retort.trainers.objectives.parts.contract import Asked
from retort.trainers.watch import Silent  # noqa: E402

HERE = all((folders.EMBEDDED / name).is_file() for name in embedded.FILES)
KINDS = ["SD1.5", "SDXL", "SD3", "Flux dev"]
ALL = [*KINDS, *(pytest.param(k, marks=pytest.mark.skipif(not HERE, reason="no weights")) for k in ("flow", "eps"))]
CONTEXTS = {"SD1.5": (6, 64), "SDXL": (6, 128), "SD3": (6, 160), "Flux dev": (6, 64)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(kind) -> MODEL, CONDITIONING of one prompt, and a noisy latent."""
    from retort.hosts.headless.diffusers_loader import load_diffusion_model
    from retort.models.layouts.dit import flux_layout, sd3_layout
    from retort.models.layouts.unet import layout

    root, made = tmp_path_factory.mktemp("models"), {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(0)
            if kind in ("flow", "eps"):
                model, clip, _ = embedded.load(kind)
                made[kind] = model, clip.encode("a bold blue seven"), 16
            else:
                network = {
                    "SD1.5": lambda: tiny.unet(False), "SDXL": lambda: tiny.unet(True), "SD3": tiny.sd3,
                    "Flux dev": lambda: tiny.flux(True),
                }[kind]()  # fmt: skip
                table = {"SD3": sd3_layout, "Flux dev": flux_layout}.get(kind, layout)(network.config)
                file = root / f"{kind}.safetensors"
                save_file({k: v.contiguous() for k, v in tiny.published(network, table).items()}, file)
                pooled = 128 if kind == "SD3" else 64
                extra = {"pooled_output": torch.randn(1, pooled), "guidance": 2.0}
                positive = [[torch.randn(1, *CONTEXTS[kind]), extra]]
                made[kind] = load_diffusion_model(file), positive, 4 if kind.startswith("SD1") or kind == "SDXL" else 16
        model, positive, channels = made[kind]
        return model, positive, torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))

    return get


@pytest.fixture(autouse=True)
def session():
    with host.training_session():
        yield


def sampled(model, positive, x, sigma):
    with torch.inference_mode():
        return Guider(model, positive).denoiser(x.shape)(x, sigma).clone()


def level(model, batch=1):
    return model.schedule.sigmas[len(model.schedule.sigmas) // 2].float().repeat(batch)


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def ready(model, positive, x, rank=3):
    denoiser = host.trainable(model)
    denoiser.adapters.add("student", LoraConfig(rank=rank, alpha=2.0 * rank), 0)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for key, weight in denoiser.adapters.parameters("student").items():
            if "lora_B" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.03)
    return denoiser, denoiser.encode(positive, x[:1].shape)


@pytest.mark.parametrize("kind", ALL)
def test_it_predicts_what_sampling_computes_and_a_batch_has_its_own_levels(models, kind):
    model, positive, x = models(kind)
    denoiser = host.trainable(model)
    one = denoiser.encode(positive, x[:1].shape)
    levels = level(model, 2) * torch.tensor([1.0, 0.6])
    whole = denoiser.predict_x0(x, levels, denoiser.join([one, one]))
    for i in range(2):
        assert close(whole[i : i + 1], sampled(model, positive, x[i : i + 1], levels[i : i + 1]))


@pytest.mark.parametrize("kind", ALL)
def test_gradients_reach_every_layer_and_checkpoints_change_nothing(models, kind):
    model, positive, x = models(kind)
    with torch.inference_mode(), host.training_session():
        denoiser, one = ready(model, positive, x)
        found = []
        for on in (False, True):
            if on:
                assert checkpointing.enable(denoiser.network)
            with denoiser.adapter("student"):
                denoiser.predict_x0(x[:1], level(model), denoiser.join([one])).square().mean().backward()
            weights = denoiser.adapters.parameters("student")
            found.append({k: w.grad.clone() for k, w in weights.items() if w.grad is not None})
            for weight in weights.values():
                weight.grad = None
    assert sum(bool(g.any()) for g in found[0].values()) > len(weights) // 2
    assert found[0].keys() == found[1].keys() and all(close(found[1][k], g, 1e-4) for k, g in found[0].items())


@pytest.mark.parametrize("kind", ALL)
def test_the_file_of_a_lora_does_what_the_adapter_did(models, tmp_path, kind):
    model, positive, x = models(kind)
    plain = sampled(model, positive, x[:1], level(model))
    denoiser, one = ready(model, positive, x)
    with torch.no_grad(), denoiser.adapter("student"):
        expected = denoiser.predict_x0(x[:1], level(model), denoiser.join([one]))
    own = denoiser.adapters.lora("student")
    save_file(denoiser.to_file(own), tmp_path / "student.safetensors")
    state = load_file(tmp_path / "student.safetensors")
    back = denoiser.from_file(state)
    assert back.keys() == own.keys() and all(torch.equal(back[k], v) for k, v in own.items())
    patched = model.with_lora(Lora("student", state, 1.0))
    assert not close(expected, plain, 1e-3)
    assert close(sampled(patched, positive, x[:1], level(model)), expected, 1e-4)
    data = SimpleNamespace(latents=None, shape=x.shape[1:], entries=[tuple(positive[0])])
    assert host.output_change(model, tmp_path / "student.safetensors", data) > 1e-3
    ends = ("lora_B.weight", "lora_up.weight")
    nothing = {name: value * 0 if name.endswith(ends) else value for name, value in state.items()}
    save_file(nothing, tmp_path / "nothing.safetensors")
    assert host.output_change(model, tmp_path / "nothing.safetensors", data) == 0
    # The copy that samples has not been touched.
    assert torch.equal(plain, sampled(model, positive, x[:1], level(model)))
    # A user's LoRA is part of the base that the next student stands on.
    again = host.trainable(patched)
    based = again.predict_x0(x[:1], level(model), again.join([again.encode(positive, x[:1].shape)]))
    assert close(based, expected, 1e-4)
    assert again.base_hash != denoiser.base_hash and again.architecture == denoiser.architecture


@pytest.mark.parametrize("kind", KINDS)
def test_features_have_the_widths_that_are_said(models, kind):
    model, positive, x = models(kind)
    denoiser = host.trainable(model)
    cond = denoiser.join([denoiser.encode(positive, x[:1].shape)] * 2)
    features = denoiser.features(x, level(model, 2), cond)
    widths = denoiser.feature_widths(x, level(model, 2), cond)
    assert features and [f.shape[-1] if f.ndim == 3 else f.shape[1] for f in features] == widths


def test_prompts_of_unlike_length(models):
    """UNets repeat the shorter one; the others take a call for each length."""
    for kind, groups in (("SD1.5", 1), ("SD3", 2)):
        model, positive, x = models(kind)
        longer = [[torch.cat([positive[0][0]] * 2, 1).flip(1), positive[0][1]]]
        denoiser = host.trainable(model)
        conds = [denoiser.encode(c, x[:1].shape) for c in (positive, longer)]
        joined = denoiser.join(conds)
        assert len(joined.groups) == groups
        whole = denoiser.predict_x0(x, level(model, 2), joined)
        for i in range(2):
            assert close(whole[i : i + 1], denoiser.predict_x0(x[i : i + 1], level(model), denoiser.join([conds[i]])))
        seen = denoiser.features(x, level(model, 2), joined)
        for i in range(2):
            alone = denoiser.features(x[i : i + 1], level(model), denoiser.join([conds[i]]))
            assert all(close(a[i : i + 1], b) for a, b in zip(seen, alone, strict=True))


def test_features_of_unlike_shape_cannot_be_put_together():
    """Where a block's tokens are those of the picture and of the prompt, and prompts differ in length."""
    joined = conditions.join([1, 2, 1], lambda a, b: a == b, lambda group: {})
    alike = [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0]])]
    assert conditions.in_order(alike, joined).flatten().tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="different lengths .2 and 1 samples each.*batch_size to 1"):
        conditions.in_order([torch.zeros(2, 5, 4), torch.zeros(1, 6, 4)], joined)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_two_networks_are_two_calls(models, kind):
    """PEFT's batches of mixed adapters on diffusers' layers, and a batch's condition put together anew."""
    model, positive, x = models(kind)
    denoiser, one = ready(model, positive, x)
    cond, sigma = denoiser.join([one]), level(model)
    asked = [Asked(x[:1], sigma, cond), Asked(0.9 * x[:1], 0.8 * sigma, cond), Asked(x[:1], sigma, cond)]
    counted, call = [], denoiser.call
    denoiser.call = lambda *args: (counted.append(None), call(*args))[1]
    with torch.no_grad():
        together = denoiser.predict_each(asked, ["student", None, None])
        assert len(counted) == 1 and denoiser.adapters.mixes
        denoiser.most_places = 0
        apart = denoiser.predict_each(asked, ["student", None, None])
    assert not close(apart[0], apart[2], 1e-4)
    assert all(close(one, other, 2e-6) for one, other in zip(together, apart, strict=True))
    assert denoiser.chosen(denoiser.join([one, one]), [1]).parts == (one,)


def test_a_released_network_is_gone(models):
    model, positive, x = models("SD3")
    denoiser, _ = ready(model, positive, x)
    held = weakref.ref(denoiser.network)
    denoiser.release()
    assert held() is None


def test_what_cannot_be_trained_is_refused_by_name(models):
    model, positive, x = models("SD3")
    denoiser = host.trainable(model)
    tokens, extra = positive[0]
    for conditioning, message in (
        ([], "positive is empty"),
        (positive * 2, "positive has 2 entries"),
        ([[tokens, {**extra, "strength": 0.5}]], "'strength' = 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            denoiser.encode(conditioning, x[:1].shape)
    with pytest.raises(UsageError, match="4 channels and the model takes 16"):
        denoiser.latents_in(torch.zeros(1, 4, 8, 8))
    with pytest.raises(UsageError, match="this model lacks, such as transformer.nowhere"):
        denoiser.from_file({f"transformer.nowhere.lora_{p}.weight": torch.zeros(1, 1) for p in "AB"})


@pytest.mark.skipif(not HERE, reason="the embedded weights are not built")
def test_latents_pictures_and_folders(tmp_path):
    model, clip, vae = embedded.load("flow")
    with torch.inference_mode():
        stored = host.encode_images(vae, torch.rand(2, 64, 64, 3))["samples"]
    denoiser = host.trainable(model)
    latents = denoiser.latents_in(stored)
    assert not latents.is_inference() and close(denoiser.latents_out(latents), stored)
    assert denoiser.preview(latents).shape == (2, 8, 8, 3)
    assert host.decode(vae, stored).shape == (2, 64, 64, 3)
    assert host.empty_latent_shape(model, torch.zeros(1, 4, 8, 8)) == (16, 8, 8)
    latents.requires_grad_(True)
    host.differentiable_decoder(vae)(denoiser.latents_out(latents)).mean().backward()
    assert latents.grad.any()
    assert torch.equal(host.encode_text(clip, "two")[0][0], clip.encode("two")[0][0])
    with folders.use(folders.Folders(models=(tmp_path,), output=tmp_path / "out")):
        assert host.loras_folder() == tmp_path / "loras" and host.runs_folder() == tmp_path / "out" / "retort"
    host.progress(2).step(1)
    host.check_cancelled()


MIXED = {
    "dmd2": {"gan_weight": 0.01, "ratio": 1, "regression_weight": 0.2, "pairs": 5, "pair_steps": 1},
    "f_distill": {"gan_on": "fake", "ratio": 1},
    "tdm": {"steps": 2},
    "di_star": {"ratio": 1},
    "flow": {},
    "few_shot": {"source_steps": 1},
}


@pytest.mark.parametrize("method", list(MIXED))
def test_prompts_of_unlike_length_and_pictures_of_unlike_size_train(models, tmp_path, method):
    """One at a time everything fits; what looks at several samples before the first step must not ask for more."""
    model, positive, x = models("SD3")
    (tokens, extra), channels = positive[0], x.shape[1]
    entries = [(tokens, extra), (torch.cat([tokens, tokens], 1).flip(1), extra), (tokens + 1, extra)]
    latents = [torch.randn(channels, 8, width, generator=torch.Generator().manual_seed(width)) for width in (8, 16, 8)]
    settings = {"steps": 3, "batch_size": 1, "preview_every": 3, "previews": 2, "learning_rate": 0.01, "warmup": 0}
    config = {"method": method, "objective": MIXED[method], "training": settings, "lora": {"rank": 2}}
    data = Dataset(entries, [], (tokens - 1, extra), latents)
    with folders.use(folders.Folders(models=(tmp_path / "models",), output=tmp_path / "out")):
        result = training.run(host, model, training.Request("mixed", read_config(config), data), watcher=Silent())
    assert result.path is not None and len(result.losses) == 3


class Ended(ended.Ending, Silent):
    """Ends a run after its first step, whenever it is asked."""


def base_of(module):
    """A network's own weights by name; LoRAs with which it has sampled stay beside them, switched off."""
    state = {name: value.clone() for name, value in module.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer", ""): value for name, value in state.items()}


@pytest.mark.parametrize("offload", ["none", "1"])
@pytest.mark.parametrize(
    "error",
    [None, Stopped("asked to"), RuntimeError("a fault"), torch.OutOfMemoryError("none left")],
    ids=["finished", "cancelled", "failed", "out of memory"],
)
def test_nothing_lives_on_after_a_run(models, tmp_path, monkeypatch, offload, error):
    """Neither the network, its adapters, the optimiser nor an activation; the MODEL is as it was, without a hook."""
    model, positive, x = models("SD3")
    before = base_of(model.network.module)
    held = ended.follow(monkeypatch, training.Trainer)
    settings = {
        "steps": 2, "batch_size": 1, "learning_rate": 0.01, "warmup": 0, "preview_every": 0, "offload": offload,
        "gradient_checkpointing": True,
    }  # fmt: skip
    config = {"method": "flow", "objective": {}, "training": settings, "lora": {"rank": 2}}
    data = Dataset([tuple(positive[0])], [], None, [x[0]])
    watcher = Ended(error)
    request = training.Request("ends", read_config(config), data)
    kind = TrainingFailed if isinstance(error, torch.OutOfMemoryError) else type(error)
    with folders.use(folders.Folders(models=(tmp_path / "models",), output=tmp_path / "out")):
        if error is None:
            training.run(host, model, request, watcher=watcher)
        else:
            with pytest.raises(kind) as raised:
                training.run(host, model, request, watcher=watcher)
            ended.forget(raised.value)
            del raised
    assert ended.alive(held) == [] and watcher.checks >= 2 and len(held) > 100
    module = model.network.module
    assert not ended.changed(module)
    after = base_of(module)
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
