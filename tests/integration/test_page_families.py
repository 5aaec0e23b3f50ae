"""Networks of LTX-2's and Anima's classes trained from ComfyUI's page: previews seen in the panel, the LoRA used.

Needs what test_page.py needs.
"""

from __future__ import annotations

import json
import time

import page_server
import pytest
import training_server

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
page, spelled = page_server.page, training_server.spelled
# A network of a family's real class, a prompt, latents of its parts, and a few numbers of what was sampled.
PACK = """
import torch
from comfy_api.latest import ComfyExtension, io
from retort.benchmarks.family_networks import families

def row(name):
    return families()[name]

class TinyFamily(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("TinyFamily", inputs=[io.String.Input("family", default="Anima")], outputs=[
            io.Model.Output(), io.Conditioning.Output(), io.Latent.Output(), io.Latent.Output()])

    @classmethod
    def execute(cls, family):
        one = row(family)
        return io.NodeOutput(one.model(), one.prompt(1), one.empty(one.noise(2, 2)), one.empty())

class TinyDigest(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("TinyDigest", is_output_node=True, inputs=[io.Latent.Input("samples")], outputs=[])

    @classmethod
    def execute(cls, samples):
        found = samples["samples"]
        parts = found.unbind() if found.is_nested else [found]
        return io.NodeOutput(ui={"digest": [[float(part.mean()), float(part.std())] for part in parts]})

class Pack(ComfyExtension):
    async def get_node_list(self):
        return [TinyFamily, TinyDigest]

async def comfy_entrypoint():
    return Pack()
"""
LOAD = "async (prompt) => { await app.loadApiJson(prompt, 'tiny'); await app.queuePrompt(0); }"


@pytest.fixture(scope="module")
def app(started, tmp_path_factory):
    """A server with the plugin and the pack."""
    with page_server.serving(started, tmp_path_factory.mktemp("families"), tiny_family=PACK) as running:
        yield running


def prompt(spelled, family):
    """Training, and the model with and without its LoRA sampled from the same noise."""
    nodes = {
        "1": {"class_type": "TinyFamily", "inputs": {"family": family}},
        "2": spelled(
            "RetortTrainFlow", model=["1", 0], positive=["1", 1], negative=["1", 1], latents=["1", 2],
            name=f"tiny_{family}", steps=1, batch_size=2, rank=2, warmup=0, learning_rate=0.01, preview_every=1,
            previews=1,
        ),
        "3": spelled("LoraModelLoader", model=["1", 0], lora=["2", 0]),
    }  # fmt: skip
    for number, model in ((4, ["1", 0]), (6, ["3", 0])):
        nodes[f"{number}"] = spelled(
            "KSampler", model=model, positive=["1", 1], negative=["1", 1], latent_image=["1", 3], seed=3, steps=2,
            cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        nodes[f"{number + 1}"] = {"class_type": "TinyDigest", "inputs": {"samples": [f"{number}", 0]}}
    return nodes


def finished(app, count, seconds=1200):
    """The latest of so many prompts, once it has ended."""
    end = time.monotonic() + seconds
    while True:
        history = json.loads(app.get("/history"))
        done = [one for one in history.values() if one["status"]["completed"] or one["status"]["status_str"] == "error"]
        if len(done) >= count:
            return done[-1]
        assert time.monotonic() < end, app.text()[-3000:]
        time.sleep(0.5)


@pytest.mark.parametrize("family", ["LTXAV", "Anima"])
def test_it_is_trained_from_the_page_and_its_lora_is_used(app, page, spelled, family):
    before = len(json.loads(app.get("/history")))
    page("open")
    page("look", vue=False, theme="dark")
    page("evaluate", code=LOAD, given=prompt(spelled, family))
    done = finished(app, before + 1)
    assert done["status"]["status_str"] == "success", training_server.error_of(done)
    name = f"tiny_{family}"
    assert (app.base / "models" / "loras" / f"{name}.safetensors").is_file()
    plain, with_lora = (done["outputs"][number]["digest"] for number in ("5", "7"))
    parts = 2 if family == "LTXAV" else 1
    assert len(plain) == len(with_lora) == parts and all(a != b for a, b in zip(plain, with_lora, strict=True))
    page("panel", section="Training")
    titles = "[...document.querySelectorAll('.retort-title')].map((one) => one.textContent)"
    page("until", condition=f"{titles}.some((one) => one.includes('{name}'))")
    page("click", where=".retort-title", text=name)
    page("until", condition="document.querySelector('.retort-strip img')?.naturalWidth > 0")
    page("shot", name=f"family_{family}")
    assert not page("heard")
