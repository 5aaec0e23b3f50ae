"""The trainer nodes as users run them: prompts in API format, queued on a real ComfyUI server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import training_server as server
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
files, app, spelled, base, drawn = server.files, server.app, server.spelled, server.base, server.drawn
PROMPTS, QUICK, Listener = server.PROMPTS, server.QUICK, server.Listener
error_of, post, succeeded = server.error_of, server.post, server.succeeded


CASES = [
    ("digits flow", "RetortTrainDistillation", {"method": "dmd2", "method.ratio": 1}),
    ("digits flow", "RetortTrainDistillation", {"method": "f_distill", "method.ratio": 1}),
    ("digits flow", "RetortTrainDistillation", {"method": "tdm", "method.steps": 2}),
    ("digits flow", "RetortTrainDistillation", {"method": "di_star", "method.ratio": 1}),
    ("digits eps", "RetortTrainDistillation", {"method": "dmd2", "method.ratio": 1}),
    ("digits eps", "RetortTrainDistillation", {"method": "tdm"}),
    ("sd3", "RetortTrainDistillation", {"method": "dmd2", "method.ratio": 1}),
    ("sd15", "RetortTrainDistillation", {"method": "tdm", "method.steps": 2, "method.cfg": 1.0}),
    ("digits flow", "RetortTrainFlow", {}),
    ("digits eps", "RetortTrainFlow", {"levels": "logit_normal"}),
    ("sd3", "RetortTrainFlow", {}),
    ("sd15", "RetortTrainFlow", {"loss_space": "x0"}),
    ("digits flow", "RetortFewShotAdapt", {"source_steps": 2}),
    ("digits eps", "RetortFewShotAdapt", {"source_steps": 1}),
    ("sd3", "RetortFewShotAdapt", {"source_steps": 1}),
]


@pytest.mark.parametrize(
    ("node", "settings"),
    [("RetortTrainDistillation", {"method": "tdm"}), ("RetortTrainFlow", {"prompts": "a two\na six\na nine"})],
)
def test_a_prompt_names_what_it_changes_and_nothing_else(app, base, node, settings):
    nodes, given = base("digits flow")
    if node == "RetortTrainFlow":
        nodes["data"] = {"class_type": "TinyLatents", "inputs": {"batch": 3, "channels": 16, "seed": 1}}
        given["latents"] = ["data", 0]
    given |= {"steps": 2, "batch_size": 1, "name": f"few_{node[6:]}", **settings}
    nodes["t"] = {"class_type": node, "inputs": given}
    (text,) = succeeded(app.run(nodes))["outputs"]["t"]["text"]
    assert text == f"few_{node[6:]}.safetensors, 2 steps"


def test_a_method_that_is_not_known_is_refused_by_name(app, base):
    nodes, given = base("digits flow")
    nodes["t"] = {"class_type": "RetortTrainDistillation", "inputs": {**given, "method": "dmd"}}
    said = "method is 'dmd', which this version of the node does not know: choose one of dmd2, f_distill, tdm, di_star"
    assert said in error_of(app.run(nodes))


@pytest.mark.parametrize(("kind", "node", "settings"), CASES)
def test_a_trainers_lora_changes_the_picture(app, spelled, base, drawn, kind, node, settings):
    nodes, given = base(kind)
    if node != "RetortTrainDistillation" or settings["method"] == "f_distill":
        count = 3
        given["latents"] = ["data", 0]
        channels = 4 if kind == "sd15" else 16
        nodes["data"] = {"class_type": "TinyLatents", "inputs": {"batch": count, "channels": channels, "seed": 1}}
    name = "_".join([kind.replace(" ", "_"), node[6:], settings.get("method", "")])
    nodes["t"] = spelled(node, **{**given, **QUICK, "name": name, **settings})
    nodes["load"] = spelled("LoraModelLoader", model=["m", 0], lora=["t", 0])
    nodes["graph"] = spelled("LossGraphNode", loss=["t", 1])
    drawn(nodes, {"before": ["m", 0], "after": ["load", 0]})
    done = succeeded(app.run(nodes))
    before, after = drawn.read(done, "before"), drawn.read(done, "after")
    assert torch.isfinite(after).all() and (after - before).abs().max() > 1e-4
    assert done["outputs"]["graph"]["images"] and done["outputs"]["t"]["text"] == [f"{name}.safetensors, 2 steps"]
    # The file, through the loader that everybody uses; and the MODEL, which another prompt shares, as it was.
    again, _ = base(kind)
    again["load"] = spelled("LoraLoaderModelOnly", model=["m", 0], lora_name=f"{name}.safetensors", strength_model=1.0)
    drawn(again, {"before": ["m", 0], "file": ["load", 0]})
    done = succeeded(app.run(again))
    assert torch.equal(drawn.read(done, "before"), before)
    assert torch.equal(drawn.read(done, "file"), after)
    folder = app.base / "output" / "retort" / name
    assert {p.name for p in folder.iterdir()} >= {"state.safetensors", "config.json", "metrics.jsonl", "result.json"}
    assert not list((app.base / "models" / "loras").glob(".*"))


def test_cores_dataset_nodes_feed_it(app, spelled, base, drawn):
    """Pictures of two sizes, encoded by Make Training Dataset, as they come and sorted by Resolution Bucket."""
    files_of = {}
    for way in ("plain", "bucket", "pictures", "captions"):
        nodes, given = base("digits flow")
        nodes["pics"] = {"class_type": "TinyPictures", "inputs": {"count": 5, "width": 96, "seed": 2}}
        nodes["made"] = {
            "class_type": "MakeTrainingDataset",
            "inputs": {"images": ["pics", 0], "texts": ["pics", 1], "vae": ["m", 2], "clip": ["m", 1]},
        }
        source = {"plain": "made", "bucket": "sorted"}.get(way, "")
        nodes["sorted"] = {
            "class_type": "ResolutionBucket", "inputs": {"latents": ["made", 0], "conditioning": ["made", 1]},
        }  # fmt: skip
        given |= {"prompts": "", "positive": [source or "made", 1], "latents": [source, 0], "vae": ["m", 2]}
        if not source:
            del given["latents"]
            given["images"] = ["pics", 0]
        if way == "captions":
            # Texts as they are, one for each picture.
            given |= {"prompts": ["pics", 1], "clip": ["m", 1]}
            del given["positive"]
        nodes["t"] = spelled("RetortTrainFlow", **{**given, **QUICK, "steps": 4, "name": f"set {way}"})
        succeeded(app.run(nodes))
        files_of[way] = load_file(app.base / "models" / "loras" / f"set {way}.safetensors")
    # One data set each time; buckets come in another order, so they are drawn in another.
    for way in ("pictures", "captions"):
        assert all(torch.equal(files_of["plain"][k], v) for k, v in files_of[way].items())
    assert files_of["plain"].keys() == files_of["bucket"].keys()


def test_progress_and_previews_reach_the_page(app, spelled, base):
    nodes, given = base("digits flow")
    name = "seen"
    given |= {**QUICK, "steps": 6, "preview_every": 3, "previews": 3, "name": name, "vae": ["m", 2]}
    nodes["t"] = spelled("RetortTrainDistillation", **given, method="tdm")
    nodes["c"] = spelled("RetortLossChart", run=["t", 3])
    with Listener(app) as page:
        done = succeeded(app.run(nodes, "listener"))
        wait_until(lambda: page.texts and b"6 steps: seen" in page.texts[-1])
    steps = [m["data"] for m in page.said if m["type"] == "progress" and m["data"]["node"] == "t"]
    assert steps and steps[-1]["value"] == steps[-1]["max"] == 6
    texts = [t.decode("utf-8", "replace") for t in page.texts]
    assert any("step 6 of 6, loss" in t for t in texts) and "6 steps: seen.safetensors" in texts[-1]
    assert len([p for p in page.pictures if b"JFIF" in p[:400]]) == 3  # before step 1, after 3 and 6
    assert "images" not in done["outputs"]["t"]
    assert done["outputs"]["c"]["images"]
    # Done before, too, it names the run, whose previews the page shows.
    nodes["t"]["inputs"]["save_every"] = 17
    done = succeeded(app.run(nodes))["outputs"]["t"]
    assert "images" not in done and done["retort_run"] == ["seen"]


def test_a_name_that_is_taken_and_a_run_that_is_done(app, spelled, base):
    loras = app.base / "models" / "loras"
    save_file({"mine": torch.zeros(1)}, loras / "taken.safetensors")
    nodes, given = base("digits flow")
    settings = {**given, **QUICK, "name": "taken", "method": "tdm"}
    nodes["t"] = spelled("RetortTrainDistillation", **settings)
    nodes["p"] = spelled("PreviewAny", source=["t", 2])
    with Listener(app, "namer") as page:
        done = succeeded(app.run(nodes, "namer"))
        wait_until(lambda: page.texts and b"taken_2.safetensors (another" in page.texts[-1])
    assert done["outputs"]["p"]["text"] == ["taken_2.safetensors"]
    assert any("taken_2.safetensors (another file" in t.decode("utf-8", "replace") for t in page.texts)
    assert list(load_file(loras / "taken.safetensors")) == ["mine"]
    # The same settings in another prompt, so that nothing is cached: the finished run gives what it wrote.
    post(app, "/free", {"unload_models": True, "free_memory": True})
    done = succeeded(app.run(nodes))
    assert done["outputs"]["p"]["text"] == ["taken_2.safetensors"] and not (loras / "taken_3.safetensors").exists()
    # More steps go on; fewer give no other LoRA than the one there is.
    nodes["t"]["inputs"]["steps"] = 3
    before = (loras / "taken_2.safetensors").read_bytes()
    assert succeeded(app.run(nodes))["outputs"]["p"]["text"] == ["taken_2.safetensors"]
    assert (loras / "taken_2_step_2.safetensors").read_bytes() == before != (loras / "taken_2.safetensors").read_bytes()
    rows = [json.loads(r) for r in (app.base / "output/retort/taken/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
    # A file that is gone is written again.
    (loras / "taken_2.safetensors").unlink()
    nodes["t"]["inputs"]["save_every"] = 17
    assert succeeded(app.run(nodes))["outputs"]["p"]["text"] == ["taken_2.safetensors"]


def wait_until(found, seconds=300):
    limit = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.05)


@pytest.mark.parametrize(("kind", "method"), [("digits flow", "tdm"), ("sd15", "tdm"), ("sd3", "dmd2")])
def test_an_interrupted_run_goes_on_and_ends_alike(app, spelled, base, drawn, kind, method):
    after = 2 if kind == "sd15" else 5

    def nodes_of(name, steps):
        nodes, given = base(kind)
        given |= {**QUICK, "steps": steps, "name": name, "batch_size": 2, "save_every": 0, "ema": 0.5}
        nodes["t"] = spelled("RetortTrainDistillation", **given, method=method, **{"method.steps": 2})
        return drawn(nodes, {"plain": ["m", 0]})

    name = f"cut {kind} {method}"
    folder = app.base / "output" / "retort" / name
    # So many that the interruption, however late, comes before the last.
    queued = post(app, "/prompt", {"prompt": nodes_of(name, 100_000)})["prompt_id"]
    wait_until(lambda: (folder / "metrics.jsonl").is_file() and running_steps(app, folder) >= after)
    post(app, "/interrupt")
    wait_until(lambda: queued in json.loads(app.get(f"/history/{queued}")))
    done = json.loads(app.get(f"/history/{queued}"))[queued]
    kinds = [kind for kind, _ in done["status"]["messages"]]
    assert "execution_interrupted" in kinds and "execution_error" not in kinds
    steps = len(read_steps(folder)) + 3
    assert steps > 3 and not (app.base / "models" / "loras" / f"{name}.safetensors").exists()
    assert load_file(folder / "state.safetensors")  # whole
    went_on = succeeded(app.run(nodes_of(name, steps)))
    assert read_steps(folder) == list(range(1, steps + 1))
    whole = succeeded(app.run(nodes_of(f"whole {name}", steps)))
    loras = [load_file(app.base / "models" / "loras" / f"{n}.safetensors") for n in (name, f"whole {name}")]
    assert loras[0].keys() == loras[1].keys() and all(torch.equal(v, loras[1][k]) for k, v in loras[0].items())
    assert torch.equal(drawn.read(went_on, "plain"), drawn.read(whole, "plain"))


def read_steps(folder):
    return [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


def running_steps(app, folder):
    """The log is flushed twice a second."""
    try:
        return len(read_steps(folder))
    except ValueError:
        return 0


# Runs prompts without ComfyUI, and leaves the latents of some of their nodes.
HEADLESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from retort.hosts.headless.folders import Folders
from retort.graphs.run import run
torch.set_num_threads(1)
models, out, found = Path(sys.argv[2]), Path(sys.argv[3]), {}
for name, (prompt, keep) in json.loads(sys.argv[1]).items():
    done = run(prompt, where=Folders(models=(models,), output=out), keep=keep)
    found |= {f"{name}/{k}": done.results.outputs[k][0][0]["samples"].contiguous() for k in keep}
save_file(found, out / "latents.safetensors")
"""


