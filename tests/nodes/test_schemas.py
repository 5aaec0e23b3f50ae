"""What every node promises a workflow and its user: stable ids, tooltips, a help page."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from retort import WEB_DIRECTORY, comfy_entrypoint
from retort.hosts import api
from retort.nodes import NODES

ROOT = Path(__file__).resolve().parents[2]

SOURCES = ["model", "clip", "positive", "negative", "latents", "images", "vae"]
RUN = [
    "prompts", "name", "steps", "batch_size", "learning_rate", "rank", "seed", "gradient_checkpointing",
    "preview_every", "previews", "accumulation", "noise_scale_target", "accumulation_cap", "decay", "warmup",
    "optimiser", "weight_decay", "max_grad_norm", "ema", "precision", "prompt_dropout", "alpha", "targets", "exclude",
    "convolutions", "dropout", "fake_rank", "start_from", "save_every", "save_minutes", "keep",
]  # fmt: skip
IMAGES = ["slow_repeats", "slow_after", "importance"]
ALONE = [name for name in RUN if name != "fake_rank"]
MATCHING = [
    "steps", "timesteps", "cfg", "ratio", "fake_rate", "gan_weight", "gan_on", "regression_steps", "regression_weight",
    "pairs", "pair_steps", "decoupled", "normalise", "low", "high", "shift",
]  # fmt: skip
FLOW = ["loss_space", "levels", "cfg", "mean", "std", "max_weight", "aug_dim"]
FEW_SHOT = ["consistency", "cfg", "source_steps", "phase"]
RESTORER = [
    "degradation", "weakest", "strongest", "least", "most", "timestep", "cfg", "matching_weight", "regression_weight",
    "feature_weight", "features", "regression_steps", "dynamic", "ratio", "fake_rate", "gan_weight", "gan_on", "narrow",
    "floor", "memory", "low", "high", "shift", "normalise",
]  # fmt: skip
METHODS = {
    "dmd2": MATCHING,
    "f_distill": ["divergence", *MATCHING, "ratio_ema", "ratio_low", "ratio_high", "ratio_normalise"],
    "tdm": [
        "steps", "timesteps", "cfg", "fake_rate", "diffusing", "exact_score", "huber", "normalise", "random_mid",
        "steps_choices", "conditioned",
    ],
    "di_star": [
        "steps", "timesteps", "cfg", "ratio", "fake_rate", "alpha_rew", "guidance", "distance", "huber", "sid_alpha",
        "space", "normalise", "low", "high", "shift",
    ],
    "flow": FLOW,
    "few_shot": FEW_SHOT,
    "dpo": ["beta", "flipped", "levels", "cfg"],
    "smpo": ["beta", "gamma", "labels", "temperature", "inversion_steps", "renoise", "levels", "cfg"],
    "mapo": ["beta", "snr", "scale", "levels", "cfg"],
    "instarevive": RESTORER,
}  # fmt: skip
REFLECTED = ["end", "begin", "rounds", "inversion", "iterations", "base"]
PAIRS = {
    "cfg": ["weak_cfg"],
    "lora": ["lora", "strong_strength", "weak_strength", "reflecting_cfg"],
    "prompt": ["weak_positive", "reflecting_cfg"],
    "model": ["weak_model", "reflecting_cfg"],
}
REWARD_METHODS = {
    "align_prop": ["steps", "cfg", "truncation", "last", "sampler", "stopped", "loss", "target", "checkpoint"],
    "spo": ["steps", "cfg", "step", "noise_level", "candidates", "trained", "skipped", "beta"],
    "flow_grpo": ["steps", "cfg", "noise_level", "group", "trained", "clip", "kl", "updates"],
}
PREFERENCE = ("dpo", "smpo", "mapo")
SIZE = ["scale", "tile", "overlap", "least_side"]
CAPTIONERS = {"embedded": ["least"], "transformers": ["model", "question", "max_tokens"]}
DEGRADATIONS = {"real world": ["shrink", "strength"], "face": [], "infrared": ["shrink"]}
LIMITS = ["calls", "seconds", "enough", "batch_size"]
# Workflows store widgets by position: names never change, and new ones come last.
INPUTS = {
    "RetortTrainDistillation": [*SOURCES, "reward", "method", *RUN, "offload"],
    "RetortTrainFlow": [*SOURCES, *FLOW, *ALONE, *IMAGES, "offload"],
    "RetortFewShotAdapt": [*SOURCES, *FEW_SHOT, *ALONE, *IMAGES, "offload"],
    "RetortTrainReward": [*SOURCES, "reward", "reward_2", "method", *ALONE, "offload"],
    "RetortTrainRestorer": [*(name for name in SOURCES if name != "latents"), *RESTORER, *RUN, "offload"],
    "RetortTrainingJob": [*SOURCES, "method", *RUN, "processes", "pairs", *IMAGES, "offload"],
    "RetortPreferenceSet": [
        "pairs", "name", "by", "prompt", "least", "ties", "held_out", "seed", "import_from", "export",
    ],
    "RetortLabelPairs": [
        "reward", "images", "latents", "vae", "name", "prompt", "prompt_per_line", "pairing", "margin", "batch_size",
    ],
    "RetortTrainPreference": [
        "model", "clip", "vae", "pairs", "method", *(name for name in ALONE if name != "prompts"),
        *IMAGES, "offload",
    ],
    "RetortPreferencePicker": ["images", "samples", "prompt", "name", "candidates", "by"],
    "RetortPromptQueue": ["prompts", "index", "begin_again"],
    "RetortCollectJob": ["run", "wait", "command"],
    "RetortLossChart": ["run", "smoothing", "log_scale"],
    "RetortReward": ["kind"],
    "RetortCombineRewards": [
        *(f"reward_{i}" for i in range(1, 5)),
        *(f"weight_{i}" for i in range(1, 5)),
        "standardise",
        "limit",
        "veto_on",
        "veto_below",
        "calibration_prompt",
        "calibration",
    ],
    "RetortScoreImages": ["reward", "images", "prompt", "prompt_per_line", "batch_size", "columns"],
    "RetortCompareModels": [
        "base", "tuned", "clip", "vae", "reward", "sampler", "sigmas", "latent", "prompts", "negative", "cfg",
        "per_prompt", "seed", "shown",
    ],
    "RetortTreeSearch": [
        "guider", "sigmas", "latent", "vae", "reward", "prompt", "method", "transition", "noise_level", *LIMITS, "keep",
        "seed", "noise",
    ],
    "RetortResumeSearch": ["search", "guider", "vae", "reward", *LIMITS, "noise"],
    "RetortSaveSearch": ["search", "name"],
    "RetortLoadSearch": ["file"],
    "RetortDrawFromSearch": ["search", "guider", "count", "greedy", "seed"],
    "RetortNoisePolicy": [
        "guider", "sigmas", "latent", "vae", "reward", "prompt", "samples", "rate", "pull", "divergence", "epochs",
        *LIMITS, "keep", "seed",
    ],
    "RetortPolicyNoise": ["search", "seed"],
    "RetortGaussianStatistics": [
        "model", "latents", "images", "vae", "form", "rank", "folder", "width", "height", "name",
    ],
    "RetortLoadGaussianStatistics": ["name"],
    "RetortTeleportSampler": ["sampler", "statistics", "skip_steps", "sigma_skip", "infer_mean"],
    "RetortStudentTNoise": ["seed", "aug_dim"],
    "RetortStructureSampler": ["reference", "factor", "iterations", "start_percent", "end_percent", "steps"],
    "RetortDopri5Sampler": ["atol", "rtol", "max_calls"],
    "RetortReflectionSampler": ["weak", *REFLECTED, "reflecting"],
    "RetortReflectionSetup": ["model", "positive", "negative", "pair", "cfg", *REFLECTED, "sigmas"],
    "RetortReflectionCompare": ["guider", "sampler", "sigmas", "latent", "vae", "seed"],
    "RetortRestore": [
        "model", "clip", "vae", "image", "caption", "tile_captions", "tile_strength", *SIZE, "window", "colour_fix",
        "timestep", "latent_scale", "batch_size", "caption_per_line", "mask", "feather",
    ],
    "RetortCaption": ["image", "captioner", "per_tile", *SIZE, "suffix", "batch_size"],
    "RetortDegrade": ["image", "kind", "keep_size", "seed"],
    "RetortColorFix": ["image", "source", "method", "strength"],
    "RetortCompareImages": ["before", "after", "clean", "reward", "prompt"],
    "RetortSpectralGuidance": [
        "model", "vae", "reference", "scale", "spectrum", "structure", "start_percent", "end_percent",
    ],
    "RetortEmbeddedModel": ["variant"],
    "RetortDistilledSetup": ["model", "positive", "negative", "preset", "steps", "timesteps", "denoise"],
    "RetortDistilledSigmas": ["model", "preset", "steps", "timesteps", "denoise"],
    "RetortDistilledSampler": ["preset", "mode", "start"],
}  # fmt: skip
SEARCHED = ["LATENT", "LATENT", "SEARCH_TREE", "IMAGE", "STRING"]
TRAINED = ["LORA_MODEL", "LOSS_MAP", "STRING", "STRING"]
OUTPUTS = {
    "RetortTrainDistillation": TRAINED,
    "RetortTrainFlow": TRAINED,
    "RetortFewShotAdapt": TRAINED,
    "RetortTrainReward": TRAINED,
    "RetortTrainRestorer": TRAINED,
    "RetortPreferenceSet": ["PREFERENCES", "PREFERENCES", "STRING", "STRING"],
    "RetortLabelPairs": ["PREFERENCES", "INT", "STRING"],
    "RetortTrainPreference": TRAINED,
    "RetortPreferencePicker": ["INT", "STRING"],
    "RetortPromptQueue": ["STRING", "INT", "INT"],
    "RetortTrainingJob": ["STRING", "STRING"],
    "RetortCollectJob": ["LORA_MODEL", "LOSS_MAP", "STRING", "IMAGE", "STRING", "STRING"],
    "RetortLossChart": ["IMAGE"],
    "RetortReward": ["REWARD"],
    "RetortCombineRewards": ["REWARD"],
    "RetortScoreImages": ["FLOAT", "INT", "IMAGE", "IMAGE", "STRING"],
    "RetortCompareModels": ["FLOAT", "FLOAT", "FLOAT", "IMAGE", "STRING"],
    "RetortTreeSearch": SEARCHED,
    "RetortResumeSearch": SEARCHED,
    "RetortSaveSearch": ["STRING"],
    "RetortLoadSearch": ["SEARCH_TREE"],
    "RetortDrawFromSearch": ["LATENT"],
    "RetortNoisePolicy": ["NOISE", *SEARCHED],
    "RetortPolicyNoise": ["NOISE"],
    "RetortGaussianStatistics": ["GAUSS_STATS"],
    "RetortLoadGaussianStatistics": ["GAUSS_STATS"],
    "RetortTeleportSampler": ["SAMPLER"],
    "RetortStudentTNoise": ["NOISE"],
    "RetortStructureSampler": ["SAMPLER"],
    "RetortDopri5Sampler": ["SAMPLER"],
    "RetortReflectionSampler": ["SAMPLER"],
    "RetortReflectionSetup": ["GUIDER", "SAMPLER", "STRING"],
    "RetortReflectionCompare": ["IMAGE", "LATENT", "STRING"],
    "RetortRestore": ["IMAGE"],
    "RetortCaption": ["STRING", "STRING"],
    "RetortDegrade": ["IMAGE"],
    "RetortColorFix": ["IMAGE"],
    "RetortCompareImages": ["IMAGE", "FLOAT", "FLOAT", "STRING"],
    "RetortSpectralGuidance": ["MODEL"],
    "RetortEmbeddedModel": ["MODEL", "CLIP", "VAE"],
    "RetortDistilledSetup": ["MODEL", "GUIDER", "SAMPLER", "SIGMAS"],
    "RetortDistilledSigmas": ["SIGMAS"],
    "RetortDistilledSampler": ["SAMPLER"],
}


@pytest.fixture(params=NODES, ids=lambda node: node.__name__)
def node(request):
    return request.param


def test_the_entry_point_lists_the_nodes():
    extension = asyncio.run(comfy_entrypoint())
    assert isinstance(extension, api.ComfyExtension)
    asyncio.run(extension.on_load())
    assert asyncio.run(extension.get_node_list()) == NODES
    assert {node.GET_SCHEMA().node_id for node in NODES} == set(INPUTS)


def test_ids_and_order(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__
    assert schema.node_id.startswith("Retort")
    assert [i.id for i in schema.inputs] == INPUTS[schema.node_id]
    assert [o.get_io_type() for o in schema.outputs] == OUTPUTS[schema.node_id]


@pytest.mark.parametrize(
    ("node", "methods"),
    [
        ("RetortTrainDistillation", list(METHODS)[:4]),
        ("RetortTrainingJob", list(METHODS)),
        ("RetortTrainPreference", list(PREFERENCE)),
    ],
)
def test_each_method_has_its_own_settings_in_order(node, methods):
    schema = next(n for n in NODES if n.__name__ == node).GET_SCHEMA()
    options = next(i for i in schema.inputs if i.id == "method").options
    found = {option.key: [i.id for i in option.inputs] for option in options}
    assert found == {k: METHODS[k] for k in methods} and list(found) == methods
    for option in options:
        for part in option.inputs:
            assert part.tooltip and part.tooltip.endswith(".") and part.default is not None, part.id


def test_each_kind_of_pair_has_its_own_settings_in_order():
    schema = next(n for n in NODES if n.__name__ == "RetortReflectionSetup").GET_SCHEMA()
    options = next(i for i in schema.inputs if i.id == "pair").options
    assert {option.key: [i.id for i in option.inputs] for option in options} == PAIRS
    page = (ROOT / WEB_DIRECTORY / "docs" / "RetortReflectionSetup.md").read_text(encoding="utf-8")
    for name in {name for names in PAIRS.values() for name in names}:
        assert f"\n| {name} |" in page
    for option in options:
        assert all(part.tooltip and part.tooltip.endswith(".") for part in option.inputs)


@pytest.mark.parametrize(
    ("node", "chosen", "expected"),
    [("RetortCaption", "captioner", CAPTIONERS), ("RetortDegrade", "kind", DEGRADATIONS)],
)
def test_captioners_and_degradations_are_explained(node, chosen, expected):
    schema = next(n for n in NODES if n.__name__ == node).GET_SCHEMA()
    options = next(i for i in schema.inputs if i.id == chosen).options
    assert {option.key: [i.id for i in option.inputs] for option in options} == expected
    page = (ROOT / WEB_DIRECTORY / "docs" / f"{node}.md").read_text(encoding="utf-8")
    for option in options:
        for part in option.inputs:
            assert part.tooltip and part.tooltip.endswith(".") and part.default is not None, part.id
            assert f"| {part.id} |" in page or f"`{part.id}`" in page


def test_the_reward_trainers_methods_are_explained():
    schema = next(n for n in NODES if n.__name__ == "RetortTrainReward").GET_SCHEMA()
    options = next(i for i in schema.inputs if i.id == "method").options
    assert {option.key: [i.id for i in option.inputs] for option in options} == REWARD_METHODS
    page = (ROOT / WEB_DIRECTORY / "docs" / "RetortTrainReward.md").read_text(encoding="utf-8")
    for option in options:
        for part in option.inputs:
            assert part.tooltip and part.tooltip.endswith(".") and part.default is not None, part.id
            assert f"\n| {part.id} |" in page, (option.key, part.id)


@pytest.mark.parametrize(
    ("node", "methods"),
    [("RetortTrainDistillation", ("dmd2", "f_distill", "tdm", "di_star")), ("RetortTrainPreference", PREFERENCE)],
)
def test_the_page_explains_every_setting_of_every_method(node, methods):
    page = (ROOT / WEB_DIRECTORY / "docs" / f"{node}.md").read_text(encoding="utf-8")
    for method in methods:
        for name in METHODS[method]:
            assert re.search(rf"(^\| |, )({name})(,| \|)|\*\*{name}\*\*", page, re.MULTILINE), (method, name)


def test_everything_is_explained(node):
    schema = node.GET_SCHEMA()
    assert schema.display_name and schema.category.split("/")[-1] == "retort"
    assert len(schema.description) > 40 and schema.search_aliases
    for part in (*schema.inputs, *schema.outputs):
        assert part.tooltip and part.tooltip.endswith("."), part
    for part in schema.inputs:
        if part.get_io_type() in ("COMBO", "INT", "FLOAT", "STRING"):
            assert part.default is not None, f"{part.id} has no default"


def test_every_node_has_a_help_page(node):
    schema = node.GET_SCHEMA()
    page = (ROOT / WEB_DIRECTORY / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    for heading in ("When to use it", "Inputs", "Outputs", "Cost"):
        assert f"\n## {heading}\n" in page
    for part in schema.inputs:
        assert f"\n| {part.id} |" in page
    for part in schema.outputs:
        assert f"\n| {part.get_io_type()} |" in page


def test_no_help_page_is_left_over():
    pages = {page.stem for page in (ROOT / WEB_DIRECTORY / "docs").glob("*.md")}
    assert pages == {node.GET_SCHEMA().node_id for node in NODES}


def test_the_setup_page_lists_every_preset():
    from retort.sampling.presets import PRESETS

    page = (ROOT / WEB_DIRECTORY / "docs" / "RetortDistilledSetup.md").read_text(encoding="utf-8")
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    assert set(PRESETS) <= {name.strip() for cell in first for name in cell.split(",")}
