"""Training on video with sound: levels, errors and weights of both parts, LoRAs that core reads, on core's classes."""

from __future__ import annotations

import json

import pytest
import tiny_sound as sound
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
METHODS = {
    "flow": {},
    "dmd2 with a discriminator": {"ratio": 1, "gan_weight": 0.01, "gan_on": "fake"},
    "dmd2": {"ratio": 1, "steps": 2, "regression_weight": 0.2, "pairs": 2, "pair_steps": 1},
    "tdm": {"steps": 2},
    "dpo": {},
}


@pytest.fixture(scope="module", params=list(sound.KINDS))
def kind(request, comfy):
    return request.param


@pytest.fixture(scope="module")
def host(ours):
    return ours("hosts.comfyui.host").host


@pytest.fixture(scope="module")
def tiny(comfy):
    """tiny(kind) -> MODEL."""
    made = {}

    def get(kind):
        if kind not in made:
            with torch.inference_mode():
                made[kind] = sound.model(kind)
        return made[kind]

    return get


@pytest.fixture
def session(host):
    with host.training_session():
        yield


def dataset(ours, kind, losers=False):
    """Two samples of one prompt, and pairs where they are asked for."""
    rows = [tuple(part[0] for part in sound.filled(kind, seed).unbind()) for seed in range(4)]
    entry, empty = (tuple(sound.prompt(kind, seed)[0]) for seed in (1, 2))
    pairs = {"losers": rows[2:], "strengths": [1.0, 2.0]} if losers else {}
    return ours("trainers.dataset").Dataset([entry] * 2, [], empty, rows[:2], **pairs)


@pytest.fixture
def made(ours, host, tiny, session):
    """made(kind, weight) -> denoiser with an adapter of random weights, a batch of two, its latents' parts."""
    done = []

    def make(kind, weight=1.0):
        denoiser = host.trainable(tiny(kind))
        denoiser.adapters.add("student", ours("trainers.adapters").LoraConfig(rank=2), 0)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for key, value in denoiser.adapters.parameters("student").items():
                if "lora_B" in key:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.03)
        denoiser.place(0)
        done.append(denoiser)
        given = dataset(ours, kind)
        data = ours("hosts.training.assembly").encode(denoiser, given, weight)
        return denoiser, data.batch(denoiser, [0, 1], [0, 1], 7, 0, 0.0), given

    yield make
    for denoiser in done:
        denoiser.release()


def stored(given):
    """The batch's parts (2, ...) as they are stored."""
    return [torch.stack(parts) for parts in zip(*given.latents, strict=True)]


