"""A run of two players on a scalar network, for tests of whatever the engine does with a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retort.sampling.path import VE
from retort.trainers import watch
from retort.trainers.adapters import LoraConfig
from retort.trainers.config import RunConfig, TrainingConfig
from retort.trainers.data import Data
from retort.trainers.loop import Trainer
from retort.trainers.objectives.parts.contract import Loss, Objective, Player


@dataclass(frozen=True)
class TwoConfig:
    poison: int = -1
    heads: bool = True


PLAIN, RANK_ONE = TwoConfig(), LoraConfig(rank=1)


class Two(Objective):
    """Student regresses on latents, the fake on the student's result: two players, a module, a buffer."""

    name = "two"

    def __init__(self, config, denoiser):
        super().__init__(config, denoiser)
        self.level = torch.zeros(1)
        self.head = None

    def prepare(self, samples):
        torch.manual_seed(3)
        self.head = torch.nn.Linear(1, 1)

    @property
    def players(self):
        return {"student": Player("student"), "fake": Player("fake", rate=3.0, modules=self.head)}

    def losses(self, batch, step):
        noise = batch.draws.normal("noise", batch.shape)
        sigma = torch.full((len(batch),), 1.0)
        with self.denoiser.adapter("student"):
            x0 = self.denoiser.predict_x0(noise, sigma, batch.cond)
        error = (x0 - batch.latents).square().mean()
        if step == self.config.poison:
            error = error * float("nan")
        yield Loss("student", error, {"watched": x0.mean().detach()})
        with self.denoiser.adapter("fake"):
            fake = self.denoiser.predict_x0(noise, sigma, batch.cond)
        value = (fake - x0.detach()).square().mean() + (
            self.head(noise[..., None])[..., 0] - batch.latents
        ).square().mean()
        yield Loss("fake", value, {})

    def after_step(self, metrics, step):
        self.level.mul_(0.9).add_(0.1 * metrics["watched"])

    def buffers(self):
        return {"level": self.level}

    def sample(self, noise, cond, uncond):
        return self.denoiser.predict_x0(noise, torch.ones(len(noise)), cond)


class Stop(watch.Silent):
    """Ends the run after some steps, by wish or by an exception in the middle of a step."""

    def __init__(self, at: int, error: type[BaseException] | None = None):
        self.at, self.error, self.seen, self.checks = at, error, [], 0

    def step(self, done, total, metrics):
        self.seen.append((done, metrics["student_loss"]))

    def commands(self):
        return {"stop"} if self.error is None and len(self.seen) == self.at else set()

    def check(self):
        if self.error is not None and len(self.seen) == self.at:
            raise self.error("now")


def trainer(affine, tmp_path):
    """build(folder, ...) -> a Trainer of the two players on a scalar network, 12 steps unless said otherwise."""

    def build(folder="run", watcher=None, data=None, objective=PLAIN, lora=RANK_ONE, reducer=None, **settings):
        denoiser = affine(VE, (1.0,), 0.5, 0.7)
        values = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(1))
        rows = {"mean": torch.zeros(1)}
        data = data or Data([rows] * 12, latents=list(values), uncond=rows)
        settings = {"steps": 12, "batch_size": 4, "warmup": 2, "save_minutes": 0, "preview_every": 0} | settings
        config = RunConfig("two", objective, TrainingConfig(**settings), lora)
        return Trainer(denoiser, Two(objective, denoiser), data, config, tmp_path / folder, watcher, reducer=reducer)

    return build


def same(a, b, exact=True):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], **({"rtol": 0, "atol": 0} if exact else {"rtol": 2e-4, "atol": 2e-6})
        )
