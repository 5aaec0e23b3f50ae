"""A student is known by its files' names or by what its LoRA says, never by the kind of the model alone, and two are
never chosen between."""

from __future__ import annotations

import json

import pytest

from retort.hosts.prompted import Source
from retort.hosts.recognise import by_name, files_of, none_found, runs_of, student
from retort.sampling import presets
from retort.sampling.presets import PRESETS, PresetMismatch

EVERY = list(PRESETS.values())
Z_IMAGE = ("FLOW", "flow", 16, 2)
SDXL = ("VE", "eps", 4, 2)


def found(names, what, kind="", metadata=None):
    known = metadata or {}
    one = student(EVERY, names, known.get, kind, lambda preset: presets.check(preset, *what))
    return one.preset.key, one.how


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("z_image_turbo_bf16.safetensors", "z_image_turbo"),
        ("turbo/Z_Image_Turbo_fp8.safetensors", "z_image_turbo"),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", "wan22_lightx2v_t2v"),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors", "wan22_lightx2v_i2v"),
        ("lightx2v_I2V_14B_480p_cfg_step_distill_rank64.safetensors", "wan21_lightx2v"),
        ("minimax_h3_fl2v_turbo_8step_v1.0_comfyui_bf16.safetensors", "minimax_h3_turbo"),
        ("minimax_h3_fl2v_turbo_4step_v1.1.safetensors", "minimax_h3_turbo_768p"),
        ("ltx-2.3-22b-distilled-lora-384.safetensors", "ltx2_distilled"),
        ("ltx-2.5-22b-distilled-transformer-comfy-int8-convrot.safetensors", "ltx25_distilled"),
        ("Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors", "qwen_image_lightning"),
        ("Qwen-Image-Lightning-8steps-V2.0.safetensors", "qwen_image_lightning"),
        ("Qwen-Image-2.1-Lightning-4steps.safetensors", "qwen_image_21_lightning"),
        ("flux-2-klein-9b-kv-fp8.safetensors", "flux2_klein"),
        ("Flux2TurboComfyv2.safetensors", "flux2_dev_turbo"),
        ("sd3.5_large_turbo.safetensors", "sd35_large_turbo"),
        ("Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors", "hyper_sdxl_1step"),
        ("Hyper-SDXL-1step-lora.safetensors", "hyper_sd_unified"),
        ("Hyper-SDXL-8steps-CFG-lora.safetensors", "hyper_sd_cfg"),
        ("Hyper-SDXL-8steps-lora.safetensors", "hyper_sd"),
        ("Hyper-SD15-2steps-lora.safetensors", "hyper_sd"),
        ("sd_xl_turbo_1.0_fp16.safetensors", "turbo"),
        ("sdxl_lightning_4step_lora.safetensors", "lightning_sdxl"),
        ("lcm-lora-sdxl.safetensors", "lcm"),
        ("flux1-schnell-fp8.safetensors", "flux_schnell"),
        ("hidream_i1_dev_bf16.safetensors", "hidream_i1_dev"),
        ("hidream_o1_image_dev_bf16.safetensors", "hidream_o1_dev"),
        ("fastvideo_fasth3_8step_v2_pruned_int8_convrot.safetensors", "fasth3_v2"),
        ("fasth3_omniref_8step_pruned_int8_convrot.safetensors", "fasth3"),
        ("hunyuanvideo1.5_720p_sr_distilled_fp16.safetensors", "hunyuanvideo15_sr"),
        ("nitrosd-vibrant_comfyui.safetensors", "nitrosd_vibrant"),
        ("minimax_h3_ref2v_turbo_4step_v0.1_comfyui_bf16.safetensors", "minimax_h3_turbo_ref2v"),
        ("Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors", "qwen_image_wuli"),
        ("FireRed-Image-Edit-1.0-Lightning-8steps-v1.0.safetensors", "firered_edit_lightning"),
        ("anima-turbo-lora-v0.2.safetensors", "anima_turbo"),
        ("lens_turbo_bf16.safetensors", "lens_turbo"),
        ("ming_image_0.1_design_int8_convrot.safetensors", "ming_image_design"),
        ("seedvr2_3b_int8_convrot.safetensors", "seedvr2"),
        ("causal_forcing-framewise.safetensors", "causal_forcing"),
        ("kandinsky5lite_t2v_distilled16steps_5s.safetensors", "kandinsky5_distilled_5s"),
        ("hunyuanimage2.1_distilled_bf16.safetensors", "hunyuanimage21_distilled"),
        ("wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors", "wan21_lightx2v"),
        ("digits_flow_tdm_4step.safetensors", "digits_flow_tdm"),
        ("digits_flow_dmd2_1step.safetensors", "digits_flow"),
    ],
)
def test_published_files_are_known_by_their_names(file, key):
    assert list(by_name(EVERY, [file])) == [key]


@pytest.mark.parametrize(
    "file",
    [
        "flux-2-klein-base-4b.safetensors", "sd_xl_base_1.0.safetensors", "z_image_bf16.safetensors",
        "my_lora.safetensors",
        "Qwen-Image-2512.safetensors", "wan2.2_t2v_high_noise_14B_fp16.safetensors", "sd3.5_large.safetensors",
        "flux1-dev.safetensors", "ltx-2-19b-dev.safetensors", "krea2_base.safetensors", "lightning_strike.safetensors",
    ],
)  # fmt: skip
def test_bases_and_other_loras_are_no_student(file):
    assert not by_name(EVERY, [file])


