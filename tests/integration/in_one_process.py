"""Runs workflows with ComfyUI in one process, for `test_inprocess.py`.

`python in_one_process.py OPTIONS COMFYUI OUT FILES...`, with OPTIONS the JSON of {"slots": {class: output},
"arguments": [ComfyUI's]}. The latents that nodes of these classes give are saved beside a workflow's pictures, in
OUT/NAME. Prints a line of JSON for each file: the prompt that was run, what came of it or the error, and the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from retort.graphs import workflow
from retort.hosts.headless.folders import Folders
from retort.hosts.inprocess.session import Session

OPTIONS = json.loads(sys.argv[1])
SLOTS = OPTIONS["slots"]
folder, out, *sources = map(Path, sys.argv[2:])
session = Session(folder, ["--disable-api-nodes", *OPTIONS["arguments"]])
from retort.hosts.inprocess.run import run  # noqa: E402 (ComfyUI's modules are there only now)

for source in sources:
    started = time.monotonic()
    prompt = workflow.read(source, session.known).prompt()
    for id in [id for id, node in prompt.items() if node["class_type"] in SLOTS]:
        inputs = {"samples": [id, SLOTS[prompt[id]["class_type"]]], "filename_prefix": f"in_one/{source.stem}_{id}"}
        prompt[f"save_{id}"] = {"class_type": "SaveLatent", "inputs": inputs}
    told = {"name": source.stem, "prompt": prompt}
    try:
        # A copy, because ComfyUI writes into the prompts that it runs.
        done = run(session, json.loads(json.dumps(prompt)), where=Folders(output=out / source.stem, inputs=()))
        told |= {"saved": list(map(str, done.saved)), "notes": done.notes, "texts": done.texts}
    except ValueError as error:
        told["error"] = str(error)
    sys.stdout.write(json.dumps({**told, "seconds": time.monotonic() - started}) + "\n")
    sys.stdout.flush()
