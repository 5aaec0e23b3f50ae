"""Rewards by networks: the real architectures at tiny size, against the way their authors score."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from retort.hosts.rewards import kinds as rewards
from retort.rewards.heads import LinearHead
from retort.rewards.scoring import score

PROMPTS = ["a red cat", "a blue dog", "a red cat", "a seven on yellow paper"]


def promises(reward, images, prompts=PROMPTS):
    """Batch = singles, order does not matter, range holds, gradients where they are said to be; the scores."""
    with torch.no_grad():
        whole = score(reward, images, prompts)
        torch.testing.assert_close(score(reward, images, prompts, batch=1), whole, atol=1e-4, rtol=1e-4)
        order = torch.tensor([2, 0, 3, 1])
        mixed = score(reward, images[order], [prompts[i] for i in order])
        torch.testing.assert_close(mixed, whole[order], atol=1e-4, rtol=1e-4)
        same = score(reward, images, prompts[0])
        torch.testing.assert_close(same, score(reward, images, [prompts[0]] * 4), atol=1e-5, rtol=1e-5)
    assert whole.dtype == torch.float32
    assert (whole >= reward.range[0] - 1e-3).all() and (whole <= reward.range[1] + 1e-3).all()
    tracked = images.clone().requires_grad_()
    found = reward(tracked, prompts)
    assert found.requires_grad == reward.differentiable
    if reward.differentiable:
        found.sum().backward()
        assert torch.isfinite(tracked.grad).all() and tracked.grad.abs().max() > 0
    return whole


def published_clip(folder, images, prompts):
    """(cosines, exp(logit_scale)) by transformers' own processor, from PIL pictures."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    pictures = [Image.fromarray((p.numpy() * 255).round().astype(np.uint8)) for p in images]
    pixels = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
    words = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], **pixels)
    return (out.image_embeds * out.text_embeds).sum(-1), model.logit_scale.exp().item()


def test_clip_score_and_pick_score_are_the_published_ones(host, tiny_clip, rewards_folder, images):
    cosines, scale = published_clip(tiny_clip, images, PROMPTS)
    assert cosines.std() > 0.005
    shutil.copytree(tiny_clip, rewards_folder / "PickScore_v1")
    pick = rewards.make(host, "pick_score", {"model": ""})
    torch.testing.assert_close(promises(pick, images), cosines * scale, atol=0.1, rtol=0)
    shutil.copytree(tiny_clip, rewards_folder / "openai" / "clip-vit-large-patch14")
    clip = rewards.make(host, "clip_score", {})
    torch.testing.assert_close(promises(clip, images) / 100, cosines, atol=1e-3, rtol=0)
    assert (pick.name, clip.name) == ("PickScore", "CLIPScore") and scale == pytest.approx(np.exp(4.6), rel=1e-4)
    assert clip.range == (-100.0, 100.0)


def test_hps_pads_where_the_others_crop(host, tiny_clip, rewards_folder, images):
    shutil.copytree(tiny_clip, rewards_folder / "clip")
    padded, cropped = (rewards.make(host, kind, {"model": "clip"}) for kind in ("hps_v2", "clip_score"))
    found = promises(padded, images)
    assert (found - score(cropped, images, PROMPTS)).abs().max() > 0.1
    # On squares there is nothing to pad nor to crop.
    square = images[:, :, 6:46]
    torch.testing.assert_close(score(padded, square, PROMPTS), score(cropped, square, PROMPTS))
    by_hand = torch.zeros(4, 32, 32, 3)
    for i, one in enumerate(images):
        small = Image.fromarray((one.numpy() * 255).round().astype(np.uint8)).resize((32, 25), Image.Resampling.BICUBIC)
        by_hand[i, 3:28] = torch.from_numpy(np.array(small)) / 255
    cosines, _ = published_clip(tiny_clip, by_hand, PROMPTS)
    torch.testing.assert_close(found / 100, cosines, atol=1e-3, rtol=0)


