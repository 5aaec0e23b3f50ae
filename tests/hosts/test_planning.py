"""A run's forecast through the host: what is counted, remembered, and done on little memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import outlines

from retort.hosts.headless import folders  # noqa: E402
from retort.hosts.headless.folders import Folders  # noqa: E402
from retort.hosts.headless.host import host  # noqa: E402
from retort.hosts.headless.model import Vae  # noqa: E402
from retort.hosts.training import planning  # noqa: E402
from retort.hosts.training import run as training
from retort.trainers import dry_run  # noqa: E402
from retort.trainers.counted import Counted  # noqa: E402
from retort.trainers.dataset import Dataset  # noqa: E402
from retort.trainers.loop import TrainingFailed  # noqa: E402
from retort.trainers.methods import read_config  # noqa: E402
from retort.trainers.watch import Silent  # noqa: E402

SMALL = {**outlines.FLUX_SMALL, "num_layers": 1, "num_single_layers": 6}


@pytest.fixture(autouse=True)
def where(tmp_path):
    with folders.use(Folders(models=(tmp_path,), output=tmp_path / "output")):
        yield


@pytest.fixture(scope="module")
def model():
    return outlines.model_of(outlines.FLUX, SMALL, real=True)


def request(method="flow", side=8, **training_settings):
    settings = {"steps": 1, "batch_size": 1, "gradient_checkpointing": True, "preview_every": 0, **training_settings}
    config = read_config({"method": method, "training": settings, "lora": {"rank": 2}})
    return training.Request("counted", config, outlines.dataset_of((16, side, side), (4, 64), 32))


@dataclass
class Looked:
    """What a vision network has found, as some conditionings hold it."""

    found: Tensor


@dataclass
class Bare:
    """A network where a reward keeps it."""

    network: torch.nn.Module

    def offload(self):
        """It stays."""


@dataclass
class Reward:
    """Of this name, looking with a network."""

    name: str
    looks: Bare


class Heard(Silent):
    def __init__(self):
        self.said = []

    def says(self, text):
        self.said.append(text)


def test_the_largest_picture_and_the_longest_prompt_are_counted():
    entries = [(torch.ones(1, n, 4), {}) for n in (3, 9, 5)]
    latents = [torch.ones(4, h, 8) for h in (8, 4, 16)]
    found = planning.largest(Dataset(entries, ["a", "bb", "c"], entries[0], latents))
    assert found.entries[0][0].shape[1] == 9 and found.prompts == ["bb"]
    assert [tuple(t.shape) for t in found.latents] == [(4, 16, 8)]


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("dmd2", {"ratio": 1, "steps": 2, "timesteps": "999, 400"}),
        ("tdm", {"steps": 2, "timesteps": "999, 400"}),
        ("di_star", {"steps": 2, "timesteps": "999, 400"}),
        ("dmd2", {"ratio": 1, "steps": 1}),
        ("dmd2", {"regression_steps": 2}),
    ],
)
def test_levels_and_pairs_are_found_where_a_network_has_no_numbers(model, method, objective):
    asked = request()
    settings = {"method": method, "objective": objective, "training": {"gradient_checkpointing": True}}
    assert planning.counted(host, model, read_config(settings), asked.dataset).beside > 0


def test_samples_that_come_more_often_are_counted(model):
    asked = request(importance=0.5)
    assert planning.counted(host, model, asked.config, asked.dataset).beside > 0


def test_a_count_is_remembered_and_settings_that_matter_are_told_apart(model, tmp_path, monkeypatch):
    asked, remembered = request(), tmp_path / "counted.json"
    first = planning.counted(host, model, asked.config, asked.dataset, remembered=remembered)
    monkeypatch.setattr(dry_run, "count", lambda *_, **__: pytest.fail("counted again"))
    again = request(learning_rate=1e-3, steps=7, offload="none")
    assert planning.counted(host, model, again.config, again.dataset, remembered=remembered) == first
    for other in (request(batch_size=2), request(optimiser="adafactor")):
        with pytest.raises(pytest.fail.Exception):
            planning.counted(host, model, other.config, other.dataset, remembered=remembered)


def test_the_largest_references_are_counted_whichever_prompt_has_them():
    def told(side, mask):
        return {"reference_latents": [torch.ones(1, 4, side, side)], "attention_mask": torch.ones(1, mask)}

    short, long = (torch.ones(1, 3, 4), told(8, 3)), (torch.ones(1, 9, 4), told(2, 9))
    bare = long[0], {"attention_mask": torch.ones(1, 9)}
    for entries in ([short, long], [short, bare], [long, short, bare]):
        tokens, extra = planning.largest(Dataset(entries, [], None, [torch.ones(4, 8, 8)] * len(entries))).entries[0]
        assert tokens.shape[1] == extra["attention_mask"].shape[1] == 9
        assert extra["reference_latents"][0].shape == (1, 4, 8, 8)
    assert long[1]["reference_latents"][0].shape[-1] == 2 and "reference_latents" not in bare[1]
    references = [torch.ones(4, side, 4) for side in (2, 6, 4)]
    found = planning.largest(Dataset([bare], [], None, [torch.ones(4, 8, 8)] * 3, references=references))
    assert [tuple(reference.shape) for reference in found.references] == [(4, 6, 4)]


def _shown(side=8, **given):
    """A data set like `request`'s, but for what is given."""
    tokens, extra = torch.zeros(1, 4, 64), {"pooled_output": torch.zeros(1, 32), **given.pop("extra", {})}
    entry, empty = (tokens, extra), (tokens, {**extra, **given.pop("empty", {})})
    return Dataset([entry], ["a"], empty, [torch.zeros(16, side, side)], **given)


