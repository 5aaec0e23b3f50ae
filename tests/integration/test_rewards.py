"""Rewards in real ComfyUI: its model management places them, both hosts score alike, gradients survive."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def parts(comfy, ours):
    return ours("hosts.comfyui.host").host, ours("hosts.rewards.kinds"), ours("rewards.scoring")


@pytest.fixture(scope="module")
def clip_folder(parts, tmp_path_factory):
    """A tiny CLIPModel with a word tokenizer under models/rewards."""
    import folder_paths
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("rewards")
    folder_paths.add_model_folder_path("rewards", str(root))
    words = {w: i for i, w in enumerate(["[UNK]", "a", "red", "blue", "cat", "<s>", "</s>"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 5), ("</s>", 6)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    text = {**sizes, "vocab_size": 7, "bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 6}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)
    for saved in (CLIPModel(config), tokenizer):
        saved.save_pretrained(root / "PickScore_v1")
    return root


def test_placed_scored_freed(comfy, parts, clip_folder):
    host, rewards, scoring = parts
    assert clip_folder in host.rewards_folders() and host.rewards_folders()[0].name == "rewards"
    images = torch.rand(3, 40, 48, 3, generator=torch.Generator().manual_seed(0))
    management = comfy.model_management
    with torch.inference_mode():
        reward = rewards.make(host, "pick_score", {"model": ""})
        first = scoring.score(reward, images, "a red cat")
        held = reward.holder
        assert any(held.patcher is loaded.model for loaded in management.current_loaded_models)
        held.offload()
        assert not any(held.patcher is loaded.model for loaded in management.current_loaded_models)
        assert torch.equal(scoring.score(reward, images, "a red cat"), first)
        # Another model may need the memory between two calls.
        management.unload_all_models()
        assert torch.equal(scoring.score(reward, images, "a red cat", batch=3), first)
    with torch.inference_mode(False):
        tracked = images.clone().requires_grad_()
        reward(tracked, "a red cat").sum().backward()
        assert tracked.grad.abs().max() > 0
    # Nobody holds it: ComfyUI's list lets it go.
    count = len(management.current_loaded_models)
    del reward, held
    import gc

    gc.collect()
    management.cleanup_models()
    assert len(management.current_loaded_models) < count


def test_both_hosts_score_alike(parts, ours, clip_folder):
    host, rewards, scoring = parts
    headless, folders = ours("hosts.headless.host").host, ours("hosts.headless.folders")
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    (clip_folder / "root" / "rewards").mkdir(parents=True, exist_ok=True)
    with folders.use(folders.Folders(models=(clip_folder / "root",))):
        for kind, settings, prompt in (
            ("pick_score", {"model": "PickScore_v1"}, "a blue cat"),
            ("embedded_judge", {"boldness": 1.0}, "a red three on white paper"),
        ):
            target = clip_folder / "root" / "rewards" / "PickScore_v1"
            if not target.exists():
                import shutil

                shutil.copytree(clip_folder / "PickScore_v1", target)
            here, there = (rewards.make(h, kind, settings) for h in (host, headless))
            assert torch.equal(scoring.score(here, images, prompt), scoring.score(there, images, prompt))


def test_nodes_under_inference_mode(ours, parts):
    host, _, _ = parts
    nodes = ours("nodes.rewards")
    with torch.inference_mode():
        reward = nodes.RetortReward.execute({"kind": "embedded_judge", "boldness": 0.0}).args[0]
        model, clip, vae = host.embedded("flow")
        images = vae.decode(torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
        combined = nodes.RetortCombineRewards.execute(reward_1=reward, weight_1=2.0).args[0]
        scores, ranking, best, sheet, text = nodes.RetortScoreImages.execute(combined, images, "a red three").args
    assert len(scores) == 3 and ranking[0] == max(range(3), key=lambda i: scores[i])
    assert best.shape == (1, 64, 64, 3) and torch.equal(best[0], images[ranking[0]]) and sheet.ndim == 4
    assert [n.GET_SCHEMA().node_id for n in (nodes.RetortReward, nodes.RetortScoreImages)]
