"""Installs Retort: nothing to do inside ComfyUI, and `demo`, `test` and `link` for everyone else.

python install.py                     what a plugin manager calls; does nothing inside ComfyUI
python install.py demo                makes .venv, installs, runs the quick start, leaves a contact sheet and a table
python install.py test [ARGUMENTS]    makes .venv, installs, runs ruff, mypy and pytest (ARGUMENTS are pytest's)
python install.py link PATH           puts this folder into the ComfyUI at PATH, or its web UI part into a Forge Neo

Standard library only and nothing heavy imported: A1111 and Forge run this file at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
EXTRAS = "test"
NOT_IN_WEBUI = ("peft", "segno")  # nothing is trained or picked there
MOST_PROCESSES = 4  # of pytest; each imports torch
PYTORCH_CPU = "https://download.pytorch.org/whl/cpu"
# What an installation depends on: a change in any of them, or a move of the folder, installs again.
INPUTS = ("constraints.txt", "requirements.txt", "pyproject.toml")


class InstallError(Exception):
    """Something the user can put right; the message says what."""


def say(text: str) -> None:
    sys.stdout.write(f"[retort] {text}\n")
    sys.stdout.flush()


def run(command: Sequence[str | Path], quiet: bool = False, into: IO[str] | None = None) -> int:
    """Run a program in the repository root, without a shell; its exit code. into: a file for what it says."""
    sink = subprocess.DEVNULL if quiet else into
    argv = [str(part) for part in command]
    # pip is told not to compile all it installs, so what is used must be compiled and kept at its first import.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
    ).returncode


# ---- no argument: what a plugin manager calls ----------------------------------------------------


def inside_webui() -> bool:
    """True when A1111's or Forge's own `launch` module is what `import launch` would give."""
    spec = importlib.util.find_spec("launch")
    # Other packages are called launch too; only the web UI keeps its helpers in modules/ beside it.
    return bool(spec and spec.origin and (Path(spec.origin).parent / "modules" / "launch_utils.py").is_file())


def requirements(text: str) -> list[str]:
    """The requirement lines of a requirements.txt, without comments."""
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def install_for_manager() -> None:
    """Install what is missing under A1111 or Forge; ComfyUI's manager has read requirements.txt already."""
    if not inside_webui():
        return
    launch = importlib.import_module("launch")
    for line in requirements((ROOT / "requirements.txt").read_text(encoding="utf-8")):
        name = re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0]
        if name not in NOT_IN_WEBUI and not launch.is_installed(name):
            launch.run_pip(f'install "{line}"', f"{name} for Retort")


# ---- the virtual environment ---------------------------------------------------------------------


