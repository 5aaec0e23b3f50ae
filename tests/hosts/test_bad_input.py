"""Bad input: one clear message, exit code 2, no traceback, no file left behind."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner

from retort.files import pictures as images
from retort.graphs import registry
from retort.graphs.api import io
from retort.hosts import cli


class Poison(io.ComfyNode):
    """A latent that holds NaN."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Poison", inputs=[io.Latent.Input("latent")], outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, latent):
        return io.NodeOutput({"samples": latent["samples"] + float("nan")})


@pytest.fixture
def failing(monkeypatch, known, tmp_path, where):
    """failing(document or path, *arguments) -> the message of a run that must fail cleanly."""
    monkeypatch.setenv("COLUMNS", "300")
    nodes = known(Poison)

    async def everything():
        return nodes

    monkeypatch.setattr(registry, "everything", everything)

    def run(workflow, *arguments) -> str:
        path = workflow
        if not isinstance(workflow, Path):
            path = tmp_path / "workflow.json"
            path.write_bytes(workflow if isinstance(workflow, bytes) else json.dumps(workflow).encode())
        out = tmp_path / "out"
        fixed = ["--out", out, "--models", where.models[0], "--input", where.inputs[0]]
        result = CliRunner().invoke(cli.app, ["run", str(path), *map(str, fixed), *arguments])
        assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
        assert result.stdout == "" and not [path for path in out.rglob("*.p*") if not path.is_symlink()]
        assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
        return result.stderr.removeprefix("error: ").rstrip("\n")

    return run


def step(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


NODE_5 = 'node 5 "Draw" (KSampler)'


def test_broken_json_names_line_and_column(failing, tmp_path):
    assert "is not valid JSON: Expecting" in failing(b'{"1": \n{"class_type": ]}')
    assert "line 2, column" in failing(b'{"1": \n{"class_type": ]}')
    assert "is not a workflow" in failing(b"\xff\xfe\x00broken")
    assert "nested more than 60 deep" in failing(b"[" * 80 + b"]" * 80)
    assert "is not a workflow" in failing(b"[" * 100_000)
    assert "is not a workflow" in failing(b'{"1": ' + b"9" * 5000 + b"}")
    for other in (b"[]", b"3", b"null", b"{}", b'{"nodes": 3}'):
        assert "this is not a workflow" in failing(other)
    assert "cannot be read" in failing(tmp_path / "absent.json")
    assert "cannot be read" in failing(tmp_path)


def test_a_png_without_a_workflow(failing, tmp_path):
    images.save_png(torch.rand(8, 8, 3), tmp_path / "plain.png")
    assert "carries no workflow" in failing(tmp_path / "plain.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:60])
    assert "is not a picture that can be read" in failing(tmp_path / "cut.png")


def test_unknown_class_names_the_nearest(failing, api, ui):
    api["5"]["class_type"] = "KSamplr"
    message = failing(api)
    assert message.startswith("node 5 \"Draw\" (KSamplr): the class 'KSamplr' is not known")
    assert "Did you mean KSampler" in message and "retort nodes" in message
    ui["nodes"][4]["type"] = "SomebodysNode"
    assert "'SomebodysNode' is not known" in failing(ui)
    del api["5"]["class_type"]
    assert 'node 5 has no "class_type"' in failing(api)


def test_a_cycle_is_spelt_out(failing, api):
    api["4"] = step("LatentFromBatch", samples=["5", 0], batch_index=0, length=1)
    assert failing(api).startswith(f"{NODE_5}: it needs its own output: 5 <- 4 <- 5. Remove one")
    api["4"]["inputs"]["samples"] = ["4", 0]
    assert "it needs its own output: 4 <- 4" in failing(api)


def test_a_link_of_the_wrong_type(failing, api):
    api["5"]["inputs"]["positive"] = ["4", 0]
    assert failing(api) == (
        f'{NODE_5}, input "positive": a CONDITIONING is needed, but output 0 of node 4 "EmptyLatentImage" is a LATENT. '
        "Connect an output of type CONDITIONING."
    )


def test_links_to_nowhere(failing, api, ui):
    api["5"]["inputs"]["model"] = ["99", 0]
    assert f'{NODE_5}, input "model": it is linked to node 99, which is not in the workflow' in failing(api)
    api["5"]["inputs"]["model"] = ["1", 7]
    assert 'linked to output 7 of node 1 "TinyLoader", which has 3' in failing(api)
    ui["nodes"][5]["inputs"][0]["link"] = 77
    assert 'node 6 "VAE Decode" (VAEDecode), input "samples": its link is not in the file (got 77)' in failing(ui)


def test_a_missing_required_input(failing, api):
    del api["5"]["inputs"]["positive"]
    assert f'{NODE_5}, input "positive": a CONDITIONING is required and nothing is connected' in failing(api)
    api["5"]["inputs"]["positive"] = 3
    assert "it needs a connection from an output of type CONDITIONING, not a value (got 3)" in failing(api)


def test_a_choice_that_does_not_exist(failing, api):
    api["5"]["inputs"]["sampler_name"] = "euler_a"
    message = failing(api)
    assert f"{NODE_5}, input \"sampler_name\": this is not one of its choices (got 'euler_a'). Choose euler" in message


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("steps", 0, "it must be at least 1 (got 0)"),
        ("steps", 10**30, "it must be at most 10000"),
        ("steps", 2.5, "it must be a whole number (got 2.5)"),
        ("steps", "many", "it must be a whole number (got 'many')"),
        ("steps", None, "it must be a whole number (got None)"),
        ("cfg", float("nan"), "it must be a finite number (got nan)"),
        ("cfg", -1, "it must be at least 0"),
        ("cfg", [1, 2, 3], "it must be a finite number"),
        ("denoise", {}, "it must be a finite number"),
        ("seed", -1, "it must be at least 0"),
    ],
)
def test_numbers_out_of_range_or_of_another_kind(failing, api, name, value, problem):
    api["5"]["inputs"][name] = value
    assert f'{NODE_5}, input "{name}": {problem}' in failing(api)


