"""The plugin in a real ComfyUI server: found in custom_nodes, nodes listed, a workflow run, an error explained."""

from __future__ import annotations

import io
import json
import re
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

PAGE = Path(__file__).resolve().parents[2] / "extensions" / "comfyui"
pytestmark = [pytest.mark.integration, pytest.mark.slow]

NODES = {"RetortEmbeddedModel", "RetortDistilledSetup", "RetortDistilledSigmas", "RetortDistilledSampler"}


def workflow(variant="flow", preset="digits_flow", steps=1):
    return {
        "1": {"class_type": "RetortEmbeddedModel", "inputs": {"variant": variant}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a (blue:1.2) seven"}},
        "3": {
            "class_type": "RetortDistilledSetup",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "preset": preset, "steps": steps, "timesteps": "",
                "denoise": 1.0,
            },
        },
        "4": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "6": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["4", 0], "guider": ["3", 1], "sampler": ["3", 2], "sigmas": ["3", 3],
                "latent_image": ["5", 0],
            },
        },
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "retort"}},
    }  # fmt: skip


def test_it_is_loaded_once_and_without_a_failure(server):
    times = re.findall(r"[\d.]+ seconds(.*?): \S*retort$", server.text(), re.MULTILINE)
    assert times == [""], server.text()


def test_its_nodes_are_listed(server):
    listed = json.loads(server.get("/object_info"))
    assert set(listed) >= NODES
    setup = listed["RetortDistilledSetup"]
    assert setup["python_module"] == "custom_nodes.retort"
    assert setup["input_order"]["required"] == ["model", "positive"]
    assert setup["input_order"]["optional"][:5] == ["negative", "preset", "steps", "timesteps", "denoise"]
    assert setup["output"][:4] == ["MODEL", "GUIDER", "SAMPLER", "SIGMAS"]
    assert all(options[1]["tooltip"] for options in setup["input"]["required"].values())
    assert setup["search_aliases"]


def test_a_preset_of_one_s_own_is_one_file_and_listed_after_a_reload_of_the_page(server):
    """No code and no restart: what the page asks for when it is reloaded. What is no preset is left out."""
    folder = server.base / "models" / "retort" / "presets"
    folder.mkdir(parents=True)
    row = {"title": "My student, 4 steps", "family": "flow", "steps": [4], "shift": 3, "mode": "deterministic"}
    (folder / "my_student.json").write_text(json.dumps(row), encoding="utf-8")
    (folder / "broken.json").write_text("{", encoding="utf-8")

    def offered(node):
        inputs = json.loads(server.get(f"/object_info/{node}"))[node]["input"]
        (preset,) = (group["preset"] for group in inputs.values() if "preset" in group)
        return preset[1]["options"]

    for node in ("RetortDistilledSetup", "RetortDistilledSigmas", "RetortDistilledSampler"):
        assert "my_student" in offered(node) and "broken" not in offered(node)
    assert "broken.json is left out" in server.text()
    (folder / "my_student.json").unlink()
    assert "my_student" not in offered("RetortDistilledSetup")


def test_its_help_pages_are_served(server):
    for node in NODES:
        page = server.get(f"/extensions/retort/docs/{node}.md").decode()
        assert page.startswith("# ")
        for picture in re.findall(r"pictures/\w+\.jpg", page):
            assert Image.open(io.BytesIO(server.get(f"/extensions/retort/docs/{picture}"))).format == "JPEG"


def test_no_browser_keeps_its_modules_over_an_update(server):
    """ComfyUI itself says so of scripts and styles alone, and an old module would meet a new script."""
    for path in PAGE.rglob("*.mjs"):
        address = f"{server.url}/extensions/retort/{path.relative_to(PAGE).as_posix()}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.headers.get_content_type() == "text/javascript", path
            assert answer.headers.get_all("Cache-Control") == ["no-store"], path


def test_its_blueprints_are_offered(server):
    listed = json.loads(server.get("/global_subgraphs"))
    ours = {id: one["name"] for id, one in listed.items() if one["info"]["node_pack"] == "custom_nodes.retort"}
    assert len(ours) == 3
    for id, name in ours.items():
        assert json.loads(json.loads(server.get(f"/global_subgraphs/{id}"))["data"])["nodes"][0]["title"] == name


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_its_nodes_speak_the_users_language(server, language):
    listed = {id: one for id, one in json.loads(server.get("/object_info")).items() if id.startswith("Retort")}
    names = json.loads(server.get("/i18n"))[language]["nodeDefs"]
    # What translate.mjs looks up, by the English that the interface gets.
    texts = json.loads(server.get(f"/extensions/retort/locales/{language}.json"))["texts"]

    def missing(groups):
        for inputs in groups.values():
            for _, options in (spec for spec in inputs.values()):
                yield from [] if options["tooltip"] in texts else [options["tooltip"]]
                for option in options.get("options", []):
                    if isinstance(option, dict):
                        yield from missing(option["inputs"])

    for id, node in listed.items():
        assert names[id]["display_name"] != node["display_name"]
        given = {name for group in ("required", "optional") for name in node["input"].get(group, {})}
        assert given <= set(names[id]["inputs"]) and node["description"] in texts
        assert all(text in texts for text in node["output_tooltips"])
        assert not [*missing({k: v for k, v in node["input"].items() if k != "hidden"})]


@pytest.mark.parametrize(
    ("variant", "preset", "steps"),
    [("flow", "digits_flow", 1), ("flow", "digits_flow", 4), ("flow", "digits_flow_tdm", 4), ("eps", "digits_eps", 1),
     ("eps early", "digits_eps_tdm", 4)],
)  # fmt: skip
def test_a_workflow_gives_images(server, variant, preset, steps):
    done = server.run(workflow(variant, preset, steps))
    assert done["status"]["status_str"] == "success", done["status"]
    images = done["outputs"]["8"]["images"]
    assert len(images) == 2
    for image in images:
        data = server.get("/view?" + urllib.parse.urlencode(image))
        assert Image.open(io.BytesIO(data)).size == (64, 64)


def test_a_prompt_may_leave_out_what_has_a_default(server):
    prompt = workflow()
    for node in ("1", "3"):
        given = prompt[node]["inputs"]
        prompt[node]["inputs"] = {name: given[name] for name in given if isinstance(given[name], list)}
    prompt["3"]["inputs"]["preset"] = "digits_flow"
    done = server.run(prompt)
    assert done["status"]["status_str"] == "success", done["status"]


def test_a_preset_that_cannot_fit_is_explained_at_its_node(server):
    done = server.run(workflow("eps", "tdm_sd3", 0))
    (error,) = [data for name, data in done["status"]["messages"] if name == "execution_error"]
    assert (error["node_id"], error["node_type"]) == ("3", "RetortDistilledSetup")
    for words in ("TDM, SD3", "predicts 'eps'", "digits_eps"):
        assert words in error["exception_message"]
