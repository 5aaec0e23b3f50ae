"""DeQA by a tiny LLaVA: the five words' tokens at the end of the prompt, in transformers' own classes."""

from __future__ import annotations

import shutil

import pytest
import torch

from retort.hosts.rewards import kinds as rewards
from retort.rewards.deqa import ANSWER, LEVELS, QUESTION
from retort.rewards.scoring import score

from .conftest import word_tokenizer
from .test_networks import promises


@pytest.fixture
def llava(rewards_folder, tiny_clip):
    """models/rewards/llava: LLaVA of width 32 with two layers, and its processor."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    words = word_tokenizer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, "", "")
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(6)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **sizes, "vocab_size": len(words), "num_key_value_heads": 2},
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, 2 * value[0].numel() ** -0.5)
    folder = rewards_folder / "llava"
    model.save_pretrained(folder)
    images = CLIPImageProcessor.from_pretrained(tiny_clip)
    take = LlavaProcessor(
        image_processor=images, tokenizer=words, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    take.save_pretrained(folder)
    return folder, model, take


def test_the_level_words_decide(host, llava, images):
    folder, model, take = llava
    reward = rewards.make(host, "deqa", {"model": "llava"})
    found = promises(reward, images)
    text = f"USER: {QUESTION}\n<image>\nASSISTANT: {ANSWER}"
    from PIL import Image

    pictures = [Image.fromarray((p * 255).round().byte().numpy()) for p in images]
    with torch.no_grad():
        logits = model(**take(images=pictures, text=[text] * 4, return_tensors="pt")).logits[:, -1]
    five = logits[:, take.tokenizer.convert_tokens_to_ids(list(LEVELS))]
    wanted = five.softmax(-1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert wanted.std() > 1e-4
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_equal_logits_are_three(host, llava, images):
    reward = rewards.make(host, "deqa", {"model": "llava"})
    torch.nn.init.zeros_(host.counted.held[-1].network.model.lm_head.weight)
    torch.testing.assert_close(score(reward, images, ""), torch.full((4,), 3.0), atol=0, rtol=1e-6)


def test_a_chat_template_is_used(host, llava):
    folder, _, _ = llava
    picture = "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}"
    parts = f"{{% for c in m['content'] %}}{picture}{{% endfor %}}"
    template = (
        "{% for m in messages %}USER: " + parts + "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    from transformers import AutoProcessor

    take = AutoProcessor.from_pretrained(folder)
    from retort.hosts.rewards.files import Place
    from retort.hosts.rewards.kinds import asked

    assert asked(take, Place("llava", folder)) == f"USER: <image> {QUESTION} ASSISTANT: {ANSWER}"


def test_the_published_model_is_sent_elsewhere(host, rewards_folder, tiny_clip):
    shutil.copytree(tiny_clip, rewards_folder / "deqa")
    (rewards_folder / "deqa" / "config.json").write_text('{"model_type": "mplug_owl2"}', encoding="utf-8")
    with pytest.raises(ValueError, match="process of its own"):
        rewards.make(host, "deqa", {"model": "deqa"})
