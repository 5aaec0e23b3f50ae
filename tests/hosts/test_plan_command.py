"""`retort plan` and the node Training Plan: a line for each card from a file's header alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny

from retort.hosts.cli import app  # noqa: E402
from retort.hosts.headless.host import host  # noqa: E402
from retort.hosts.training import plan_report  # noqa: E402
from retort.models.layouts.dit import flux_layout  # noqa: E402
from retort.nodes.plan import RetortTrainingPlan  # noqa: E402
from retort.trainers.methods import METHODS  # noqa: E402


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    network = tiny.flux(True)
    published = tiny.published(network, flux_layout(network.config))
    save_file({name: value.contiguous() for name, value in published.items()}, path)
    return path


def test_the_command_says_what_fits(file):
    given = [str(file), "--width", "128", "--height", "64", "--rank", "2", "--tokens", "6", "--cards", "1, 24"]
    said = CliRunner().invoke(app, ["plan", *given, "--method", "dmd2"])
    assert said.exit_code == 0, said.output
    first, *lines = said.output.strip().splitlines()
    assert first.startswith("dmd2, rank 2, batch 1, adamw: base ")
    assert [line.partition(": ")[0] for line in lines] == ["1 GB", "24 GB", "time"]
    assert all("the base stays on the card, peak about" in line for line in lines[:2])
    assert "TFLOP a step, so 1000 steps take about" in lines[2]


def test_further_settings_are_the_runs_own(file):
    """Half as large arithmetic, a smaller adapter of the fake score and a discriminator each change what is counted."""
    given = [str(file), "--width", "128", "--height", "64", "--rank", "4", "--tokens", "6", "--cards", "24"]
    said = set()
    for more in ([], ["precision=fp32"], ["fake_rank=1"], ["gan_weight=0.01"], ["gradient_checkpointing=false"]):
        sets = [part for text in more for part in ("--set", text)]
        done = CliRunner().invoke(app, ["plan", *given, "--method", "dmd2", *sets])
        assert done.exit_code == 0, done.output
        said.add(done.output)
    assert len(said) == 5
    config = plan_report.settings("dmd2", 4, 1, "adamw", ["fake_rank = 1", "gan_weight=0.01", "precision=fp32"])
    assert (config.training.fake_rank, config.training.precision, config.objective.gan_weight) == (1, "fp32", 0.01)


def test_mistakes_are_one_message(file, tmp_path):
    for given, message in (
        ([str(tmp_path / "none.safetensors")], "there is no"),
        ([str(file), "--method", "magic"], "method must be one of"),
        ([str(file), "--cards", "a lot"], "cards must be sizes in GB"),
        ([str(file), "--frames", "9"], "with --comfyui alone"),
        ([str(file), "--set", "magic=1"], "flow has no setting 'magic': give NAME=VALUE"),
        ([str(file), "--set", "precision"], "flow has no setting 'precision': give NAME=VALUE"),
        ([str(file), "--set", "precision=fp64"], "precision must be"),
        ([str(file), "--method", "align_prop", "--tokens", "6"], "align_prop learns through a reward and a VAE"),
    ):
        said = CliRunner().invoke(app, ["plan", *given])
        assert said.exit_code == 2 and message in said.output.replace("\n", " "), (given, said.output)
        assert ("Training Plan" in said.output) == ("reward" in message) and "connect `" not in said.output


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("align_prop", "spo")])
def test_every_method_whose_memory_no_reward_decides_is_planned(file, method):
    given = [str(file), "--width", "64", "--height", "64", "--rank", "2", "--tokens", "6", "--cards", "24"]
    said = CliRunner().invoke(app, ["plan", *given, "--method", method])
    assert said.exit_code == 0 and said.output.startswith(f"{method}, rank 2"), said.output
    assert "24 GB: the base stays on the card, peak about" in said.output


def test_the_node_says_the_same(file):
    model, entry, shape = host.from_header(file, 128, 64, tokens=6)
    out = RetortTrainingPlan.execute(
        model, [list(entry)], {"samples": torch.zeros(1, *shape)}, "dpo", 2, 1, "adafactor", "8, 12"
    )
    text = out.args[0]
    assert text.splitlines()[0].startswith("dpo, rank 2, batch 1, adafactor: base ")
    assert len(text.splitlines()) == 4


def test_the_template_runs_on_the_embedded_model(tmp_path):
    """Its weights are fp32 and a plan counts in bf16, which its own network must be told of."""
    template = Path(__file__).parents[2] / "workflows" / "Train - What memory a training takes.json"
    said = CliRunner().invoke(app, ["run", str(template), "--out", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "8 GB: the base stays on the card, peak about" in said.output


def test_host_memory_that_is_short_is_said(file, monkeypatch):
    model, entry, shape = host.from_header(file, 512, 512, tokens=6)
    config, data = plan_report.settings("flow", 2, 1, "adamw"), plan_report.sample("flow", entry, shape)
    config = replace(config, training=replace(config.training, offload="2"))
    monkeypatch.setattr(host, "free_memory", lambda: 2**30)
    monkeypatch.setattr(plan_report.planning, "host_memory", lambda base: base // 4)
    text = plan_report.report(host, model, config, data, [24])
    assert "here, 1.0 GB free: does not fit into the " in text
    assert " of host memory that are free (2 of " in text


def test_what_does_not_fit_says_what_to_change(file, monkeypatch):
    monkeypatch.setattr(plan_report.planning, "with_measures", lambda *_: ())
    model, entry, shape = host.from_header(file, 512, 512, tokens=6)
    config = plan_report.settings("flow", 2, 64, "adamw")
    text = plan_report.report(host, model, config, plan_report.sample("flow", entry, shape), [1])
    assert "1 GB: does not fit (" in text and text.splitlines()[-1].startswith("To make it smaller: lower batch_size")
