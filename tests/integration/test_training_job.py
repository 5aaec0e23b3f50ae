"""A job that ComfyUI starts trains, in a process of its own, what the node would have trained: to the bit."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def api(comfy, ours, tmp_path, monkeypatch):
    """The host, which writes into a folder of the test's own and finds a checkpoint there."""
    monkeypatch.setattr(comfy.folders, "output_directory", str(tmp_path / "out"))
    places = dict(comfy.folders.folder_names_and_paths)
    monkeypatch.setattr(comfy.folders, "folder_names_and_paths", places)
    for kind in ("loras", "checkpoints"):
        roots, endings = places[kind]
        places[kind] = ([str(tmp_path / kind), *roots], endings)
    (tmp_path / "checkpoints" / "sub").mkdir(parents=True)
    found = ours("hosts.api")
    weights = ours("models.loader").FOLDER / "checkpoints" / "digits_flow.safetensors"
    shutil.copy(weights, tmp_path / "checkpoints" / "sub" / "mine.safetensors")
    comfy.folders.filename_list_cache.clear()
    return found


def request(api, ours, name, clip, method="flow"):
    dataset = ours("trainers.dataset")
    prompts = ["a red 3", "a blue 7"] * 2
    with torch.inference_mode():
        positive = [api.host.encode_text(clip, prompt) for prompt in prompts]
        negative = api.host.encode_text(clip, "")
        data = dataset.Dataset(
            dataset.entries_of(positive, "positive"),
            prompts,
            dataset.entries_of([negative], "negative")[0],
            [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)],
        )
    if method == "instarevive":
        generator = torch.Generator().manual_seed(9)
        data.pictures = [torch.randint(0, 256, (64, 64, 3), generator=generator).byte() for _ in range(4)]
    settings = {"steps": 4, "batch_size": 2, "preview_every": 4, "previews": 1}
    objective = {"regression_steps": 2} if method == "instarevive" else {}
    config = {"method": method, "objective": objective, "training": settings, "lora": {"rank": 2}}
    return api.training.Request(name, ours("trainers.methods").read_config(config), data)


@pytest.mark.parametrize(("kind", "method"), [("named", "flow"), ("merged", "flow"), ("named", "instarevive")])
def test_the_job_trains_what_the_node_trains(comfy, ours, api, kind, method):
    host, read_status = api.host, ours("trainers.job_watch").read_status
    with torch.inference_mode():
        if kind == "named":
            _, clip, _ = host.embedded("flow")
            model, _, vae = comfy.nodes.CheckpointLoaderSimple().load_checkpoint("sub/mine.safetensors")
            model = host.with_shift(model, 2.0)
        else:
            model, clip, vae = host.embedded("eps")
            lora = load_file(min((ours("models.loader").FOLDER / "loras").glob("digits_eps_*.safetensors")))
            model = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0.0)[0]
    folder = host.runs_folder() / "job"
    job = api.starter.write_job(host, folder, model, request(api, ours, "job", clip, method), vae)
    assert job.started_by == "comfyui"
    if kind == "named":
        assert (job.base.kind, job.base.file, job.base.shift) == ("checkpoint", "sub/mine.safetensors", 2.0)
        assert (job.vae.kind, job.vae.file) == ("checkpoint", "sub/mine.safetensors")
    else:
        assert (job.base.kind, job.base.variant, job.vae.kind) == ("merged", "eps", "embedded")
    pid = api.starter.start(folder, host.job_arguments())
    with torch.inference_mode():
        inside = request(api, ours, "inside", clip, method)
        result = api.training.run(host, model, inside, watcher=ours("trainers.watch").Silent(), vae=vae)
    deadline = time.monotonic() + 300
    while read_status(folder).going:
        assert time.monotonic() < deadline and pid != os.getpid()
        time.sleep(0.1)
    status = read_status(folder)
    assert status.state == "finished" and status.preview == "previews/step_0000004.png", status
    assert result.path.parent == host.loras_folder()
    ours_, theirs = load_file(result.path), load_file(host.loras_folder() / status.lora)
    assert ours_.keys() == theirs.keys() and all(torch.equal(ours_[k], theirs[k]) for k in ours_)


@pytest.mark.parametrize("expert", ["high noise", "low noise"])
def test_a_jobs_preview_is_drawn_by_an_expert_with_its_loras_as_the_nodes_is(comfy, ours, api, expert):
    """No file names such a MODEL, so that it is merged beside the job, and deleted with the run."""
    host, trained, drawn = api.host, ours("trainers.methods"), []
    run_job, manage = ours("hosts.jobs.process").run_job, ours("hosts.jobs.manage")
    with torch.inference_mode():
        model, clip, vae = host.embedded("flow")
        lora = load_file(min((ours("models.loader").FOLDER / "loras").glob("digits_flow_*.safetensors")))
        other = host.with_shift(comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0.0)[0], 2.0)
    for name, second in (("alone", None), ("plain", model), ("node", other), ("job", other)):
        asked, folder = request(api, ours, name, clip), host.runs_folder() / name
        told = {**asked.config.to_json(), "objective": {"steps": 4, "expert": expert, "boundary": 0.6}}
        asked.config = trained.read_config(told)
        if name == "job":
            job = api.starter.write_job(host, folder, model, asked, vae, other=second)
            assert (job.base.kind, job.other_expert.kind, job.other_expert.shift) == ("embedded", "merged", 2.0)
            assert (folder / "other_expert.safetensors").is_file() and not (folder / "base.safetensors").is_file()
            assert run_job(host, folder).state == "finished"
        else:
            api.training.run(host, model, asked, watcher=ours("trainers.watch").Silent(), vae=vae, other=second)
        drawn.append((folder / "previews" / "step_0000004.png").read_bytes())
    assert drawn[2] == drawn[3] and drawn[2] not in drawn[:2]
    manage.delete(host.runs_folder(), "job")
    assert not folder.exists()


def test_what_cannot_be_merged_is_refused_by_the_name_of_its_input(comfy, ours, api):
    with torch.inference_mode():
        model, clip, vae = api.host.embedded("flow")
        other = model.clone()
        other.model_options["model_function_wrapper"] = lambda run, given: run(given["input"], given["timestep"])
        other.add_patches({"diffusion_model.x_embedder.proj.bias": (torch.zeros(1),)})
    with pytest.raises(ValueError, match="^other_expert: model carries a function around the network"):
        api.starter.write_job(
            api.host, api.host.runs_folder() / "job", model, request(api, ours, "job", clip), vae, other=other
        )
