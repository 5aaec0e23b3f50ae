"""Plans from a counted step: the fewest streamed blocks that fit, one line of text, and what a measurement corrects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retort.trainers import planning
from retort.trainers.config import TrainingConfig
from retort.trainers.counted import Counted
from retort.trainers.planning import Forecast

GB = 2**30
# Ten blocks of 1 GB and 1 GB besides; 2 GB of adapters and state; 3 GB in the backward pass.
COUNTED = Counted(
    base=11 * GB,
    blocks=(GB,) * 10,
    adapters=GB // 2,
    state=GB * 3 // 2,
    peaks={"student forward": 2 * GB, "student backward @ blocks.0": 3 * GB, "optimiser": GB // 2},
    flops={"student forward": 10**13, "student backward": 2 * 10**13},
    calls={"student forward": 1, "teacher pass": 1},
    moves={"student": 2 * GB},
)
CHECKPOINTED = TrainingConfig(gradient_checkpointing=True)


def test_what_is_streamed_leaves_the_card_but_for_two_blocks():
    forecast = Forecast(COUNTED, CHECKPOINTED)
    assert forecast.peak(0) == 16 * GB
    assert forecast.peak(1) == 16 * GB  # it leaves, and one buffer comes
    assert forecast.peak(4) == 14 * GB
    assert forecast.peak(10) == 8 * GB
    assert replace(forecast, context=GB).peak(10) == 9 * GB


@pytest.mark.parametrize(
    ("free", "streamed", "fits"), [(17, 0, True), (16, 3, True), (12, 7, True), (9, 10, True), (8, 10, False)]
)
def test_auto_takes_the_fewest_blocks_that_fit(free, streamed, fits):
    plan = Forecast(COUNTED, CHECKPOINTED, free * GB).plan
    assert (plan.streamed, plan.fits) == (streamed, fits)
    assert (planning.problem(plan, CHECKPOINTED) is None) is fits
    if streamed and fits:
        assert Forecast(COUNTED, CHECKPOINTED).peak(streamed - 1) > planning.usable(free * GB)


def test_what_the_user_sets_is_kept():
    for offload, streamed in (("none", 0), ("4", 4), ("99", 10)):
        assert Forecast(COUNTED, replace(CHECKPOINTED, offload=offload), 80 * GB).plan.streamed == streamed
    # Streaming needs checkpoints.
    assert Forecast(COUNTED, TrainingConfig(gradient_checkpointing=False), 9 * GB).plan.streamed == 0
    assert Forecast(COUNTED, CHECKPOINTED).plan.streamed == 0  # nobody knows the card


def test_one_line_says_what_fits_and_how():
    assert str(Forecast(COUNTED, CHECKPOINTED, 12 * GB).plan) == (
        "7 of 10 blocks streamed, 7.0 GB of host memory, peak about 11.0 GB"
    )
    assert str(Forecast(COUNTED, CHECKPOINTED, 80 * GB).plan) == "the base stays on the card, peak about 16.0 GB"
    fast, slow = (Forecast(COUNTED, CHECKPOINTED, 12 * GB, speed=speed).plan for speed in (1e15, 3e11))
    assert str(slow).endswith("about 100 s a step, transfer hidden")
    assert str(fast).endswith("about 0.90 s a step, transfer adds about 0.87 s a step")
    measured = Forecast(COUNTED, CHECKPOINTED, 12 * GB).timed(2.0, 7e9)
    assert str(measured.plan).endswith("about 3.22 s a step, transfer adds about 1.22 s a step")
    # Of accumulated batches two are counted, and time is taken of all.
    eight = replace(measured, training=replace(CHECKPOINTED, accumulation=8)).timed(8.0, None)
    assert (eight.bus, eight.plan.seconds) == (7e9, pytest.approx(4 * 3.2212, rel=1e-3))
    assert eight.speed == pytest.approx(measured.speed)


def test_too_little_room_names_what_to_change():
    said = planning.problem(Forecast(COUNTED, CHECKPOINTED, 4 * GB).plan, CHECKPOINTED)
    assert "needs about 8.0 GB on the card (10 of 10 blocks streamed" in said
    assert "3.8 GB can be used: for a new run, lower batch_size from 4" in said
    short = Forecast(COUNTED, CHECKPOINTED, 12 * GB, host_free=GB).plan
    assert short.on_card and not short.in_host and not short.fits
    said = planning.problem(short, CHECKPOINTED)
    assert "needs 7.0 GB of host memory (7 of 10 blocks streamed" in said and "there are 1.0 GB for it" in said


def test_cards_have_a_context_besides():
    plans = dict(planning.on_cards(COUNTED, CHECKPOINTED, (8, 12, 24)))
    assert [plans[card].streamed for card in (8, 12, 24)] == [10, 8, 0]
    assert [plans[card].fits for card in (8, 12, 24)] == [False, True, True]


@pytest.mark.parametrize(("wrong", "streamed"), [(1.0, 7), (1.02, 7), (1.2, 8), (2.0, 10), (0.5, 5)])
def test_a_first_step_corrects_the_forecast(wrong, streamed):
    forecast = Forecast(COUNTED, CHECKPOINTED, 12 * GB)
    assert forecast.first(7) == forecast.peak(7) - COUNTED.state  # the optimiser's state is made at its end
    measured = forecast.base(7) + int((forecast.first(7) - forecast.base(7)) * wrong)
    found, count = planning.corrected(forecast, 7, measured, anew=True)
    assert found.factor == pytest.approx(wrong, rel=1e-6)
    assert count == streamed
    assert found.peak(7) == pytest.approx(forecast.base(7) + COUNTED.beside * wrong, rel=1e-6)
    pinned = replace(forecast, training=replace(CHECKPOINTED, offload="7"))
    assert planning.corrected(pinned, 7, measured, anew=True)[1] == 7
    # A run that goes on has the state from its first step on.
    whole = forecast.base(7) + int((forecast.peak(7) - forecast.base(7)) * wrong)
    assert planning.corrected(forecast, 7, whole, anew=False)[0].factor == pytest.approx(wrong, rel=1e-6)


def test_a_first_step_is_highest_where_the_last_player_moves():
    """The first one's gradients are gone by then, and its state is there."""
    two = replace(COUNTED, peaks={"student backward": GB, "optimiser": GB}, moves={"student": 2 * GB, "fake": 4 * GB})
    assert two.first == COUNTED.adapters + 4 * GB
    assert replace(two, moves={}).first == COUNTED.adapters + GB


