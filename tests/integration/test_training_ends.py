"""However a run in real ComfyUI ends, nothing of it is alive afterwards, and the MODEL is as it was."""

from __future__ import annotations

import ended
import pytest
import tiny_training as tiny
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host, sampled = tiny.files, tiny.loaded, tiny.host, tiny.sampled


@pytest.mark.parametrize(("method", "offload"), [("flow", "none"), ("dmd2", "none"), ("dmd2", "1")])
@pytest.mark.parametrize("end", ["finished", "stopped", "cancelled", "failed", "out of memory"])
def test_nothing_lives_on_after_a_run(comfy, ours, host, loaded, sampled, tmp_path, monkeypatch, method, offload, end):
    """Neither the network, its adapters, the optimisers nor an activation, in host memory or on a card."""
    training, loop = ours("hosts.training.run"), ours("trainers.loop")
    error = {
        "finished": None, "stopped": loop.Stopped("asked to"), "cancelled": host.CANCELLED(),
        "failed": RuntimeError("a fault"), "out of memory": torch.OutOfMemoryError("none left"),
    }[end]  # fmt: skip
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path / "loras")
    model, positive = loaded("sd3")
    x = tiny.x_of("sd3")
    picture = sampled(model, positive, x, 0.7)
    comfy.model_management.unload_all_models()
    on_card = held_on_card(comfy)
    held = ended.follow(monkeypatch, training.Trainer)
    settings = {
        "steps": 2, "batch_size": 1, "learning_rate": 0.01, "warmup": 0, "preview_every": 0, "offload": offload,
        "gradient_checkpointing": True,
    }  # fmt: skip
    objective = {"ratio": 1, "gan_weight": 0.01} if method == "dmd2" else {}
    config = {"method": method, "objective": objective, "training": settings, "lora": {"rank": 2}}
    entry = tuple(positive[0])
    data = ours("trainers.dataset").Dataset([entry], [], (entry[0] * 0, entry[1]), [x[0]])
    request = training.Request("ends", ours("trainers.methods").read_config(config), data)
    watcher = type("Ended", (ended.Ending, ours("trainers.watch").Silent), {})(error)

    def run():
        with torch.inference_mode():
            training.run(host, model, request, watcher=watcher, folder=tmp_path / "run")

    if error is None:
        run()
    else:
        with pytest.raises(loop.TrainingFailed if end == "out of memory" else type(error)) as raised:
            run()
        ended.forget(raised.value)
        del raised
    assert ended.alive(held) == [] and watcher.checks >= 2 and len(held) > 100
    assert not ended.changed(model.model.diffusion_model)
    comfy.model_management.unload_all_models()
    assert held_on_card(comfy) == on_card
    assert torch.equal(sampled(model, positive, x, 0.7), picture)


def held_on_card(comfy) -> int:
    """Bytes that torch holds on a card, 0 without one."""
    return 0 if comfy.model_management.cpu_mode() else torch.accelerator.memory_allocated()
