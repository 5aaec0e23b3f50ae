"""Imports every module of an unpacked pack as ComfyUI would, warnings being errors: import_all.py FOLDER [BLOCKED ...]

BLOCKED packages, the optional ones, count as not installed. Modules that miss one of them or ComfyUI are named and
skipped; nodes, maths and trainers may miss nothing. Ends with exit code 1 and a line for each fault.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

# Whose modules must import with requirements.txt alone.
WHOLE = ("nodes", "sampling", "rewards", "restoration", "trainers", "files", "preferences")
OUTSIDE = {"comfy", "comfy_api", "comfy_execution", "comfy_kitchen", "folder_paths", "server", "nodes"}
NO_MODULES = ("install.py", "extensions/", "hosts/job.py", "benchmarks/")


class Blocker:
    """Finds nothing under the names that it blocks."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: Path, blocked: Sequence[str]) -> int:
    # Third parties warn at their own import; only ours is held to silence.
    import numpy  # noqa: F401
    import torch  # noqa: F401

    warnings.simplefilter("error")
    sys.meta_path.insert(0, Blocker(blocked))
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    root = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(root)
    count, missing, broken = 0, {}, []
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder).as_posix()
        if place.startswith(NO_MODULES):
            continue
        inner = place.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")
        try:
            importlib.import_module(f"{name}.{inner}" if inner else name)
            count += 1
        except ModuleNotFoundError as error:
            missed = (error.name or "").split(".")[0]
            missing[place] = missed
            if place.startswith(WHOLE) or missed not in OUTSIDE | set(blocked):
                broken.append(f"{place}: misses {error.name}")
        except Exception:
            broken.append(f"{place}: {traceback.format_exc()}")
    extension = asyncio.run(root.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    for node in nodes:
        node.define_schema()
    sys.stdout.write(f"{count} modules imported, {len(nodes)} nodes; skipped: {missing}\n")
    sys.stdout.write("".join(f"{line}\n" for line in broken))
    return 1 if broken or not nodes else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
