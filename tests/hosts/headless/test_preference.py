"""The bundled preference workflow without ComfyUI, with few steps: sampled, labelled, learnt, compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from retort.files.errors import UsageError  # noqa: E402
from retort.graphs.run import run  # noqa: E402
from retort.hosts.headless import embedded, folders  # noqa: E402
from retort.hosts.headless.folders import Folders  # noqa: E402
from retort.preferences import store as preferences  # noqa: E402

WORKFLOW = Path(__file__).resolve().parents[3] / "workflows" / "Prefer - Pairs that a reward labels.json"
HERE = all((folders.EMBEDDED / name).is_file() for name in embedded.FILES)
pytestmark = pytest.mark.skipif(not HERE, reason="no weights")


def ids(kind):
    nodes = json.loads(WORKFLOW.read_text(encoding="utf-8"))["nodes"]
    return [node["id"] for node in nodes if node["type"] == kind]


def quick(*more):
    (trainer,), (size,) = ids("RetortTrainPreference"), ids("EmptySD3LatentImage")
    changes = {"steps": 2, "batch_size": 2, "warmup": 0, "preview_every": 0}
    return [
        *(f"{trainer}.{name}={value}" for name, value in changes.items()),
        *(f"{sampler}.steps=2" for sampler in ids("KSampler")), f"{size}.batch_size=4", *more,
    ]  # fmt: skip


def test_the_workflow(tmp_path):
    where = Folders(models=(tmp_path / "models",), output=tmp_path)
    outcome = run(WORKFLOW, where=where, sets=quick())
    before, after = (tmp_path / "retort/train_preference" / f"{name}_00001_.png" for name in ("before", "after"))
    assert before.read_bytes() != after.read_bytes() and {before, after} <= set(outcome.saved)
    found = preferences.read(tmp_path / "retort_preferences" / "bold_digits")
    assert len(found.pairs) == 6 and not found.problems
    assert any(text.startswith("6 pairs, 1 prompts, 4 pictures") for text in outcome.texts)
    assert any(text == "bold_digits.safetensors, 2 steps" for text in outcome.texts)
    assert (tmp_path / "models/loras/bold_digits.safetensors").is_file()


def test_a_mistake_is_one_message(tmp_path):
    where = Folders(models=(tmp_path / "models",), output=tmp_path)
    (label,) = ids("RetortLabelPairs")
    with pytest.raises(UsageError, match=r"RetortLabelPairs.*margin"):
        run(WORKFLOW, where=where, sets=quick(f"{label}.margin=1000"))
