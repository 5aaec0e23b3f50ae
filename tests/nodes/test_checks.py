"""What nodes refuse before anything runs, on which input, and what is passed over since it is not known yet."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from retort.hosts.prompted import NODE, PROMPT
from retort.nodes import NODES
from retort.nodes.checks import Asked, Refused, about, at, batch_of, is_empty
from retort.nodes.inputs import CHOICE

BY_NAME = {node.__name__: node for node in NODES}
LINKED = ["other", 0]
TRAINER = {
    "model": LINKED, "clip": LINKED, "vae": LINKED, "latents": ["empty", 0], "prompts": "a red two", "name": "mine",
    "method": "tdm",
}  # fmt: skip
SETUP = {"model": LINKED, "positive": LINKED, "preset": "custom", "timesteps": "999, 499"}
SEARCH = {name: LINKED for name in ("guider", "sigmas", "latent", "vae", "reward")} | {"method": "fk"}
STRUCTURE = {"reference": LINKED, "start_percent": 0.8, "end_percent": 0.2}
OTHERS = {
    "other": {"class_type": "Anything", "inputs": {}},
    "student": {"class_type": "UNETLoader", "inputs": {"unet_name": "z_image_turbo_bf16.safetensors"}},
    "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
    "sampled": {"class_type": "KSampler", "inputs": {"latent_image": ["empty", 0]}},
    "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["sampled", 0]}},
}


@pytest.fixture
def refusal(where):
    """refusal(node, inputs, **changes) -> what is raised for a prompt, None where it may run; None leaves one out."""

    def ask(node, inputs, **changes):
        given = {name: value for name, value in {**inputs, **changes}.items() if value is not None}
        prompt, own = PROMPT.set({**OTHERS, "me": {"class_type": node, "inputs": given}}), NODE.set("me")
        try:
            assert BY_NAME[node].validate_inputs() is True
        except (ValueError, ImportError) as error:
            return str(error)
        finally:
            PROMPT.reset(prompt)
            NODE.reset(own)

    return ask


TRAINING = [
    ({"prompts": " "}, "prompts: there are no prompts: type one in each line and connect `clip`"),
    ({"clip": None}, "prompts: typed prompts need their text encoder: connect `clip`"),
    ({"positive": LINKED}, "prompts: prompts are both typed and connected"),
    ({"latents": None}, "images: the size of the pictures is not known"),
    ({"latents": None, "images": LINKED, "vae": None}, "images: images are encoded by a VAE: connect `vae`"),
    ({"images": LINKED}, "images: both images and latents are connected"),
    (
        {"method": "dmd2", "method.gan_weight": 0.01},
        "images: DMD2 learns from images here, and there are none: connect them to `images`, and their `vae`, or to "
        "`latents` what VAE Encode made of them, or set gan_weight to 0",
    ),
    ({"method": "f_distill"}, "images: f-distill learns from images here"),
    ({"method": "f_distill", "latents": None}, "images: f-distill learns from images here"),
    ({"method.timesteps": "9, x"}, "method.timesteps: timesteps: 'x' is not a whole number"),
    ({"method.steps": 3, "method.timesteps": "999, 499"}, "method.timesteps: timesteps '999, 499' lists 2, and steps"),
    ({"method": "of another version"}, "method: method is 'of another version', which this version"),
    ({"name": "../x?*"}, "name: name '../x?*' cannot be a file's name"),
    ({"accumulation": 32}, "accumulation_cap: training: accumulation_cap 16 is below accumulation 32"),
    ({"offload": "most"}, "offload: training: offload must be auto, none or a number of blocks"),
    ({"reward": LINKED}, "reward: tdm pleases none; choose one of di_star"),
    ({"method": "di_star", "method.alpha_rew": 1.0}, "method.alpha_rew: alpha_rew is 1.0, and there is no reward"),
    ({"method": "di_star", "reward": LINKED, "vae": None}, "reward: a reward looks at pictures: connect `vae`"),
    ({"prompts": None, "clip": None, "positive": LINKED}, "negative: tdm compares with an empty prompt here"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), TRAINING)
def test_what_a_trainer_lacks_is_said_on_its_input(refusal, changes, said):
    assert (refusal("RetortTrainDistillation", TRAINER, **changes) or "").startswith(said)


@pytest.mark.parametrize(
    ("node", "inputs", "said"),
    [
        ("RetortDistilledSetup", {**SETUP, "timesteps": "999 749; abc"}, "timesteps: 'abc' is not a whole number"),
        ("RetortDistilledSetup", {**SETUP, "timesteps": ""}, "timesteps: timesteps is empty; type one per step"),
        ("RetortDistilledSetup", {**SETUP, "preset": "dmd2_sdxl_4step", "steps": 3}, "steps: steps is 3, and 'DMD2"),
        ("RetortDistilledSetup", {**SETUP, "preset": "lcm", "stage": "refine"}, "stage: stage is 'refine', and 'LCM"),
        ("RetortDistilledSetup", {**SETUP, "preset": "lcm", "low_noise_model": LINKED}, "low_noise_model: low_noise_"),
        ("RetortDistilledSampler", {"preset": "lcm", "stage": "refine"}, "stage: stage is 'refine', and 'LCM"),
        ("RetortDistilledSampler", {"preset": "lcm", "low_noise_guider": LINKED}, "low_noise_guider: low_noise_guid"),
        ("RetortTreeSearch", {**SEARCH, "transition": "ode"}, "transition: transition is ode, which draws no noise"),
        ("RetortTreeSearch", {**SEARCH, "enough": "lots"}, "enough: enough 'lots' is no number"),
        ("RetortTreeSearch", {**SEARCH, "calls": 0}, "calls: the search would never end; give calls, seconds"),
        ("RetortReward", {"kind": "pick_score"}, "kind.model: model is empty: type yuvalkirstain/PickScore_v1 to"),
        ("RetortReward", {"kind": "gone"}, "kind: kind is 'gone', which this version of the node does not know"),
        ("RetortCombineRewards", {"reward_1": LINKED, "veto_on": "reward_3"}, "veto_on: veto_on is reward_3, which is"),
        ("RetortCombineRewards", {"reward_1": LINKED, "standardise": "calibrated"}, "standardise: standardise is cali"),
        ("RetortPreferenceSet", {"name": "new"}, "name: the set 'new' is empty"),
        ("RetortPreferenceSet", {"name": "../x"}, "name: name '../x' cannot be a file's name"),
        ("RetortLabelPairs", {"name": "new"}, "images: there is nothing to judge: connect images or latents"),
        ("RetortLabelPairs", {"name": "new", "images": LINKED, "margin": 1.0}, "margin: margin 1 compares scores"),
        ("RetortLabelPairs", {"name": "new", "latents": ["empty", 0]}, "latents: the latents are empty"),
        ("RetortPreferencePicker", {"images": ["decoded", 0], "candidates": "4"}, "candidates: 2 images cannot be"),
        ("RetortPromptQueue", {"prompts": "\n"}, "prompts: prompts is empty"),
        ("RetortPromptQueue", {"prompts": "one", "index": 1}, "index: index 1: all 1 prompts have been drawn"),
        ("RetortLoadSearch", {"file": "none"}, "file: there is no search 'none'"),
        ("RetortSaveSearch", {"search": LINKED, "name": "a/b"}, "name: name 'a/b' cannot be a file's name"),
        ("RetortCollectJob", {"run": "../x"}, "run: name '../x' cannot be a file's name"),
        ("RetortGaussianStatistics", {"model": LINKED}, "latents: none of latents, images and folder are given"),
        ("RetortStructureSampler", STRUCTURE, "start_percent: start_percent 0.8 and end_percent 0.2 enclose nothing"),
        ("RetortTrainPreference", {"model": LINKED, "clip": LINKED, "pairs": LINKED, "method": "dpo", "name": "CON"},
         "name: name 'CON' cannot be a file's name"),
        ("RetortTrainingJob", {**TRAINER, "pairs": LINKED}, "pairs: tdm learns from none"),
        ("RetortTrainingJob", {**TRAINER, "method": "di_star", "method.alpha_rew": 1.0}, "method: method di_star: al"),
    ],
)  # fmt: skip
def test_other_nodes_say_it_too(refusal, node, inputs, said):
    assert (refusal(node, inputs) or "").startswith(said)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("RetortTrainDistillation", TRAINER),
        ("RetortTrainDistillation", {**TRAINER, "prompts": LINKED}),
        ("RetortTrainDistillation", {**TRAINER, "prompts": LINKED, "clip": None, "positive": LINKED,
                                     "method.cfg": 1.0}),
        # What a link brings may make up for a value that would be wrong beside the default.
        ("RetortTrainDistillation", {**TRAINER, "accumulation": 32, "accumulation_cap": LINKED}),
        ("RetortTrainDistillation", {**TRAINER, "name": LINKED}),
        ("RetortTrainDistillation", {**TRAINER, "method": "dmd2", "method.gan_weight": LINKED}),
        ("RetortTrainDistillation", {**TRAINER, "method": "dmd2", "method.gan_weight": 0.1, "latents": LINKED}),
        ("RetortDistilledSetup", {**SETUP, "timesteps": LINKED}),
        ("RetortDistilledSetup", {**SETUP, "preset": "wan22_lightx2v_t2v", "low_noise_model": LINKED}),
        ("RetortDistilledSampler", {"preset": "wan22_lightx2v_t2v", "low_noise_guider": LINKED}),
        ("RetortDistilledSampler", {"preset": LINKED, "stage": "refine"}),
        ("RetortDistilledSetup", {**SETUP, "preset": LINKED, "timesteps": "abc"}),
        ("RetortTreeSearch", {**SEARCH, "transition": LINKED}),
        ("RetortTreeSearch", {**SEARCH, "calls": LINKED, "seconds": 0.0}),
        ("RetortPreferencePicker", {"images": LINKED, "candidates": "4"}),
        ("RetortPreferencePicker", {"images": ["decoded", 0], "candidates": LINKED}),
        ("RetortPromptQueue", {"prompts": LINKED, "index": 7}),
        ("RetortStructureSampler", {**STRUCTURE, "end_percent": LINKED}),
        ("RetortReward", {"kind": "pick_score", "kind.model": LINKED}),
        ("RetortReward", {"kind": "likeness", "kind.reference": LINKED}),
        ("RetortPreferenceSet", {"pairs": LINKED}),
        ("RetortLoadSearch", {"file": LINKED}),
        # Hosts say these themselves, and better.
        ("RetortTrainDistillation", {**TRAINER, "prompts": "", "model": None}),
        ("RetortTrainDistillation", {**TRAINER, "prompts": "", "batch_size": 5000}),
        ("RetortDistilledSetup", {**SETUP, "preset": "of another version", "timesteps": "abc"}),
        ("RetortTrainDistillation", {**TRAINER, "prompts": "", "method": "dmd2", "method.gan_on": "nobody"}),
    ],
)  # fmt: skip
def test_what_is_not_known_or_said_elsewhere_is_passed_over(refusal, node, inputs):
    assert refusal(node, inputs) is None


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_a_new_node_with_everything_connected_may_run(refusal, node):
    """With the defaults that a user finds, and a link for whatever has no widget or must be typed."""
    given = {}
    for one in node.define_schema().inputs:
        if one.get_io_type() == CHOICE:
            given[one.id] = one.options[0].key
        elif getattr(one, "default", None) is None and not one.optional:
            given[one.id] = LINKED
    typed = {"prompts": "one", "clip": LINKED, "latents": ["other", 0], "images": LINKED, "vae": LINKED}
    known = {one.id for one in node.define_schema().inputs}
    given |= {name: value for name, value in typed.items() if name in known}
    if {"images", "latents"} <= known:
        del given["images"]
    # A search, a set, a run and folders of pictures are there only once they were made.
    made = {"RetortPreferenceSet": "name", "RetortLoadSearch": "file", "RetortEditPairs": "folder"}
    if node.__name__ in made:
        given[made[node.__name__]] = LINKED
    if node.__name__ == "RetortDistilledSetup":  # its preset is auto, which the names of files tell
        given["model"] = ["student", 0]
    assert refusal(node.__name__, given) is None


def test_a_run_of_the_same_name_with_other_settings_is_known_by_its_state(refusal, monkeypatch):
    from retort.hosts.training import run as training

    def refuse(host, name, config):
        assert name == "mine" and config.lora.rank == 4
        raise ValueError("the run in FOLDER was started with other settings (lora.rank: 2 -> 4)")

    monkeypatch.setattr(training, "refuse_other_settings", refuse)
    said = refusal("RetortTrainDistillation", TRAINER, rank=4)
    assert said == "name: the run in FOLDER was started with other settings (lora.rank: 2 -> 4)"


def test_a_message_that_begins_with_its_input_says_it_once(refusal, where):
    file = where.models[0] / "loras" / "style.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, file)
    said = refusal("RetortLoadStudent", {"model": LINKED, "positive": LINKED, "lora_name": file.name})
    assert said.startswith("lora_name: style.safetensors carries no recipe of a student")


def test_a_missing_peft_is_said_before_anything_runs(refusal, monkeypatch):
    from retort.trainers import adapters

    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    assert "pip install" in refusal("RetortTrainFlow", {**TRAINER, "method": None})


def test_every_choice_is_taken_since_hosts_name_them():
    named = {one.id for node in NODES for one in node.define_schema().inputs if one.get_io_type() == CHOICE}
    assert set(BY_NAME["RetortReward"].validate_inputs.__kwdefaults__) == named


def test_outside_of_a_check_nothing_is_said():
    assert BY_NAME["RetortTrainFlow"].validate_inputs(method={"method": None}) is True


def test_the_input_is_the_one_that_a_message_names_first():
    with pytest.raises(Refused) as refused, about("steps", "method.steps", "rate"):
        raise ValueError("my_steps and other.steps are fine, rate is not, and steps is 3")
    assert refused.value.input == "rate"
    with pytest.raises(ValueError, match="nobody") as plain, about("steps"):
        raise ValueError("nobody is named")
    assert not isinstance(plain.value, Refused)
    with pytest.raises(Refused) as refused, about("steps"), at("name"):
        raise ValueError("steps")
    assert refused.value.input == "name"


def test_what_is_sampled_from_an_empty_latent_has_its_batch():
    from retort.hosts.prompted import _value

    assert batch_of(_value(OTHERS, ["decoded", 0])) == 2
    assert batch_of(_value(OTHERS, ["other", 0])) is None and batch_of(None) is None
    assert is_empty(_value(OTHERS, ["empty", 0])) and not is_empty(_value(OTHERS, ["sampled", 0]))


def test_given_values_count_as_connected():
    given = Asked({"images": [], "vae": object(), "clip": None})
    assert given.connected("vae") and not any(given.connected(name) for name in ("images", "clip", "latents"))
