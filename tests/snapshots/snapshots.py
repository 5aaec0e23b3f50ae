"""What must not change unnoticed: every node's schema, and the latents of every workflow that runs anywhere.

`python tests/snapshots/snapshots.py [--write] [--only TEXT]` compares all of it with the committed snapshots, trainings
of two steps among it, and says what differs; --write keeps what is found. About two minutes on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
WORKFLOWS = HERE.parents[1] / "workflows"
SCHEMAS, LATENTS = HERE / "schemas.json", HERE / "latents.json"
# Nodes that sample, and which of their outputs is the LATENT.
SAMPLES = {
    "KSampler": 0, "SamplerCustomAdvanced": 0, "RetortTreeSearch": 0, "RetortResumeSearch": 0,
    "RetortDrawFromSearch": 0, "RetortNoisePolicy": 1, "RetortReflectionCompare": 1,
}  # fmt: skip
# They need files that have to be downloaded.
DOWNLOADS = {
    "SDXL - DMD2 in 4 steps", "SDXL - Diff-Instruct in 1 step", "SDXL - Search by PickScore", "SDXL - Reflect a LoRA",
    "SDXL - Reflect Juggernaut against its base", "SDXL - MaPO with pairs that PickScore labels",
    "SD3 - TDM in 4 steps", "Flux - Reflect guidance", "PixArt - Restore with InstaRevive",
}
# They also need nodes that ComfyUI has and the host without it has not.
PUBLISHED = {
    "Boogu - Turbo in 4 steps",
    "ERNIE-Image - Turbo in 8 steps",
    "Flux.2 - Dev Turbo in 8 steps",
    "Flux.2 - Klein in 4 steps",
    "LTX-2.3 - Video with sound in two stages",
    "MiniMax-H3 - Video with sound in 8 steps",
    "Qwen-Image - Lightning in 4 steps",
    "SD3.5 - Large Turbo in 4 steps",
    "Wan 2.1 - CausVid in 9 steps",
    "Wan 2.2 - Text to video in 4 steps",
    "Z-Image - Turbo in 8 steps",
}  # fmt: skip
# They train a published model.
TRAINED = {
    "Qwen-Image - Train an edit on pairs",
    "SDXL - Make a 4-step LoRA of your checkpoint",
    "Wan 2.2 - Train both networks on your pictures",
    "Z-Image - Train a style on your pictures",
}
# Restores a photograph, and samples nothing.
RESTORES = "5 Restore a photograph"
# They train for minutes: here two steps of everything.
TRAINERS = {
    "2 Train a student that draws in 1 step": ("RetortTrainDistillation",),
    "Distil - Train in a process of its own": ("RetortTrainingJob",),
    "Prefer - Train on a reward": ("RetortTrainReward",),
    "Prefer - Pairs that a reward labels": ("RetortTrainPreference",),
    "Train - A style from eight pictures": ("RetortTrainFlow", "RetortFewShotAdapt"),
    "Restore - Train a restorer": ("RetortTrainRestorer",),
}  # fmt: skip
QUICK = {
    "steps": 2, "batch_size": 2, "warmup": 0, "preview_every": 0, "regression_steps": 1,
    "method.regression_steps": 1, "method.pairs": 2, "method.pair_steps": 2,
}  # fmt: skip
NUMBERS = 6  # random projections that stand for a latent
TOLERANCE = 1e-3  # of each, in standard deviations of the latent: kernels of other processors round otherwise


def schemas() -> dict[str, Any]:
    """Ids, inputs in order with types, defaults, ranges and options, and outputs of every node."""
    from retort.nodes import NODES

    return {schema.node_id: _schema(schema) for schema in (node.GET_SCHEMA() for node in NODES)}


def _schema(schema: Any) -> dict[str, Any]:
    return {
        "inputs": [_input(one) for one in schema.inputs],
        "outputs": [[one.id, one.get_io_type()] for one in schema.outputs],
        "output_node": schema.is_output_node,
    }


def _input(one: Any) -> dict[str, Any]:
    found = {"id": one.id, "type": one.get_io_type()}
    for name in ("default", "min", "max", "step", "optional", "advanced", "multiline"):
        value = getattr(one, name, None)
        if value not in (None, False):
            found[name] = value
    options = getattr(one, "options", None)
    if options and any(str(each).endswith(".safetensors") for each in options):
        found["options"] = "files"
    elif options:
        found["options"] = [
            {"key": each.key, "inputs": [_input(part) for part in each.inputs]} if hasattr(each, "key") else str(each)
            for each in options
        ]
    return found


def shortened(document: dict[str, Any], name: str) -> dict[str, Any]:
    """A workflow whose trainings take two steps."""
    for node in document["nodes"]:
        if node["type"] in TRAINERS.get(name, ()):
            widgets = [one["name"] for one in node["inputs"] if "widget" in one]
            for key, value in QUICK.items():
                if key in widgets:
                    node["widgets_values"][widgets.index(key)] = value
        if node["type"] == "RetortCollectJob":  # so that there is a LoRA to sample with
            node["widgets_values"][1] = True
    return document


def latents(source: Path, folder: Path) -> dict[str, Tensor]:
    """The latents of every node of a workflow file that samples, by the node's id."""
    from retort.graphs import registry, workflow
    from retort.graphs.run import run
    from retort.hosts.headless.folders import Folders

    prompt = workflow.read(source, asyncio.run(registry.everything())).prompt()
    slots = {key: SAMPLES[node["class_type"]] for key, node in prompt.items() if node["class_type"] in SAMPLES}
    done = run(source, where=Folders(inputs=(source.parent,), output=folder), keep=slots).results.outputs
    return {key: done[key][slot][0]["samples"].float() for key, slot in slots.items()}