def test_no_output_node(failing, api):
    del api["7"]
    assert "no output node" in failing(api)


def test_a_workflow_of_another_version_of_a_node(failing, ui):
    ui["nodes"][4]["widgets_values"] = [5, "fixed", 3, "old_option", 4.0, "euler", "simple", 1.0]
    message = failing(ui)
    assert "1 of its 8 widget values belong to no input (got [1.0])" in message and "another version" in message
    ui["nodes"][4]["widgets_values"] = [5, "fixed", 3, "euler", 4.0, "simple", 1.0]
    message = failing(ui)
    assert "input \"cfg\": it must be a finite number (got 'euler')" in message
    assert "saved by another version of the node" in message


def checkpoint(api, name):
    api["1"] = step("CheckpointLoaderSimple", ckpt_name=name)
    return api


def test_a_missing_model_says_where_it_belongs(failing, api, where):
    message = failing(checkpoint(api, "sd_xl_base_1.0.safetensors"))
    assert "node 1" in message and "checkpoints file 'sd_xl_base_1.0.safetensors' was not found" in message
    assert f"Put it into {where.models[0] / 'checkpoints'}" in message


def test_files_that_are_no_whole_safetensors(failing, api, where):
    folder = where.models[0] / "checkpoints"
    folder.mkdir()
    whole = safetensors.torch.save({"model.diffusion_model.x": torch.zeros(64, 64)})
    header = struct.pack("<Q", 2**40) + b"{}"
    contents = {
        "cut.safetensors": whole[: len(whole) // 2], "empty.safetensors": b"", "text.safetensors": b"not a model " * 9,
        "header.safetensors": header,
    }  # fmt: skip
    for name, data in contents.items():
        (folder / name).write_bytes(data)
        message = failing(checkpoint(api, name))
        assert message.startswith('node 1 "CheckpointLoaderSimple"') and "is not a whole safetensors file" in message
    for name, data in {
        "old.safetensors": b"\x80\x04\x95\x0a\x00\x00\x00.",
        "zip.safetensors": b"PK\x03\x04" + bytes(40),
    }.items():
        (folder / name).write_bytes(data)
        assert "is a pickle" in failing(checkpoint(api, name))
    (folder / "other.safetensors").write_bytes(whole)
    assert "is no model that" in failing(checkpoint(api, "other.safetensors"))


PATHS = [
    ("../secret.safetensors", "leaves its folder"),
    ("a/../../secret.safetensors", "leaves its folder"),
    ("..\\secret.safetensors", "leaves its folder"),
    ("/etc/passwd", "is absolute"),
    ("C:\\models\\x.safetensors", "is absolute"),
    ("C:x.safetensors", "is absolute"),
    ("\\\\server\\share\\x.safetensors", "is absolute"),
    ("a\x00b.safetensors", "control character"),
    ("gone.safetensors", "cannot be followed"),
    ("gone/x.safetensors", "cannot be followed"),
    ("loop.safetensors", "cannot be followed"),
    ("", "the name is empty"),
    ("x" * 5000, "is too long"),
]


@pytest.mark.parametrize(("name", "problem"), PATHS)
def test_paths_that_leave_their_folder(failing, api, where, tmp_path, name, problem):
    folder = where.models[0] / "checkpoints"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    for gone in ("gone.safetensors", "gone"):
        os.symlink(tmp_path / "nothing", folder / gone)
    os.symlink(folder / "loop.safetensors", folder / "loop.safetensors")
    message = failing(checkpoint(api, name))
    assert 'node 1 "CheckpointLoaderSimple", input "ckpt_name"' in message and problem in message


@pytest.mark.parametrize("prefix", ["linked/x", "../x", "/tmp/x", "C:\\x", "a/../../x", "a\x00b", "", "folder/"])
def test_images_are_not_saved_outside_the_output_folder(failing, api, where, tmp_path, prefix):
    (tmp_path / "elsewhere").mkdir()
    where.output.mkdir()
    (where.output / "linked").symlink_to(tmp_path / "elsewhere")
    api["7"]["inputs"]["filename_prefix"] = prefix
    assert failing(api).startswith('node 7 "SaveImage"')


@pytest.mark.parametrize(
    "name", ["../up.png", "/etc/passwd", "absent.png", "notes.png", "a\x00.png [output]", "link.png [output]",
             "gone.png"]
)  # fmt: skip
def test_images_that_cannot_be_loaded(failing, where, tmp_path, name):
    images.save_png(torch.rand(8, 8, 3), tmp_path / "up.png")
    # Among the results may lie what came from others; links in the input folder are the user's own.
    where.output.mkdir()
    (where.output / "link.png").symlink_to(tmp_path / "up.png")
    (where.inputs[0] / "gone.png").symlink_to(tmp_path / "nothing.png")
    (where.inputs[0] / "notes.png").write_text("no image")
    graph = {"1": step("LoadImage", image=name), "2": step("PreviewImage", images=["1", 0])}
    assert failing(graph).startswith('node 1 "LoadImage"')


def test_nan_latents(failing, api):
    api["9"] = step("Poison", latent=["4", 0])
    api["5"]["inputs"]["latent_image"] = ["9", 0]
    assert 'node 9 "Poison": its LATENT holds NaN or infinity' in failing(api)


def test_a_model_that_returns_nan(failing, api, monkeypatch):
    from retort.graphs import executor

    monkeypatch.setattr(executor, "_check_finite", lambda *args: None)
    api["9"] = step("Poison", latent=["4", 0])
    api["5"]["inputs"]["latent_image"] = ["9", 0]
    assert f"{NODE_5}: the latent that entered step 1 of 3" in failing(api)


def test_a_preset_that_cannot_fit_the_model(failing, api):
    api["1"]["inputs"]["kind"] = "eps"
    api["8"] = step("RetortDistilledSetup", model=["1", 0], positive=["2", 0], preset="tdm_sd3", steps=4)
    api["9"] = step("SamplerCustomAdvanced", noise=["10", 0], guider=["8", 1], sampler=["8", 2], sigmas=["8", 3],
                    latent_image=["4", 0])  # fmt: skip
    api["10"] = step("RandomNoise", noise_seed=1)
    api["6"]["inputs"]["samples"] = ["9", 0]
    message = failing(api)
    assert "node 8" in message and "flow" in message


def test_a_latent_of_other_channels(failing, api, where):
    api["10"] = step("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    api["6"]["inputs"]["samples"] = ["10", 0]
    assert 'node 6 "VAEDecode": the latents have 16 channels and this VAE reads 4' in failing(api)


# --- mutations -------------------------------------------------------------------------------------------------------

JUNK = [
    None, True, 0, -1, 3, 2.5, 1e308, float("nan"), float("inf"), 10**30, "", "x", "\x00", "../up", "é" * 300, [], {},
    [1, 2, 3], ["1", 0], ["5", 0], [["1", 0]], {"a": 1}, {"__value__": [1]}, "5", "KSampler", -(2**63),
]  # fmt: skip


def spots(value, path=()):
    """Every (container, key) inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from spots(inner, (*path, key))


def mutated(document, dice: random.Random):
    """One to three random changes of structure."""
    document = copy.deepcopy(document)
    for _ in range(dice.randint(1, 3)):
        places = list(spots(document))
        if not places:
            return document
        holder, key = dice.choice(places)
        kind = dice.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = copy.deepcopy(dice.choice(JUNK))
        elif kind == 2:  # a piece of the document in the wrong place
            other, name = dice.choice(places)
            if name in other if isinstance(other, dict) else isinstance(name, int) and name < len(other):
                holder[key] = copy.deepcopy(other[name])
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(dice.choice(JUNK)))
        elif kind == 3:
            holder[dice.choice(["class_type", "inputs", "nodes", "links", "mode", "zz"])] = dice.choice(JUNK)
        elif isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += dice.choice([-1, 1, 2])
        elif isinstance(holder[key], str):
            holder[key] = holder[key][::-1]
    return document


def scarred(data: bytes, dice: random.Random) -> bytes:
    """One to four random changes of bytes; no digit is added, so that no number grows tenfold."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(changed))
        kind = dice.randrange(3)
        if kind == 0:
            changed[at] = dice.choice(b'{}[]",:\x00\xff-. abc')
        elif kind == 1:
            del changed[at : at + dice.randint(1, 12)]
        else:
            changed[at:at] = dice.choice([b'"', b"}", b"null", b"\xc3", b",", b"-", b"[]"])
        if not changed:
            changed = bytearray(b"{")
    return bytes(changed)


def test_500_mutated_workflows_never_end_in_a_traceback(monkeypatch, capsys, known, api, ui, where, tmp_path):
    """Seeded. Every file either runs (0) or is refused with one message (2); nothing half written stays behind."""
    nodes = known(Poison)

    async def everything():
        return nodes

    monkeypatch.setattr(registry, "everything", everything)
    monkeypatch.chdir(tmp_path)
    for workflow in (api, ui):  # small, since many of the files still run
        smaller = json.loads(json.dumps(workflow).replace("64", "16"))
        workflow.clear()
        workflow.update(smaller)
    carrier = tmp_path / "carrier.png"
    images.save_png(torch.zeros(2, 2, 3), carrier, {"prompt": api, "workflow": ui})
    sources = [json.dumps(api).encode(), json.dumps(ui).encode(), carrier.read_bytes()]
    dice, codes, out = random.Random(20), [], tmp_path / "out"
    for i in range(500):
        if i % 5 < 3:
            data = json.dumps(mutated(dice.choice([api, ui]), dice)).encode()
        else:
            data = scarred(sources[dice.randrange(3)], dice)
        path = tmp_path / "mutant"
        path.write_bytes(data)
        try:
            # The command itself, without typer's parsing of the arguments, which would take most of the time.
            cli.run(path, out=out, inputs=[where.inputs[0]])
            codes.append(0)
        except typer.Exit as end:
            codes.append(end.exit_code)
        except Exception as error:
            pytest.fail(f"mutation {i} ended in {error!r}: {data[:2000]!r}")
        printed = capsys.readouterr()
        assert codes[-1] in (0, 2) and "Traceback" not in printed.err
        assert codes[-1] == 0 or (printed.err.startswith("error: ") and printed.out == ""), (i, data, printed)
    assert not [p for p in out.rglob("*") if p.suffix == ".part"]
    assert 30 < codes.count(0) < 470, codes.count(0)
