"""A user finds the node by the word that the field uses, in a place like those of ComfyUI's own nodes."""

from __future__ import annotations

import pytest

from retort.nodes import NODES

# Lower case; the interface looks for a part of a node's id, name or alias.
WORDS = {
    "dmd": "RetortDistilledSetup",
    "dmd2": "RetortTrainDistillation",
    "lcm": "RetortDistilledSampler",
    "tcd": "RetortDistilledSampler",
    "low noise": "RetortDistilledSetup",
    "wan": "RetortDistilledSetup",
    "turbo": "RetortDistilledSetup",
    "lightning": "RetortDistilledSigmas",
    "few step": "RetortDistilledSetup",
    "one step": "RetortTrainDistillation",
    "distil": "RetortTrainDistillation",
    "instarevive": "RetortDistilledSetup",
    "load lora": "RetortLoadStudent",
    "lora": "RetortTrainFlow",
    "fine-tune": "RetortTrainFlow",
    "finetune": "RetortTrainFlow",
    "flow matching": "RetortTrainFlow",
    "style": "RetortFewShotAdapt",
    "few shot": "RetortFewShotAdapt",
    "dpo": "RetortTrainPreference",
    "mapo": "RetortTrainPreference",
    "rlhf": "RetortTrainReward",
    "grpo": "RetortTrainReward",
    "alignprop": "RetortTrainReward",
    "train lora": "RetortTrainFlow",
    "lora training": "RetortTrainPreference",
    "lora train": "RetortTrainDistillation",
    "dreambooth": "RetortTrainFlow",
    "kohya": "RetortTrainFlow",
    "sdxl lightning": "RetortDistilledSetup",
    "sdxl turbo": "RetortDistilledSetup",
    "lcm lora": "RetortTrainDistillation",
    "dpo lora": "RetortTrainPreference",
    "background": "RetortTrainingJob",
    "multi gpu": "RetortTrainingJob",
    "vram": "RetortTrainingPlan",
    "loss": "RetortLossChart",
    "metrics": "RetortLossChart",
    "best of n": "RetortTreeSearch",
    "tree": "RetortTreeSearch",
    "dts": "RetortTreeSearch",
    "svdd": "RetortTreeSearch",
    "steering": "RetortTreeSearch",
    "golden noise": "RetortNoisePolicy",
    "score": "RetortScoreImages",
    "aesthetic": "RetortReward",
    "pickscore": "RetortReward",
    "hpsv2": "RetortReward",
    "imagereward": "RetortReward",
    "win rate": "RetortCompareModels",
    "xy plot": "RetortLoraGrid",
    "compare": "RetortReflectionCompare",
    "pick-a-pic": "RetortPreferenceSet",
    "label": "RetortLabelPairs",
    "w2sd": "RetortReflectionSetup",
    "z-sampling": "RetortReflectionSetup",
    "zigzag": "RetortReflectionSampler",
    "autoguidance": "RetortReflectionSetup",
    "teleport": "RetortTeleportSampler",
    "covariance": "RetortGaussianStatistics",
    "pfgm": "RetortStudentTNoise",
    "ilvr": "RetortStructureSampler",
    "rk45": "RetortDopri5Sampler",
    "demo model": "RetortEmbeddedModel",
    "test image": "RetortDemoPhotograph",
    "upscale": "RetortRestore",
    "super resolution": "RetortRestore",
    "deblur": "RetortRestore",
    "captioner": "RetortCaption",
    "florence": "RetortCaption",
    "real-esrgan": "RetortDegrade",
    "jpeg": "RetortDegrade",
    "wavelet": "RetortColorFix",
    "color fix": "RetortColorFix",
    "slider": "RetortCompareImages",
    "psnr": "RetortCompareImages",
    "infrared": "RetortSpectralGuidance",
    "vote": "RetortPreferencePicker",
    "blind": "RetortBlindTest",
    "evaluate lora": "RetortBlindTest",
    "human feedback": "RetortPreferencePicker",
    "wildcard": "RetortPromptQueue",
    "before after": "RetortEditPairs",
    "kontext": "RetortEditPairs",
}
# What a search for another kind of node must not bring.
STRANGERS = {"turbo": ("RetortLossChart", "RetortCollectJob", "RetortTrainPreference"), "dpo": ("RetortTreeSearch",)}
# ComfyUI 0.33 sorts by what a node does; rewards and preferences have no place of its own there.
PLACES = {"model/sampling", "model/training", "model/loaders", "model/rewards", "model/preference", "image/restoration"}


def finds(word: str) -> set[str]:
    schemas = [node.GET_SCHEMA() for node in NODES]
    said = {s.node_id: [s.node_id.lower(), s.display_name.lower(), *s.search_aliases] for s in schemas}
    return {id for id, texts in said.items() if any(word in text for text in texts)}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_finds_its_node(word):
    assert WORDS[word] in finds(word)


def test_every_node_is_looked_for_by_some_word():
    assert {node.__name__ for node in NODES} <= {id for word in WORDS for id in finds(word)}


@pytest.mark.parametrize("word", STRANGERS)
def test_a_word_does_not_find_another_kind(word):
    assert not finds(word) & set(STRANGERS[word])


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_aliases_are_words_as_typed(node):
    aliases = node.GET_SCHEMA().search_aliases
    assert len(aliases) == len(set(aliases)), "an alias stands there twice"
    assert all(alias == alias.lower().strip() for alias in aliases)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_a_category_is_a_function_then_our_name(node):
    place, _, name = node.GET_SCHEMA().category.rpartition("/")
    assert name == "retort" and place in PLACES