def _reference(side):
    return {"reference_latents": [torch.zeros(1, 16, side, side)]}


SHOWN = [
    {}, {"side": 16}, *({"references": [torch.zeros(16, side, side)]} for side in (8, 64)),
    *({"extra": _reference(side)} for side in (8, 64)), {"empty": _reference(8)},
    {"extra": {"reference_latents": [torch.zeros(1, 16, 8, 8)] * 2}},
    *({"extra": {"attention_mask": torch.zeros(1, 4, dtype=dtype)}} for dtype in (torch.float32, torch.bool)),
    *({"extra": {"looked_at": Looked(torch.zeros(1, width))}} for width in (16, 32)),
    {"extra": {"reference_latents_method": "index"}},
    *({"pictures": [torch.zeros(side, side, 3, dtype=torch.uint8)]} for side in (64, 128)),
]  # fmt: skip


def test_a_count_is_remembered_for_what_the_network_is_shown(model, tmp_path, monkeypatch):
    """Of references, of a conditioning's extras and of pictures by their sizes, whatever they hold."""
    counts = iter(range(1, 99))
    monkeypatch.setattr(dry_run, "count", lambda *_, **__: Counted(next(counts), (), 0, 0, {}))
    config, remembered = request().config, tmp_path / "counted.json"

    def base(given):
        return planning.counted(host, model, config, _shown(**given), remembered=remembered).base

    assert [base(given) for given in SHOWN] == [base(given) for given in SHOWN] == [*range(1, len(SHOWN) + 1)]
    given = {"references": [torch.ones(16, 8, 8)], "extra": {"pooled_output": torch.ones(1, 32)}}
    assert base(given) == base({"references": [torch.zeros(16, 8, 8)]})
    monkeypatch.setattr(host, "VERSION", "another")
    assert base({}) == len(SHOWN) + 1


def test_decoder_and_reward_of_a_gradient_belong_to_what_is_remembered(model, tmp_path, monkeypatch):
    counts = iter(range(1, 99))
    monkeypatch.setattr(dry_run, "count", lambda *_, **__: Counted(next(counts), (), 0, 0, {}))
    given = {"objective": {}, "training": {"batch_size": 1}, "lora": {"rank": 2}}
    pleasing, plain = (read_config({"method": method, **given}) for method in ("align_prop", "flow"))

    def vae(width, dtype=torch.float32):
        return Vae(None, None, 16, network=lambda: torch.nn.Linear(2, width, dtype=dtype))

    def reward(width):
        return Reward("PickScore", Bare(torch.nn.Linear(2, width)))

    def base(config, vae, *rewards):
        return planning.counted(host, model, config, _shown(), vae, rewards, remembered=tmp_path / "counted.json").base

    asked = [(vae(3), reward(4)), (vae(5), reward(4)), (vae(3, torch.bfloat16), reward(4)), (vae(3), reward(5))]
    assert [base(pleasing, *each) for each in asked * 2] == [1, 2, 3, 4] * 2
    # No gradient passes it, and it is not read for a count in which it is not.
    unread = Vae(None, None, 16, network=lambda: pytest.fail("the decoder was read"))
    assert base(plain, unread) == base(plain, vae(3)) == 5


