"""ImageReward from a file with the published names, against BLIP's arithmetic written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from retort.hosts.rewards import kinds as rewards
from retort.rewards.heads import LinearHead
from retort.rewards.image_reward import MEAN, STD
from retort.rewards.preprocess import Preprocess
from retort.rewards.scoring import score

from .conftest import word_tokenizer
from .test_networks import PROMPTS, promises

WIDTH, TEXT, DEPTH, PATCH, SIDE = 128, 64, 2, 8, 32


def published_state(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of the published file: ViT of width 128, BERT of width 64, two layers each."""
    generator = torch.Generator().manual_seed(11)
    state = {}

    def linear(name, after, before, bias=True):
        state[f"{name}.weight"] = torch.randn(after, before, generator=generator) * 1.5 * before**-0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(after, generator=generator) * 0.1

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    state[f"{v}.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
    state[f"{v}.pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH, generator=generator)
    linear(f"{v}.patch_embed.proj", WIDTH, 3 * PATCH**2)
    state[f"{v}.patch_embed.proj.weight"] = state[f"{v}.patch_embed.proj.weight"].view(WIDTH, 3, PATCH, PATCH)
    for i in range(DEPTH):
        b = f"{v}.blocks.{i}"
        norm(f"{b}.norm1", WIDTH)
        linear(f"{b}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{b}.attn.proj", WIDTH, WIDTH)
        norm(f"{b}.norm2", WIDTH)
        linear(f"{b}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"{b}.mlp.fc2", WIDTH, 4 * WIDTH)
    norm(f"{v}.norm", WIDTH)
    state[f"{t}.embeddings.word_embeddings.weight"] = torch.randn(vocabulary, TEXT, generator=generator)
    state[f"{t}.embeddings.position_embeddings.weight"] = torch.randn(48, TEXT, generator=generator)
    state[f"{t}.embeddings.position_ids"] = torch.arange(48)[None]
    norm(f"{t}.embeddings.LayerNorm", TEXT)
    for i in range(DEPTH):
        for part, keys in (("attention", TEXT), ("crossattention", WIDTH)):
            a = f"{t}.encoder.layer.{i}.{part}"
            linear(f"{a}.self.query", TEXT, TEXT)
            linear(f"{a}.self.key", TEXT, keys)
            linear(f"{a}.self.value", TEXT, keys)
            linear(f"{a}.output.dense", TEXT, TEXT)
            norm(f"{a}.output.LayerNorm", TEXT)
        linear(f"{t}.encoder.layer.{i}.intermediate.dense", 4 * TEXT, TEXT)
        linear(f"{t}.encoder.layer.{i}.output.dense", TEXT, 4 * TEXT)
        norm(f"{t}.encoder.layer.{i}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 16, WIDTH)
    linear("blip.text_proj", 16, TEXT)
    torch.manual_seed(12)
    state |= {f"mlp.{name}": value.clone() for name, value in LinearHead(TEXT).state_dict().items()}
    return state


def by_hand(state, pixels, ids, mask):
    """BLIP's ViT and BERT in their published names, heads of 64 numbers."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, mask=None):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(64)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels, state[f"{v}.patch_embed.proj.weight"], state[f"{v}.patch_embed.proj.bias"], stride=PATCH)
    first = state[f"{v}.cls_token"].expand(len(pixels), -1, -1)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + state[f"{v}.pos_embed"]
    for i in range(DEPTH):
        b = f"{v}.blocks.{i}"
        x = x + linear(f"{b}.attn.proj", attend(*linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)))
        x = x + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x, 1e-6))))
    seen = norm(f"{v}.norm", x, 1e-6)
    e = f"{t}.embeddings"
    y = state[f"{e}.word_embeddings.weight"][ids] + state[f"{e}.position_embeddings.weight"][: ids.shape[1]]
    y = norm(f"{e}.LayerNorm", y, 1e-12)
    for i in range(DEPTH):
        for part, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            a = f"{t}.encoder.layer.{i}.{part}"
            keys = y if source is None else source
            mixed = attend(
                linear(f"{a}.self.query", y), *(linear(f"{a}.self.{n}", keys) for n in ("key", "value")), hidden
            )
            y = norm(f"{a}.output.LayerNorm", linear(f"{a}.output.dense", mixed) + y, 1e-12)
        layer = f"{t}.encoder.layer.{i}"
        wide = F.gelu(linear(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", wide) + y, 1e-12)
    z = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        z = linear(f"mlp.layers.{place}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def folder(rewards_folder):
    """models/rewards/ImageReward with its file and a BERT-like tokenizer."""
    where = rewards_folder / "ImageReward"
    words = word_tokenizer({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}, "[CLS]", "[SEP]")
    words.save_pretrained(where)
    save_file(published_state(len(words)), where / "ImageReward.safetensors")
    return where, words


def test_it_is_the_published_arithmetic(host, folder, images):
    _, words = folder
    reward = rewards.make(host, "image_reward", {})
    found = promises(reward, images)
    tokens = words(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens["input_ids"].shape == (4, 35)
    pixels = Preprocess(SIDE, "crop")(images)
    wanted = by_hand(published_state(len(words)), pixels, tokens["input_ids"], tokens["attention_mask"])
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)
    # The picture and the prompt both count.
    other = score(reward, images, ["yellow paper"] * 4)
    assert (other - found).abs().min() > 1e-6


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("blip.visual_encoder.blocks.1.attn.qkv.bias"), "lacks encoder.layers.1.self_attn.qkv.bias"),
        (lambda s: s.pop("mlp.layers.7.bias"), "9 of the ten"),
        (lambda s: s.update({"unet.weight": torch.zeros(1)}), "unet.weight"),
        (lambda s: s.pop("blip.text_encoder.embeddings.word_embeddings.weight"), "word_embeddings"),
    ],
)
def test_a_wrong_file_is_named(host, folder, change, match):
    where, words = folder
    state = published_state(len(words))
    change(state)
    save_file(state, where / "ImageReward.safetensors")
    with pytest.raises(ValueError, match=match):
        rewards.make(host, "image_reward", {})


def test_the_pickle_that_is_published_is_refused(host, folder):
    where, _ = folder
    (where / "ImageReward.safetensors").rename(where / "ImageReward.pt")
    with pytest.raises(ValueError, match="ImageReward.pt is a pickle: get it as safetensors, or convert"):
        rewards.make(host, "image_reward", {})
