"""Builds the archive that the registry serves, and says everything that is wrong with it.

python .ci/archive.py [FILE]             packs what git tracks into dist/retort-VERSION.zip, and checks it
python .ci/archive.py --imports [FILE]   imports its modules too, in a new environment with requirements.txt alone

The same files as `comfy node pack` takes: what git tracks, less .comfyignore, with [tool.comfy] includes first of all.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 80_000_000
# The registry's scanner warns of these today and is to refuse them.
SCANNED = "S102,S307,E702"
NOT_SERVED = {".ci", ".git", ".github", ".venv", "tests"}
# Who may start processes: each is short and reviewed. benchmarks/ measures programs and runs in no ComfyUI.
STARTS_PROCESSES = {"install.py", "hosts/jobs/starter.py"}
ACCELERATORS = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal"}


def git(root: Path, *arguments: str) -> list[str]:
    """Paths that git names, with `-z` among the arguments."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return [path for path in done.stdout.split("\0") if path]


def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def listing(root: Path) -> list[str]:
    """The archive's files, sorted. `includes` are folders or files that go in whatever the two ignore files say."""
    kept = set(git(root, "ls-files", "-z"))
    if (root / ".comfyignore").is_file():
        kept -= set(git(root, "ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore"))
    for include in project(root)["tool"]["comfy"].get("includes", []):
        place = root / include
        inside = place.rglob("*") if place.is_dir() else [place]
        kept |= {path.relative_to(root).as_posix() for path in inside if path.is_file()}
    return sorted(kept)


def build(root: Path, target: Path) -> list[str]:
    """Write the archive of `root` and return its files; the same tree gives the same bytes."""
    names = listing(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (root / name).read_bytes(), zipfile.ZIP_DEFLATED)
    return names


# ---- what can be wrong with it -------------------------------------------------------------------


def uncommitted(root: Path, names: Sequence[str]) -> Iterator[str]:
    """A release is a commit: files that differ from it."""
    changed = {*git(root, "diff", "--name-only", "-z", "HEAD"), *git(root, "ls-files", "-z", "--others")}
    for name in sorted(changed & set(names)):
        yield f"{name}: is not as git has it; commit it first"


def content_faults(archive: Path, tracked: Sequence[str]) -> Iterator[str]:
    """Of the size and of the names."""
    size = archive.stat().st_size
    if size >= MOST_BYTES:
        yield f"{archive.name}: {size / 1e6:.1f} MB, and it must stay below {MOST_BYTES / 1e6:.0f} MB"
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        if (broken := opened.testzip()) is not None:
            yield f"{broken}: does not unpack"
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name:
            yield f"{name}: leaves the folder that it is unpacked to"
        if NOT_SERVED & set(parts[:-1]) or "__pycache__" in parts or name.endswith((".pyc", ".zip")):
            yield f"{name}: is of no use inside ComfyUI; name it in .comfyignore"
        if name not in tracked:
            yield f"{name}: is not in git"
    for name in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        if name not in names:
            yield f"{name}: is missing"