def test_aesthetic_with_a_head_of_its_own_and_with_one_inside(host, tiny_clip, rewards_folder, images):
    torch.manual_seed(2)
    head = LinearHead(768)
    shutil.copytree(tiny_clip, rewards_folder / "clip-vit-large-patch14")
    save_file(head.state_dict(), rewards_folder / "sac+logos+ava1-l14-linearMSE.safetensors")
    reward = rewards.make(host, "aesthetic", {})
    found = promises(reward, images)
    from transformers import AutoImageProcessor, CLIPModel, CLIPVisionModelWithProjection

    whole = CLIPModel.from_pretrained(tiny_clip)
    # A whole CLIP's folder gives the width of its projection in another place than a half one's.
    whole.config.vision_config.projection_dim = 768
    model = CLIPVisionModelWithProjection(whole.config.vision_config).eval()
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if "vision" in k or "visual" in k})
    pictures = [Image.fromarray((p.numpy() * 255).round().astype(np.uint8)) for p in images]
    pixels = AutoImageProcessor.from_pretrained(tiny_clip)(images=pictures, return_tensors="pt")
    weight, bias = head.collapsed()
    with torch.no_grad():
        features = torch.nn.functional.normalize(model(**pixels).image_embeds, dim=-1).double()
    torch.testing.assert_close(found.double(), features @ weight + bias, atol=1e-3, rtol=0)

    # shunk031's layout: backbone and head in one file.
    inside = rewards_folder / "aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
    model.save_pretrained(inside)
    save_file({**model.state_dict(), **head.state_dict()}, inside / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(score(rewards.make(host, "aesthetic", {}), images, ""), found)

    save_file(LinearHead(512).state_dict(), rewards_folder / "other.safetensors")
    with pytest.raises(ValueError, match="takes 512 features and this CLIP gives 768"):
        rewards.make(host, "aesthetic", {"head": "other.safetensors"})


def test_any_classifier(host, rewards_folder, images):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label={0: "cat", 1: "Dog", 2: "bird"})
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(rewards_folder / "vit")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(rewards_folder / "vit")
    pictures = [Image.fromarray((p.numpy() * 255).round().astype(np.uint8)) for p in images]
    with torch.no_grad():
        wanted = model(**processor(images=pictures, return_tensors="pt")).logits
    for measure, values in {
        "log probability": wanted.log_softmax(-1), "probability": wanted.softmax(-1), "logit": wanted,
    }.items():  # fmt: skip
        reward = rewards.make(host, "classifier", {"model": "vit", "label": "dog", "measure": measure})
        torch.testing.assert_close(promises(reward, images), values[:, 1], atol=1e-2, rtol=0)
    numbered = rewards.make(host, "classifier", {"model": "vit", "label": "1", "measure": "logit"})
    assert numbered.name == "classifier: Dog"
    with pytest.raises(ValueError, match="'fish' is not one of this classifier's 3: cat, Dog, bird"):
        rewards.make(host, "classifier", {"model": "vit", "label": "fish"})

    config.num_labels = 1
    ViTForImageClassification(config).save_pretrained(rewards_folder / "regressor")
    processor.save_pretrained(rewards_folder / "regressor")
    promises(rewards.make(host, "classifier", {"model": "regressor"}), images)


def test_likeness_to_a_picture(host, tiny_clip, rewards_folder, images):
    from transformers import Dinov2Config, Dinov2Model

    shutil.copytree(tiny_clip, rewards_folder / "clip")
    torch.manual_seed(4)
    dino = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(dino).save_pretrained(rewards_folder / "dino")
    shutil.copy(tiny_clip / "preprocessor_config.json", rewards_folder / "dino")
    for model in ("", "clip", "dino"):
        reward = rewards.make(host, "likeness", {"model": model, "reference": images[1:2]})
        found = promises(reward, images)
        assert found.argmax() == 1 and found[1].item() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="connect `reference`"):
        rewards.make(host, "likeness", {})


def test_the_embedded_judge(host):
    from retort.models import digits
    from retort.models.reward import wanted

    assert wanted("a bold blue 7 on yellow paper, leaning left") == {"digit": 7, "ink": 6, "paper": 4}
    assert wanted("(red:1.3) three, white background") == {"digit": 3, "ink": 2, "paper": 1}
    assert wanted("something else") == {}
    fields, labels = digits.load("held_out")
    drawn = digits.draw(fields[:4], labels[:4], torch.Generator().manual_seed(0))
    images = drawn.image.movedim(1, -1)
    prompts = [drawn.caption(i) for i in range(4)]
    judge = rewards.make(host, "embedded_judge", {})
    found = promises(judge, images, prompts)
    assert (found > -0.5).all()
    others = score(judge, images, [prompts[i] for i in (1, 2, 3, 0)])
    assert (found > others + 1).all()
    with pytest.raises(ValueError, match="names no digit and no colour"):
        judge(images, "a portrait")
    bold = rewards.make(host, "embedded_judge", {"boldness": 0.5})
    extra = score(bold, images, prompts) - found
    torch.testing.assert_close(extra, 0.5 * score(rewards.make(host, "embedded_judge", {"boldness": 1.0}), images, "x"))
    bolder = score(bold, images, "").argsort()
    assert int(drawn.weight[bolder[-1]]) >= int(drawn.weight[bolder[0]])


def test_networks_are_asked_for_before_each_use_and_can_go(host, tiny_clip, rewards_folder, images):
    shutil.copytree(tiny_clip, rewards_folder / "clip")
    with torch.inference_mode():
        reward = rewards.make(host, "clip_score", {"model": "clip"})
        before = host.counted.loads
        first = reward(images, PROMPTS)
        host.counted.held[-1].offload()
        assert torch.equal(reward(images, PROMPTS), first)
    assert host.counted.loads == before + 2
    # Made and used under inference mode, it still gives gradients outside.
    tracked = images.clone().requires_grad_()
    reward(tracked, PROMPTS).sum().backward()
    assert tracked.grad.abs().max() > 0
