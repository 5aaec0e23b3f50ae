"""What ComfyUI's page is told of a few-step student that a prompt samples otherwise than it was trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.integration
LIGHTNING = "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors"


@pytest.fixture
def warned(ours):
    return ours("hosts.comfyui.students").warnings


def prompt(lora=LIGHTNING, negative="", **sampler):
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan2.2_t2v_high_noise_14B_fp16.safetensors"}},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": {
            "lora_name": lora, "strength_model": 1.0, "model": ["1", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": negative, "clip": ["9", 0]}},
        "4": {"class_type": "KSampler", "inputs": {
            "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "model": ["2", 0],
            "negative": ["3", 0], **sampler}},
    }  # fmt: skip


def test_a_student_sampled_as_it_was_trained_is_no_matter(warned):
    assert warned(prompt()) == []
    assert warned(prompt(steps=8)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cfg": 3.5}, ["cfg is 3.5", "guidance built in", "set cfg to 1"]),
        ({"steps": 6}, ["steps is 6", "was trained for 4, 8", "preset wan22_lightx2v_t2v"]),
        ({"sampler_name": "uni_pc"}, ["sampler_name is uni_pc", "leaves out the last level but one", "euler"]),
        ({"sampler_name": "res_multistep"}, ["res_multistep", "extrapolates", "euler"]),
        ({"negative": "blurry"}, ["negative prompt 'blurry' is ignored", "cfg 1"]),
    ],
)
def test_each_departure_is_one_sentence_that_names_the_file(warned, changes, said):
    (sentence,) = warned(prompt(**changes))
    assert LIGHTNING in sentence and all(words in sentence for words in said)


def test_a_custom_sampler_is_looked_at_through_its_links(warned):
    graph = prompt()
    graph["4"] = {"class_type": "CFGGuider", "inputs": {"model": ["2", 0], "cfg": 1.0, "negative": ["3", 0]}}
    graph["5"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "uni_pc"}}
    graph["6"] = {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["4", 0], "sampler": ["5", 0]}}
    (sentence,) = warned(graph)
    assert "extrapolates" in sentence, "its levels are given: none is left out"


def test_other_models_and_loras_that_are_off_are_left_alone(warned):
    assert warned(prompt("my_style.safetensors", "blurry", cfg=7.0, steps=30, sampler_name="uni_pc")) == []
    graph = prompt(cfg=7.0, steps=30)
    graph["2"]["inputs"]["strength_model"] = 0
    assert warned(graph) == []


def setup(preset, lora="digits_eps_dmd2_1step.safetensors"):
    graph = prompt(lora)
    graph["4"] = {"class_type": "RetortDistilledSetup", "inputs": {"model": ["2", 0], "preset": preset, "steps": 4}}
    return graph


def test_the_preset_of_another_student_than_is_loaded(warned):
    (sentence,) = warned(setup("digits_flow"))
    assert "preset is digits_flow, and digits_eps_dmd2_1step.safetensors" in sentence
    assert "choose digits_eps, or auto" in sentence
    for fitting in ("digits_eps", "auto", ["9", 0], "of another version"):
        assert warned(setup(fitting)) == []
    assert warned(setup("digits_flow", "my_own.safetensors")) == []


def test_a_students_preset_on_nothing_but_its_base(warned):
    def loaded(file, *loras, preset="z_image_turbo"):
        graph = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": file}}}
        for i, lora in enumerate(loras, 2):
            graph[str(i)] = {"class_type": "LoraLoaderModelOnly", "inputs": {
                "lora_name": lora, "strength_model": 1.0, "model": [str(i - 1), 0]}}  # fmt: skip
        model = [str(len(loras) + 1), 0]
        graph["9"] = {"class_type": "RetortDistilledSetup", "inputs": {"model": model, "preset": preset, "steps": 0}}
        return warned(graph)

    (sentence,) = loaded("z_image_bf16.safetensors")
    assert "preset is z_image_turbo, and nothing but z_image_bf16.safetensors is loaded" in sentence
    assert "called z_image_turbo*" in sentence
    # With a LoRA of any name, or a checkpoint of somebody's own, nobody knows.
    assert loaded("z_image_bf16.safetensors", "my_turbo.safetensors") == []
    assert loaded("my_merge.safetensors") == loaded("z_image_turbo_bf16.safetensors") == []
    assert all(loaded("z_image_bf16.safetensors", preset=preset) == [] for preset in ("custom", "auto"))
    assert loaded("flux1-dev-turbo-alpha.safetensors", preset="flux_turbo_alpha") == []
    lightning = "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors"
    wan = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
    assert loaded(wan, lightning, preset="wan22_lightx2v_t2v") == []
    assert len(loaded(wan, preset="wan22_lightx2v_t2v")) == 1


@pytest.fixture
def mine(ours, tmp_path, monkeypatch):
    """The name of a LoRA that carries the recipe of a student of one step."""
    import folder_paths
    from safetensors.torch import save_file

    module, recipes = ours("hosts.comfyui.students"), ours("trainers.recipes")
    preset = replace(ours("sampling.presets").PRESETS["digits_flow"], key="mine", files=(), timesteps=((1000,),))
    notes = {recipes.KEY: recipes.written(recipes.Recipe(preset, "dmd2")), "retort.method": "dmd2"}
    save_file({"x": torch.zeros(1)}, tmp_path / "mine.safetensors", notes)
    plain = folder_paths.get_full_path
    found = {"mine.safetensors": str(tmp_path / "mine.safetensors")}
    monkeypatch.setattr(module.folder_paths, "get_full_path", lambda kind, name: found.get(name) or plain(kind, name))
    return "mine.safetensors"


def test_a_student_of_ones_own_knows_its_steps(warned, mine):
    assert warned(prompt(mine, steps=1)) == []
    (sentence,) = warned(prompt(mine, steps=20))
    assert "steps is 20, and mine.safetensors was trained for 1:" in sentence and "Distilled Setup" in sentence
    graph = prompt(mine, steps=1, cfg=4.0)
    graph["2"]["class_type"] = "RetortLoadStudent"
    (sentence,) = warned(graph)
    assert warned(prompt(mine, steps=2, denoise=0.5)) == [], "image to image leaves levels out"
    assert "cfg is 4" in sentence and "connect GUIDER, SAMPLER and SIGMAS of Load Student" in sentence


def test_prompts_of_the_demo_model_for_another(warned):
    def training(loader, prompts, **inputs):
        given = {"method": "tdm", "steps": 9, "prompts": prompts, "model": ["1", 0]}
        return {"1": {"class_type": loader, "inputs": inputs},
                "2": {"class_type": "RetortTrainDistillation", "inputs": given}}  # fmt: skip

    demo = "a thin orange zero on black paper, leaning left\na bold red one on blue paper"
    (sentence,) = warned(training("UNETLoader", demo, unet_name="z_image_bf16.safetensors"))
    assert "prompts are still those of the demo model" in sentence
    assert warned(training("RetortEmbeddedModel", demo, variant="flow")) == []
    assert warned(training("CheckpointLoaderSimple", demo, ckpt_name="digits_eps.safetensors")) == []
    assert warned(training("UNETLoader", "a cat on a red sofa", unet_name="z_image_bf16.safetensors")) == []


def test_a_training_that_ends_before_dmd2_begins(warned):
    def training(**inputs):
        return {"1": {"class_type": "RetortTrainDistillation", "inputs": {
            "method": "dmd2", "method.regression_steps": 180, "steps": 280, **inputs}}}  # fmt: skip

    (sentence,) = warned(training(steps=100))
    assert "training steps is 100" in sentence and "set training steps above 180" in sentence
    for fine in ({}, {"steps": 100, "method.regression_steps": 0}, {"steps": ["2", 0]}, {"steps": 1, "method": "tdm"}):
        assert warned(training(**fine)) == []


def test_a_student_with_guidance_may_have_it(warned):
    assert warned(prompt("Hyper-SDXL-8steps-CFG-lora.safetensors", "blurry", cfg=5.0, steps=8)) == []


ODD = {"class_type": "K", "inputs": {"model": ["2", 0], "cfg": True, "steps": "x", "sampler_name": "uni_pc"}}


@pytest.mark.parametrize(
    "graph",
    [
        {}, {"1": None}, {"1": {}}, {"1": {"inputs": None}}, {"1": ODD, "2": {"class_type": 1, "inputs": []}},
        {"1": ODD, "2": ODD}, {"1": {"class_type": "K", "inputs": {"model": ["1", 0], "cfg": 9}}},
    ],
)  # fmt: skip
def test_whatever_a_prompt_is_nothing_breaks(warned, graph):
    assert warned(graph) == []