def code_faults(folder: Path) -> Iterator[str]:
    """Of what the scanner of the registry reads: evaluated text, pickles, packages installed at run time, processes."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--output-format", "concise"]
    done = subprocess.run([*command, "--select", SCANNED, "."], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        yield from (done.stdout or done.stderr).splitlines()
    checks = load("retort_imports", ROOT / "tests" / "test_imports.py")
    yield from checks.import_faults(folder)
    yield from checks.call_faults(folder)
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        if name not in STARTS_PROCESSES and not name.startswith("benchmarks/"):
            found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            if {"subprocess", "pty"} & found:
                yield f"{name}: starts processes; hosts/jobs/starter.py does that for everyone"
        for node in nodes:
            # As an argument of its own: help that says "pip install ..." to a reader installs nothing.
            if isinstance(node, ast.Constant) and node.value in ("pip", "uv", "ensurepip") and name != "install.py":
                yield f"{name}:{node.lineno}: a pack may not install packages when it runs"


def metadata_faults(folder: Path) -> Iterator[str]:
    """Of what the registry reads in pyproject.toml."""
    of = project(folder)
    about, comfy = of["project"], of["tool"]["comfy"]
    if not re.fullmatch(r"[A-Za-z](?:[-._]?[A-Za-z0-9])*", about["name"]) or len(about["name"]) >= 100:
        yield f"name {about['name']!r}: letters, digits and single - _ . between them, fewer than 100"
    if "comfyui" in about["name"].lower():
        yield f"name {about['name']!r}: must not hold 'ComfyUI'"
    if not re.fullmatch(r"\d+\.\d+\.\d+", about["version"]):
        yield f"version {about['version']!r}: must be X.Y.Z"
    for field in ("description", "license", "requires-python"):
        if not about.get(field):
            yield f"[project] {field}: is missing"
    classifiers = about["classifiers"]
    if not any(line.startswith("Operating System :: ") for line in classifiers):
        yield "classifiers: name no operating system"
    given = {line.rpartition(" :: ")[2] for line in classifiers if line.startswith("Environment :: GPU :: ")}
    if given != ACCELERATORS:
        yield f"classifiers: accelerators are {sorted(given)}, expected {sorted(ACCELERATORS)}"
    if any(line.startswith("Environment :: ") and ":: GPU ::" not in line for line in classifiers):
        # One classifier that it does not know makes the registry drop all of them.
        yield "classifiers: an Environment that the registry does not know"
    for field in ("PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"):
        if not comfy.get(field):
            yield f"[tool.comfy] {field}: is missing"
    if not re.fullmatch(r">=\d+\.\d+\.\d+", comfy.get("requires-comfyui", "")):
        yield "[tool.comfy] requires-comfyui: give a floor as >=X.Y.Z"
    home = about.get("urls", {}).get("Repository", "")
    if not home.startswith("https://"):
        yield "[project.urls] Repository: give its https address"
    for field in ("Icon", "Banner"):
        address = comfy.get(field, "")
        picture = address.removeprefix(f"{home}/raw/main/")
        if picture == address or not (folder / picture).is_file():
            yield f"[tool.comfy] {field}: {address!r} is no file of this archive below {home}/raw/main/"


def optional_packages(root: Path) -> list[str]:
    """What the extras install, by the names that it is imported under."""
    lines = [line for extra in project(root)["project"]["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[\s<>=~;\[]", line, maxsplit=1)[0] for line in lines} - {"retort", "torch"}
    return sorted("sklearn" if name == "scikit-learn" else name.replace("-", "_") for name in names)


def import_faults(python: Path, folder: Path) -> Iterator[str]:
    """Of importing every module of an unpacked archive with `python`, no optional package being there."""
    command = [str(python), "-I", str(ROOT / ".ci" / "import_all.py"), str(folder), *optional_packages(folder)]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    if done.returncode:
        yield from (done.stdout + done.stderr).splitlines()


def faults(archive: Path, folder: Path, tracked: Sequence[str]) -> Iterator[str]:
    """Everything wrong with the archive of which `folder`, empty before, becomes the unpacked copy."""
    found = list(content_faults(archive, tracked))
    yield from found
    if not found:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
        yield from code_faults(folder)
        yield from metadata_faults(folder)


# ---- the command ---------------------------------------------------------------------------------


def load(name: str, path: Path) -> ModuleType:
    """A file as a module, registered because dataclasses look their module up."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_environment(place: Path, folder: Path) -> Path:
    """An environment with requirements.txt alone, and torch, which ComfyUI brings; its Python."""
    install = load("retort_install", ROOT / "install.py")
    venv.create(place, with_pip=True)
    python = install.venv_python(place)
    torch, sources = "torch", []
    if install.wants_cpu_torch():
        torch = install.cpu_constraints((ROOT / "constraints.txt").read_text(encoding="utf-8"))[1]
        sources = install.cpu_sources(python, torch)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", *sources]
    subprocess.run([*pip, "--requirement", str(folder / "requirements.txt"), torch], check=True)
    return Path(python)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("file", nargs="?", type=Path, help="default: dist/retort-VERSION.zip")
    arguments.add_argument("--imports", action="store_true", help="import every module in a new environment (minutes)")
    given = arguments.parse_args()
    target = given.file or ROOT / "dist" / f"retort-{project(ROOT)['project']['version']}.zip"
    names = build(ROOT, target)
    sys.stdout.write(f"{target}: {len(names)} files, {target.stat().st_size / 1e6:.1f} MB\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "Retort"
        found = [*uncommitted(ROOT, names), *faults(target, folder, git(ROOT, "ls-files", "-z"))]
        if given.imports and not found:
            found += import_faults(new_environment(Path(scratch) / "venv", folder), folder)
    for fault in found:
        sys.stderr.write(f"{fault}\n")
    sys.stdout.write(f"{len(found)} faults\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
