"""Damaged files of a run, a job and a search: one sentence with the file and the remedy, and exit code 2."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("peft")

from retort.hosts import api, cli
from retort.hosts.jobs import starter
from retort.hosts.search import files as search_files
from retort.hosts.training import run as training  # noqa: E402
from retort.nodes.jobs import RetortCollectJob, RetortLossChart  # noqa: E402
from retort.trainers.dataset import Dataset, entries_of  # noqa: E402
from retort.trainers.job_watch import Status, write_status  # noqa: E402
from retort.trainers.methods import read_config  # noqa: E402


def train(folder, where):
    done = CliRunner().invoke(
        cli.app, ["train", str(folder), "--models", str(where.models[0]), "--out", str(where.output)],
        env={"COLUMNS": "1000"},
    )  # fmt: skip
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


DAMAGE = {
    "metrics.jsonl": (None, ["[" * 100_000 + "\n", '{"step": ' + "9" * 5000 + "}\n",
                             '{"step": 1, "student_loss": ' + "9" * 400 + "}\n"]),
    "origin.json": ("another name", ["[]", "null", "[" * 100_000, "\x00"]),
    "result.json": (None, ["[" * 100_000, "[]", '{"file": "../../a", "steps": 1, "sha256": ""}']),
    "config.json": (None, ["[" * 100_000, "null"]),
    "status.json": ("delete the file", ["[]", '{"pid": 1099511627776}', '{"state": "gone"}']),
    "state.safetensors": ("another name", ["", "{}", "\x08" + "\x00" * 7 + "{}      "]),
    "job.json": ("job.json", ["[]", "[" * 100_000, '{"format": ' + "9" * 5000 + "}"]),
    "data.safetensors": ("data.safetensors", ["", "\x08" + "\x00" * 7 + "{}      "]),
}  # fmt: skip


@pytest.mark.slow
def test_each_damaged_file_is_one_sentence_or_is_done_without(where, tmp_path):
    model, clip, _ = api.host.embedded("flow")
    data = Dataset(entries_of([api.host.encode_text(clip, "a 3")], "positive"), ["a 3"], None, [torch.zeros(16, 8, 8)])
    settings = {"steps": 2, "batch_size": 1, "warmup": 0, "preview_every": 0, "save_every": 1}
    config = {"method": "flow", "objective": {"steps": 2}, "training": settings, "lora": {"rank": 1}}
    folder = api.host.runs_folder() / "mine"
    starter.write_job(api.host, folder, model, training.Request("mine", read_config(config), data))
    assert train(folder, where).exit_code == 0
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name, (remedy, texts) in DAMAGE.items():
        for text in texts:
            for kept, content in whole.items():
                (folder / kept).write_bytes(content)
            # As one that was stopped after its first step, so that it goes on.
            if name != "status.json":
                write_status(folder, Status("stopped", 1, 2))
            (folder / name).write_bytes(text.encode("latin-1") if name.endswith("safetensors") else text.encode())
            done = train(folder, where)
            said = done.stderr.strip()
            if remedy is None:
                assert done.exit_code == 0, (name, text[:40], said)
            else:
                assert done.exit_code == 2 and said.startswith("error: "), (name, text[:40], said)
                assert name in said and remedy in said and "Traceback" not in said, (name, text[:40], said)
    # A log that no one can read is still drawn, or says that it is empty.
    (folder / "metrics.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="holds no numbers yet"):
        RetortLossChart.execute("mine")


@pytest.mark.parametrize("lora", ["/etc/private.safetensors", "../private.safetensors", "a/b.safetensors", "x.pt", ""])
def test_a_job_gives_loras_of_its_own_folder_by_bare_name(where, tmp_path, lora):
    folder = api.host.runs_folder() / "mine"
    for place in (where.models[0] / "loras", where.models[0] / "loras" / "a"):
        place.mkdir(parents=True)
    for path in (where.models[0] / "private.safetensors", where.models[0] / "loras" / "a" / "b.safetensors"):
        save_file({"secret": torch.ones(1)}, path)
    write_status(folder, Status("finished", 1, 1, lora=lora))
    with pytest.raises(ValueError, match="run 'mine' says that its LoRA is .*no file's name"):
        RetortCollectJob.execute("mine")


def test_a_job_that_was_trained_anew_is_collected_anew(where):
    folder = api.host.runs_folder() / "mine"
    seen = set()
    for lora in ("a.safetensors", "b.safetensors", "b.safetensors"):
        write_status(folder, Status("finished", 5, 5, lora=lora))
        seen.add(RetortCollectJob.fingerprint_inputs("mine"))
        assert RetortCollectJob.fingerprint_inputs("mine") in seen
    assert len(seen) == 3


def test_no_order_of_a_jobs_files_reaches_the_terminal(where, tmp_path):
    folder = api.host.runs_folder() / "mine"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    evil = "\x1b]0;pwned\x07\x1b[2J\x9b31mgood\u202e"
    told = {"state": "failed", "message": evil, "lora": evil, "preview": evil}
    (folder / "status.json").write_text(json.dumps(told))
    (folder / "job.log").write_bytes(f"{evil}\n\x1b[Aup".encode())
    done = CliRunner().invoke(cli.app, ["job", "status", str(folder)], color=True)
    assert done.exit_code == 3 and "good" in done.stdout and "up" in done.stderr
    for text in (done.stdout, done.stderr):
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text.replace("\x1b[2m", "").replace("\x1b[0m", "")), text
    (folder / "status.json").write_text(json.dumps({"state": evil}))
    done = CliRunner().invoke(cli.app, ["job", "status", str(folder)])
    assert done.exit_code == 2 and not {"\x1b", "\x07", "\x9b"} & set(done.stderr)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_a_search_in_float8_is_one_sentence(where, kind):
    folder = search_files.folder(api.host)
    folder.mkdir(parents=True)
    found = {"sigmas": torch.ones(3).to(kind), "latent.samples": torch.ones(1, 4, 2, 2).to(kind)}
    header = {"method": "dts", "items": [None], "seed": 0, "keep": 1, "noise": None, "config": {}, "latent": {},
              "prompt": "", "transition": {}}  # fmt: skip
    save_file(found, folder / "theirs.safetensors", {"format": search_files.FORMAT, "search": json.dumps(header)})
    with pytest.raises(
        ValueError, match=r"theirs\.safetensors cannot be used .*is of torch\.float8.*start a new search"
    ):
        search_files.load(api.host, "theirs")
    save_file(found, folder / "deep.safetensors", {"format": search_files.FORMAT, "search": "[" * 100_000})
    with pytest.raises(ValueError, match=r"deep\.safetensors cannot be used"):
        search_files.load(api.host, "deep")


def test_a_name_that_is_no_files_is_refused_before_anything_is_trained(where):
    folder = api.host.runs_folder() / "mine"
    folder.mkdir(parents=True)
    for name in ("\U0001f600" * 100, "nul"):
        (folder / "job.json").write_text(
            json.dumps({"format": 1, "name": name, "base": {"kind": "embedded", "variant": "flow"}, "method": "flow"})
        )
        done = train(folder, where)
        assert done.exit_code == 2 and "cannot be a file's name" in done.stderr and "job.json" in done.stderr
        assert not (folder / "metrics.jsonl").exists()
