"""Links in a stranger's run, set, search or job: refused by node, panel, picker and command line.

Depth 1 is the folder itself, 2 a folder in it, 3 a folder in that; depth 2 and 3 also as a link above the file.
"""

from __future__ import annotations

import json
import socket
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("aiohttp")
pytest.importorskip("peft")

from retort.files.entries import LinkError  # noqa: E402
from retort.hosts import api, cli, preference_view
from retort.hosts.comfyui import picker_routes  # noqa: E402
from retort.hosts.jobs import starter
from retort.hosts.jobs import view as run_view
from retort.hosts.search import files as search_files
from retort.hosts.search import view as search_view
from retort.hosts.search.record import Record  # noqa: E402
from retort.hosts.training import run as training  # noqa: E402
from retort.nodes.jobs import RetortCollectJob, RetortLossChart  # noqa: E402
from retort.nodes.picker import RetortPreferencePicker  # noqa: E402
from retort.nodes.preference import RetortLabelPairs, RetortPreferenceSet  # noqa: E402
from retort.nodes.search_files import RetortLoadSearch  # noqa: E402
from retort.preferences import store as preferences  # noqa: E402
from retort.preferences import tickets
from retort.trainers.dataset import Dataset, entries_of  # noqa: E402
from retort.trainers.job_watch import Status, write_status  # noqa: E402
from retort.trainers.methods import read_config  # noqa: E402
from retort.trainers.watch import Silent  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="making links needs a right there")
NAMED = "is a link to .*no link in such a folder is followed"
RUN = ("config.json", "origin.json", "state.safetensors", "metrics.jsonl", "status.json", "result.json", "job.json",
       "job.lock", "job.log", "lock", "data.safetensors", "base.safetensors", "commands", "previews", "checkpoints",
       "pairs", "slow")  # fmt: skip
DEEPER = ("commands/stop", "previews/step_0000001.png", "checkpoints/step_0000001.safetensors", "pairs/made_for.json",
          "pairs/0000000.safetensors", "slow/state.safetensors", "slow/slow.json")  # fmt: skip
DEEPEST = ("slow/checkpoints/step_0000001.safetensors", "slow/previews/step_0000001.png")
SET = ("pairs.jsonl", "tickets.jsonl", "tickets.lock", "images", "latents")