def fingerprint(latent: Tensor) -> dict[str, Any]:
    """Shape, deviation and some projections on random directions, each about as large as the deviation."""
    flat = latent.flatten().double()
    generator = torch.Generator().manual_seed(len(flat))
    directions = torch.randn(NUMBERS, len(flat), generator=generator, dtype=torch.float64) / len(flat) ** 0.5
    return {
        "shape": list(latent.shape),
        "std": round(float(flat.std()), 6),
        "projections": [round(float(value), 6) for value in directions @ flat],
    }


def same(found: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one latent but for rounding."""
    if found["shape"] != kept["shape"]:
        return False
    pairs = zip([found["std"], *found["projections"]], [kept["std"], *kept["projections"]], strict=True)
    return all(abs(a - b) <= TOLERANCE * max(kept["std"], 1e-6) for a, b in pairs)


def names() -> list[str]:
    """Workflows that run anywhere and sample."""
    return sorted({path.stem for path in WORKFLOWS.glob("*.json")} - DOWNLOADS - PUBLISHED - TRAINED - {RESTORES})


def fingerprints(chosen: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(workflow, fingerprint by node) of each."""
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            document = shortened(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")), name)
            source = Path(folder) / f"{name}.json"
            source.write_text(json.dumps(document), encoding="utf-8")
            yield name, {key: fingerprint(one) for key, one in latents(source, Path(folder) / "out").items()}


def differences(found: Any, kept: Any, at: str = "") -> Iterator[str]:
    """Where two schemas differ, a line each."""
    if isinstance(found, dict) and isinstance(kept, dict):
        for key in sorted({*found, *kept}):
            yield from differences(found.get(key), kept.get(key), f"{at}.{key}")
    elif isinstance(found, list) and isinstance(kept, list) and len(found) == len(kept):
        for number, (one, other) in enumerate(zip(found, kept, strict=True)):
            yield from differences(one, other, f"{at}[{number}]")
    elif found != kept:
        yield f"{at[1:]}: {kept!r:.200} became {found!r:.200}"


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep what is found")
    parser.add_argument("--only", default="", help="workflows with this text in their names alone")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    wrong = list(differences(schemas(), json.loads(SCHEMAS.read_text(encoding="utf-8")))) if SCHEMAS.exists() else []
    kept = json.loads(LATENTS.read_text(encoding="utf-8")) if LATENTS.exists() else {}
    found = {}
    for name, prints in fingerprints(name for name in names() if given.only in name):
        found[name] = prints
        before = kept.get(name, {})
        wrong += [
            f"{name}: node {key} gives other latents"
            for key in sorted({*prints, *before})
            if key not in prints or key not in before or not same(prints[key], before[key])
        ]
        sys.stderr.write(f"{name}: {len(prints)} latents\n")
    if given.write:
        SCHEMAS.write_text(json.dumps(schemas(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        LATENTS.write_text(json.dumps(kept | found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    sys.stdout.write("\n".join([*wrong, ""]) or "nothing differs\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
