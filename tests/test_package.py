"""The package's metadata agrees with the tree, and its requirements cannot break a ComfyUI."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "sampling", "rewards", "restoration", "trainers", "files", "preferences", "graphs", "hosts", "nodes", "models",
    "benchmarks",
)  # fmt: skip


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in (line.split("#")[0].strip() for line in text.splitlines()) if line]


def test_every_folder_is_a_package_and_every_package_is_listed(project) -> None:
    inits = [path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    found = {"retort", *(".".join(("retort", *path.parent.relative_to(ROOT).parts)) for path in inits)}
    assert found == set(project["tool"]["setuptools"]["packages"]), "pyproject.toml lists [tool.setuptools] packages"
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    bare = {path.parent for path in modules} - {path.parent for path in inits}
    assert not bare, "a folder with modules needs an __init__.py whose docstring says what it holds"


def test_requirements_move_nothing_of_comfyuis() -> None:
    for line in lines("requirements.txt"):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+(>=[\d.]+)?", line), f"{line}: a pin or a ceiling breaks other packs"
        assert line.split(">=")[0].lower() not in ("torch", "torchvision", "torchaudio", "transformers")


@pytest.mark.integration
def test_requirements_are_comfyuis_own_peft_and_segno(comfyui: Path) -> None:
    text = (comfyui / "requirements.txt").read_text(encoding="utf-8").lower()
    brought = {re.split(r"[<>=~!;\s]", line)[0] for line in text.splitlines()}
    wanted = {line.split(">=")[0].lower() for line in lines("requirements.txt")}
    # PEFT brings accelerate, and segno nothing; what else they ask for ComfyUI has.
    assert wanted - brought == {"peft", "segno"}


def test_constraints_pin_exactly_and_name_no_build() -> None:
    for line in lines("constraints.txt"):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+(; python_version >= '3\.11')?", line), line
    assert "torch==2.13.0" in lines("constraints.txt")


def test_the_registry_finds_what_it_asks_for(project) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["urls"]["Repository"]
    comfy = project["tool"]["comfy"]
    assert (comfy["PublisherId"], comfy["DisplayName"]) == ("retort", "Retort")
    assert comfy["requires-comfyui"].startswith(">=")
    # With WEB_DIRECTORY in __init__.py a `web` here would serve, and load, every script twice.
    assert "web" not in comfy


def test_the_changelog_knows_its_version(project) -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or f"## [{project['project']['version']}]" in text


def test_every_node_is_in_a_workflow_that_has_a_thumbnail() -> None:
    """As a newcomer meets it: open the template, press Run."""
    pytest.importorskip("torch")
    from retort.nodes import NODES

    shown = set()
    for path in (ROOT / "workflows").glob("*.json"):
        assert path.with_suffix(".jpg").is_file(), f"{path.name} has no thumbnail"
        shown |= {node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    # The panel opens the grid with the names of a run.
    missing = {node.define_schema().node_id for node in NODES} - shown - {"RetortLoraGrid"}
    assert not missing, f"in no workflow: {', '.join(sorted(missing))}"