def test_block_inputs_wait_in_host_memory_before_a_block_does():
    inputs = replace(COUNTED, peaks={"student backward": GB, "optimiser": GB // 2})
    forecast = Forecast(COUNTED, CHECKPOINTED, 15 * GB, more=(((planning.INPUTS,), inputs),))
    assert forecast.plan.streamed == 4
    assert str(forecast.settled.plan) == (
        "the base stays on the card, block inputs in host memory, 2.0 GB of host memory, peak about 14.0 GB"
    )
    for kept in (
        replace(forecast, free=17 * GB),  # nothing has to go
        replace(forecast, free=14 * GB),  # blocks have to go in any case
        replace(forecast, training=replace(CHECKPOINTED, offload="4")),
    ):
        assert kept.settled is kept


def test_what_waits_in_host_memory_besides_is_taken_last_and_said():
    inputs = replace(COUNTED, peaks={"student backward": GB, "optimiser": GB // 2})
    both = replace(inputs, state=0, peaks={"student backward": GB // 2, "optimiser": 2 * GB})
    more = (((planning.INPUTS,), inputs), (planning.MEASURES[1], both))
    forecast = Forecast(COUNTED, CHECKPOINTED, 12 * GB, more=more)
    assert forecast.settled is forecast
    inputs = replace(forecast, free=8 * GB).settled.plan
    assert (inputs.measures, inputs.streamed, inputs.host) == ((planning.INPUTS,), 9, 11 * GB)
    assert str(inputs) == (
        "9 of 10 blocks streamed, block inputs in host memory, 11.0 GB of host memory, peak about 7.0 GB"
    )
    # What fills host memory is no help where that is short.
    assert replace(forecast, host_free=GB).settled.measures == ()
    least = replace(forecast, free=6 * GB).settled
    assert least.measures == planning.MEASURES[1] and least.plan.streamed == 10 and least.plan.fits
    assert not replace(forecast, free=4 * GB).settled.plan.fits


def test_graphs_wait_where_that_streams_no_block():
    alone = replace(COUNTED, peaks={"student backward": 2 * GB, "optimiser": GB // 2})
    inputs = replace(COUNTED, peaks={"student backward": GB, "optimiser": GB // 2})
    least = replace(alone, peaks={"student backward": GB // 2, "optimiser": GB // 2})
    more = (((planning.ALONE,), alone), ((planning.INPUTS,), inputs), ((planning.ALONE, planning.INPUTS), least))
    forecast = Forecast(COUNTED, CHECKPOINTED, 17 * GB, more=more)
    assert forecast.settled is forecast
    # One call more in a step, and every block stays on the card.
    found = replace(forecast, free=16 * GB).settled.plan
    assert str(found) == "the base stays on the card, one graph at a time, peak about 15.0 GB"
    assert found.measures == (planning.ALONE,) and not found.host
    assert replace(forecast, free=15 * GB).settled.measures == (planning.INPUTS,)
    # Where blocks are streamed in any case, the call is spared.
    assert replace(forecast, free=12 * GB).settled.measures == ()
    assert replace(forecast, free=8 * GB).settled.measures == (planning.ALONE,)
    # Graphs that wait in host memory take room there.
    little = replace(forecast, free=int(6.9 * GB))
    assert little.settled.plan.host == 12 * GB and little.settled.measures == (planning.INPUTS,)
    short = replace(little, host_free=int(11.7 * GB)).settled
    assert short.plan.host == 9 * GB + 3 * GB // 2 and short.measures == (planning.ALONE, planning.INPUTS)
    without = TrainingConfig(gradient_checkpointing=False)
    assert replace(forecast, training=without, free=16 * GB).settled.measures == (planning.ALONE,)
