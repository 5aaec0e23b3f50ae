"""`retort search`: a list of prompts, shared out among processes, each found as it would be alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from retort.hosts import cli

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "4 Search for a better picture.json"
PROMPTS = ["a blue seven on yellow paper", "a red three on white paper", "a green one = two, on black paper"]


def arguments(prompts: Path, out: Path, *more: str) -> list[str]:
    quick = {"RetortTreeSearch.calls": 12, "BasicScheduler.steps": 2}
    graph = json.loads(WORKFLOW.read_text())
    ids = {n["type"]: n["id"] for n in graph["nodes"]}
    sets = [f"{ids[name.split('.')[0]]}.{name.split('.')[1]}={value}" for name, value in quick.items()]
    return ["search", str(WORKFLOW), str(prompts), "--out", str(out), *(x for s in sets for x in ("--set", s)), *more]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): Image.open(p).tobytes() for p in sorted(folder.rglob("*.png"))}


def run(*given: str):
    return CliRunner().invoke(cli.app, list(given))


def test_processes_share_the_prompts_and_find_what_one_finds(prompts, tmp_path, monkeypatch):
    done = run(*arguments(prompts, tmp_path / "alone"))
    assert done.exit_code == 0, done.stderr
    assert [line.split(": ")[1] for line in done.stdout.splitlines() if ": a " in line] == PROMPTS
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        shared = run(*arguments(prompts, tmp_path / "shared"))
        assert shared.exit_code == 0 and len(shared.stdout.splitlines()) >= 2 - rank
    alone, shared = pictures(tmp_path / "alone"), pictures(tmp_path / "shared")
    assert alone == shared and len({p.split("/")[0] for p in alone}) == 3
    for number, prompt in enumerate(PROMPTS):
        result = json.loads((tmp_path / "alone" / f"{number:04d}" / "result.json").read_text())
        assert result["prompt"] == prompt and all(
            (tmp_path / "alone" / f"{number:04d}" / i).is_file() for i in result["images"]
        )


def test_what_is_done_is_not_done_again(prompts, tmp_path):
    first = arguments(prompts, tmp_path / "out")
    assert run(*first).exit_code == 0
    (tmp_path / "out" / "0001" / "result.json").write_text(
        "{"
    )  # killed while it wrote, on a file system that allows it
    again = run(*first)
    assert again.exit_code == 0 and [line for line in again.stdout.splitlines() if ": a " in line] == [
        f"{tmp_path / 'out' / '0001'}: {PROMPTS[1]}"
    ]
    assert run(*first, "--seed", "8").stdout.count(": a ") == 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot be read as a text file"),
        ("empty.txt", "\n \n", "holds no prompts"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read as a text file"),
    ],
)
def test_a_bad_list_is_one_message(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run(*arguments(path, tmp_path / "out"))
    assert done.exit_code == 2 and said in done.stderr and not (tmp_path / "out").exists()


def test_a_workflow_without_a_place_for_prompts_is_one_message(prompts, tmp_path):
    plain = WORKFLOW.with_name("1 Quick start - 4 steps instead of 50.json")
    done = run("search", str(plain), str(prompts), "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and "has no search" in done.stderr
    graph = json.loads(WORKFLOW.read_text())
    search = next(n for n in graph["nodes"] if n["type"] == "RetortTreeSearch")
    link = next(i for i in search["inputs"] if i["name"] == "prompt")
    graph["links"] = [row for row in graph["links"] if row[0] != link["link"]]
    link["link"] = None
    own = tmp_path / "own.json"
    own.write_text(json.dumps(graph))
    done = run("search", str(own), str(prompts), "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and "--at NODE.INPUT" in done.stderr
    at = ["--at", f"{search['id']}.prompt", "--at", "Prompt.value"]
    quick = arguments(prompts, tmp_path / "out")[5:]
    assert run("search", str(own), str(prompts), "--out", str(tmp_path / "out"), *quick, *at).exit_code == 0


@pytest.mark.slow
def test_accelerate_launches_it(prompts, tmp_path):
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--module", "retort.hosts.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [str(Path(sys.executable).with_name(command[0])), *command[1:], *arguments(prompts, tmp_path / "out")]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / "out" / f"{n:04d}" / "result.json").is_file() for n in range(3))