def test_the_training_network_is_cores_sampling(comfy, ours, tiny, made, kind):
    """x0 of packed latents as a guider of core computes it from nested ones, for one sample of the batch."""
    denoiser, batch, _ = made(kind)
    sigma = float(denoiser.schedule.sigmas[600])
    noise = sound.filled(kind, 9)
    packed = batch.parts.pack(noise.unbind())
    seen = {}

    class Once(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            seen["x0"] = model_wrap(noise, sigmas[:1].expand(len(noise)), **extra_args).clone()
            return noise

    guider = comfy.samplers.CFGGuider(tiny(kind))
    guider.inner_set_conds({"positive": sound.prompt(kind, 1)})
    with torch.inference_mode():
        grid, start = torch.tensor([sigma, 0.0]), sound.empty(kind)["samples"]
        guider.sample(noise, start, Once(), grid, disable_pbar=True, seed=0)
    with torch.no_grad():
        x0 = denoiser.predict_x0(packed.expand(2, -1, -1), torch.full((2,), sigma), batch.cond)
    assert torch.allclose(x0[:1], seen["x0"], atol=2e-4) and torch.allclose(x0[1:], x0[:1], atol=1e-5)


def test_both_parts_are_noised_and_judged_as_the_network_itself_has_them(ours, made, kind):
    """The loss is the mean squared error of the velocity that the network puts out for each part, at that part's level.

    MiniMax-H3: sound at shift 3 on the grid whose video is at shift 12. LTX-2: one level for both.
    """
    denoiser, batch, given = made(kind, 0.5)
    objective = ours("trainers.objectives.flow_matching").FlowMatching(
        ours("trainers.objectives.flow_matching").FlowMatchingConfig(), denoiser
    )
    (loss,) = objective.losses(batch, 0)
    sigma, noise = loss.sigma, batch.parts.unpack(batch.draws.normal("noise", batch.shape))
    if kind == "MiniMaxH3":
        base = sigma / (12 - 11 * sigma)
        levels = [sigma, 3 * base / (1 + 2 * base)]
    else:
        levels = [sigma, sigma]
    for i in range(2):
        clean = [part[i : i + 1] for part in stored(given)]
        own = [(1 - s[i]) * x + s[i] * n[i : i + 1] for x, n, s in zip(clean, noise, levels, strict=True)]
        told = denoiser.join([batch.cond.parts[i]]).groups[0][1]
        extra = {k: v for k, v in told.items() if k not in ("c_crossattn", "latent_shapes")}
        if kind == "MiniMaxH3":
            extra["minimax_payload"] = {**extra["minimax_payload"], "audio_scale": 1.0}
        time = denoiser._model.process_timestep(denoiser._model.model_sampling.timestep(sigma[i : i + 1]), x=None)
        with torch.no_grad(), denoiser.adapter("student"):
            options = denoiser._options
            out = denoiser.network(own, time, context=told["c_crossattn"], transformer_options=options, **extra)
        errors = [
            float((v - (n[i : i + 1] - x)).square().mean()) for v, n, x in zip(out, noise, clean, strict=True)
        ]
        assert float(loss.each[i].detach()) == pytest.approx(errors[0] + 0.5 * errors[1], rel=1e-3)


def test_without_weight_the_sound_teaches_nothing(ours, made, kind, monkeypatch):
    """With sound_weight 0 the gradient by the network's x0 is, to the bit, that of the mean over the video alone."""
    denoiser, batch, _ = made(kind, 0.0)
    flow, predict, answers = ours("trainers.objectives.flow_matching"), denoiser.predict_x0, []

    def answer(*asked):
        with torch.no_grad():
            answers.append(predict(*asked))
        return answers[-1].requires_grad_()

    monkeypatch.setattr(denoiser, "predict_x0", answer)
    (loss,) = flow.FlowMatching(flow.FlowMatchingConfig(), denoiser).losses(batch, 0)
    loss.value.backward()
    (x0,) = answers
    video = batch.parts.split(x0.detach())[0].requires_grad_()
    error = video - batch.parts.split(batch.images)[0]
    (error.square().flatten(1).mean(1) * loss.sigma.pow(-2).clamp(max=1e4)).mean().backward()
    found, heard = batch.parts.split(x0.grad)
    assert torch.equal(found, video.grad) and found.any() and not heard.any()


def test_a_discriminator_sees_each_sample_of_a_batch(made, kind):
    """Features and x0 of a batch are those of its samples alone, also where the network takes one at a time (H3)."""
    denoiser, batch, _ = made(kind)
    x, sigma = batch.images, torch.tensor([0.4, 0.8])
    with torch.no_grad():
        together, x0 = denoiser.features_and_x0(x, sigma, batch.cond)
        assert len(together) == 2
        assert all(torch.equal(a, b) for a, b in zip(denoiser.features(x, sigma, batch.cond), together, strict=True))
        for row in range(2):
            rows = slice(row, row + 1)
            alone, one = denoiser.features_and_x0(x[rows], sigma[rows], denoiser.chosen(batch.cond, [row]))
            for a, b in zip([*together, x0], [*alone, one], strict=True):
                assert torch.allclose(a[rows], b, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_core_reads_the_lora(comfy, ours, host, tiny, kind, method, tmp_path, monkeypatch):
    """Two steps of a batch of two with previews; every key of the file is read by core, whose output it changes."""
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path / "loras")
    training = {
        "steps": 2, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 2, "previews": 2,
        "gradient_checkpointing": True,
    }  # fmt: skip
    config = {
        "method": method.split()[0], "objective": METHODS[method], "training": training, "lora": {"rank": 2},
    }  # fmt: skip
    request = ours("hosts.training.run").Request(
        method, ours("trainers.methods").read_config(config), dataset(ours, kind, method == "dpo")
    )
    with torch.inference_mode():
        result = ours("hosts.training.run").run(
            host, tiny(kind), request, watcher=ours("trainers.watch").Silent(), folder=tmp_path / method
        )
    rows = [json.loads(row) for row in (tmp_path / method / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(torch.isfinite(torch.tensor(row["student_loss"])) for row in rows)
    assert (tmp_path / method / "previews" / "step_0000002.png").is_file()
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(tiny(kind), None, result.lora, 1.0, 0.0)[0]
        loaded = comfy.lora.load_lora(result.lora, comfy.lora.model_lora_keys_unet(tiny(kind).model, {}))
    assert len(patched.patches) == len(loaded) == len(result.lora) // 3 or len(loaded) == len(result.lora) // 2
    if method == "tdm":
        # *Load Student* takes it for the same model, at whose shifts the sound had its levels.
        preset = ours("trainers.recipes").read(ours("trainers.export").lora_metadata(result.path)).preset
        assert (preset.latent_channels, preset.latent_dims) == host.latent_format(tiny(kind))
        assert (preset.shift, preset.audio_shift) == (host.sound_shifts(tiny(kind)) or (None, None))


def test_a_method_that_knows_no_parts_says_so(ours, host, tiny, kind, tmp_path):
    config = {"method": "few_shot", "objective": {"source_steps": 1}, "training": {"steps": 1, "batch_size": 2}}
    request = ours("hosts.training.run").Request(
        "few", ours("trainers.methods").read_config(config), dataset(ours, kind)
    )
    with torch.inference_mode(), pytest.raises(ValueError, match="several .video with sound.: choose one of"):
        ours("hosts.training.run").run(
            host, tiny(kind), request, watcher=ours("trainers.watch").Silent(), folder=tmp_path / "few"
        )
