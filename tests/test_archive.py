"""The archive that the registry serves: what is in it, and what must not be."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_archive() -> ModuleType:
    spec = importlib.util.spec_from_file_location("retort_archive", ROOT / ".ci" / "archive.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


archive = load_archive()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("archive") / "retort.zip"
    archive.build(ROOT, target)
    return target


@pytest.fixture(scope="module")
def unpacked(packed: Path) -> Path:
    folder = packed.parent / "ComfyUI" / "custom_nodes" / "Retort"
    with zipfile.ZipFile(packed) as opened:
        opened.extractall(folder)
    return folder


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# ---- ours ----


def test_our_archive_has_no_fault(packed: Path, tmp_path: Path) -> None:
    assert list(archive.faults(packed, tmp_path / "Retort", archive.git(ROOT, "ls-files", "-z"))) == []


def test_our_archive_imports_without_any_optional_package(unpacked: Path) -> None:
    before = files(unpacked)
    assert list(archive.import_faults(Path(sys.executable), unpacked)) == []
    assert {name for name in files(unpacked) if "__pycache__" not in name} == set(before), "an import writes nothing"


@pytest.mark.slow
@pytest.mark.skipif("RETORT_NEW_VENV" not in os.environ, reason="installs packages: set RETORT_NEW_VENV=1")
def test_our_archive_imports_in_a_new_environment(unpacked: Path, tmp_path: Path) -> None:
    python = archive.new_environment(tmp_path / "venv", unpacked)
    assert list(archive.import_faults(python, unpacked)) == []


def test_install_py_is_over_at_once_in_an_unpacked_archive(unpacked: Path, slowness: float) -> None:
    """ComfyUI's manager runs it after each installation, and a web UI in whose extensions it lies at every start."""
    code = (
        "import json, runpy, sys, time\n"
        "acts = []\n"
        "watched = ('subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.exec', 'os.fork', 'socket.connect',\n"
        "           'os.mkdir', 'os.remove', 'os.rename', 'urllib.Request')\n"
        "sys.addaudithook(lambda event, given: acts.append(event) if event in watched else None)\n"
        "began = time.perf_counter()\n"
        "sys.argv = ['install.py']\n"
        "try:\n    runpy.run_path('install.py', run_name='__main__')\n"
        "except SystemExit as end:\n    code = end.code\n"
        "print(json.dumps([code, acts, time.perf_counter() - began]))\n"
    )
    before = files(unpacked)
    command = [sys.executable, "-I", "-B", "-c", code]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=True)
    status, acts, seconds = json.loads(done.stdout)
    assert (status, acts) == (0, [])
    assert seconds < 2 * slowness, "well below 0.1 s on an idle machine"
    assert files(unpacked) == before


@pytest.mark.parametrize(("name", "size"), [("icon", (400, 400)), ("banner", (1260, 540))])
def test_the_pictures_have_the_sizes_that_the_registry_asks_for(unpacked: Path, name: str, size) -> None:
    picture = unpacked / "extensions" / "assets" / f"{name}.png"
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24]) == size
    assert picture.stat().st_size < 100_000
    assert picture.with_suffix(".svg").is_file()


