"""ComfyUI's official templates: the prompt that our reader makes of each, against the one that ComfyUI's page makes.

`python -m retort.benchmarks.templates FOLDER [--quick] [--page FOLDER] [--json FILE] [--write]` with COMFYUI_PATH, in
an environment with ComfyUI's packages. FOLDER: the templates (of the package comfyui-workflow-templates-json).
COMFYUI_FRONTEND: folder `static` of another comfyui-frontend-package. Chromium is driven by playwright, here or in the
Python that PLAYWRIGHT_PYTHON names. --page keeps what the page says of each file in a folder, and what is there is not
asked again; --quick takes every tenth file.

A prompt is the same when nodes, classes and inputs are equal, links and seeds among them. Random choices in prompts
would differ; no template has any. Nodes within subgraphs whose numbers the page changes, because others outside have
them, are compared by what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files.errors import UsageError
from ..graphs import workflow
from ..graphs.declared import Declared
from ..graphs.registry import Registry
from ..graphs.widgets import places
from ..graphs.workflow_ui import VIRTUAL
from .comfyui import Server
from .report import RESULTS, Figure, Report, arguments, finish, put

SCENES = (
    "Load3D", "Load3DAdvanced", "Preview3DAdvanced", "Save3DAdvanced", "PreviewGaussianSplat", "PreviewPointCloud",
)  # fmt: skip
# Values of widgets that no class declares: what happens to seeds, buttons, what is played.
UNDECLARED = ("control_", "upload", "audioUI", "clear", "option", "$", "image", "x", "y", "width", "height")


def main() -> None:
    """Compare and print."""
    parser = arguments(__doc__)
    parser.add_argument("templates", type=Path, help="folder of the templates' JSON files")
    parser.add_argument("--page", type=Path, help="folder in which the page's prompts are kept")
    options = parser.parse_args()
    checkout = os.environ.get("COMFYUI_PATH")
    if not checkout:
        raise SystemExit("set COMFYUI_PATH to the folder of a ComfyUI checkout")
    files = [path for path in sorted(options.templates.glob("*.json")) if _is_workflow(path)]
    files = files[:: 10 if options.quick else 1]
    with tempfile.TemporaryDirectory() as temporary:
        kept = options.page or Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        there = any((kept / path.name).is_file() for path in files)
        started = time.monotonic()
        info = asked(Path(checkout).resolve(), files, kept)
        took = time.monotonic() - started
        known = Declared(info, info.__getitem__, "this ComfyUI")
        started = time.monotonic()
        verdicts = {path.stem: verdict(path, kept / path.name, known) for path in files}
        reading = time.monotonic() - started
    report = Report("templates")
    counted = Counter(kind for kind, _ in verdicts.values())
    here = sum(counted[kind] for kind in ("same", "differs", "refused"))
    for kind, words in KINDS.items():
        report.figures[words] = Figure(counted[kind])
    report.figures["the same, of those whose classes the checkout has"] = Figure(
        100 * counted["same"] / max(here, 1), "%", target=98, better="higher"
    )
    report.figures["files read and compared by us"] = Figure(reading, "s")
    if not there:
        report.figures["all files opened by the page, its server's start among it"] = Figure(took, "s")
    others = {name: found for name, found in verdicts.items() if found[0] != "same"}
    for name, (kind, why) in others.items():
        sys.stdout.write(f"{name}: {KINDS[kind]}: {why}\n")
    finish(report, options)
    if options.write:
        put(RESULTS, "templates-others", table(others))


def table(others: dict[str, tuple[str, str]]) -> str:
    """The templates that are not the same, with the reason of each, for RESULTS.md."""
    lines = ["| template | | why |", "|---|---|---|"]
    for name, (kind, why) in sorted(others.items(), key=lambda item: (list(KINDS).index(item[1][0]), item[0])):
        if kind != "missing":
            shown = why.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {name} | {KINDS[kind]} | {shown if len(shown) <= 300 else shown[:300] + '...'} |")
    lacking = [f"{name} ({why})" for name, (kind, why) in others.items() if kind == "missing"]
    return "\n".join([*lines, "", f"A class is missing in the checkout for {'; '.join(lacking)}."])


KINDS = {
    "same": "the same prompt",
    "differs": "another prompt",
    "newer": "saved for another version of a class than the checkout has",
    "missing": "a class is missing in the checkout",
    "refused": "refused by our reader",
}


def _is_workflow(path: Path) -> bool:
    document = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(document, dict) and isinstance(document.get("nodes"), list)


def asked(checkout: Path, files: list[Path], kept: Path) -> dict[str, Any]:
    """What ComfyUI declares of its classes; the page's prompts are written to `kept`, as far as they are not there."""
    frontend = os.environ.get("COMFYUI_FRONTEND")
    with Server(checkout, plugin=False, arguments=["--front-end-root", frontend] if frontend else []) as server:
        missing = [path for path in files if not (kept / path.name).is_file()]
        if missing:
            browser = os.environ.get("PLAYWRIGHT_PYTHON", sys.executable)
            script = str(Path(__file__).with_name("templates_browser.py"))
            subprocess.run([browser, script, server.url, str(kept), *map(str, missing)], check=True)
        return server.ask("/object_info")


