"""Which folder may import which, read from the imports themselves, and the few calls that nobody may make."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS_OF_NO_CODE = {"output", "build", "dist", "node_modules", "__pycache__"}

PURE = ("sampling", "rewards", "restoration", "trainers.objectives")
MATHS = {"torch", "numpy", "scipy", "einops", "tqdm"}
# ComfyUI's own top-level modules; `nodes` and `models` among them are why imports inside the package are relative.
COMFYUI = {
    "comfy", "comfy_api", "comfy_extras", "comfy_execution", "comfyui_version", "folder_paths", "execution", "server",
    "nodes",
}  # fmt: skip
NEVER = {"torchvision", "torchaudio", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# A second or more each: ComfyUI's start must not wait for them, so they are imported where they are used.
SLOW = {"accelerate", "diffusers", "peft", "sklearn", "transformers"}
# These stand outside the package or start without it, and so spell its name.
SPELLS_ITS_NAME = ("tests", "benchmarks", "hosts.job", "extensions.webui")


@dataclass(frozen=True)
class Rule:
    """What a folder may import: folders of ours, and other packages (the standard library always)."""

    folders: tuple[str, ...]
    packages: frozenset[str] | None = None  # None: any
    banned: frozenset[str] = field(default_factory=frozenset)


STORES = ("files", "preferences")
RULES = {
    **{folder: Rule(PURE, frozenset(MATHS)) for folder in PURE},
    "files": Rule(("files",), banned=frozenset(COMFYUI | {"diffusers"})),
    "preferences": Rule((*PURE, *STORES), banned=frozenset(COMFYUI | {"diffusers"})),
    "trainers": Rule((*PURE, *STORES, "trainers"), banned=frozenset(COMFYUI | {"diffusers"})),
    "models": Rule((*PURE, "files", "trainers", "models"), banned=frozenset(COMFYUI)),
    # The root is how the graphs reach the node classes: they ask it for `comfy_entrypoint`, as ComfyUI does.
    "graphs": Rule((*PURE, *STORES, "models", "hosts", "graphs", ""), banned=frozenset(COMFYUI)),
    "hosts": Rule((*PURE, *STORES, "trainers", "models", "hosts", "graphs")),
    "hosts.headless": Rule((*PURE, *STORES, "trainers", "models", "hosts"), banned=frozenset(COMFYUI)),
    "nodes": Rule((*PURE, *STORES, "trainers", "nodes", "hosts.api"), frozenset(MATHS)),
    "benchmarks": Rule((*PURE, *STORES, "trainers", "models", "hosts", "graphs", "benchmarks", "")),
    # gradio and modules are the web UI's.
    "extensions.webui": Rule(("sampling",), frozenset(MATHS | {"gradio", "modules"})),
    "": Rule(("nodes", "hosts.api"), frozenset()),
}


@dataclass(frozen=True)
class Import:
    """One imported name: `module` is a path inside the package (ours) or a package of others."""

    line: int
    module: str
    ours: bool
    relative: bool
    top: bool  # runs when the file is imported


def sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part.startswith(".") or part in FOLDERS_OF_NO_CODE for part in parts[:-1]):
            yield path


def module_of(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, folder: str) -> bool:
    """True when `module` is `folder` or lies in it; the root folder "" is only itself."""
    return module == folder or (folder != "" and module.startswith(folder + "."))


def at_import(tree: ast.Module) -> set[ast.AST]:
    """Nodes that run when the module is imported: not those in functions, nor under `if TYPE_CHECKING`."""
    found: set[ast.AST] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        found.add(node)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return found


@cache
def imports(root: Path, path: Path, text: str) -> tuple[Import, ...]:
    """What a file with this text imports; read once for all the tests."""
    return tuple(_imports(root, path, ast.parse(text)))


def _imports(root: Path, path: Path, tree: ast.Module) -> Iterator[Import]:
    module, is_package = module_of(root, path), path.name == "__init__.py"
    here = [part for part in module.split(".") if part]
    top = at_import(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                ours = first == "retort"
                yield Import(node.lineno, rest if ours else alias.name, ours, False, node in top)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                up = node.level - is_package
                assert up <= len(here), f"{path}:{node.lineno}: relative import leaves the package"
                base = [*here[: len(here) - up], *(node.module.split(".") if node.module else [])]
            else:
                first, _, rest = (node.module or "").partition(".")
                if first != "retort":
                    yield Import(node.lineno, node.module or "", False, False, node in top)
                    continue
                base = rest.split(".") if rest else []
            for alias in node.names:
                # `from ..hosts import api` imports hosts.api; `from ..hosts.api import io` imports hosts.api too.
                inner = root.joinpath(*base, alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                target = ".".join([*base, alias.name] if is_module else base)
                yield Import(node.lineno, target, True, bool(node.level), node in top)
                if alias.name.startswith("_") and base and base[0] != (here or [""])[0]:
                    yield Import(node.lineno, f"{target}:{alias.name}", True, bool(node.level), node in top)


def folder_of(module: str) -> str | None:
    """The most particular folder that has a rule, or None for a module outside every folder."""
    folders = [folder for folder in RULES if within(module, folder)]
    return max(folders, key=len) if folders else None


def import_faults(root: Path) -> Iterator[str]:
    for path in sources(root):
        where, module = path.relative_to(root).as_posix(), module_of(root, path)
        folder = folder_of(module)
        for found in imports(root, path, path.read_text(encoding="utf-8")):
            at = f"{where}:{found.line}: imports {found.module or 'the root'}"
            outside = found.module.split(".")[0]
            if not found.ours and outside in NEVER:
                yield f"{at}, which nothing here may import"
            if folder is None:
                continue
            rule = RULES[folder]
            if found.ours:
                target, _, private = found.module.partition(":")
                if not any(within(target, allowed) for allowed in rule.folders):
                    yield f"{at}, but {folder or 'the root'} may import only {', '.join(filter(None, rule.folders))}"
                if private:
                    yield f"{at}: a name with an underscore is private to its folder"
                if not found.relative and not any(within(module, name) for name in SPELLS_ITS_NAME):
                    yield f"{at} as retort.*: imports inside the package are relative"
            elif outside not in sys.stdlib_module_names:
                if outside in rule.banned or (rule.packages is not None and outside not in rule.packages):
                    yield f"{at}, which {folder or 'the root'} may not import"
                if outside in SLOW and found.top and folder != "benchmarks":
                    yield f"{at} at import time; import it in the function that uses it"


def call_faults(root: Path) -> Iterator[str]:
    for path in sources(root):
        where = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            named = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            called = ast.unparse(node.func) if named in ("eval", "exec", "load") or node.keywords else ""
            if called in ("eval", "exec", "torch.load") or any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in node.keywords
            ):
                yield f"{where}:{node.lineno}: calls {called}, which can run what a file says"


def long_files(root: Path) -> Iterator[str]:
    for path in sources(root):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 600:
            yield f"{path.relative_to(root).as_posix()} has {lines} lines; split it by subject at 600"


def circle(root: Path) -> list[str]:
    """Files that import each other in a ring, at import time or later; empty where there is none."""
    known = {module_of(root, path): path for path in sources(root)}
    imported: dict[str, set[str]] = {}
    for module, path in known.items():
        found = imports(root, path, path.read_text(encoding="utf-8"))
        imported[module] = {one.module for one in found if one.ours} & known.keys() - {module}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_in_a_ring() -> None:
    assert not circle(ROOT)


def test_a_ring_is_seen(tmp_path: Path) -> None:
    for name in ("files", "hosts/search"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "files" / "a.py").write_text("from . import b", encoding="utf-8")
    (tmp_path / "files" / "b.py").write_text("def f():\n    from ..hosts.search import c", encoding="utf-8")
    (tmp_path / "hosts" / "search" / "c.py").write_text("from ...files import d", encoding="utf-8")
    (tmp_path / "files" / "d.py").touch()
    assert not circle(tmp_path)
    (tmp_path / "files" / "d.py").write_text("from .a import name", encoding="utf-8")
    assert {"files.a", "files.b", "hosts.search.c", "files.d"} == set(circle(tmp_path))


def test_every_import_goes_allowed() -> None:
    assert not list(import_faults(ROOT))


def test_no_call_runs_what_a_file_says() -> None:
    assert not list(call_faults(ROOT))


def test_no_file_outgrows_a_reading() -> None:
    assert not list(long_files(ROOT))


def test_there_is_something_to_read() -> None:
    read = {module_of(ROOT, path).split(".")[0] for path in sources(ROOT)}
    assert {"sampling", "hosts", "nodes", "models", "install", "tests", ""} <= read


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("sampling/a.py", "import comfy.samplers"),
        ("sampling/a.py", "def f():\n    import diffusers"),
        ("sampling/a.py", "from ..hosts import api"),
        ("sampling/a.py", "from .. import hosts"),
        ("sampling/a.py", "from ..rewards.clip import _score"),
        ("trainers/objectives/a.py", "from ..engine import Engine"),
        ("trainers/objectives/a.py", "import peft"),
        ("trainers/engine.py", "import folder_paths"),
        ("models/a.py", "from ..hosts.headless import host"),
        ("nodes/a.py", "from ..hosts.headless import host"),
        ("nodes/a.py", "from ..hosts.comfyui.sampler import DistilledSampler"),
        ("nodes/a.py", "from comfy_api.latest import io"),
        ("nodes/a.py", "from ..models import digits"),
        ("hosts/a.py", "from ..nodes import RetortExtension"),
        ("hosts/a.py", "from .. import nodes"),
        ("hosts/comfyui/a.py", "import diffusers"),
        ("hosts/headless/a.py", "import comfy"),
        ("hosts/headless/a.py", "from ...graphs import run"),
        ("files/a.py", "from ..sampling import path"),
        ("preferences/a.py", "from ..trainers import loop"),
        ("hosts/a.py", "import retort.sampling"),
        ("benchmarks/a.py", "from retort.nodes import RetortExtension"),
        ("__init__.py", "from .hosts.comfyui import host"),
        ("__init__.py", "import torch"),
        ("hosts/a.py", "import torchvision"),
        ("tests/a.py", "import torchaudio"),
        ("models/a.py", "import pickle"),
        ("extensions/webui/scripts/a.py", "import comfy"),
        ("extensions/webui/scripts/a.py", "import retort.nodes"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path: Path, file: str, text: str) -> None:
    folders = ("hosts/headless", "hosts/comfyui", "nodes", "trainers/objectives", "models", "rewards", "tests")
    for folder in (*folders, "files", "preferences", "graphs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sampling").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "extensions" / "webui" / "scripts").mkdir(parents=True)
    (tmp_path / "hosts" / "api.py").touch()
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert list(import_faults(tmp_path))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("sampling/a.py", "import math\nimport torch\nfrom .path import VE\nfrom ..rewards.clip import score"),
        ("nodes/a.py", "from ..hosts import api\nfrom ..hosts.api import io\nfrom ..sampling.path import VE"),
        ("hosts/headless/a.py", "def f():\n    import diffusers"),
        ("graphs/a.py", "from .. import comfy_entrypoint\nfrom ..hosts.headless import host"),
        ("hosts/job.py", "import retort.hosts"),
        (
            "extensions/webui/scripts/a.py",
            "import gradio\nfrom modules import scripts\nfrom retort.sampling import path",
        ),
        ("benchmarks/a.py", "import diffusers\nfrom retort.hosts.api import host"),
        ("__init__.py", "async def comfy_entrypoint():\n    from .nodes import RetortExtension"),
    ],
)
def test_an_allowed_import_is_let_through(tmp_path: Path, file: str, text: str) -> None:
    for folder in ("hosts/headless", "graphs", "nodes", "sampling", "benchmarks", "extensions/webui/scripts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "hosts" / "api.py").touch()
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert not list(import_faults(tmp_path))


@pytest.mark.parametrize("text", ["eval('1')", "exec('1')", "torch.load('x')", "np.load('x', allow_pickle=True)"])
def test_a_forbidden_call_is_seen(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    assert list(call_faults(tmp_path))
    (tmp_path / "a.py").write_text("model.eval()\nnp.load('x', allow_pickle=False)", encoding="utf-8")
    assert not list(call_faults(tmp_path))


def test_a_long_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("\n" * 601, encoding="utf-8")
    assert list(long_files(tmp_path))
