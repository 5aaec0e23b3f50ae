"""ComfyUI entered: its settings and folders, all its nodes, and a server object without a network.

Importing ComfyUI's own `main` does what its start does before there is a server (memory management, folders of models,
start scripts of packs), whatever that is in its version. It must be the process's first use of ComfyUI.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...files.errors import UsageError
from ...graphs.declared import Declared
from ..headless.folders import KINDS, Folders
from .find import ROOT

OURS = "RetortEmbeddedModel"
TORCH_FIRST = "Torch already imported"


class Session:
    """ComfyUI's executor and all its nodes, for any number of workflows; at most one for a process.

    folder: ComfyUI's. arguments: as on its own command line. where: folders of models that it gets beside its own.
    Raises UsageError where ComfyUI does not start.
    """

    def __init__(self, folder: Path, arguments: Sequence[str] = (), where: Folders | None = None):
        try:
            self._start(folder, arguments, where or Folders())
        except Exception as error:
            raise UsageError(
                f"the ComfyUI in {folder} does not start: {type(error).__name__}: {error}. Start its own main.py by "
                "the same Python and with the same arguments to see more"
            ) from error

    def _start(self, folder: Path, arguments: Sequence[str], where: Folders) -> None:
        enter(folder, arguments)
        import comfy.cli_args
        import torch

        args = comfy.cli_args.args
        if not torch.accelerator.is_available():
            args.cpu = True  # without it ComfyUI asks for a card, and fails; so do processes that it starts
            sys.argv.append("--cpu")
        import folder_paths

        for kind, path in _further(where):
            folder_paths.add_model_folder_path(kind, str(path), is_default=True)
        with _without(TORCH_FIRST):
            main = importlib.import_module("main")
        import comfy.model_management
        import comfy.utils
        import execution

        from .server import Offline

        # By name, since `nodes` is a folder of ours too.
        nodes = importlib.import_module("nodes")

        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self.folder = folder
        self.server = Offline(loop, folder)
        packs = not args.disable_all_custom_nodes or bool(args.whitelist_custom_nodes)
        loop.run_until_complete(nodes.init_extra_nodes(packs, not args.disable_api_nodes))
        if OURS not in nodes.NODE_CLASS_MAPPINGS:
            loop.run_until_complete(nodes.load_custom_node(str(ROOT)))
        main.hijack_progress(self.server)
        comfy.utils.set_progress_bar_enabled(False)  # the bars are ours
        cache, sizes = _cache(args, comfy.model_management.total_ram)
        self.executor = execution.PromptExecutor(self.server, cache_type=cache, cache_args=sizes)
        self.known = Declared(nodes.NODE_CLASS_MAPPINGS, _info, f"the ComfyUI in {folder}")

    def folder_of(self, options: Sequence[Any]) -> str:
        """The folder of the files that a choice is among, as far as the files that are there tell."""
        import folder_paths

        for kind, (paths, _) in folder_paths.folder_names_and_paths.items():
            if options and list(options) == folder_paths.get_filename_list(kind):
                return str(paths[0])
        return "of its kind"


def enter(folder: Path, arguments: Sequence[str]) -> None:
    """Let `import` find ComfyUI's modules, and its settings come from `arguments`; a process's share of the cards.

    Sets the allocator that ComfyUI's own start would choose, which counts where torch is not imported yet.
    """
    if str(folder) in sys.path:
        return
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[int(rank) % len(cards)] if cards != [""] else rank
    sys.path.insert(0, str(folder))
    sys.argv = [str(folder / "main.py"), "--verbose", "WARNING", *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("cuda_malloc")


def _further(where: Folders) -> Iterator[tuple[str, Path]]:
    """The folders of models that a command names, last first, since each goes before those that are known."""
    laid = {path.name for root in where.models if root.is_dir() for path in root.iterdir() if path.is_dir()}
    aliases = {alias: kind for kind, names in KINDS.items() for alias in names}
    kinds = {aliases.get(name, name) for name in laid} | {extra.kind for extra in where.extras()}
    for kind in sorted(kinds):
        for path in reversed(where.own(kind)):
            yield kind, path


def _cache(args: Any, memory: float) -> tuple[Any, dict[str, float]]:
    """The cache of results that ComfyUI's options ask for; memory: of the machine in MB."""
    from execution import CacheType

    sizes = {"lru": args.cache_lru, "ram": 0.0, "ram_inactive": 0.0}
    if args.cache_none:
        return CacheType.NONE, sizes
    if args.cache_lru > 0:
        return CacheType.LRU, sizes
    if args.cache_classic:
        return CacheType.CLASSIC, sizes
    # As its own start chooses them: how much memory stays free while a prompt runs, and how much between prompts.
    defaults = [min(10.0, max(2.0, memory * 0.1 / 1024)), min(128.0, memory / 1024)]
    given = [*args.cache_ram, *defaults[len(args.cache_ram) :]]
    return CacheType.RAM_PRESSURE, {**sizes, "ram": given[0], "ram_inactive": given[1]}


def _info(id: str) -> dict[str, Any]:
    """What ComfyUI tells its page of a class."""
    from comfy_api.internal import _ComfyNodeInternal

    nodes = importlib.import_module("nodes")
    made = nodes.NODE_CLASS_MAPPINGS[id]
    if issubclass(made, _ComfyNodeInternal):
        return made.GET_NODE_INFO_V1()
    given = vars_of(made)
    kinds = made.RETURN_TYPES
    return {
        "input": made.INPUT_TYPES(),
        "output": kinds,
        "output_is_list": given.get("OUTPUT_IS_LIST", [False] * len(kinds)),
        "output_name": given.get("RETURN_NAMES", kinds),
        "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS.get(id, id),
        "category": given.get("CATEGORY", ""),
        "is_input_list": given.get("INPUT_IS_LIST", False),
        "output_node": given.get("OUTPUT_NODE", False) is True,
    }


def vars_of(made: type) -> dict[str, Any]:
    """The attributes of a class, its bases' among them."""
    return {name: value for base in reversed(made.__mro__) for name, value in vars(base).items()}


@contextlib.contextmanager
def _without(text: str) -> Iterator[None]:
    """Keep one warning of ComfyUI's from the user: it says what we have seen to."""

    def other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    log = logging.getLogger()
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)