@pytest.fixture
def outside(tmp_path):
    """A folder of the user's with files of all names that Retort knows; `same()`: whether all are as they were."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in (*RUN, *SET, "step_0000001.png", "step_0000001.safetensors", "stop", "made_for.json", "new.jsonl"):
        if "." in name or name == "stop":
            (folder / name).write_bytes(b"mine\n")

    def marks():
        return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    before = marks()
    folder_like = type("Outside", (), {"path": folder, "same": staticmethod(lambda: marks() == before)})
    return folder_like


def linked(folder, name, outside):
    """Put a link in a folder at a name, to the outside thing of the same last name or, for a folder, to all of it."""
    link = folder / name
    link.parent.mkdir(parents=True, exist_ok=True)
    target = outside.path / link.name
    link.symlink_to(target if "." in link.name or link.name == "stop" else outside.path)
    return link


def request(host, name):
    _, clip, _ = host.embedded("flow")
    data = Dataset(entries_of([host.encode_text(clip, "a 3")], "positive"), ["a 3"], None, [torch.zeros(16, 8, 8)])
    config = {"method": "flow", "objective": {"steps": 2}, "training": {"steps": 1}, "lora": {"rank": 1}}
    return training.Request(name, read_config(config), data)


@pytest.mark.parametrize("name", [*RUN, *DEEPER, *DEEPEST])
def test_no_run_begins_in_a_folder_with_a_link(where, outside, name):
    """By a node, and as a job by a node and by the command line: before anything is loaded, written or removed."""
    folder = api.host.runs_folder() / "mine"
    link = linked(folder, name, outside)
    asked = request(api.host, "mine")
    for start in (
        lambda: training.run_in_node(api.host, None, asked, watcher=Silent()),
        lambda: training.run(api.host, None, asked, watcher=Silent()),
        lambda: starter.write_job(api.host, folder, None, asked),
        lambda: starter.start(folder, []),
    ):
        with pytest.raises(LinkError, match=NAMED):
            start()
    for command in (("train",), ("job", "status"), ("job", "stop"), ("job", "save"), ("job", "sample")):
        done = CliRunner().invoke(cli.app, [*command, str(folder)], env={"COLUMNS": "1000"})
        assert done.exit_code == 2 and f"{link.name} is a link to" in done.stderr, done.stderr
    assert outside.same() and link.is_symlink() and sorted(p.name for p in folder.iterdir()) == [name.split("/")[0]]


@pytest.mark.parametrize("name", [*RUN, *DEEPER, *DEEPEST])
def test_a_run_with_a_link_is_neither_collected_nor_drawn(where, outside, name):
    folder = api.host.runs_folder() / "mine"
    link = linked(folder, name, outside)
    for node in (RetortCollectJob, RetortLossChart):
        with pytest.raises(LinkError, match=NAMED):
            node.execute("mine")
    assert outside.same() and link.is_symlink()


@pytest.mark.parametrize("name", [*RUN, *DEEPER, *DEEPEST])
def test_the_panel_follows_no_link(where, outside, name):
    """Nothing of outside is shown, nothing is made by looking, and a command is refused."""
    runs = api.host.runs_folder()
    write_status(runs / "other", Status("finished", 1, 1))
    folder = runs / "mine"
    if name != "status.json":
        write_status(folder, Status("running", 3, 9, pid=1, machine="another", time=0))
    if name != "metrics.jsonl":
        (folder / "metrics.jsonl").parent.mkdir(exist_ok=True, parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 3, "student_loss": 1.0}\n')
    link = linked(folder, name, outside)
    before = sorted(p.name for p in folder.rglob("*"))
    listed = {run["name"]: run for run in run_view.runs(runs)}
    assert set(listed) == {"mine", "other"}
    if name in ("status.json",):
        assert listed["mine"]["state"] == "failed" and "is a link to" in listed["mine"]["message"]
    try:
        shown = run_view.log(folder, 0, 0)
        assert "mine\n" not in json.dumps(shown) and shown["saves"] == [] and shown["pictures"] == []
    except LinkError:
        pass
    if name.startswith("previews"):
        with pytest.raises(LinkError, match=NAMED):
            run_view.picture(folder, "step_0000001.png")
    with pytest.raises(LinkError, match=NAMED):
        run_view.command(folder, "stop")
    assert outside.same() and link.is_symlink() and sorted(p.name for p in folder.rglob("*")) == before


def test_looking_makes_no_lock(where, outside):
    folder = api.host.runs_folder() / "mine"
    # A process of that number is there, and its last word is old, so that the lock is asked.
    told = {"state": "running", "step": 3, "steps": 9, "pid": 1, "machine": socket.gethostname(), "time": 1.0}
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps(told))
    assert [(run["name"], run["state"]) for run in run_view.runs(folder.parent)] == [("mine", "died")]
    assert [p.name for p in folder.iterdir()] == ["status.json"]
    (folder / "job.lock").symlink_to(outside.path / "made by looking")
    (listed,) = run_view.runs(folder.parent)
    assert "job.lock is a link to" in listed["message"] and not (outside.path / "made by looking").exists()


# ---- sets -----------------------------------------------------------------------------------------


@pytest.fixture
def taste(where):
    """A set of three pictures with a ticket of two that waits, as a stranger would send it."""
    folder = api.host.runs_folder().with_name("retort_preferences") / "taste"
    names = [preferences.keep_image(folder, torch.full((4, 4, 3), value)) for value in (0.1, 0.5, 0.9)]
    preferences.append(folder, [{"prompt": "a", "winner": names[0], "loser": names[2], "strength": 1, "by": "x"}])
    (id,) = tickets.ask(folder, [tickets.Ticket("$(touch marker)", tuple(names[:2]), by="pick")])
    return folder, id, names


def moved_out(folder, name, outside):
    """Make a file, or a folder, of a set a link to itself, moved outside."""
    target = outside.path / "moved"
    if (folder / name).exists():
        (folder / name).rename(target)
    else:
        target.write_bytes(b"")
    (folder / name).symlink_to(target)
    return {p: p.read_bytes() for p in [target, *target.rglob("*")] if p.is_file()}


@pytest.mark.parametrize("name", SET[:4])
def test_the_picker_writes_through_no_link(taste, outside, name):
    """The answer to a stranger's ticket would end in the user's own file, as its prompt says."""
    import asyncio

    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    folder, id, names = taste
    before = moved_out(folder, name, outside)

    async def asked():
        table = web.RouteTableDef()
        picker_routes.add(table, lambda: folder.parent)
        application = web.Application()
        application.add_routes(table)
        async with TestClient(TestServer(application)) as client:
            url = "/retort/picker/taste"
            picture = await client.get(f"{url}/images/{names[0].split('/')[1].removesuffix('.png')}")
            answers = [await client.get(f"{url}/tickets?by=pick")]
            for deed in ("answer", "take_back"):
                body = {"id": id} | ({"choice": 0} if deed == "answer" else {})
                answers.append(await client.post(f"{url}/{deed}?by=pick", json=body))
            return picture.status, [(one.status, await one.text()) for one in answers]

    picture, answers = asyncio.run(asked())
    # Where its pictures lie behind a link, a ticket waits for nobody, so that there is nothing to take back.
    assert all(status == 400 or (name, status) == ("images", 409) for status, _ in answers[1:]), answers
    assert name == "images" or any("is a link to" in text for _, text in answers), answers
    assert picture == (404 if name == "images" else 200)
    assert all(path.read_bytes() == content for path, content in before.items()) and outside.path.is_dir()


@pytest.mark.parametrize("name", [SET[0], "images"])
def test_nodes_and_panel_read_a_set_through_no_link(taste, outside, name):
    folder, _, _ = taste
    before = moved_out(folder, name, outside)
    sets = folder.parent
    image = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    label = {"reward": None, "name": "taste", "prompt": "a", "pairing": "all", "margin": 0.0, "batch_size": 2}
    label |= {"images": image, "samples": None, "vae": None, "prompt_per_line": False}
    known = {i.id for i in RetortLabelPairs.define_schema().inputs}
    acts = {
        "label": lambda: RetortLabelPairs.execute(**{k: v for k, v in label.items() if k in known}),
        "pick": lambda: RetortPreferencePicker.execute(image, name="taste", prompt="b"),
        "set": lambda: RetortPreferenceSet.execute(name="taste"),
        "panel": lambda: preference_view.one(sets, "taste"),
        "export": lambda: RetortPreferenceSet.execute(name="taste", export="folder"),
    }
    assert [one["name"] for one in preference_view.every(sets)] == ["taste"]
    for act, deed in acts.items():
        if name == "images" and act == "panel":
            assert deed()["problems"] == 1
            continue
        with pytest.raises(ValueError, match="is a link|none of the 0 pairs"):
            deed()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(p.name for p in (outside.path / "moved").rglob("*")) == sorted(
        p.name for p in before if p.name != "moved"
    )


@pytest.mark.parametrize("name", ["picture", "tickets.lock"])
def test_the_picker_meets_links_deeper_in(taste, outside, name):
    """A picture of the ticket, two folders down, and the lock that would be made, as links."""
    folder, id, names = taste
    before = moved_out(folder, names[0] if name == "picture" else name, outside)
    with pytest.raises(ValueError, match="is a link" if name == "picture" else NAMED):
        tickets.answer(folder, id, 0, "pick")
    with pytest.raises(ValueError, match="there is no answer|is a link"):
        tickets.take_back(folder, id, "pick")
    assert name != "picture" or len(tickets.TicketState(folder, "pick").waiting) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [pair.prompt for pair in preferences.read(folder).pairs] == (["a"] if name != "picture" else [])


@pytest.mark.parametrize("name", [*SET[:2], "images", "picture"])
def test_the_command_line_reads_a_set_through_no_link(taste, outside, tmp_path, name):
    folder, _, names = taste
    before = moved_out(folder, names[0] if name == "picture" else name, outside)
    inputs = {i.id: i.default for i in RetortPreferenceSet.define_schema().inputs if i.id != "pairs"}
    graph = {
        "1": {"class_type": "RetortPreferenceSet", "inputs": inputs | {"name": "taste"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 3]}},
    }
    (tmp_path / "set.json").write_text(json.dumps(graph))
    out = str(folder.parents[1])
    done = CliRunner().invoke(cli.app, ["run", str(tmp_path / "set.json"), "--out", out], env={"COLUMNS": "1000"})
    # The node reads no tickets.
    if name == "tickets.jsonl":
        assert done.exit_code == 0
    else:
        assert done.exit_code == 2 and ("is a link" in done.stderr or "none of the 0 pairs" in done.stderr), done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())


def test_imports_and_exports_follow_no_link(taste, outside):
    folder, _, names = taste
    sets = folder.parent
    (sets / "taste_export").symlink_to(outside.path)
    (sets / "taste.parquet").symlink_to(outside.path / "new.jsonl")
    for way in ("folder", "parquet"):
        with pytest.raises(LinkError, match=NAMED):
            RetortPreferenceSet.execute(name="taste", export=way)
    given = sets / "given" / "train"
    given.mkdir(parents=True, exist_ok=True)
    (given / "metadata.jsonl").symlink_to(outside.path / "new.jsonl")
    with pytest.raises(LinkError, match=NAMED):
        RetortPreferenceSet.execute(name="taste", import_from="given")
    (given / "metadata.jsonl").unlink()
    row = {"caption": "a", "jpg_0_file_name": "a.png", "jpg_1_file_name": "b.png", "label_0": 1}
    (given / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    for name, file in zip(("a.png", "b.png"), names, strict=False):
        (given / name).symlink_to(folder / file)
    assert "is a link" in RetortPreferenceSet.execute(name="taste", import_from="given").args[3]
    assert outside.same()


# ---- searches -------------------------------------------------------------------------------------


def test_searches_and_their_records_follow_no_link(where, outside, tmp_path):
    saved = search_files.folder(api.host)
    saved.mkdir(parents=True, exist_ok=True)
    (saved / "theirs.safetensors").symlink_to(outside.path / "state.safetensors")
    with pytest.raises(LinkError, match=NAMED):
        RetortLoadSearch.execute("theirs")
    records = tmp_path / "records"
    name = "20260101-000000-00000000"
    (records / name / "item_0").mkdir(parents=True)
    (records / name / "view.json").symlink_to(outside.path / "status.json")
    (records / name / "item_0" / "1.jpg").symlink_to(outside.path / "step_0000001.png")
    (records / name / "item_0" / "1.latent").symlink_to(outside.path / "state.safetensors")
    assert search_view.searches(records, saved, 1) == {"searches": [], "saved": []}
    for look in (
        lambda: search_view.record(records, name, 1),
        lambda: search_view.picture(records, name, 0, 1),
        lambda: search_view.take(records, tmp_path / "input", name, 0, 1),
    ):
        with pytest.raises(LinkError, match=NAMED):
            look()
    # Old records go, and their links are not followed.
    for number in range(20):
        (records / f"2025010{number % 10}-00000{number % 10}-0000000{number % 10}").mkdir(exist_ok=True)
    (records / "20250101-000001-00000001" / "item_0").symlink_to(outside.path)
    Record(records, "a", "b", 1)
    assert outside.same() and not any((tmp_path / "input").iterdir())


def test_the_users_own_links_to_models_and_folders_stay(where, tmp_path):
    disk = tmp_path / "disk"
    (disk / "runs").mkdir(parents=True, exist_ok=True)
    where.output.mkdir(exist_ok=True)
    (where.output / "retort").symlink_to(disk / "runs")
    write_status(api.host.runs_folder() / "mine", Status("finished", 1, 1))
    assert [run["name"] for run in run_view.runs(api.host.runs_folder())] == ["mine"]
    lora = {"a.lora_up.weight": torch.ones(2, 1)}
    save_file(lora, disk / "lora.safetensors")
    loras = api.host.loras_folder()
    loras.parent.mkdir(parents=True, exist_ok=True)
    loras.symlink_to(disk)
    (disk / "linked.safetensors").symlink_to(disk / "lora.safetensors")
    assert torch.equal(api.host.read_lora("linked.safetensors")["a.lora_up.weight"], torch.ones(2, 1))