def verdict(path: Path, said: Path, known: Registry) -> tuple[str, str]:
    """The kind of a template (see KINDS), and what differs or why."""
    document, page = (json.loads(one.read_text(encoding="utf-8")) for one in (path, said))
    contents = list(_contents(document))
    defined = {content.get("id") for content in contents}
    kinds = {node["type"] for content in contents for node in content["nodes"]} - defined - set(VIRTUAL)
    missing = sorted(kind for kind in kinds if known.find(kind) is None)
    try:
        ours = json.loads(json.dumps(workflow.from_document(document, known).prompt()))
    except UsageError as error:
        return "refused", str(error)
    if missing:
        return "missing", ", ".join(missing)
    if isinstance(page.get("error"), str):
        return "differs", f"the page fails: {page['error'].splitlines()[0]}"
    ours, page = _plain(ours), _plain(page)
    if ours == page or sorted(_by_content(ours)) == sorted(_by_content(page)):
        return "same", ""
    differences = list(_differences(ours, page))
    newer = sorted({f"{kind}: {name}" for content in contents for kind, name in _undeclared(content, known)})
    if newer:
        return "newer", ", ".join(newer)
    return "differs", _reason(ours, page) + "; ".join(differences[:6])


def _contents(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield document
    yield from (document.get("definitions") or {}).get("subgraphs", [])


def _plain(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt without titles, which do not run."""
    return {id: {"class_type": node["class_type"], "inputs": node["inputs"]} for id, node in prompt.items()}


def _by_content(prompt: dict[str, Any]) -> Iterator[str]:
    """A digest of every node, with those of what it is connected to in place of their numbers."""
    made: dict[str, str] = {}

    def digest(id: str) -> str:
        if id not in made:
            made[id] = ""  # a ring would hold itself
            found = {name: source(value) for name, value in sorted(prompt[id]["inputs"].items())}
            text = json.dumps([prompt[id]["class_type"], found])
            made[id] = hashlib.sha256(text.encode()).hexdigest()
        return made[id]

    def source(value: Any) -> Any:
        return [digest(value[0]), value[1]] if _is_link(value) and value[0] in prompt else value

    return (digest(id) for id in prompt)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _differences(ours: dict[str, Any], page: dict[str, Any]) -> Iterator[str]:
    for id in sorted(set(ours) | set(page)):
        if id not in page or id not in ours:
            where = "ours" if id in ours else "the page's"
            yield f"node {id} ({(ours | page)[id]['class_type']}) is only in {where}"
            continue
        mine, theirs = ours[id]["inputs"], page[id]["inputs"]
        for name in sorted(set(mine) | set(theirs)):
            if mine.get(name, "nothing") != theirs.get(name, "nothing"):
                pair = (json.dumps(one.get(name, "nothing"))[:60] for one in (mine, theirs))
                yield f"{ours[id]['class_type']}.{name}: {' / '.join(pair)}"


def _undeclared(content: dict[str, Any], known: Registry) -> Iterator[tuple[str, str]]:
    """Widgets that a file's nodes have, and their classes here do not."""
    for node in content["nodes"]:
        schema = known.find(node["type"])
        if schema is None:
            continue
        here = places(node, schema)
        told = [one["widget"]["name"] for one in node.get("inputs") or [] if isinstance(one.get("widget"), dict)]
        for name in (*told, *(node.get("widgets_values_named") or {})):
            if name not in here and not name.startswith(UNDECLARED):
                yield node["type"], name


def _reason(ours: dict[str, Any], page: dict[str, Any]) -> str:
    more = page.keys() - ours.keys()
    used = {source[0] for id in ours for source in page.get(id, {"inputs": {}})["inputs"].values() if _is_link(source)}
    if all(page[id] == ours[id] for id in ours if id in page) and ours.keys() < page.keys() and not more & used:
        return "the page sends nodes of a bypassed subgraph within a subgraph, which nothing needs: "
    if any(node["class_type"] in SCENES for node in (*ours.values(), *page.values())):
        return "the page draws a 3D scene and sends its pictures and camera: "
    lost = [
        name
        for id in ours.keys() & page.keys()
        for name, value in ours[id]["inputs"].items()
        if _is_link(value) and name not in page[id]["inputs"]
    ]
    return "the page loses a link to a growing input: " if any("." in name for name in lost) else ""


if __name__ == "__main__":
    main()
