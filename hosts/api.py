"""What nodes import of `hosts`: the host that runs us, its node API, and the code that both hosts share.

`io`, `ui` and `ComfyExtension` are the names of `comfy_api.latest`, `ExecutionBlocker` is that of `comfy_execution`;
`host` is a `hosts.contract.Host`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..models import demo_photographs
from . import compare, lora_grid, methods, noise, recognise, reflection, statistics
from . import presets as students
from .contract import Host
from .jobs import graph as run_graph
from .jobs import starter
from .jobs.view import latest as latest_runs
from .prompted import Link
from .restoration import captions
from .restoration import compare as picture_compare
from .restoration import run as restoration
from .rewards import kinds as rewards
from .search import run as search
from .training import plan_report as plans
from .training import run as training

# The process tells who runs us: ComfyUI has imported its API long before it loads packs. That ComfyUI could be imported
# says nothing, since the command line may be started inside a ComfyUI checkout.
IN_COMFYUI = "comfy_api" in sys.modules

if TYPE_CHECKING or not IN_COMFYUI:
    from ..graphs.api import io, ui
    from ..graphs.api.io import ComfyExtension
    from ..graphs.api.schema import ExecutionBlocker
    from .headless.host import host as own
else:
    from comfy_api.latest import ComfyExtension, io, ui
    from comfy_execution.graph_utils import ExecutionBlocker

    from .comfyui.host import host as own

host: Host = own

__all__ = [
    "IN_COMFYUI", "ComfyExtension", "ExecutionBlocker", "Link", "captions", "compare", "demo_photographs", "host", "io",
    "latest_runs", "lora_grid", "methods", "noise", "picture_compare", "plans", "recognise", "reflection",
    "restoration", "rewards", "run_graph", "search", "starter", "statistics", "students", "training", "ui",
]  # fmt: skip
