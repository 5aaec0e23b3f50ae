"""Models without a table of trained levels: every method trains within the schedule's range, from its own start."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling import presets
from retort.sampling.path import broadcast
from retort.sampling.presets import sigmas as sigmas_of
from retort.sampling.students.form import from_json, to_json
from retort.trainers import recipes
from retort.trainers.objectives.align_prop import AlignProp, AlignPropConfig
from retort.trainers.objectives.di_star import DIStar, DIStarConfig
from retort.trainers.objectives.dmd2 import DMD2, DMD2Config
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.fdistill import FDistill, FDistillConfig
from retort.trainers.objectives.few_shot import FewShot, FewShotConfig
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from retort.trainers.objectives.instarevive import InstaRevive, InstaReviveConfig
from retort.trainers.objectives.mapo import MaPO, MaPOConfig
from retort.trainers.objectives.parts.contract import Batch, Draws
from retort.trainers.objectives.parts.grids import student_sigmas
from retort.trainers.objectives.smpo import SmPO, SmPOConfig
from retort.trainers.objectives.spo import SPO, SPOConfig
from retort.trainers.objectives.tdm import TDM, TDMConfig
from retort.trainers.recipes import preset_of

SHAPE = (3, 4, 4)
METHODS = {
    "flow matching": lambda d: FlowMatching(FlowMatchingConfig(), d),
    "core's levels": lambda d: FlowMatching(FlowMatchingConfig(levels="core"), d),
    "logit-normal levels": lambda d: FlowMatching(FlowMatchingConfig(levels="logit_normal"), d),
    "DPO": lambda d: DPO(DPOConfig(), d),
    "SmPO": lambda d: SmPO(SmPOConfig(), d),
    "MaPO": lambda d: MaPO(MaPOConfig(), d),
    "few-shot": lambda d: FewShot(FewShotConfig(), d),
    "TDM": lambda d: TDM(TDMConfig(), d),
    "TDM, exact score": lambda d: TDM(TDMConfig(exact_score=True, random_mid=True), d),
    "DMD2": lambda d: DMD2(DMD2Config(ratio=1), d),
    "DMD2, four steps, decoupled": lambda d: DMD2(DMD2Config(steps=4, ratio=1, decoupled=True), d),
    "DMD2 with a GAN": lambda d: DMD2(DMD2Config(ratio=1, gan_weight=0.005), d),
    "f-distill": lambda d: FDistill(FDistillConfig(ratio=1), d),
    "DI*": lambda d: DIStar(DIStarConfig(space="score", ratio=1), d),
    "AlignProp": lambda d: AlignProp(AlignPropConfig(steps=4, stopped=True, checkpoint=False), d),
    "SPO": lambda d: SPO(SPOConfig(steps=4), d),
}


def made(tiny, off_table):
    """A tiny network that lives on this schedule; `told` collects the levels of its calls."""
    schedule, path, prediction = off_table
    denoiser = tiny(path)
    denoiser.schedule, denoiser.prediction = schedule, prediction
    denoiser.sigma_range = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    denoiser.told = []
    call = denoiser.call
    denoiser.call = lambda x, sigma, cond: (denoiser.told.append(sigma.detach().float()), call(x, sigma, cond))[1]
    return denoiser


def batch_of(step=0, count=4):
    generator = torch.Generator().manual_seed(step)
    latents, loser = torch.randn(2, count, *SHAPE, generator=generator, dtype=torch.float64)
    cond = {"mean": torch.linspace(-0.2, 0.2, count)}
    return Batch(
        Draws(3, step, tuple(range(count))), SHAPE, cond, {"mean": torch.zeros(count)}, latents, ("a",) * count,
        {"loser": loser, "strength": torch.ones(count)},
    )  # fmt: skip


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_within_the_schedule(tiny, off_table, method):
    denoiser = made(tiny, off_table)
    objective = METHODS[method](denoiser)
    objective.reward = lambda x, prompts, batch: x.flatten(1).mean(1)
    objective.prepare([batch_of()])
    if getattr(objective, "discriminator", None) is not None:
        objective.discriminator.double()
    low, high = denoiser.sigma_range
    for step in range(2):
        for loss in objective.losses(batch_of(step), step):
            with denoiser.adapter(objective.players[loss.player].adapter):
                loss.value.backward()
            assert math.isfinite(loss.value.item())
    slopes = [p.grad for p in denoiser.adapters.parameters("student").values() if p.grad is not None]
    assert slopes and all(torch.isfinite(slope).all() for slope in slopes) and any(slope.any() for slope in slopes)
    told = torch.cat([sigma.flatten() for sigma in denoiser.told])
    assert low * (1 - 1e-4) <= float(told.min()) and float(told.max()) <= high * (1 + 1e-4)


@pytest.mark.parametrize("levels", ["uniform", "logit_normal"])
def test_fine_tuning_sees_as_much_noise_as_data(tiny, off_table, levels):
    """The median level is near sigma_data, and few draws are where there is nothing to learn."""
    denoiser = made(tiny, off_table)
    objective = FlowMatching(FlowMatchingConfig(levels=levels), denoiser)
    sigma = objective.sigma(Draws(0, 0, tuple(range(2000)))) / denoiser.path.sigma_data
    assert 0.8 < float(sigma.median()) < 1.25
    assert float(((sigma > 0.1) & (sigma < 10)).float().mean()) > 0.8


def test_the_loss_is_in_the_network_s_own_output(tiny, off_table):
    denoiser, batch = made(tiny, off_table), batch_of()
    objective = FlowMatching(FlowMatchingConfig(max_weight=1e8), denoiser)
    (loss,) = objective.losses(batch, 0)
    sigma, data = objective.sigma(batch.draws).double(), denoiser.path.sigma_data
    noise = batch.draws.normal("noise", SHAPE)
    s = broadcast(sigma, batch.latents)
    x = batch.latents + s * noise
    with torch.no_grad(), denoiser.adapter("student"):
        x0 = denoiser.predict_x0(x, sigma, batch.cond)
    root = (s**2 + data**2).sqrt()

    def output(clean):
        if denoiser.prediction == "eps":
            return (x - clean) / s
        if denoiser.prediction == "flow":
            return (x - (1 + s) * clean) / s
        v = (x * data**2 / root**2 - clean) * root / (s * data)
        return -v if denoiser.prediction == "edm" else v

    expected = (output(x0) - output(batch.latents)).square().mean()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_student_of_one_call_begins_with_unit_noise(tiny, continuous):
    denoiser, noise = made(tiny, continuous), torch.randn(2, *SHAPE, dtype=torch.float64)
    sigmas = student_sigmas(denoiser, 1)
    assert float(sigmas[0]) == pytest.approx(1.2 * denoiser.path.sigma_data) and sigmas[1] == 0
    start = denoiser.path.unit_start(sigmas[0], noise)
    torch.testing.assert_close(denoiser.parametrisation.shown(start, sigmas[:1].expand(2)), noise, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="needs timestep 999, and this model's noise schedule"):
        student_sigmas(denoiser, 1, "999")
    with pytest.raises(ValueError, match="needs timestep 400"):
        InstaRevive(InstaReviveConfig(), denoiser)


def test_a_rectified_flow_s_student_begins_at_the_top_and_is_told_its_times(tiny, rectified):
    """As ComfyUI begins: sigma n, of which the network is shown the time's share."""
    denoiser, noise = made(tiny, rectified), torch.randn(2, *SHAPE, dtype=torch.float64)
    sigmas = student_sigmas(denoiser, 1)
    assert sigmas.tolist() == [pytest.approx(80.0), 0.0]
    assert torch.equal(denoiser.path.unit_start(sigmas[0], noise), sigmas[0] * noise)
    assert student_sigmas(denoiser, 2, "980, 500").tolist() == pytest.approx([49.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="needs timestep 999, and this model's go from 2 to 987"):
        student_sigmas(denoiser, 1, "999")
    objective = TDM(TDMConfig(steps=4), denoiser)
    preset = preset_of("a student", objective, denoiser, (16, 3))
    assert preset.family == "flow" and preset.paths == ("VE",) and 0.98 < preset.levels[0][0] < 1
    again = sigmas_of(preset, 4, denoiser.schedule, denoiser.path)
    assert torch.equal(again, objective.grids[4])
    assert from_json(to_json(preset), "student") == preset


def test_tdm_compares_between_a_state_and_the_step_s_start(tiny, off_table):
    denoiser = made(tiny, off_table)
    objective = TDM(TDMConfig(), denoiser)
    sigmas = objective.grids[4]
    for pick in range(4):
        batch = batch_of(pick, 64)
        mid, tau = objective.levels(batch, sigmas, torch.full((64,), pick))
        assert (mid == sigmas[pick + 1]).all() and (tau >= mid).all() and (tau <= sigmas[pick] * (1 + 1e-4)).all()
        assert float(tau.max() / tau.min()) > 1.05


def test_smpo_s_inversion_rises_in_even_steps(tiny, off_table):
    denoiser = made(tiny, off_table)
    objective = SmPO(SmPOConfig(inversion_steps=5), denoiser)
    sigma = torch.tensor([0.05, 1.0, denoiser.sigma_range[1]])
    grid = torch.stack(objective._grid(sigma))
    assert (grid[0] == 0).all() and torch.equal(grid[-1], sigma) and (grid.diff(dim=0) > 0).all()
    times = denoiser.levels.time(grid[1:])
    torch.testing.assert_close(times, times[-1:] * torch.arange(1, 6)[:, None] / 5, rtol=1e-3, atol=1e-1)


def test_few_shot_s_phases_are_shares_of_the_angle(tiny, off_table):
    denoiser = made(tiny, off_table)
    objective = FewShot(FewShotConfig(consistency=0.0), denoiser)
    seen = {}
    for step in range(20):
        (loss,) = objective.losses(batch_of(step), step)
        seen.setdefault(step % 2, []).append(denoiser.levels.time(loss.sigma))
    high, low = torch.cat(seen[0]), torch.cat(seen[1])
    assert float(high.min()) > 299 and float(high.max()) <= 801 and float(low.max()) <= 301
    assert float(low.max() - low.min()) > 150 and float(high.max() - high.min()) > 250


@pytest.mark.parametrize("method", ["DMD2, four steps, decoupled", "TDM", "f-distill", "DI*"])
def test_a_student_carries_its_levels_to_the_last_bit(tiny, continuous, method):
    """A recipe says them as they are, since there are no timesteps to say."""
    denoiser = made(tiny, continuous)
    objective = METHODS[method](denoiser)
    own = recipes.preset_of("mine", objective, denoiser, (SHAPE[0], len(SHAPE) - 1))
    read = recipes.read({recipes.KEY: recipes.written(recipes.Recipe(own, "dmd2"))}).preset
    assert read.family == denoiser.prediction and read.step_counts == tuple(map(len, objective.student_grids))
    for grid in objective.student_grids:
        found = presets.sigmas(read, len(grid), denoiser.schedule, denoiser.path)
        assert torch.equal(found, torch.tensor([*map(float, grid), 0.0]))
    presets.check(read, denoiser.path.kind, denoiser.prediction, SHAPE[0], 2)
    highest = max(float(grid[0]) for grid in objective.student_grids)
    assert presets.start_level(read, denoiser.schedule, denoiser.path) == highest
    kept = presets.cut(read, found, 0.5, denoiser.schedule, denoiser.path)
    assert torch.equal(kept, found[-len(kept) :])
