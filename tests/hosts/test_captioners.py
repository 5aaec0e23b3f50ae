"""Captioners of transformers, tiny and as their folders are: how they are asked and read, and folders that are none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from retort.hosts.headless import rewards as headless
from retort.hosts.restoration import captions

WORDS = [
    "a",
    "red",
    "blue",
    "seven",
    "three",
    "on",
    "yellow",
    "white",
    "paper",
    "describe",
    "this",
    "image",
    "user",
    "assistant",
    ":",
]


def tokenizer(**specials):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"} | specials
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *dict.fromkeys(specials.values()), *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **specials)


def image_processor(folder, kind):
    settings = {
        "image_processor_type": kind, "do_resize": True, "size": {"height": 16, "width": 16}, "do_rescale": True,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture
def blip(tmp_path):
    """models/captioners/blip: a BLIP that conditions on a text where it is given one."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    folder = tmp_path / "blip"
    folder.mkdir()
    image_processor(folder, "BlipImageProcessor")
    words = tokenizer(cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    text = {
        "vocab_size": len(words), "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": words.bos_token_id,
        "sep_token_id": words.sep_token_id, "eos_token_id": words.sep_token_id, "pad_token_id": words.pad_token_id,
        "projection_dim": 16,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8, "projection_dim": 16}  # fmt: skip
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    from transformers import BlipImageProcessor

    BlipProcessor(BlipImageProcessor.from_pretrained(folder), words).save_pretrained(folder)
    return folder


@pytest.fixture
def halves(tmp_path):
    """models/captioners/halves: an encoder and a decoder, saved as vit-gpt2-image-captioning is."""
    from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

    folder = tmp_path / "halves"
    folder.mkdir()
    words = tokenizer()
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 image_size=16, patch_size=8), add_pooling_layer=False)  # fmt: skip
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    sizes = {"vocab_size": len(words), "n_embd": 32, "n_layer": 1, "n_head": 2}
    decoder = GPT2LMHeadModel(GPT2Config(**sizes, **ids, add_cross_attention=True))
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = words.bos_token_id
    model.config.pad_token_id = words.pad_token_id
    model.generation_config.decoder_start_token_id = words.bos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    image_processor(folder, "ViTImageProcessor")
    return folder


@pytest.fixture
def llava(tmp_path):
    """models/captioners/llava: converses, and repeats the question before its answer."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path / "llava"
    folder.mkdir()
    words = tokenizer(image_token="<image>")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=16, patch_size=8)  # fmt: skip
    text = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                       num_attention_heads=2, num_key_value_heads=2, bos_token_id=words.bos_token_id,
                       eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)  # fmt: skip
    image = words.convert_tokens_to_ids("<image>")
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    ).save_pretrained(folder)
    see = CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
    part = "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
    template = f"{{% for m in messages %}}{{% for c in m.content %}}{part}{{% endfor %}}{{% endfor %}}assistant :"
    LlavaProcessor(see, words, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
                   chat_template=template, num_additional_image_tokens=1).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def host(tmp_path):
    held = []

    class Held(headless.Held):
        offloads = 0

        def offload(self):
            self.offloads += 1
            super().offload()

    def hold(network):
        held.append(Held(network))
        return held[-1]

    return SimpleNamespace(
        hold=hold, captioners_folders=lambda: [tmp_path], held=held, check_cancelled=lambda: None,
        bf16=lambda: False,
        say=lambda *a, **k: None, progress=lambda total: SimpleNamespace(step=lambda done: None),
    )  # fmt: skip


def pictures(count=3, side=24):
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["blip", "halves", "llava"])
@pytest.mark.parametrize("question", ["", "describe this image"])
def test_a_captioner(request, host, name, question):
    request.getfixturevalue(name)
    settings = {"model": name, "question": question, "max_tokens": 5}
    found = captions.run(host, "transformers", settings, pictures(), None, 2)
    assert len(found.images) == 3 and found.tiles is None
    assert all(len(line.split()) <= 5 + 3 for line in found.images)
    assert not any("assistant" in line and "describe" in line for line in found.images)
    assert host.held[0].offloads == 1
    # One by one says the same, and the only folder needs no name.
    again = captions.run(host, "transformers", settings | {"model": ""}, pictures(), None, 1)
    assert again.images == found.images


def test_what_is_not_there(host, tmp_path):
    with pytest.raises(ValueError, match="Found there: nothing"):
        captions.run(host, "transformers", {"model": ""}, pictures(), None, 2)
    for name in ("missing", "owner/name", ".", "../elsewhere"):
        with pytest.raises(ValueError):
            captions.run(host, "transformers", {"model": name}, pictures(), None, 2)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "blip"}', encoding="utf-8")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="pickle"):
        captions.run(host, "transformers", {"model": "pickled"}, pictures(), None, 2)
    (tmp_path / "own").mkdir()
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(own), encoding="utf-8")
    (tmp_path / "own" / "code.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read"):
        captions.run(host, "transformers", {"model": "own"}, pictures(), None, 2)
    with pytest.raises(ValueError, match="not known"):
        captions.run(host, "oracle", {}, pictures(), None, 2)
