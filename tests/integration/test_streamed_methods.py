"""Methods and formats together: with a streamed base, gradients and whole runs are a resident one's to the bit."""

from __future__ import annotations

import pytest
import tiny_training as tiny
import torch
from safetensors.torch import load_file, save_file

from retort.benchmarks.stored_formats import quantised

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("poisoned")]
files, loaded, host, poisoned = tiny.files, tiny.loaded, tiny.host, tiny.poisoned

FORMATS = ("fp32", "bf16", "fp8_scaled", "int8", "nvfp4")
METHODS = {
    "dmd2": {"ratio": 1, "cfg": 2.0},
    "tdm": {"cfg": 2.0},
    "dpo": {},
    "align_prop": {"steps": 3, "truncation": "fixed", "last": 2, "cfg": 2.0},
    "flow_grpo": {"steps": 3, "group": 2, "cfg": 2.0},
}
# Blocks (of two) that are streamed, and buffers on the card.
STREAMED = ((2, 2), (1, 2), (2, 1))


@pytest.fixture
def model_in(comfy, files, loaded, tmp_path):
    """model_in(form) -> MODEL and CONDITIONING of the SD3 layout from a file in a format."""

    def load(form):
        path = tmp_path / f"{form}.safetensors"
        weights = load_file(files("sd3"))
        if form == "bf16":
            weights = {name: value.bfloat16() for name, value in weights.items()}
        elif form != "fp32":
            weights = quantised(weights, form)[0]
        save_file(weights, path)
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model(str(path))
            # A mapped file's weights begin anywhere, and some of the CPU's products differ by that in the last bit.
            for module in model.model.diffusion_model.modules():
                for key, weight in list(module.named_parameters(recurse=False)):
                    setattr(module, key, torch.nn.Parameter(weight.clone(), requires_grad=False))
        return model, loaded("sd3")[1]

    return load


def gradients(ours, host, model, positive, method, streamed):
    """Of every adapter in one step; streamed: (blocks, buffers), None for a resident base."""
    contract = ours("trainers.objectives.parts.contract")
    config = ours("trainers.methods").read_config({"method": method, "objective": METHODS[method], "lora": {"rank": 2}})
    denoiser = host.trainable(model)
    objective = ours("trainers.methods").METHODS[method].objective(config.objective, denoiser)
    ours("hosts.training.assembly").add_adapters(denoiser, config, objective, None)
    generator = torch.Generator().manual_seed(7)
    for name in ("student", *(p.adapter for p in objective.players.values() if p.adapter != "student")):
        with torch.no_grad():
            for weight in denoiser.adapters.parameters(name).values():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    if streamed is None:
        denoiser.place(0)
    else:
        ring = ours("trainers.streaming").Ring
        denoiser.ring = ring(denoiser.network, denoiser.device, streamed[0], buffers=streamed[1])
        assert denoiser.ring.count == streamed[0] and len(denoiser.ring.blocks) == 2
    assert ours("trainers.checkpointing").enable(denoiser.network)
    shape = tiny.x_of("sd3").shape[1:]
    cond = denoiser.encode(positive, (1, *shape))
    without = denoiser.encode([[positive[0][0] * 0, positive[0][1]]], (1, *shape))
    objective.reward = lambda x, prompts, batch: -x.square().flatten(1).mean(1)
    pair = [denoiser.join([one] * 2) for one in (cond, without)]
    latents = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(i)).to(denoiser.device) for i in (1, 2)]
    batch = contract.Batch(
        contract.Draws(0, 0, (0, 1), denoiser.device), shape, *pair, latents=latents[0], prompts=("a", "b"),
        columns={contract.LOSER: latents[1], contract.STRENGTH: torch.ones(2, device=denoiser.device)},
    )  # fmt: skip
    objective.prepare([batch])
    for loss in objective.losses(batch, 0):
        with denoiser.adapter(objective.players[loss.player].adapter):
            loss.value.backward()
    names = {"student", *(player.adapter for player in objective.players.values())}
    found = {
        f"{name} {key}": weight.grad.cpu()
        for name in names for key, weight in denoiser.adapters.parameters(name).items() if weight.grad is not None
    }  # fmt: skip
    denoiser.end_streaming()
    ours("trainers.checkpointing").disable(denoiser.network)
    denoiser.release()
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_step(ours, host, model_in, method, form):
    model, positive = model_in(form)
    with host.training_session():
        expected = gradients(ours, host, model, positive, method, None)
        assert sum(float(each.abs().sum()) > 0 for each in expected.values()) > len(expected) / 3
        for streamed in STREAMED:
            found = gradients(ours, host, model, positive, method, streamed)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert bool(torch.isfinite(value).all()) and found[name].equal(value), (streamed, name)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("method", ["flow", "dmd2", "tdm", "dpo"])
def test_ten_steps_with_a_resume_in_them(ours, host, model_in, monkeypatch, tmp_path, method, form):
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path / "loras")
    model, positive = model_in(form)
    run, shape = ours("hosts.training.run"), tiny.x_of("sd3").shape[1:]
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    entry = tuple(positive[0])
    pairs = {"losers": [-each for each in latents], "strengths": [1.0] * 3} if method == "dpo" else {}
    data = ours("trainers.dataset").Dataset([entry] * 3, [], (entry[0] * 0, entry[1]), latents, **pairs)

    class Stopping(ours("trainers.watch").Silent):
        at, done = 5, 0

        def step(self, done, total, metrics):
            self.done = done

        def commands(self):
            return {"stop"} if self.done == self.at else set()

    written = {}
    for offload in ("none", "1", "99"):
        settings = {
            "steps": 10, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "gradient_checkpointing": True,
            "preview_every": 0, "offload": offload,
        }  # fmt: skip
        config = {"method": method, "objective": METHODS.get(method, {}), "training": settings, "lora": {"rank": 2}}
        request = run.Request(offload, ours("trainers.methods").read_config(config), data)
        given = {"folder": tmp_path / offload}
        with torch.inference_mode():
            if offload != "none":
                with pytest.raises(ours("trainers.loop").Stopped):
                    run.run(host, model, request, watcher=Stopping(), **given)
            written[offload] = run.run(host, model, request, watcher=ours("trainers.watch").Silent(), **given)
    for offload in ("1", "99"):
        assert written[offload].steps == 10
        for name, value in written["none"].lora.items():
            assert written[offload].lora[name].equal(value), (offload, name)