def test_a_run_says_what_it_takes_and_streams_what_does_not_fit(model, monkeypatch):
    assert planning.forecast(host, model, request().config, request().dataset) is None  # nothing to fill
    found = planning.counted(host, model, request().config, request().dataset)
    whole = planning.Forecast(found, request().config.training)
    for free, blocks in ((10**12, None), (int(whole.peak(7) / 0.94), 7)):
        monkeypatch.setattr(host, "free_memory", lambda free=free: free)
        heard = Heard()
        training.run(host, model, request(), watcher=heard)
        said = next(text for text in heard.said if text.startswith("memory: "))
        expected = "the base stays on the card" if blocks is None else f"{blocks} of 7 blocks streamed"
        assert said.startswith(f"memory: {expected}") and "peak about" in said
    monkeypatch.setattr(host, "free_memory", lambda: whole.peak(7) // 100)
    with pytest.raises(TrainingFailed, match="this run needs about .* make the latents smaller"):
        training.run(host, model, request(), watcher=Heard())


def test_a_run_whose_blocks_host_memory_cannot_hold_is_refused_before_it_begins(model, monkeypatch):
    found = planning.counted(host, model, request().config, request().dataset)
    whole = planning.Forecast(found, request().config.training)
    monkeypatch.setattr(host, "free_memory", lambda: int(whole.peak(7) / 0.94))
    monkeypatch.setattr(planning, "host_memory", lambda base: sum(found.blocks) - 1)
    with pytest.raises(TrainingFailed, match="of host memory .7 of 7 blocks streamed.* close other programs"):
        training.run(host, model, request(), watcher=Heard())
    monkeypatch.setattr(planning, "host_memory", lambda base: sum(found.blocks))
    assert training.run(host, model, request(), watcher=Heard()).steps == 1


def test_host_memory_is_what_is_free_and_what_of_the_base_is_there_already(monkeypatch):
    rows = {"MemAvailable": 5 * 2**30, "RssAnon": 2**30}
    monkeypatch.setattr(planning, "_row", lambda path, name: rows[name])
    assert [planning.host_memory(base * 2**28) for base in (2, 16)] == [11 * 2**29, 6 * 2**30]
    monkeypatch.undo()
    assert 2**20 < planning.host_memory(0) <= planning.host_memory(2**40)


def test_a_network_that_cannot_be_run_dry_is_trained_all_the_same(model, monkeypatch, caplog):
    def fails(*_, **__):
        raise NotImplementedError("no numbers")

    monkeypatch.setattr(host, "free_memory", lambda: 10**12)
    monkeypatch.setattr(dry_run, "count", fails)
    assert training.run(host, model, request(), watcher=Heard()).steps == 1
    assert "could not be counted beforehand: no numbers" in caplog.text


@pytest.mark.parametrize("checkpoints", [True, False])
def test_graphs_wait_only_where_the_card_has_room(model, tmp_path, monkeypatch, checkpoints):
    asked = request("tdm", side=48, gradient_checkpointing=checkpoints)
    given = host, model, asked.config, asked.dataset
    kept, alone = (planning.counted(*given, measures=measures) for measures in ((), (planning.ALONE,)))
    assert kept.beside > alone.beside and kept.calls["student forward"] == alone.calls["student forward"]
    assert alone.calls["student pass"] == kept.calls.get("student pass", 0) + 1
    found = []
    for counted, words in ((kept, "the base stays on the card, peak"), (alone, "one graph at a time, peak")):
        peak = planning.Forecast(counted, asked.config.training).peak(0)
        monkeypatch.setattr(host, "free_memory", lambda peak=peak: int(peak / 0.94))
        heard = Heard()
        found.append(training.run(host, model, asked, watcher=heard, folder=tmp_path / words[:3]))
        assert words in next(text for text in heard.said if text.startswith("memory: "))
    one, other = (result.lora for result in found)
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())


@pytest.mark.parametrize("method", ["f_distill", "di_star", "few_shot"])
def test_methods_whose_graphs_wait_are_counted(model, method):
    config = request(method).config
    given = host, model, config, request().dataset
    plain, alone = planning.counted(*given), planning.counted(*given, measures=planning.able(config)[0])
    assert plain.operations and alone.operations
