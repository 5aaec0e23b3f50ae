"""The entry of the `retort` command: what must be settled before torch is imported, then the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .inprocess.find import find

# Commands that run a workflow, and what keeps them on the built-in host.
RUNNING, BUILT_IN, COMFYUI = ("run", "search"), "--built-in", "--comfyui"


def prepare(argv: Sequence[str]) -> None:
    """Choose torch's allocator as ComfyUI's start does, for a command that will run on it; mistakes are said later."""
    own, arguments = split(argv)
    if not own or own[0] not in RUNNING or BUILT_IN in own or "--help" in own:
        return
    at = own.index(COMFYUI) + 1 if COMFYUI in own else 0
    try:
        folder = find(Path(own[at]) if 0 < at < len(own) else None)
    except ValueError:
        return
    if folder is not None:
        from .inprocess.session import enter

        enter(folder, arguments)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's own arguments, and those behind `--`, which are ComfyUI's."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def main() -> None:
    """Entry point of the `retort` command."""
    argv = sys.argv[1:]
    prepare(argv)
    from .cli import app

    app(argv, prog_name="retort")


if __name__ == "__main__":
    main()
