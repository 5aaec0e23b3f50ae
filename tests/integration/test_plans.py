"""What a run takes, counted on ComfyUI's own networks before a weight is loaded, against the same step with weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_training as tiny
import torch
from safetensors.torch import load_file, save_file

from retort.benchmarks.stored_formats import quantised

pytest.importorskip("peft")
pytestmark = pytest.mark.integration


STORED = ["fp8_scaled", "int8", "nvfp4", "mxfp8", "plain fp8"]
files, loaded, host = tiny.files, tiny.loaded, tiny.host


@pytest.fixture
def counted(ours, host, monkeypatch):
    """counted(model, positive, kind, method) -> (counted dry, counted on the real network)."""
    # On the CPU the norm is taken apart.
    monkeypatch.setattr(ours("trainers.weightless"), "_FUSED_NORM", False)
    planning, assembly = ours("hosts.training.planning"), ours("hosts.training.assembly")
    dry_run = ours("trainers.dry_run")
    methods = ours("trainers.methods")

    def count(model, positive, kind, method="flow"):
        config = methods.read_config({
            "method": method, "training": {"batch_size": 2, "gradient_checkpointing": True}, "lora": {"rank": 4},
        })  # fmt: skip
        latent = torch.zeros(tiny.x_of(kind).shape[1:])
        dataset = ours("trainers.dataset").Dataset([tuple(positive[0])], [], tuple(positive[0]), [latent])
        dry = planning.counted(host, model, config, dataset)

        def trainer(denoiser):
            objective = methods.METHODS[method].objective(config.objective, denoiser)
            assembly.add_adapters(denoiser, config, objective, None)
            data = assembly.encode(denoiser, dataset)
            return ours("trainers.loop").Trainer(denoiser, objective, data, config, Path("nowhere"))

        with host.training_session():
            denoiser = host.trainable(model)
            real = dry_run.measure(denoiser, trainer, ours("trainers.tracker").Tracker("cpu"))
            denoiser.release()
        return dry, real

    return count


@pytest.mark.parametrize("method", ["flow", "dmd2"])
@pytest.mark.parametrize("kind", ["digits flow", "sd3", "sd15", "flux", "wan"])
def test_a_dry_step_takes_what_a_real_one_takes(loaded, counted, kind, method):
    model, positive = loaded(kind)
    dry, real = counted(model, positive, kind, method)
    assert dry.calls == real.calls and dry.operations == real.operations
    assert dry.blocks == real.blocks and dry.base == pytest.approx(real.base, rel=0.01)
    # The data set's own prompts, which stand on the CPU, are counted where that is the device.
    prompts = 2 * positive[0][0].nbytes
    assert 0.97 * (real.beside - prompts) <= dry.beside <= 1.03 * real.beside


@pytest.mark.parametrize("kind", STORED)
def test_small_weights_are_counted_as_they_are_stored(comfy, loaded, files, counted, tmp_path, kind):
    weights = quantised(load_file(files("sd3")), kind)[0]
    save_file(weights, tmp_path / "small.safetensors")
    with torch.inference_mode():
        options = {"dtype": torch.float8_e4m3fn} if kind == "plain fp8" else {}
        model = comfy.sd.load_diffusion_model(str(tmp_path / "small.safetensors"), options)
    dry, real = counted(model, loaded("sd3")[1], "sd3")
    assert dry.base == pytest.approx(real.base, rel=0.01) and dry.blocks == real.blocks
    assert dry.beside == pytest.approx(real.beside, rel=0.05)


@pytest.mark.parametrize("tokenizer", ["KleinTokenizer", "KleinTokenizer8B"])
def test_a_prompt_of_flux_2_is_as_long_as_its_encoders_make_it(comfy, ours, tokenizer):
    found = getattr(tiny.module("comfy.text_encoders.flux"), tokenizer)().tokenize_with_weights("a heron in the reeds")
    assert [len(row) for rows in found.values() for row in rows] == [ours("hosts.comfyui.bare").LENGTHS["Flux2"]]


def test_a_file_is_counted_by_its_header(comfy, ours, loaded, files, tmp_path):
    """The same MODEL as ComfyUI loads, but for the weights, also of a quantised file."""
    bare = ours("hosts.comfyui.bare")
    for kind in ("sd15", "flux", "wan"):
        model = bare.from_file(Path(files(kind)))
        real = loaded(kind)[0]
        assert ours("trainers.weightless").bare(model.model.diffusion_model)
        assert type(model.model) is type(real.model)
        mine, theirs = (
            {n: tuple(w.shape) for n, w in m.model.diffusion_model.named_parameters()} for m in (model, real)
        )
        assert mine == theirs
    save_file(quantised(load_file(files("sd3")), "fp8_scaled")[0], tmp_path / "small.safetensors")
    network = bare.from_file(tmp_path / "small.safetensors").model.diffusion_model
    assert sum(ours("hosts.comfyui.exact").small(layer) for layer in network.modules()) > 8
