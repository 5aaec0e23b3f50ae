"""What an objective sees of the engine, and the engine of an objective: nothing else passes between them.

An objective is the maths of one paper. Each step it gets the same `Batch` for all its losses and yields them one by
one; the engine runs each backward pass before it asks for the next, so that one network's graph is alive at a time. A
graph may wait beside it where that spares a call and there is memory for it (`TrainableDenoiser.may_wait`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ....sampling.accounts import seed_of
from ....sampling.distilled import Rule, Start
from ....sampling.levels import Levels, Parametrisation, Prediction
from ....sampling.parts import WHOLE, Parts
from ....sampling.path import NoisePath
from ....sampling.schedule import Schedule
from ....sampling.standard import sample_euler

# What a network is told besides latent and level; made, joined and read by the host alone.
Cond = Any


class Asked(NamedTuple):
    """A call of the network: x (B, ...) at the levels sigma (B,), and what it is told of these samples."""

    x: Tensor
    sigma: Tensor
    cond: Cond


class TrainableDenoiser(Protocol):
    """One frozen base with named adapters: without one it is the teacher, with "student" or "fake" those networks.

    network carries the adapters. sigma_range: lowest and highest level of the model's schedule. checkpointed: whether
    the network's blocks forget what they computed until the backward pass, so that a graph that waits takes little.
    """

    network: nn.Module
    path: NoisePath
    schedule: Schedule
    prediction: Prediction
    sigma_range: tuple[float, float]
    device: torch.device

    @property
    def levels(self) -> Levels:
        """The schedule's levels by their place."""
        ...

    @property
    def parametrisation(self) -> Parametrisation:
        """What the network is shown and what its output means."""
        ...

    @property
    def checkpointed(self) -> bool:
        """See the class."""
        ...

    def may_wait(self, calls: int = 1) -> bool:
        """Whether graphs of so many calls may wait for their backward pass beside another's, which spares calls.

        As memory was counted; where nobody has counted it, one call's, if its blocks are checkpointed.
        """
        ...

    def predict_x0(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x (B, C, ...) at sigma (B,) -> x0 in fp32, with gradients wherever they are on; no guidance inside."""
        ...

    def joined(self, asked: Sequence[Asked]) -> Asked | None:
        """Several calls as one of all their samples; None where they do not fit, or are large enough by themselves."""
        ...

    def fitting(self, x: Tensor) -> int:
        """How many calls on samples like x (B, ...) together are no larger than a picture of 1024 px; at least 1."""
        ...

    def predict_each(self, asked: Sequence[Asked], adapters: Sequence[str | None] | None = None) -> list[Tensor]:
        """x0 of each of several calls, in as few passes of the network as `joined` allows.

        adapters: whose each call is, by default that of the adapter which is on. Calls of unlike adapters share a pass
        only without gradients.
        """
        ...

    def chosen(self, cond: Cond, rows: Sequence[int]) -> Cond:
        """What the network is told of some of a batch's samples."""
        ...

    def features(self, x: Tensor, sigma: Tensor, cond: Cond) -> list[Tensor]:
        """What middle blocks put out, (B, C, ...) in a UNet, (B, N, C) in a DiT; blocks behind them are not run."""
        ...

    def features_and_x0(self, x: Tensor, sigma: Tensor, cond: Cond) -> tuple[list[Tensor], Tensor]:
        """Features and x0 of one pass; x0 is without a gradient."""
        ...

    def feature_widths(self, x: Tensor, sigma: Tensor, cond: Cond) -> list[int]:
        """Channels of each of those outputs."""
        ...

    def adapter(self, name: str | None) -> AbstractContextManager[None]:
        """Within it the network is the base with this adapter; gradients flow to that adapter's weights alone."""
        ...


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, by name and sample, so that neither batch split nor call order changes them.

    indices: which samples of the step's whole batch these are. There is no state to save: a resumed run draws the same.
    """

    seed: int
    step: int
    indices: tuple[int, ...]
    device: torch.device = torch.device("cpu")

    def _each(self, name: str) -> Iterator[torch.Generator]:
        for seed in self.seeds(name):
            yield torch.Generator().manual_seed(seed)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Unit noise (B, *shape), fp32, drawn on the CPU so that every device gets the same."""
        drawn = torch.stack([torch.randn(tuple(shape), generator=g) for g in self._each(name)])
        return drawn.to(self.device)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B,) numbers in [low, high), fp32."""
        drawn = torch.stack([torch.rand((), generator=g) for g in self._each(name)])
        return (low + (high - low) * drawn).to(self.device)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """(B,) integers in low .. high - 1."""
        drawn = torch.stack([torch.randint(low, high, (), generator=g) for g in self._each(name)])
        return drawn.to(self.device)

    def seeds(self, name: str) -> list[int]:
        """B seeds, for what draws from generators of its own."""
        return [seed_of(self.seed, self.step, index, name) for index in self.indices]

    def common(self, name: str) -> float:
        """One number in [0, 1) that the whole step shares, on every device and process."""
        return float(
            torch.rand((), generator=torch.Generator().manual_seed(seed_of(self.seed, self.step, "all", name)))
        )


@dataclass
class Batch:
    """One micro-batch of B samples on the training device.

    shape: of one latent, (C, H, W) or (C, T, H, W). latents: (B, *shape) in the network's own scale, None where the
    run has no images. uncond: the empty or negative prompt for B samples. columns: further tensors (B, ...) that the
    data set has (pairs of noise and target). weights: (B,) by which the engine multiplies the samples' losses, None
    where all count alike. parts: how a latent is made up, and what each part counts.
    """

    draws: Draws
    shape: tuple[int, ...]
    cond: Cond
    uncond: Cond = None
    latents: Tensor | None = None
    prompts: tuple[str, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    parts: Parts = WHOLE

    def __len__(self) -> int:
        return len(self.draws.indices)

    @property
    def images(self) -> Tensor:
        """The latents, where a method cannot do without. ValueError when there are none."""
        if self.latents is None:
            raise ValueError("this method learns from images, and the batch has none: connect latents")
        return self.latents


# (x0 latents (B, ...), prompts, batch) -> (B,), higher is better, with gradients to the latents where the method needs
# them; decoding happens inside.
LatentReward = Callable[[Tensor, tuple[str, ...], Batch], Tensor]


class Loss(NamedTuple):
    """A loss to run backwards, whose it is, and the numbers worth watching (0-d or float, means over the batch).

    each: (B,) the losses of the samples, whose mean is `value`, where it is such a mean. errors: the (B,) mean squared
    errors of the network's output that `each` is made of, at the levels sigma (B,).
    """

    player: str
    value: Tensor
    metrics: dict[str, Tensor | float]
    each: Tensor | None = None
    errors: tuple[Tensor, ...] = ()
    sigma: Tensor | None = None


@dataclass(frozen=True)
class Player:
    """Someone with weights of its own: an adapter of the network, and perhaps modules beside it.

    adapter: its name on the denoiser. rate: its learning rate over the run's. modules: trained with it.
    betas: AdamW's, None for the run's.
    """

    adapter: str
    rate: float = 1.0
    modules: nn.Module | None = None
    betas: tuple[float, float] | None = None


# Columns of a batch: latents (B, ...) of degraded pictures and of losers, shaped and scaled as the batch's own; and
# by how much (B,) the winners are better.
DEGRADED, LOSER, STRENGTH = "degraded", "loser", "strength"

# (restored latents (B, ...), clean latents (B, ...)) -> (B,), with gradients to the first; decoding happens inside.
FeatureDistance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tools:
    """What an objective is given beside the network; None is what a run has none of.

    reward, second: rewards of latents. features: the distance of decoded pictures, by the network that
    `Objective.feature_network` names. other: of two networks that share the levels, the one that is not trained, ready
    to be asked within the context, by conditions of the network that is.
    """

    reward: LatentReward | None = None
    second: LatentReward | None = None
    features: FeatureDistance | None = None
    other: Callable[[], AbstractContextManager[TrainableDenoiser]] | None = None


Need = Literal["reward", "pictures", "comparisons"]
Rewards = Literal["none", "any", "differentiable"]


class Objective(ABC):
    """The maths of one method. A subclass says what its losses are and how its student samples, and what else differs.

    Of the class: name - what messages call it. needs - what it cannot do without: a reward; pictures behind the
    latents, which its `spoil` degrades anew in every step; pairs of a winner and a loser. rewards - whether it takes
    one, and whether that must be differentiable; two_rewards - whether it takes a second. of_samples - whether its
    losses are means over samples (`Loss.each`), so that some may come more often. of_parts - whether its losses treat
    each part of a latent by itself (`Batch.parts`), as video with sound asks for.
    needs_latents, needs_uncond - whether images, and the empty prompt, are asked for: of the class with every config,
    of the object with its own (`asks_latents`, `asks_uncond`).
    without_images - what a message advises besides, where images are missing.
    student_rule, student_start - what a few-step student does between its levels, and what it starts from.
    heaviest, of the object - whether draws that decide how many graphs wait fall on the most of them, as memory has to
    be counted.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    rewards: ClassVar[Rewards] = "none"
    two_rewards: ClassVar[bool] = False
    of_samples: ClassVar[bool] = False
    of_parts: ClassVar[bool] = False
    without_images: ClassVar[str] = ""
    student_rule: ClassVar[Rule] = Rule()
    student_start: ClassVar[Start] = "unit"
    needs_latents: bool = False
    needs_uncond: bool = False
    heaviest: bool = False

    def __init__(self, config: Any, denoiser: TrainableDenoiser, tools: Tools | None = None):
        self.config, self.denoiser = config, denoiser
        self.needs_latents, self.needs_uncond = self.asks_latents(config), self.asks_uncond(config)
        tools = tools or Tools()
        self.reward, self.second, self.features, self.other = tools.reward, tools.second, tools.features, tools.other

    @classmethod
    def asks_latents(cls, config: Any) -> bool:
        """Whether images are asked for with this config."""
        return cls.needs_latents

    @classmethod
    def asks_uncond(cls, config: Any) -> bool:
        """Whether the empty prompt is asked for with this config."""
        return cls.needs_uncond

    @classmethod
    def reward_refusal(cls, config: Any) -> str | None:
        """Why this config cannot train without a reward; None where it can."""
        if "reward" in cls.needs:
            return f"{cls.name} learns from a reward, and there is none: connect `reward`"
        return None

    @classmethod
    def job_refusal(cls, config: Any) -> str | None:
        """Why a job, whose file names no reward, cannot train with this config; None where it can."""
        if "reward" in cls.needs:
            return f"{cls.name} learns from a reward, and a job takes none: train in the node Train Reward"
        return None

    @classmethod
    def feature_network(cls, config: Any) -> str | None:
        """The frozen network that `Tools.features` compares by, "judge" or "vgg16"; None where it is not asked for."""
        return None

    @classmethod
    def looks_inside(cls, config: Any) -> bool:
        """Whether its memory depends on blocks in the middle of the network, so that all of them are to be counted."""
        return False

    @classmethod
    def graphs_wait(cls, config: Any) -> bool:
        """Whether graphs of its calls can wait beside others, which spares calls and takes memory."""
        return False

    @property
    def players(self) -> dict[str, Player]:
        """Who is trained; every name that `losses` yields. The one called "student" becomes the LoRA."""
        return {"student": Player("student")}

    @property
    def pairs(self) -> int:
        """How many teacher pairs the run needs (0 = none); they arrive as columns "pair_noise" and "pair_target"."""
        return 0

    @property
    def varies(self) -> bool:
        """Whether steps differ in how many graphs wait, so that the first says nothing of the memory of others."""
        return False

    @property
    def student_levels(self) -> list[Tensor]:
        """The levels at which a few-step student is called, highest first; none for other methods."""
        return []

    @property
    def student_grids(self) -> list[list[Tensor]]:
        """Such levels for each number of calls that the student can make, its own number first."""
        return [self.student_levels] if self.student_levels else []

    def prepare(self, samples: Iterable[Batch]) -> None:
        """Called once, before the optimisers are made, with the run's first samples, of any size and one to a batch:
        heads learn their sizes here. ValueError where a tool is missing.
        """
        refusal = self.reward_refusal(self.config)
        if refusal and self.reward is None:
            raise ValueError(refusal)

    def make_pairs(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """The guided teacher's x0 (B, ...) from unit noise, where `pairs` is above 0."""
        raise NotImplementedError

    def spoil(self, images: Tensor, draws: Draws) -> Tensor:
        """Pictures (B, H, W, 3) in [0, 1], degraded at the size they have, where "pictures" are among its needs."""
        raise NotImplementedError

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The step's losses, each a mean over the micro-batch, in an order that keeps one graph alive at a time."""

    def after_step(self, metrics: Mapping[str, float], step: int) -> None:  # noqa: B027
        """Called when every player has moved, with the whole batch's mean metrics: running averages are kept here."""

    def check_first(self, metrics: Mapping[str, float]) -> None:
        """Called before the first step of a run moves anything. ValueError where the reward cannot teach anything.

        metrics: means over the whole batch; reward_spread, the distance of the scores of what is compared, or
        reward_slope, the size of the reward's gradient, where the method has one of them.
        """
        if metrics.get("reward_spread", 1.0) == 0:
            raise ValueError(
                f"the reward gives every picture of the first step the same score, {metrics['reward']:g}, so "
                f"{self.name} has nothing to learn from: connect a reward that tells the pictures of a prompt apart, "
                "or compare more of them at once (batch_size, candidates, group)"
            )
        if metrics.get("reward_slope", 1.0) == 0:
            raise ValueError(_no_gradient(self.name))

    def buffers(self) -> dict[str, Tensor]:
        """Tensors, besides weights, that a resumed run needs; they are restored in place."""
        return {}

    @abstractmethod
    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """x0 from unit noise as users of this student will sample it, for previews; adapter "student" is on.

        A method that restores is given degraded latents instead.
        """


def _no_gradient(method: str) -> str:
    return (
        f"the reward has no gradient with respect to the picture, so {method} has nothing to follow: give it a weight, "
        "or connect a reward that no veto or limit holds at one score"
    )


def slope_of(rewards: Tensor, leaf: Tensor, method: str) -> Tensor:
    """The derivative (B, ...) of the sum of rewards (B,) by `leaf`. ValueError where they do not depend on it."""
    found = torch.autograd.grad(rewards.sum(), leaf, allow_unused=True)[0] if rewards.requires_grad else None
    if found is None:
        raise ValueError(_no_gradient(method))
    return found


def mean_each(x: Tensor) -> Tensor:
    """(B, ...) -> (B,), the mean over all but the batch."""
    return x.flatten(1).mean(1)


@contextmanager
def swapped(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the weights have the values of `others` (their running average, an older policy), by name."""
    own = {key: weights[key].detach().clone() for key in others}
    try:
        for key, value in others.items():
            weights[key].data.copy_(value)
        yield
    finally:
        for key, value in own.items():
            weights[key].data.copy_(value)


def alpha_sigma(path: NoisePath, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) of x_t = a x0 + s n as the papers write it: VP's for VE models, (1 - t, t) for flows; sigma (B,).

    It is what the network is shown: where sigma_data is not 1, x_t has unit variance and x0 has sigma_data's.
    """
    if path.kind == "FLOW":
        return 1 - sigma, sigma * path.noise_scale
    a = 1 / path.shrinking(sigma)
    return a, sigma * a


def guided(
    denoiser: TrainableDenoiser, x: Tensor, sigma: Tensor, cond: Cond, uncond: Cond, cfg: float, joined: bool = False
) -> Tensor:
    """Classifier-free guidance in x0: uncond + cfg (cond - uncond) (Ho & Salimans 2022, arXiv 2207.12598, eq. 6).

    It is linear in the network's output, so x0, eps and v give the same. cfg 1 makes one call. joined: let both calls
    share a pass where they can, which rounds otherwise.
    """
    if cfg == 1.0:
        return denoiser.predict_x0(x, sigma, cond)
    if joined:
        return guided_each(denoiser, [x], sigma, cond, uncond, cfg)[0]
    x0, without = (denoiser.predict_x0(x, sigma, told) for told in (cond, uncond))
    return without + cfg * (x0 - without)


def guided_each(
    denoiser: TrainableDenoiser, xs: Sequence[Tensor], sigma: Tensor, cond: Cond, uncond: Cond, cfg: float
) -> list[Tensor]:
    """`guided` x0 of several x (B, ...) at one sigma (B,), in as few passes of the network as there can be."""
    told = [cond] if cfg == 1.0 else [cond, uncond]
    found = denoiser.predict_each([Asked(x, sigma, each) for each in told for x in xs])
    if cfg == 1.0:
        return found
    return [without + cfg * (x0 - without) for x0, without in zip(found[: len(xs)], found[len(xs) :], strict=True)]


def sample_guided(
    denoiser: TrainableDenoiser, sigmas: Tensor, noise: Tensor, cond: Cond, uncond: Cond, cfg: float
) -> Tensor:
    """x0 (B, ...) from unit noise: Euler on a grid (steps + 1,), with guidance where there is an empty prompt."""
    return euler_guided(denoiser, sigmas, denoiser.path.unit_start(sigmas[0], noise), cond, uncond, cfg)


def euler_guided(
    denoiser: TrainableDenoiser, sigmas: Tensor, x: Tensor, cond: Cond, uncond: Cond, cfg: float
) -> Tensor:
    """x (B, ...) at the last level of a grid (steps + 1,) from x at its first; see `sample_guided`."""
    cfg = 1.0 if uncond is None else cfg

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return guided(denoiser, x, sigma, cond, uncond, cfg)

    return sample_euler(model, x, sigmas, disable=True, path=denoiser.path)