def has_nvidia_gpu() -> bool:
    """True when an NVIDIA driver answers. `nvidia-smi` alone proves nothing: containers carry it without a card."""
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir() and any(gpus.iterdir()):
        return True
    places = [shutil.which("nvidia-smi"), "/usr/lib/wsl/lib/nvidia-smi"]
    if platform.system() == "Windows":
        places.append(os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvidia-smi.exe"))
    for place in places:
        if place and os.path.isfile(place):
            # A driver that hangs must not hang the installation.
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                listed = subprocess.run([place, "-L"], capture_output=True, text=True, timeout=20)
                if listed.returncode == 0 and "GPU" in listed.stdout:
                    return True
    return False


def wants_cpu_torch() -> bool:
    """True where the plain torch of PyPI is a CUDA build (Linux) and there is no card for it."""
    return platform.system() == "Linux" and not has_nvidia_gpu()


def cpu_constraints(text: str) -> tuple[str, str]:
    """Constraints with torch held to its CPU build, so that no index can slip a CUDA one in; and that torch's pin."""
    found = re.search(r"^torch==(\d[^\s+;]*)\s*$", text, flags=re.MULTILINE)
    if not found:
        raise InstallError("constraints.txt: no line 'torch==X.Y.Z'; restore the file from git")
    pin = f"torch=={found.group(1)}+cpu"
    return text[: found.start()] + pin + text[found.end() :], pin


def cpu_sources(python: Path, pin: str) -> list[str]:
    """Arguments by which pip finds torch's CPU build: none where one is at hand (find-links, a mirror)."""
    offer = [python, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", pin]
    if run(offer, quiet=True) == 0:
        return []
    # Offline this must end soon, with the caller's message.
    return ["--timeout", "30", "--retries", "2", "--extra-index-url", PYTORCH_CPU]


def venv_python(folder: Path = VENV) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint() -> str:
    """Hash of everything that an installation was made from."""
    digest = hashlib.sha256(f"{ROOT}|{sys.version_info[:2]}|{EXTRAS}".encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def make_venv(python: Path) -> None:
    """Create .venv, or create it anew when its interpreter no longer runs or is of another version."""
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}"
    check = f"import sys; sys.exit('%d.%d' % sys.version_info[:2] != '{wanted}')"
    if python.is_file() and run([python, "-c", check], quiet=True) == 0:
        return
    say(f"making {VENV} with Python {wanted}")
    try:
        venv.create(VENV, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InstallError(
            f"could not make {VENV}: {error}. On Debian and Ubuntu install python3-venv; "
            f"elsewhere delete {VENV} and check that the disk has room."
        ) from error


def ensure_installed() -> Path:
    """Make .venv if it is missing, install if its inputs changed, and return its Python."""
    python, stamp = venv_python(), VENV / "retort-installed.txt"
    make_venv(python)
    wanted = fingerprint()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    stamp.unlink(missing_ok=True)
    constraints, sources = ROOT / "constraints.txt", []
    if wants_cpu_torch():
        text, pin = cpu_constraints(constraints.read_text(encoding="utf-8"))
        constraints = VENV / "constraints-cpu.txt"
        constraints.write_text(text, encoding="utf-8")
        sources = cpu_sources(python, pin)
        say(f"no NVIDIA GPU found: {pin} from {sources[-1] if sources else 'the package index'}")
    say("installing; the first time takes a few minutes")
    # Twice --quiet: errors only. Compiling everything would double the time, for files that are mostly never imported.
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", "--quiet", "--quiet"]
    code = run([*pip, *sources, "--constraint", constraints, "--editable", f".[{EXTRAS}]"])
    if code != 0:
        hint = f" Is {PYTORCH_CPU} reachable? PyTorch's CPU build comes from there." if sources else ""
        raise InstallError(f"pip ended with code {code}; its message is above.{hint} Then run the same command again.")
    # mypy reads folders, not editable installs: here it finds the package under its name.
    source = VENV / "src" / "retort"
    source.parent.mkdir(exist_ok=True)
    if not os.path.lexists(source):
        make_link(source, ROOT)
    stamp.write_text(wanted, encoding="utf-8")
    return python


# ---- commands ------------------------------------------------------------------------------------


def demo() -> int:
    """Run the quick start on the embedded model."""
    return run([ensure_installed(), "-m", "retort.benchmarks.demo"])


def test(arguments: Sequence[str]) -> int:
    """Run ruff, mypy and pytest, all three, and return the first exit code that is not 0.

    mypy uses one core, so it goes beside pytest, which leaves cores idle at its beginning and end.
    """
    python = ensure_installed()
    # Each process uses one core. With ComfyUI, each would start servers of its own, so there it is one; -n overrules.
    processes = 0 if os.environ.get("COMFYUI_PATH") else min(os.cpu_count() or 1, MOST_PROCESSES)
    tests = ["pytest", "-n", str(processes), "--dist", "worksteal", *arguments]
    say("ruff check .")
    styled = run([python, "-m", "ruff", "check", "."])
    say(f"mypy, and {' '.join(tests)}")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told, ThreadPoolExecutor(1) as beside:
        typed = beside.submit(run, [python, "-m", "mypy"], into=told)
        tested = run([python, "-m", *tests])
        types = typed.result()
        told.seek(0)
        say(f"mypy: {told.read().strip()}")
    return next((code for code in (styled, types, tested) if code), 0)


def make_link(at: Path, to: Path) -> None:
    """A symbolic link, or on Windows a junction, which needs no administrator."""
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(to), str(at))
    else:
        at.symlink_to(to, target_is_directory=True)


def is_comfyui(path: Path) -> bool:
    return (path / "custom_nodes").is_dir() and (path / "comfy").is_dir()


def is_webui(path: Path) -> bool:
    return (path / "modules" / "launch_utils.py").is_file() and (path / "extensions").is_dir()


def link(path: Path) -> None:
    """Put this folder into the ComfyUI at `path`, as custom_nodes/Retort, or extensions/webui into the web UI there.

    A web UI reads `scripts` at the root of an extension, so it is given that part of this folder, as extensions/Retort.
    Doing it twice changes nothing. Raises InstallError when `path` is missing or neither, or when the place is taken.
    """
    if not path.is_dir():
        raise InstallError(f"link {path}: there is no such folder; give the folder that holds ComfyUI's main.py")
    if is_comfyui(path):
        host, folder, content = "ComfyUI", path / "custom_nodes", ROOT
    elif is_webui(path):
        host, folder, content = "the web UI", path / "extensions", ROOT / "extensions" / "webui"
    else:
        inner = next((path / name for name in ("ComfyUI", "webui") if (path / name).is_dir()), None)
        found = inner is not None and (is_comfyui(inner) or is_webui(inner))
        known = "main.py, comfy/ and custom_nodes/, or for Forge Neo launch.py, modules/ and extensions/"
        remedy = f"did you mean {inner}?" if found else f"give the folder that holds {known}"
        raise InstallError(f"link {path}: this is not a ComfyUI folder; {remedy}")
    if content.parent == folder.resolve():
        say(f"already in place: {content}")
        return
    place = folder / "Retort"
    if os.path.lexists(place):
        if place.exists() and place.samefile(content):
            say(f"already linked: {place}")
            return
        held = f"leads to {place.resolve()}" if place.resolve() != place.absolute() else "is a folder of its own"
        raise InstallError(f"link {path}: {place} exists and {held}; move it away, then run this again")
    try:
        make_link(place, content)
    except OSError as error:
        raise InstallError(f"link {path}: could not make {place}: {error}; check that you may write there") from error
    say(f"linked {place} to {content}; restart {host}")


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code: 2 for what the user can put right, otherwise the program's own."""
    command, *rest = arguments or [""]
    try:
        # Older interpreters parse this file, so that they can say what is wrong instead of a syntax error.
        if sys.version_info < (3, 10):  # noqa: UP036
            raise InstallError(f"Python {platform.python_version()} is too old; run this with Python 3.10 or newer")
        if not command:
            install_for_manager()
        elif command == "demo" and not rest:
            return demo()
        elif command == "test":
            return test(rest)
        elif command == "link" and len(rest) == 1:
            link(Path(rest[0]).expanduser())
        elif command in ("help", "-h", "--help"):
            sys.stdout.write(__doc__ or "")
        else:
            given = " ".join(arguments)
            raise InstallError(f"unknown command {given!r}; one of: demo, test [ARGUMENTS], link PATH")
    except InstallError as error:
        sys.stderr.write(f"[retort] {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