# ---- anybody's ----


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name, text in {
        "pyproject.toml": '[tool.comfy]\nincludes = ["dist", "docs/kept.md"]\n',
        ".gitignore": "dist/\n",
        ".comfyignore": "# a comment\ndocs/\n*.bak\n!kept.bak\n/only_here.txt\n",
        "__init__.py": "",
        "a.bak": "",
        "kept.bak": "",
        "docs/kept.md": "",
        "docs/lost.md": "",
        "only_here.txt": "",
        "inner/only_here.txt": "",
        "name with ö and space.txt": "",
        "dist/built.js": "",
        "untracked.txt": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    for command in (["init", "-q"], ["add", "."], ["rm", "-q", "--cached", "untracked.txt"]):
        subprocess.run(["git", "-C", str(root), *command], check=True, capture_output=True)
    return root


def test_git_less_comfyignore_with_includes_first(repository: Path) -> None:
    assert archive.listing(repository) == sorted(
        [
            ".comfyignore",
            ".gitignore",
            "__init__.py",
            "dist/built.js",
            "docs/kept.md",
            "inner/only_here.txt",
            "kept.bak",
            "name with ö and space.txt",
            "pyproject.toml",
        ]
    )


def test_the_same_tree_makes_the_same_archive(repository: Path, tmp_path: Path) -> None:
    archive.build(repository, tmp_path / "a.zip")
    for path in repository.rglob("*.py"):
        os.utime(path, (1, 1_700_000_000))
    archive.build(repository, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_what_git_does_not_hold_is_told(repository: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(repository), *identity, "commit", "-qm", "one"], check=True)
    names = archive.listing(repository)
    assert [line.split(":")[0] for line in archive.uncommitted(repository, names)] == ["dist/built.js"]
    (repository / "__init__.py").write_text("changed = 1\n")
    assert any(line.startswith("__init__.py: is not as git has it") for line in archive.uncommitted(repository, names))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tests/test_a.py", "of no use inside ComfyUI"),
        ("nodes/__pycache__/a.pyc", "of no use inside ComfyUI"),
        ("../escaped.py", "leaves the folder"),
        ("stray.py", "is not in git"),
    ],
)
def test_a_file_that_does_not_belong_is_told(tmp_path: Path, name: str, told: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.writestr(name, "")
    tracked = [] if name == "stray.py" else [name]
    found = list(archive.content_faults(tmp_path / "a.zip", tracked))
    assert any(line.startswith(name) and told in line for line in found)
    assert "LICENSE: is missing" in found


def test_an_archive_that_is_too_large_is_told(packed: Path, monkeypatch) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES", packed.stat().st_size)
    found = list(archive.content_faults(packed, archive.git(ROOT, "ls-files", "-z")))
    assert len(found) == 1 and "must stay below" in found[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exec('1')", "S102"),
        ("eval('1')", "S307"),
        ("a = 1; b = 2", "E702"),
        ("import pickle", "imports pickle"),
        ("torch.load('a')", "torch.load"),
        ("import subprocess", "starts processes"),
        ("run([python, '-m', 'pip', 'install', 'einops'])", "may not install packages"),
    ],
)
def test_code_that_the_registry_would_flag_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.py").write_text(f"{text}\n")
    assert any(told in line for line in archive.code_faults(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "retort"', 'name = "ComfyUI-retort"', "must not hold"),
        ('name = "retort"', 'name = "1retort"', "letters, digits"),
        ('version = "', 'version = "v', "must be X.Y.Z"),
        ("Environment :: GPU :: Intel Arc", "Environment :: Console", "does not know"),
        ("Operating System :: OS Independent", "Topic :: Utilities", "no operating system"),
        ('Icon = "', 'Badge = "', "Icon: is missing"),
        ("assets/banner.png", "assets/none.png", "is no file of this archive"),
        ('requires-comfyui = ">=', 'requires-comfyui = "', "requires-comfyui"),
        ("[project.urls]", "[project.links]", "give its https address"),
    ],
)
def test_metadata_that_the_registry_would_refuse_is_told(tmp_path: Path, old: str, new: str, told: str) -> None:
    shutil.copytree(ROOT / "extensions" / "assets", tmp_path / "extensions" / "assets")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    assert list(archive.metadata_faults(tmp_path)) == []
    assert old in text
    (tmp_path / "pyproject.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    assert any(told in line for line in archive.metadata_faults(tmp_path))


def test_a_module_that_misses_a_package_is_told(tmp_path: Path) -> None:
    for name, text in {
        "pyproject.toml": '[project.optional-dependencies]\nextra = ["diffusers>=1"]\n[tool.comfy]\n',
        "__init__.py": "async def comfy_entrypoint():\n    return Pack()\nclass Pack:\n"
        "    async def get_node_list(self):\n        return [Node]\n"
        "class Node:\n    define_schema = staticmethod(int)\n",
        "nodes/__init__.py": "",
        "nodes/a.py": "import diffusers",
        "hosts/__init__.py": "",
        "hosts/a.py": "import diffusers",
        "sampling/__init__.py": "import warnings\nwarnings.warn('old')",
    }.items():
        (tmp_path / "Pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "Pack" / name).write_text(text)
    found = "\n".join(archive.import_faults(Path(sys.executable), tmp_path / "Pack"))
    assert "nodes/a.py: misses diffusers" in found
    assert "UserWarning: old" in found
    assert "hosts/a.py: misses" not in found
