"""What may be loaded and what may not: folders, hub ids, pickles, halves of models, remote code."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from retort.hosts.rewards import files as reward_files
from retort.hosts.rewards import kinds as rewards


def test_a_usual_name_is_never_downloaded(host, rewards_folder, monkeypatch):
    import transformers

    def forbidden(*a, **k):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", forbidden)
    with pytest.raises(ValueError, match="model is empty: type yuvalkirstain/PickScore_v1 to download"):
        rewards.make(host, "pick_score", {})
    with pytest.raises(ValueError, match="asked the Hub"):
        rewards.make(host, "pick_score", {"model": "yuvalkirstain/PickScore_v1"})


def test_a_typed_id_that_cannot_be_read(host, monkeypatch):
    import transformers

    seen = {}

    def offline(source, **options):
        seen.update(options, source=source)
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match="'a/b' cannot be read .We couldn't connect.*check the id, the connection"):
        rewards.make(host, "clip_score", {"model": "a/b"})
    assert seen == {"source": "a/b", "local_files_only": False, "trust_remote_code": False}


@pytest.mark.parametrize("name", ["../clip", "/etc", "C:\\models", "a\x00b"])
def test_names_stay_in_their_folder(host, name):
    with pytest.raises(ValueError, match="leaves its folder|absolute|control character"):
        rewards.make(host, "clip_score", {"model": name})


def test_pickles_are_refused(host, tiny_clip, rewards_folder):
    folder = rewards_folder / "old"
    shutil.copytree(tiny_clip, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as a pickle \(pytorch_model.bin\).*get it as safetensors"):
        rewards.make(host, "clip_score", {"model": "old"})
    (folder / "pytorch_model.bin").rename(folder / "notes.txt")
    with pytest.raises(ValueError, match="holds no safetensors"):
        rewards.make(host, "clip_score", {"model": "old"})
    with pytest.raises(ValueError, match="is a pickle"):
        rewards.make(host, "aesthetic", {"model": "", "head": "sac+logos+ava1-l14-linearMSE.pth"} | {"model": "old"})
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ValueError, match="cannot be read"):
        rewards.make(host, "clip_score", {"model": "old"})
    (rewards_folder / "head.safetensors").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ValueError, match="is a pickle"):
        reward_files.read_tensors(rewards_folder / "head.safetensors")


def sharded(folder, shard="shard.bin", **index):
    """The model in a folder in two files, of which the index names one as `shard`."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "whole.safetensors")
    names = sorted(state)
    save_file({k: state[k] for k in names[1:]}, folder / "first.safetensors", {"format": "pt"})
    rest = {names[0]: state[names[0]]}
    (folder / shard).parent.mkdir(exist_ok=True)
    torch.save(rest, folder / shard) if shard.endswith(".bin") else save_file(rest, folder / shard, {"format": "pt"})
    found = {"metadata": {}, "weight_map": dict.fromkeys(names[1:], "first.safetensors") | {names[0]: shard}} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "shard", ["shard.bin", "../other/model.safetensors", "inner/model.safetensors", ".hidden.safetensors"]
)
def test_an_index_names_safetensors_files_beside_it_only(host, tiny_clip, rewards_folder, shard):
    folder = rewards_folder / "shards"
    shutil.copytree(tiny_clip, folder)
    sharded(folder, shard)
    with pytest.raises(ValueError, match="only safetensors files beside it are read.*get the model again"):
        rewards.make(host, "clip_score", {"model": "shards"})


def test_a_plain_index_is_followed_and_a_damaged_one_refused(host, tiny_clip, rewards_folder):
    folder = rewards_folder / "plain"
    shutil.copytree(tiny_clip, folder)
    sharded(folder, "second.safetensors")
    rewards.make(host, "clip_score", {"model": "plain"})
    for text in ("[" * 100_000, "{}", '{"weight_map": 1}', '{"weight_map": {"a": 3}}', "\xff"):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="index.json .*get the model again, as safetensors"):
            rewards.make(host, "clip_score", {"model": "plain"})


def test_an_adapter_names_another_model_and_is_refused(host, tiny_clip, rewards_folder):
    folder = rewards_folder / "adapter"
    shutil.copytree(tiny_clip, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../evil"}))
    with pytest.raises(ValueError, match="adapter of another model: get the whole model"):
        rewards.make(host, "clip_score", {"model": "adapter"})


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_config_cannot_name_the_code_of_attention(host, tiny_clip, rewards_folder, key):
    folder = rewards_folder / "kernel"
    shutil.copytree(tiny_clip, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: "evil/kernel"}))
    rewards.make(host, "clip_score", {"model": "kernel"})


def test_a_config_that_asks_for_other_packages_is_refused(host, tiny_clip, rewards_folder):
    folder = rewards_folder / "quantised"
    shutil.copytree(tiny_clip, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="'quantised' cannot be read .*download the whole repository again"):
        rewards.make(host, "clip_score", {"model": "quantised"})


def test_an_index_on_the_hub_is_read_before_the_model(host, tiny_clip, tmp_path, monkeypatch):
    import huggingface_hub
    import transformers

    folder = tmp_path / "hub"
    shutil.copytree(tiny_clip, folder)
    sharded(folder)

    def fetched(name, file):
        if not (folder / file).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(f"{file} is not there")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda *a, **k: pytest.fail("it was read"))
    place = reward_files.Place("some/model", None)
    with pytest.raises(ValueError, match=r"names 'shard\.bin'"):
        reward_files.load_model(place, transformers.CLIPModel)


def test_missing_weights_are_never_random(host, tiny_clip, rewards_folder):
    folder = rewards_folder / "half"
    shutil.copytree(tiny_clip, folder)
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "text_projection" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="lacks 1 weights of a CLIPModel, such as text_projection.weight"):
        rewards.make(host, "clip_score", {"model": "half"})
    state["text_projection.weight"] = torch.zeros(3, 3)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="cannot be read"):
        rewards.make(host, "clip_score", {"model": "half"})


def test_another_architecture_and_remote_code_are_refused(host, tiny_clip, rewards_folder):
    folder = rewards_folder / "other"
    shutil.copytree(tiny_clip, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(ValueError, match="is a 'vit' and this reward needs a CLIP"):
        rewards.make(host, "clip_score", {"model": "other"})
    (folder / "code.py").write_text("raise SystemExit('ran')")
    mapped = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(mapped))
    with pytest.raises(ValueError, match="cannot be read"):
        rewards.make(host, "clip_score", {"model": "other"})


def test_a_folder_without_its_tokenizer(host, tiny_clip, rewards_folder):
    folder = rewards_folder / "mute"
    shutil.copytree(tiny_clip, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        rewards.make(host, "clip_score", {"model": "mute"})


def test_unknown_kinds_and_lists(host, tiny_clip, rewards_folder):
    with pytest.raises(ValueError, match="'beauty' is not known; use one of embedded_judge, pick_score"):
        rewards.make(host, "beauty", {})
    shutil.copytree(tiny_clip, rewards_folder / "owner" / "clip")
    save_file({"a": torch.zeros(1)}, rewards_folder / "head.safetensors")
    assert reward_files.names([rewards_folder]) == ["head.safetensors", "owner/clip"]