def test_what_speaks_for_it_is_told():
    assert found(["z_image_turbo_bf16.safetensors"], Z_IMAGE, "ZImage") == (
        "z_image_turbo", "by the name of z_image_turbo_bf16.safetensors and the model's kind, ZImage",
    )  # fmt: skip
    assert found(["z_image_turbo_bf16.safetensors"], Z_IMAGE) == (
        "z_image_turbo", "by the name of z_image_turbo_bf16.safetensors",
    )  # fmt: skip
    _, how = found(["z_image_turbo_bf16.safetensors"], Z_IMAGE, "Flux")
    assert how.endswith("alone: it is published for ZImage, not Flux")


def test_a_lora_that_says_what_it_is_needs_no_name():
    row = {"title": "Mine", "family": "eps", "timesteps": [[999]], "mode": "single"}
    recipe = {"retort.student": json.dumps({"schema": 1, "preset": row, "method": "dmd2", "base": {}})}
    key, how = found(["mine.safetensors", "sd_xl_base_1.0.safetensors"], SDXL, metadata={"mine.safetensors": recipe})
    assert (key, how) == ("student", "as mine.safetensors says, taught by dmd2")


def test_two_files_of_one_student_are_one_and_two_students_are_refused():
    both = [f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise.safetensors" for noise in ("high", "low")]
    assert found(both, ("FLOW", "flow", 16, 3))[0] == "wan22_lightx2v_t2v"
    with pytest.raises(PresetMismatch, match="'auto' could be lcm .*lcm-lora-sdxl.* or turbo .*: choose one"):
        found(["lcm-lora-sdxl.safetensors", "sd_xl_turbo_1.0.safetensors"], SDXL)


def test_the_kind_alone_names_no_student_but_what_there_is_for_it():
    with pytest.raises(PresetMismatch, match="finds no student by .*krea2_base.*; for Krea2 there are krea2_turbo"):
        found(["krea2_base.safetensors"], ("FLOW", "flow", 16, 3), "Krea2")
    assert "(no file)" in none_found(EVERY, [])


def test_a_student_that_cannot_be_this_model_s_says_why():
    with pytest.raises(PresetMismatch, match="is for an eps model"):
        found(["sd_xl_turbo_1.0.safetensors"], Z_IMAGE)


def link(prompt, node="sampler"):
    return Source(prompt, node)["model"]


def test_names_are_found_behind_a_link_nearest_first_and_without_what_is_off():
    prompt = {
        "sampler": {"class_type": "KSampler", "inputs": {"model": ["shift", 0]}},
        "shift": {"class_type": "ModelSamplingSD3", "inputs": {"shift": 5.0, "model": ["one", 0]}},
        "one": {"class_type": "LoraLoader", "inputs": {
            "lora_name": "one.safetensors", "strength_model": 1.0, "model": ["off", 0], "clip": ["loader", 1]}},
        "off": {"class_type": "LoraLoader", "inputs": {
            "lora_name": "off.safetensors", "strength_model": 0, "model": ["several", 0]}},
        "several": {"class_type": "Power", "inputs": {
            "lora_1": {"on": True, "lora": "two.safetensors", "strength": 0.5},
            "lora_2": {"on": False, "lora": "no.safetensors", "strength": 1.0},
            "lora_3": {"on": True, "lora": "nor.safetensors", "strength": 0},
            "model": ["loader", 0], "note": "text.txt"}},
        "loader": {"class_type": "UNETLoader", "inputs": {"unet_name": "dir/base.gguf", "weight_dtype": "default"}},
    }  # fmt: skip
    assert files_of(link(prompt)) == ["one.safetensors", "two.safetensors", "dir/base.gguf"]


def test_what_the_same_workflow_trains_is_known_by_its_run():
    prompt = {
        "sampler": {"class_type": "KSampler", "inputs": {"model": ["lora", 0]}},
        "lora": {"class_type": "LoraModelLoader", "inputs": {
            "lora": ["trainer", 0], "strength_model": 1.0, "model": ["second", 0]}},
        "second": {"class_type": "LoraModelLoader", "inputs": {
            "lora": ["result", 0], "strength_model": 1.0, "model": ["off", 0]}},
        "off": {"class_type": "LoraModelLoader", "inputs": {
            "lora": ["trainer", 0], "strength_model": 0, "model": ["other", 0]}},
        "other": {"class_type": "LoraModelLoader", "inputs": {
            "lora": ["core", 0], "strength_model": 1.0, "model": ["loader", 0]}},
        "trainer": {"class_type": "RetortTrainDistillation", "inputs": {"name": "mine", "model": ["loader", 0]}},
        "result": {"class_type": "RetortCollectJob", "inputs": {"run": "a job"}},
        "core": {"class_type": "TrainLoraNode", "inputs": {"name": "theirs"}},
        "loader": {"class_type": "UNETLoader", "inputs": {"unet_name": "base.safetensors"}},
    }  # fmt: skip
    assert runs_of(link(prompt)) == ["mine", "a job"] and files_of(link(prompt)) == ["base.safetensors"]
    prompt["trainer"]["inputs"]["name"] = ["elsewhere", 0]
    assert runs_of(link(prompt)) == ["a job"] and runs_of(None) == []


def test_a_circle_of_links_and_odd_values_end():
    prompt = {
        "sampler": {"class_type": "K", "inputs": {"model": ["a", 0]}},
        "a": {"class_type": "A", "inputs": {"model": ["b", 0], "x": [[[[[["deep.safetensors"]]]]]], "y": None}},
        "b": {"class_type": "B", "inputs": {"model": ["a", 0], "z": "name.safetensors", "s": 3, "model2": ["c", 9]}},
    }
    assert files_of(link(prompt)) == ["name.safetensors"]
    assert files_of(None) == files_of("model.safetensors") == []
