"""Which names of ComfyUI we lean on, which of them a checkout lacks, and the integration tests against it.

python .ci/comfyui.py CHECKOUT [--list]                    the names that are gone (or all), from the sources alone
python .ci/comfyui.py CHECKOUT --tests [ARGUMENTS]         runs the integration tests too; ARGUMENTS are pytest's
python .ci/comfyui.py CHECKOUT --frontend STATIC --tests   with the page of another comfyui-frontend-package

Names of modules are read from our imports and from what is asked of them. Attributes of ComfyUI's objects cannot be:
OBJECTS lists them, and a name there that nothing of ours spells is refused. Exit code 1 where something is gone. Run it
by the Python that has ComfyUI's packages; for names alone any will do.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ("hosts", "models", "nodes", "benchmarks", "extensions/comfyui")
# ComfyUI's own top-level modules, which `comfy_api` promises nothing of.
THEIRS = (
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "main", "nodes", "server",
    "latent_preview", "protocol", "cuda_malloc", "utils", "app", "comfy_config", "comfyui_version",
)  # fmt: skip
# What is asked of objects: {class: attributes}.
OBJECTS: dict[str, tuple[str, ...]] = {
    "comfy.model_patcher.ModelPatcher": (
        "add_object_patch", "cached_patcher_init", "clone", "get_model_object", "model", "model_options",
        "object_patches", "object_patches_backup", "patches", "set_model_sampler_post_cfg_function",
        "add_wrapper_with_key", "load_device",
    ),
    "comfy.model_base.BaseModel": (
        "diffusion_model", "latent_format", "model_config", "model_sampling", "model_type", "process_latent_in",
        "process_latent_out", "state_dict_for_saving",
    ),
    "comfy.samplers.CFGGuider": (
        "inner_set_conds", "model_patcher", "original_conds", "predict_noise", "sample", "set_cfg", "set_conds",
    ),
    "comfy.sd.VAE": ("decode", "device", "encode", "first_stage_model", "patcher", "process_output", "vae_dtype"),
    "comfy.sd.CLIP": ("encode_from_tokens_scheduled", "patcher", "tokenize"),
    "comfy.latent_formats.LatentFormat": ("latent_channels", "latent_dimensions"),
    "server.PromptServer": (
        "add_on_prompt_handler", "app", "node_replace_manager", "routes", "send_progress_text", "send_sync",
        "trigger_on_prompt",
    ),
    "execution.PromptExecutor": ("caches", "execute", "history_result", "status_messages"),
    "execution.CacheSet": ("objects", "outputs"),
    "comfy_execution.caching.BasicCache": ("cache", "cache_key_set", "initialized", "subcaches"),
    "comfy_execution.caching.CacheKeySet": ("get_data_key",),
    "app.node_replace_manager.NodeReplaceManager": ("apply_replacements",),
    "comfy_api.latest._io._ComfyNodeBaseInternal": ("GET_NODE_INFO_V1", "GET_SCHEMA"),
}  # fmt: skip


def sources(root: Path) -> Iterator[Path]:
    for folder in OURS:
        yield from sorted((root / folder).rglob("*.py"))


def leant_on(root: Path) -> dict[str, str]:
    """{dotted name of a module's: the first place where ours use it}."""
    found: dict[str, str] = {}
    for path in sources(root):
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known: dict[str, str] = {}  # what a name in this file stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in THEIRS:
                        known[alias.asname or alias.name.split(".")[0]] = (
                            alias.name if alias.asname else alias.name.split(".")[0]
                        )
                        found.setdefault(alias.name, f"{where}:{node.lineno}")
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in THEIRS:
                for alias in node.names:
                    known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    found.setdefault(f"{node.module}.{alias.name}", f"{where}:{node.lineno}")
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                module = _imported(node.value)
                if module.split(".")[0] in THEIRS:
                    known[node.targets[0].id] = module
                    found.setdefault(module, f"{where}:{node.lineno}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
                first, _, rest = _dotted(node).partition(".")
                if first in known:
                    found.setdefault(f"{known[first]}.{rest}", f"{where}:{node.lineno}")
    return found


def _imported(node: ast.expr) -> str:
    """The module that `import_module("...")` names, else nothing."""
    called = isinstance(node, ast.Call) and _dotted(node.func).endswith("import_module") and len(node.args) == 1
    argument = node.args[0] if called and isinstance(node, ast.Call) else None
    return str(argument.value) if isinstance(argument, ast.Constant) else ""


def _dotted(node: ast.expr) -> str:
    """a.b.c of an attribute of names alone, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def gone(checkout: Path, name: str) -> bool:
    """Whether a checkout lacks a dotted name, as far as its sources tell: a module, its names, its classes' own."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        file = _module(checkout, parts[:length])
        if file is not None:
            rest = parts[length:]
            if not rest:
                return False
            if rest[0] not in _names(file):
                # A folder's modules are found by the longer prefixes.
                return True
            made = [node for node in _tree(file).body if isinstance(node, ast.ClassDef) and node.name == rest[0]]
            return len(rest) > 1 and bool(made) and rest[1] not in _own(checkout, made[0], frozenset())
    return not (checkout / Path(*parts)).is_dir()


def _module(checkout: Path, parts: list[str]) -> Path | None:
    place = checkout.joinpath(*parts)
    return next((one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8", errors="replace"))


@cache
def _names(path: Path) -> frozenset[str]:
    """What a module's top level defines, in branches and tries too."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(_tree(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Global):
            found |= set(node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        else:
            waiting.extend(ast.iter_child_nodes(node))
    return frozenset(found)


@cache
def _classes(checkout: Path) -> dict[str, list[ast.ClassDef]]:
    """ComfyUI's classes by name; several may share one."""
    found: dict[str, list[ast.ClassDef]] = {}
    folders = ("comfy", "comfy_api", "comfy_execution", "app")
    files = [*checkout.glob("*.py"), *(path for folder in folders for path in (checkout / folder).rglob("*.py"))]
    for path in files:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def _members(checkout: Path, name: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """Methods, attributes and what is set on `self`, of all classes of a name and of their bases."""
    return {one for made in _classes(checkout).get(name, ()) for one in _own(checkout, made, seen | {name})}


def _own(checkout: Path, made: ast.ClassDef, seen: frozenset[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(made):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    for base in made.bases:
        above = _dotted(base).rpartition(".")[2]
        if above not in seen:
            found |= _members(checkout, above, seen)
    return found


def unspelt(root: Path) -> list[str]:
    """Attributes in OBJECTS that nothing of ours spells."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources(root))
    return [f"{kind}.{name}" for kind, names in OBJECTS.items() for name in names if f".{name}" not in text]


def missing(checkout: Path, root: Path = ROOT) -> dict[str, str]:
    """{name that the checkout lacks: where ours use it}."""
    found = {name: where for name, where in leant_on(root).items() if gone(checkout, name)}
    for kind, names in OBJECTS.items():
        module, _, made = kind.rpartition(".")
        if gone(checkout, kind):
            found[kind] = "OBJECTS"
        else:
            lacking = set(names) - _members(checkout, made)
            found |= {f"{module}.{made}.{name}": "OBJECTS" for name in sorted(lacking)}
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of ComfyUI")
    parser.add_argument("--list", action="store_true", help="print every name that we lean on")
    parser.add_argument("--frontend", type=Path, help="folder `static` of a comfyui-frontend-package")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="run the integration tests; the rest is pytest's")
    given = parser.parse_args(argv)
    checkout = given.checkout.resolve()
    if not (checkout / "comfy" / "samplers.py").is_file():
        parser.error(f"{given.checkout} is no ComfyUI checkout: it has no comfy/samplers.py")
    rotten, lacking = unspelt(ROOT), missing(checkout)
    names = leant_on(ROOT)
    if given.list:
        sys.stdout.write("".join(f"{name}  {where}\n" for name, where in sorted(names.items())))
        sys.stdout.write("".join(f"{kind}: {', '.join(each)}\n" for kind, each in OBJECTS.items()))
    for name in rotten:
        sys.stdout.write(f"{name} is in OBJECTS, and nothing of ours uses it\n")
    for name, where in lacking.items():
        sys.stdout.write(f"{name} is gone ({where})\n")
    counted = len(names) + sum(map(len, OBJECTS.values()))
    sys.stdout.write(f"{counted} names of ComfyUI are used, {len(lacking)} are gone from {checkout}\n")
    code = int(bool(rotten or lacking))
    if given.tests is not None:
        environment = {**os.environ, "COMFYUI_PATH": str(checkout), "OMP_NUM_THREADS": "1"}
        if given.frontend is not None:
            environment["COMFYUI_FRONTEND"] = str(given.frontend.resolve())
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/integration", *given.tests]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode or code
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
