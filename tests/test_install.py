"""install.py: what it does to a ComfyUI folder, to a web UI and to nobody, and which torch it asks for."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def install() -> ModuleType:
    """A fresh copy of install.py as a module, free to be patched."""
    spec = importlib.util.spec_from_file_location("retort_install", ROOT / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def comfy_folder(tmp_path: Path) -> Path:
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    (tmp_path / "ComfyUI" / "comfy").mkdir()
    return tmp_path / "ComfyUI"


def fake_webui(folder: Path) -> None:
    """A `launch` that writes down what it is asked, in the layout of A1111 and Forge; only tqdm is missing."""
    (folder / "modules").mkdir()
    (folder / "modules" / "launch_utils.py").touch()
    (folder / "launch.py").write_text(
        "def is_installed(name):\n    return name not in ('tqdm', 'peft')\n"
        "def run_pip(command, desc=None):\n    open('asked.txt', 'a').write(command + '\\n')\n"
    )


# ---- no argument ----


def test_no_argument_changes_nothing_and_imports_nothing_heavy(tmp_path: Path) -> None:
    files = ("install.py", "requirements.txt")
    for name in files:
        shutil.copy(ROOT / name, tmp_path)
    code = (
        "import json, runpy, sys\n"
        "sys.argv = ['install.py']\n"
        "try:\n    runpy.run_path('install.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print(json.dumps([end.code, sorted(sys.modules)]))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    status, modules = json.loads(done.stdout)
    assert status == 0
    heavy = {"torch", "numpy", "scipy", "safetensors", "diffusers", "transformers", "pip", "setuptools", "retort"}
    assert not {name.split(".")[0] for name in modules} & heavy
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_no_argument_asks_a_webui_only_for_what_is_missing(tmp_path: Path) -> None:
    fake_webui(tmp_path)
    for _ in range(2):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        subprocess.run([sys.executable, ROOT / "install.py"], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "asked.txt").read_text() == 'install "tqdm"\n' * 2


def test_a_package_that_is_only_called_launch_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text("raise RuntimeError('this is not a web UI')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, ROOT / "install.py"], cwd=tmp_path, env=environment, check=True)


# ---- link ----


def test_link_puts_the_plugin_in_place_and_twice_is_once(install, comfy_folder: Path, capsys) -> None:
    assert install.main(["link", str(comfy_folder)]) == 0
    place = comfy_folder / "custom_nodes" / "Retort"
    assert place.samefile(ROOT)
    assert (place / "__init__.py").is_file()
    assert install.main(["link", str(comfy_folder)]) == 0
    assert "already linked" in capsys.readouterr().out
    assert [path.name for path in (comfy_folder / "custom_nodes").iterdir()] == ["Retort"]


def test_link_is_content_when_the_folder_already_lies_there(install, comfy_folder: Path, monkeypatch, capsys) -> None:
    clone = comfy_folder / "custom_nodes" / "retort-clone"
    clone.mkdir()
    monkeypatch.setattr(install, "ROOT", clone)
    assert install.main(["link", str(comfy_folder)]) == 0
    assert "already in place" in capsys.readouterr().out
    assert [path.name for path in (comfy_folder / "custom_nodes").iterdir()] == ["retort-clone"]


def test_link_says_what_is_wrong_with_the_path(install, tmp_path: Path, comfy_folder: Path, capsys) -> None:
    assert install.main(["link", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert install.main(["link", str(tmp_path)]) == 2
    assert f"did you mean {comfy_folder}" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert install.main(["link", str(tmp_path / "empty")]) == 2
    assert "not a ComfyUI folder" in capsys.readouterr().err


@pytest.mark.parametrize("taken", ["folder", "link", "dangling link"])
def test_link_never_takes_a_place_that_is_taken(install, comfy_folder: Path, tmp_path: Path, taken, capsys) -> None:
    place, other = comfy_folder / "custom_nodes" / "Retort", tmp_path / "other"
    if taken == "folder":
        place.mkdir()
    else:
        other.mkdir()
        install.make_link(place, other)
        if taken == "dangling link":
            other.rmdir()
    assert install.main(["link", str(comfy_folder)]) == 2
    told = capsys.readouterr().err
    assert "move it away" in told
    assert ("is a folder of its own" if taken == "folder" else str(other)) in told
    assert not (place.exists() and place.samefile(ROOT))


@pytest.fixture
def forge_folder(tmp_path: Path) -> Path:
    (tmp_path / "webui" / "extensions").mkdir(parents=True)
    fake_webui(tmp_path / "webui")
    return tmp_path / "webui"


def test_link_gives_a_webui_the_part_that_it_reads(install, forge_folder: Path, capsys) -> None:
    assert install.main(["link", str(forge_folder)]) == 0
    place = forge_folder / "extensions" / "Retort"
    assert place.samefile(ROOT / "extensions" / "webui")
    assert [path.name for path in (place / "scripts").glob("*.py")] == ["retort.py"]
    assert not (place / "install.py").exists(), "the web UI would run it at every start, and it has nothing to do"
    assert "restart the web UI" in capsys.readouterr().out
    assert install.main(["link", str(forge_folder)]) == 0
    assert "already linked" in capsys.readouterr().out


def test_link_finds_a_webui_in_the_folder_given(install, forge_folder: Path, capsys) -> None:
    assert install.main(["link", str(forge_folder.parent)]) == 2
    assert f"did you mean {forge_folder}" in capsys.readouterr().err


# ---- which torch ----


@pytest.mark.parametrize(
    ("system", "listed", "expected"),
    [
        ("Linux", "GPU 0: NVIDIA H200 (UUID: GPU-1)", False),
        ("Linux", "", True),
        ("Linux", None, True),
        ("Windows", None, False),
        ("Darwin", None, False),
    ],
)
def test_the_cpu_build_is_asked_for_on_linux_without_a_card(
    install, monkeypatch, tmp_path: Path, system, listed, expected
) -> None:
    def answer(command, **_):
        return subprocess.CompletedProcess(command, 0 if listed else 9, stdout=listed or "", stderr="")

    tool = tmp_path / "nvidia-smi"
    tool.touch()
    real_is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: "nvidia" not in str(path) and real_is_dir(path))
    monkeypatch.setattr(install.platform, "system", lambda: system)
    monkeypatch.setattr(install.shutil, "which", lambda _: None if listed is None else str(tool))
    monkeypatch.setattr(install.subprocess, "run", answer)
    assert install.wants_cpu_torch() is expected


def test_a_driver_that_hangs_counts_as_no_card(install, monkeypatch, tmp_path: Path) -> None:
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    tool = tmp_path / "nvidia-smi"
    tool.touch()
    real_is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: "nvidia" not in str(path) and real_is_dir(path))
    monkeypatch.setattr(install.shutil, "which", lambda _: str(tool))
    monkeypatch.setattr(install.subprocess, "run", hang)
    assert install.has_nvidia_gpu() is False


def test_the_cpu_pin_changes_torch_and_nothing_else(install) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    changed, pin = install.cpu_constraints(text)
    assert pin == "torch==2.13.0+cpu"
    different = [(a, b) for a, b in zip(text.splitlines(), changed.splitlines(), strict=True) if a != b]
    assert different == [("torch==2.13.0", pin)]
    with pytest.raises(install.InstallError, match="torch==X.Y.Z"):
        install.cpu_constraints("numpy==2.0\n")


@pytest.mark.parametrize(("offered", "index"), [(True, False), (False, True)])
def test_pytorchs_index_is_asked_only_when_no_cpu_build_is_offered(
    install, monkeypatch, tmp_path: Path, offered, index
) -> None:
    calls: list[list[str]] = []

    def run(command, quiet=False):
        calls.append([str(part) for part in command])
        return 1 if "--dry-run" in command and not offered else 0

    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "make_venv", lambda python: None)
    monkeypatch.setattr(install, "wants_cpu_torch", lambda: True)
    monkeypatch.setattr(install, "run", run)
    install.ensure_installed()
    assert len(calls) == 2
    assert (install.PYTORCH_CPU in calls[-1]) is index
    assert "torch==2.13.0+cpu" in (tmp_path / "constraints-cpu.txt").read_text()
    install.ensure_installed()
    assert len(calls) == 2, "nothing changed, so nothing is installed again"
    monkeypatch.setattr(install, "fingerprint", lambda: "changed")
    install.ensure_installed()
    assert len(calls) == 4


def test_a_failed_installation_is_tried_again(install, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "make_venv", lambda python: None)
    monkeypatch.setattr(install, "wants_cpu_torch", lambda: False)
    monkeypatch.setattr(install, "run", lambda command, quiet=False: 1)
    assert install.main(["demo"]) == 2
    assert "pip ended with code 1" in capsys.readouterr().err
    assert not (tmp_path / "retort-installed.txt").exists()


# ---- the rest of the command line ----


def test_the_first_failing_check_gives_the_exit_code(install, monkeypatch, capsys) -> None:
    codes = {"ruff": 0, "mypy": 0, "pytest": 5}
    ran: list[str] = []

    def run(command, quiet=False, into=None):
        ran.append(command[2])
        if into is not None:
            into.write("what it says")
        return codes[command[2]]

    monkeypatch.setattr(install, "ensure_installed", lambda: Path("python"))
    monkeypatch.setattr(install, "run", run)
    assert install.main(["test", "-k", "nothing"]) == 5
    assert "mypy: what it says" in capsys.readouterr().out
    codes["mypy"] = 1
    assert install.main(["test"]) == 1
    codes["ruff"] = 2
    assert install.main(["test"]) == 2
    assert sorted(ran) == sorted(["ruff", "mypy", "pytest"] * 3), "one failing check does not hide the next"


@pytest.mark.parametrize("arguments", [["dmeo"], ["link"], ["demo", "fast"]])
def test_an_unknown_command_names_the_known_ones(install, capsys, arguments) -> None:
    assert install.main(arguments) == 2
    assert "demo, test [ARGUMENTS], link PATH" in capsys.readouterr().err
