"""What ComfyUI says of workflows whose files are missing, for `test_published_workflows.py`.

`python examined.py COMFYUI FILES...` prints a line of JSON for each file: the rows of `retort doctor` that are not
well, the kinds of error that ComfyUI's own check of the prompt finds, and its nodes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from retort.graphs import workflow
from retort.hosts import workflow_doctor
from retort.hosts.inprocess.session import Session

folder, *sources = map(Path, sys.argv[1:])
session = Session(folder, ["--disable-api-nodes"])
import execution  # noqa: E402 (ComfyUI's modules are there only now)

for source in sources:
    rows = workflow_doctor.examine(source, session.known, "ComfyUI", session.folder_of)
    graph = workflow.read(source, session.known)
    prompt = graph.prompt()
    valid, _, _, errors = asyncio.run(execution.validate_prompt("0", json.loads(json.dumps(prompt)), None))
    told = {
        "missing": [[row.name, row.detail, row.remedy] for row in rows if not row.ok],
        "errors": sorted({error["type"] for each in errors.values() for error in each["errors"]}),
        "notes": graph.notes,
        "prompt": prompt,
    }
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
