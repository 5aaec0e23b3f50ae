"""The real architectures at tiny size, saved as their authors' folders are, and a host that looks only there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from retort.hosts.headless import rewards as headless
from retort.rewards.deqa import ANSWER, LEVELS, QUESTION

WORDS = sorted({*f"{QUESTION} {ANSWER} USER: ASSISTANT: a red blue seven on yellow paper , cat dog".split(), *LEVELS})


def word_tokenizer(specials: dict[str, str], begin: str, end: str):
    """A fast tokenizer of whole words with the given special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*WORDS, "[UNK]", *dict.fromkeys(specials.values())])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", special_tokens=[(t, vocabulary[t]) for t in (begin, end)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **specials)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A CLIPModel with its tokenizer and its image processor: 32 pixels, width 64."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    words = word_tokenizer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, "<s>", "</s>")
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, **ids, "vocab_size": len(words), "max_position_embeddings": 77},
            vision_config={**sizes, "image_size": 32, "patch_size": 8},
            projection_dim=768,
        )
    )
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, 0.3 * value[0].numel() ** -0.5 * 4)
        model.logit_scale.fill_(4.6)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32},
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "resample": 3, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture
def rewards_folder(tmp_path) -> Path:
    """An empty models/rewards."""
    folder = tmp_path / "rewards"
    folder.mkdir()
    return folder


@pytest.fixture
def host(rewards_folder):
    """What `hosts.rewards.kinds.make` asks of a host; it counts how often a network was asked for."""
    counted = SimpleNamespace(loads=0, held=[])

    class Held(headless.Held):
        def load(self):
            counted.loads += 1
            return super().load()

    def hold(network):
        counted.held.append(Held(network))
        return counted.held[-1]

    here = {"rewards_folders": lambda: [rewards_folder], "check_cancelled": lambda: None, "bf16": lambda: False}
    return SimpleNamespace(hold=hold, counted=counted, **here)


@pytest.fixture
def images() -> torch.Tensor:
    """Four pictures (4, 40, 52, 3) with whole pixel values."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(4, 3, 6, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (40, 52), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().movedim(1, -1) / 255