def headless(app, tmp_path, prompts):
    """Latents by NAME/NODE of {NAME: (prompt, nodes)}, by the headless host with the server's model folders."""
    command = [sys.executable, "-c", HEADLESS, json.dumps(prompts), str(app.base / "models"), str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(tmp_path / "latents.safetensors")


def test_a_lora_of_one_host_loads_in_the_other(app, spelled, base, drawn, tmp_path):
    def training(kind, name):
        nodes, given = base(kind)
        given |= {**QUICK, "name": name, "method": "tdm", "method.steps": 2}
        nodes["t"] = spelled("RetortTrainDistillation", **given)
        nodes["load"] = spelled("LoraModelLoader", model=["m", 0], lora=["t", 0])
        return drawn(nodes, {"before": ["m", 0], "after": ["load", 0]})

    def loading(kind, name):
        nodes, _ = base(kind)
        nodes["load"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["m", 0], "lora_name": f"{name}.safetensors", "strength_model": 1.0},
        }
        return drawn(nodes, {"file": ["load", 0]})

    def pictures(nodes):
        """With pictures in place of saved latents, which the headless host has no node for."""
        for key in [k for k, n in nodes.items() if n["class_type"] == "SaveLatent"]:
            samples = nodes.pop(key)["inputs"]["samples"]
            nodes[f"d {key}"] = {"class_type": "VAEDecode", "inputs": {"samples": samples, "vae": ["m", 2]}}
            nodes[key] = {"class_type": "PreviewImage", "inputs": {"images": [f"d {key}", 0]}}
        return nodes

    kinds = ("digits flow", "digits eps")
    born, prompts = {}, {}
    for kind in kinds:
        done = succeeded(app.run(training(kind, f"born in comfyui {kind}")))
        born[kind] = drawn.read(done, "after")
        assert (born[kind] - drawn.read(done, "before")).abs().max() > 1e-3
        prompts[f"{kind} trained"] = pictures(training(kind, f"born headless {kind}")), ["k before", "k after"]
        prompts[f"{kind} loaded"] = pictures(loading(kind, f"born in comfyui {kind}")), ["k file"]
    mine = headless(app, tmp_path, prompts)
    for kind in kinds:
        after = mine[f"{kind} trained/k after"]
        assert (after - mine[f"{kind} trained/k before"]).abs().max() > 1e-3
        done = succeeded(app.run(loading(kind, f"born headless {kind}")))
        assert (drawn.read(done, "file") - after).abs().max() < 1e-3
        assert (mine[f"{kind} loaded/k file"] - born[kind]).abs().max() < 1e-3
