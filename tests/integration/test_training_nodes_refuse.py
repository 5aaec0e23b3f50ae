"""What the trainer nodes refuse on a real ComfyUI server, in what words, and that nothing is left behind."""

from __future__ import annotations

import re

import pytest
import torch
import training_server as server
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
files, app, spelled, base, drawn = server.files, server.app, server.spelled, server.base, server.drawn
PROMPTS, QUICK, Listener = server.PROMPTS, server.QUICK, server.Listener
error_of, post, succeeded = server.error_of, server.post, server.succeeded


BAD = {
    "no prompts": ({"prompts": " \n "}, "no prompts.*one in each line.*`clip`"),
    "prompts twice": ({"positive": ["p", 0]}, "both typed and connected"),
    "no clip": ({"clip": None}, "typed prompts need their text encoder: connect `clip`"),
    "no size": ({"latents": None}, "size of the pictures is not known: connect an empty latent"),
    "no vae": ({"images": ["pics", 0], "latents": None}, "images are encoded by a VAE: connect `vae`"),
    "images and latents": ({"images": ["pics", 0], "vae": ["m", 2]}, "both images and latents are connected"),
    "channels": ({"latents": ["four", 0], "prompts": "one"}, "latents have 4 channels and the model takes 16.*VAE"),
    "counts": ({"latents": ["data", 0]}, "2 latents and 3 prompts: give each image its caption"),
    "nan": ({"latents": ["nan", 0], "prompts": "one"}, "latent 1 holds NaN or infinite"),
    "path": ({"name": "../x"}, "name '../x' cannot be a file's name"),
    "no name": ({"name": " "}, "name ' ' cannot be a file's name"),
    "no teacher's images": (
        {"method": "f_distill"},
        "f-distill learns from images.*`images`.*`latents`",
    ),
    "no images for gan": ({"method": "dmd2", "method.gan_weight": 0.01}, "DMD2 learns from images.*gan_weight to 0"),
    "timesteps": ({"method.timesteps": "9, x"}, "timesteps"),
    "target": ({"targets": "*nowhere*"}, "targets: no layer's name fits '\\*nowhere\\*'.*such as"),
    "alpha": ({"accumulation": 32}, "accumulation_cap 16 is below accumulation 32: raise it"),
    "cache": ({"model": ["cached", 0]}, "model carries a wrapper around the network.*before the node"),
    "start": ({"start_from": "other.safetensors"}, "LoRA has 1 layers that this model lacks.*trained for"),
    "mask": ({"latents": ["masked", 0]}, "latent 0 has a mask.*take it off"),
    "area": ({"prompts": "", "positive": ["area", 0]}, "positive carries 'area'.*before the node"),
    "negative": ({"negative": ["area", 0]}, "negative carries 'area'"),
    "two prompts": ({"prompts": "", "positive": ["both", 0]}, "positive.*2 e"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained_and_leaves_nothing(app, spelled, base, case):
    changes, message = BAD[case]
    loras, runs = app.base / "models" / "loras", app.base / "output" / "retort"
    if case == "start":
        save_file(
            {f"transformer.nowhere.lora_{p}.weight": torch.zeros(1, 1) for p in "AB"}, loras / "other.safetensors"
        )
    nodes, given = base("digits flow")
    nodes |= {
        "pics": {"class_type": "TinyPictures", "inputs": {"count": 3, "width": 64, "seed": 2}},
        "data": {"class_type": "TinyLatents", "inputs": {"batch": 2}},
        "four": {"class_type": "TinyLatents", "inputs": {"channels": 4}},
        "nan": {"class_type": "TinyLatents", "inputs": {"broken": True}},
        "cached": spelled("EasyCache", model=["m", 0]),
        "mask": spelled("SolidMask"),
        "masked": spelled("SetLatentNoiseMask", samples=["data", 0], mask=["mask", 0]),
        "area": spelled("ConditioningSetArea", conditioning=["p", 0]),
        "both": spelled("ConditioningCombine", conditioning_1=["p", 0], conditioning_2=["p", 0]),
    }
    given |= {**QUICK, "name": f"bad {case}", "method": "tdm", **changes}
    nodes["t"] = spelled("RetortTrainDistillation", **{k: v for k, v in given.items() if v is not None})
    before = sorted(p.name for folder in (loras, runs) if folder.is_dir() for p in folder.iterdir())
    done = app.run(nodes)
    said = error_of(done)
    assert done["status"]["status_str"] == "error", said
    assert re.search(f"RetortTrainDistillation: .*{message}", said, re.DOTALL), said
    assert len(said) < 500
    assert sorted(p.name for folder in (loras, runs) if folder.is_dir() for p in folder.iterdir()) == before


def test_a_run_of_that_name_with_other_settings_data_or_model_is_refused(app, spelled, base):
    nodes, given = base("digits flow")
    settings = {**given, **QUICK, "name": "mine alone", "method": "tdm"}
    nodes["t"] = spelled("RetortTrainDistillation", **settings)
    succeeded(app.run(nodes))
    for change, message in (
        ({"rank": 4}, "other settings .lora.rank: 2 -> 4.*: give it another name"),
        ({"prompts": PROMPTS + "\nanother"}, "name: .* was started with other prompts or captions .3, now 4."),
        ({"prompts": PROMPTS.replace("two", "five")}, "other prompts"),
        ({"latents": ["big", 0]}, "another size"),
        ({"model": ["early", 0]}, "another model"),
    ):
        nodes["big"] = spelled("EmptySD3LatentImage", width=128, height=64, batch_size=1)
        nodes["early"] = spelled("RetortEmbeddedModel", variant="flow early")
        nodes["t"] = spelled("RetortTrainDistillation", **{**settings, **change})
        said = error_of(app.run(nodes))
        assert re.search(message, said), said
    state = app.base / "output" / "retort" / "mine alone" / "state.safetensors"
    assert load_file(state) and len(list((app.base / "models" / "loras").glob("mine alone*"))) == 1


@pytest.fixture
def node(comfy, ours, monkeypatch, tmp_path):
    """node(**changes) -> RetortTrainFlow in this process on the embedded model, writing below tmp_path."""
    monkeypatch.setattr(comfy.folders, "output_directory", str(tmp_path / "out"))
    monkeypatch.setattr(ours("hosts.comfyui.host").host, "loras_folder", lambda: tmp_path / "loras")
    model, clip, _ = comfy.plugin["RetortEmbeddedModel"].execute("flow").args
    kind = comfy.plugin["RetortTrainFlow"]

    def run(**changes):
        values = {i.id: i.default for i in kind.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        values |= {**QUICK, "model": model, "clip": clip, "prompts": "one"} | changes
        with torch.inference_mode():
            latents = [{"samples": torch.randn(2, 16, 8, 8)}]
            return kind.execute(**{k: [v] for k, v in values.items()}, latents=latents)

    return run


def test_a_missing_peft_is_named_with_the_command(ours, node, monkeypatch, tmp_path):
    monkeypatch.setattr(ours("trainers.adapters"), "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install .peft"):
        node()
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("which", ["loras", "out"])
def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(ours, node, monkeypatch, tmp_path, which):
    """A file in the folder's place: the superuser, who runs tests, may write wherever there is a folder."""
    (tmp_path / which).write_bytes(b"")
    monkeypatch.setattr(ours("trainers.loop").Trainer, "step", lambda self: pytest.fail("it trained"))
    with pytest.raises(OSError, match=f"cannot write to .*{which}.*right to write"):
        node()
    assert [p.name for p in tmp_path.rglob("*")] == [which]


def test_a_lora_without_effect_is_not_kept(ours, node, tmp_path):
    with pytest.raises(ours("trainers.loop").TrainingFailed, match="changes nothing.*raise learning_rate"):
        node(learning_rate=0.0)
    assert not list((tmp_path / "loras").iterdir())
