"""Several trainers on one step: here as threads, so that shares, refusals and files are tested without a launcher."""

from __future__ import annotations

import threading

import pytest
import torch
from two_players import same

from retort.files.folder import inside


class Together:
    """What two threads share."""

    def __init__(self, world: int):
        self.world, self.barrier, self.slots = world, threading.Barrier(world), [None] * world

    def reducer(self, rank: int):
        return Thread(self, rank)


class Thread:
    """See trainers.processes.Reducer."""

    def __init__(self, shared: Together, rank: int):
        self.shared, self.rank, self.world = shared, rank, shared.world

    def sum(self, tensors):
        self.shared.slots[self.rank] = [t.detach().clone() for t in tensors]
        self.shared.barrier.wait(120)
        sums = [sum(parts) for parts in zip(*self.shared.slots, strict=True)]
        self.shared.barrier.wait(120)
        with torch.no_grad():
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total)

    def any(self, flag):
        count = torch.tensor(float(flag))
        self.sum([count])
        return bool(count)


def together(trainers):
    """Train all of them at once; their LoRAs, or the first error."""
    found, errors = [None] * len(trainers), []

    def one(i):
        try:
            found[i] = trainers[i].train()
        except Exception as error:
            errors.append(error)
            trainers[i].reducer.shared.barrier.abort()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(trainers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if told:
        raise told[0]
    assert not errors
    return found


@pytest.fixture
def several(make):
    def build(world, folder="shared", **settings):
        shared = Together(world)
        return [make(folder, reducer=shared.reducer(rank), **settings) for rank in range(world)]

    return build


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"accumulation": 3, "ema": 0.9}], ids=["plain", "accumulated"])
def test_the_same_samples_give_the_same_lora(make, several, world, settings):
    found = together(several(world, **settings))
    expected = make("alone", **settings).train()
    for lora in found:
        same(lora, expected, exact=False)
        same(lora, found[0])


def test_accumulation_grows_alike(make, several):
    settings = {"accumulation": 2, "batch_size": 2, "noise_scale_target": 0.05, "accumulation_cap": 8, "steps": 20}
    trainers = several(2, **settings)
    found = together(trainers)
    alone = make("alone", **settings)
    same(found[0], alone.train(), exact=False)
    assert trainers[0].accumulation.count == trainers[1].accumulation.count == alone.accumulation.count > 2


def test_shares_that_cannot_be_compared_are_refused(several):
    with pytest.raises(ValueError, match="multiple of 2"):
        several(2, accumulation=3, noise_scale_target=0.1)
    with pytest.raises(ValueError, match="raise accumulation"):
        several(2, batch_size=1)


def test_the_first_writes_and_all_go_on_from_it(several, make, tmp_path):
    first = several(2, steps=6)
    together(first)
    state = (tmp_path / "shared" / "state.safetensors").read_bytes()
    going_on = several(2, steps=12)
    assert going_on[1].save() is None and (tmp_path / "shared" / "state.safetensors").read_bytes() == state
    same(together(going_on)[1], make("alone", steps=12).train(), exact=False)
    assert len((tmp_path / "shared" / "metrics.jsonl").read_text().splitlines()) == 12


def test_processes_that_see_different_folders_are_refused(several, tmp_path):
    together(several(2, steps=2))
    apart = several(2, steps=4)
    apart[1].files = inside(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="do not all see the same state"):
        together(apart)
