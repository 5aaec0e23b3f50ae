"""What every search shares: the prior that it draws from, its budget and accounts, its best finds, and the one loop.

A search draws latents from a plain sampler (the prior), scores them with a black-box reward and spends the next calls
where that pays: `tree` (DTS), `particles` (best-of-N, FK steering, SVDD) and `find` (FIND). Jain et al. 2025
(arXiv 2506.20701), section 4, gives the frame: r(x0) after full rollouts, compute counted in network calls.

Latents are (B, C, H, W) or (B, C, T, H, W); rewards (B,), the higher the better. Candidates are numbered, and number m
draws its noise from generators of its own: a result depends on neither `batch` nor the machine that draws.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .accounts import Best, Budget, Candidate, Ledger, candidate_seed, seed_of
from .prior import Prior, require_steps
from .standard import SamplingDiverged
from .transition import Transition

Evaluate = Callable[[Tensor], Tensor]
Self = TypeVar("Self", bound="State")
_SEEDS = 1 << 64


@dataclass
class Trajectory:
    """One latent on its way down: at sigmas[step] now; `kept` are the latents that were asked for, on the CPU."""

    number: int
    x: Tensor
    generator: torch.Generator
    step: int = 0
    kept: list[Tensor] = field(default_factory=list)


class Run:
    """One run of a search: the prior as a batched sampler, whose every call is counted. Made by `search`."""

    def __init__(
        self, prior: Prior, budget: Budget, evaluate: Evaluate, transition: Transition, seed: int,
        callback: Callable[[State], None] | None, noise: Callable[[int], Tensor] | None,
    ):  # fmt: skip
        require_steps(prior.sigmas, "search")
        numbers = prior.sigmas.tolist() if prior.sigmas.ndim == 1 else []
        if not numbers or numbers[-1] != 0 or any(a <= b for a, b in zip(numbers, numbers[1:], strict=False)):
            raise ValueError(
                f"search: sigmas must descend and end in 0, since rewards need clean latents; got {numbers}: "
                "give the whole schedule, not its first part"
            )
        for name, value in (("batch", prior.batch), ("calls_per_eval", prior.calls_per_eval)):
            if value < 1:
                raise ValueError(f"search: {name} must be at least 1, got {value!r}")
        transition.check(prior.path)
        self.prior, self.budget, self.evaluate, self.transition = prior, budget, evaluate, transition
        self.path, self.sigmas, self.levels, self.batch = prior.path, prior.sigmas, numbers, prior.batch
        self.seed, self.callback, self.noise = seed % _SEEDS, callback, noise
        self.steps = len(numbers) - 1

    def begin(self, state: State) -> None:
        """Counts go to this state from now on."""
        self.state, self.ledger, self.best = state, state.ledger, state.best
        self._calls, self._seconds, self._clock = self.ledger.calls, self.ledger.seconds, time.monotonic()

    def tick(self) -> None:
        """Bring the ledger's clock up to date."""
        self.ledger.seconds = self._seconds + time.monotonic() - self._clock

    def affordable(self, evals: int) -> bool:
        """Whether the budget of calls pays for so many more evaluations of one latent each."""
        limit = self.budget.calls
        return limit is None or self.ledger.calls - self._calls + evals * self.prior.calls_per_eval <= limit

    def over(self) -> str | None:
        """Which limit of the budget is reached."""
        self.tick()
        if self.budget.reward is not None and self.best.reward >= self.budget.reward:
            return "reward"
        if self.budget.seconds is not None and self.ledger.seconds - self._seconds >= self.budget.seconds:
            return "seconds"
        return None if self.affordable(1) else "calls"

    def unit(self, number: int) -> Tensor:
        """The start noise of a candidate, of one latent's shape: what core draws from its seed, unless told."""
        if self.noise is not None:
            return self.noise(number).to(self.sigmas)
        generator = torch.Generator().manual_seed(candidate_seed(self.seed, number))
        return torch.randn(self.prior.shape, dtype=self.sigmas.dtype, generator=generator).to(self.sigmas.device)

    def trajectory(self, number: int, noise: Tensor | None = None) -> Trajectory:
        """A candidate at the top level, from its own unit noise or from the one given."""
        noise = (self.unit(number) if noise is None else noise).unsqueeze(0)
        return Trajectory(number, self.prior.first(noise)[0], self.generator(number))

    def generator(self, number: int, *branch: object) -> torch.Generator:
        """Of the fresh noise on a candidate's way, on the CPU; it starts at seed + 1, as core's does there."""
        seed = candidate_seed(self.seed, number)
        return torch.Generator().manual_seed(seed_of(seed, *branch) if branch else (seed + 1) % _SEEDS)

    def chunks(self, trajectories: Sequence[Trajectory]) -> Iterator[Sequence[Trajectory]]:
        """The trajectories in batches."""
        return (trajectories[i : i + self.batch] for i in range(0, len(trajectories), self.batch))

    def predict(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """The model's x0 (B, ...) of trajectories that are all at one level."""
        return torch.cat([self._call(chunk, torch.stack([w.x for w in chunk])) for chunk in self.chunks(trajectories)])

    def move(self, trajectories: Sequence[Trajectory], x0: Tensor, keep: frozenset[int] = frozenset()) -> None:
        """Take each trajectory one level down; a latent that arrives at a step in `keep` is kept on the CPU."""
        self._move(trajectories, torch.stack([w.x for w in trajectories]), x0, keep)

    def finish(self, trajectories: Sequence[Trajectory], keep: frozenset[int] = frozenset()) -> None:
        """Take trajectories, each from where it is, to level zero."""
        if self.prior.mixed_levels:
            # The longest first, so that the last forwards are full as well.
            waiting = sorted(reversed(trajectories), key=lambda w: -w.step)
            lanes: list[Trajectory] = []
            while waiting or lanes:
                while waiting and len(lanes) < self.batch:
                    lanes.append(waiting.pop())
                self._advance(lanes, keep)
                lanes = [w for w in lanes if w.step < self.steps]
            return
        for step in range(min((w.step for w in trajectories), default=self.steps), self.steps):
            for chunk in self.chunks([w for w in trajectories if w.step == step]):
                self._advance(chunk, keep)

    def _advance(self, trajectories: Sequence[Trajectory], keep: frozenset[int]) -> None:
        x = torch.stack([w.x for w in trajectories])
        self._move(trajectories, x, self._call(trajectories, x), keep)

    def _call(self, trajectories: Sequence[Trajectory], x: Tensor) -> Tensor:
        x0 = self.prior.model(x, self._sigma(trajectories, 0), **self.prior.extra_args)
        self.ledger.forwards += 1
        self.ledger.calls += len(trajectories) * self.prior.calls_per_eval
        if x0.shape != x.shape:
            raise ValueError(f"search: the model answered {tuple(x0.shape)} to latents of {tuple(x.shape)}")
        self.tell()
        return x0

    def _sigma(self, trajectories: Sequence[Trajectory], ahead: int) -> Tensor:
        first = trajectories[0].step
        if all(w.step == first for w in trajectories):
            return self.sigmas[first + ahead].expand(len(trajectories))
        return self.sigmas[torch.tensor([w.step + ahead for w in trajectories], device=self.sigmas.device)]

    def _move(self, trajectories: Sequence[Trajectory], x: Tensor, x0: Tensor, keep: frozenset[int]) -> None:
        noise = None
        if self.transition.stochastic:
            # No draw for a step to level zero, so that the stream is the plain sampler's.
            fresh = [
                torch.randn(self.prior.shape, dtype=x.dtype, generator=w.generator)
                if w.step + 1 < self.steps
                else torch.zeros(self.prior.shape, dtype=x.dtype)
                for w in trajectories
            ]
            noise = torch.stack(fresh).to(x.device)
        x = self.transition.step(self.path, x, x0, self._sigma(trajectories, 0), self._sigma(trajectories, 1), noise)
        for trajectory, row in zip(trajectories, x, strict=True):
            trajectory.x, trajectory.step = row, trajectory.step + 1
            if trajectory.step in keep:
                trajectory.kept.append(row.to("cpu", copy=True))

    def score(self, latents: Tensor) -> list[float]:
        """Rewards of at most `batch` clean latents (B, ...). ValueError for what is no finite number for each."""
        if not bool(torch.isfinite(latents).all()):
            raise SamplingDiverged(
                "search: a sampled latent holds NaN or infinity; run the model in bf16 or fp32 instead of fp16, and "
                "check the LoRAs, the cfg and that the sigmas belong to this model"
            )
        rewards = self.evaluate(latents)
        if not isinstance(rewards, Tensor) or tuple(rewards.shape) != (len(latents),):
            given = f"shape {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ValueError(
                f"search: the reward answered {given} for {len(latents)} images; it must return a tensor of one "
                f"number per image, shape ({len(latents)},)"
            )
        values = [float(r) for r in rewards.detach().double().cpu()]
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(
                    f"search: the reward of image {i + 1} of {len(values)} is {value}; clip the reward (a combination "
                    "can), or run its model in fp32"
                )
        self.ledger.rewards += len(values)
        return values

    def scored(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Sequence[Trajectory], list[float]]]:
        """Finished trajectories in batches with their rewards, after each has been offered to the best."""
        for chunk in self.chunks(trajectories):
            latents = torch.stack([w.x for w in chunk])
            rewards = self.score(latents)
            self.best.offer(latents, rewards, [w.number for w in chunk], self.ledger.calls)
            yield chunk, rewards
            self.tell()

    def halfway(self, trajectories: Sequence[Trajectory], x0: Tensor) -> Tensor:
        """Rewards (B,), fp64 on the CPU, of the model's x0 (B, ...) of trajectories that are not finished."""
        rewards: list[float] = []
        for i, chunk in enumerate(self.chunks(trajectories)):
            latents = x0[i * self.batch : i * self.batch + len(chunk)]
            rewards += self.score(latents)
            self.best.offer(
                latents, rewards[-len(chunk) :], [w.number for w in chunk], self.ledger.calls, finished=False
            )
        return torch.tensor(rewards, dtype=torch.float64)

    def tell(self) -> None:
        """Call the callback, from which an exception leaves the search; the state stays whole."""
        self.tick()
        if self.callback is not None:
            self.callback(self.state)

    def setting(self) -> dict[str, Any]:
        """What a state belongs to, in JSON's types."""
        path = asdict(self.path)
        # Files from before there was anything else do without.
        for name, usual in (("sigma_data", 1.0), ("rectified", False)):
            if path[name] == usual:
                del path[name]
        return {
            "path": path, "shape": list(self.prior.shape), "transition": asdict(self.transition),
            "sigmas": self.levels, "identity": self.prior.identity,
        }  # fmt: skip


class State(ABC):
    """What a search knows, and all that a later run needs to go on; each method has its own.

    drawn: candidates so far, which is also the next one's number. setting: what it belongs to, from `Run.setting`.
    """

    method: str
    config: Any

    def __init__(self, setting: Mapping[str, Any], config: Any, keep: int = 4):
        self.setting, self.config = dict(setting), config
        self.ledger, self.best, self.drawn = Ledger(), Best(keep), 0

    def configure(self, config: Any) -> None:
        """Take over the settings of the run that begins; those that the state depends on are in `setting`."""
        self.config = config

    @abstractmethod
    def round(self, run: Run) -> str | None:
        """Do the least piece of work after which the budget is looked at again; why not, when none can be done."""

    def check(self, setting: Mapping[str, Any]) -> None:
        """ValueError when a run with this setting cannot go on from here."""
        for name, value in setting.items():
            if self.setting.get(name) != value:
                raise ValueError(
                    f"search: the saved search was made with {name} {self.setting.get(name)!r}, and this one has "
                    f"{value!r}; resume it with the same model and settings, or start a new one"
                )

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, header of JSON's types) that `from_file` of the same class reads."""
        found = self.best.found
        tensors = {"best_latents": torch.stack([c.latent for c in found])} if found else {}
        header = {
            "method": self.method, "version": 1, "setting": self.setting, "ledger": asdict(self.ledger),
            "drawn": self.drawn, "keep": self.best.keep, "history": [list(pair) for pair in self.best.history],
            "best": [[c.reward, c.number, c.calls, c.finished] for c in found],
        }  # fmt: skip
        return tensors, header

    @classmethod
    def from_file(cls: type[Self], tensors: Mapping[str, Tensor], header: Mapping[str, Any], config: Any) -> Self:
        """The state that `to_file` gave away, with its method's settings. ValueError for a broken or forged file."""
        try:
            state = cls(header["setting"], config, int(header["keep"]))
            state.restore(tensors, header)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"search: the file is no saved {cls.method} search, or it was cut off or altered ({error!r}); "
                "start a new search"
            ) from error
        return state

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Take in what `to_file` wrote; raises whatever is wrong with it, and `from_file` says it."""
        if header["method"] != self.method or header["version"] != 1:
            raise ValueError(f"method {header['method']!r}, version {header['version']!r}")
        self.ledger = Ledger(**{name: type(zero)(header["ledger"][name]) for name, zero in asdict(Ledger()).items()})
        self.drawn = int(header["drawn"])
        self.best.history = [(int(calls), float(reward)) for calls, reward in header["history"]]
        rows = header["best"]
        latents = tensors["best_latents"].clone() if rows else torch.empty(0)
        for latent, (reward, number, calls, finished) in zip(latents, rows, strict=True):
            self.best.found.append(Candidate(latent, float(reward), int(number), int(calls), bool(finished)))
        if rows and not (tuple(latents.shape[1:]) == tuple(self.setting["shape"]) and torch.isfinite(latents).all()):
            raise ValueError("the best latents do not fit")
        if (
            not all(math.isfinite(c.reward) for c in self.best.found)
            or min(self.drawn, *asdict(self.ledger).values()) < 0
        ):
            raise ValueError("a number is out of range")


class Config(Protocol):
    """The settings of one method; a frozen dataclass."""

    def fresh(self, setting: Mapping[str, Any], keep: int) -> State:
        """An empty state of this method, for a run with this setting."""
        ...


@dataclass(frozen=True)
class Result:
    """best, and top: the best few, best first. stopped: "calls", "seconds" or "reward", or what a method ran out of."""

    best: Candidate
    top: list[Candidate]
    state: State
    ledger: Ledger
    stopped: str


@torch.no_grad()
def search(
    prior: Prior, config: Config, budget: Budget, evaluate: Evaluate, *, seed: int,
    transition: Transition | None = None, callback: Callable[[State], None] | None = None,
    state: State | None = None, noise: Callable[[int], Tensor] | None = None, keep: int = 4,
) -> Result:  # fmt: skip
    """Search one prompt: draw from the prior, score, and spend the next calls by `config`'s method until `budget` ends.

    prior: its sigmas end in 0; its `batch` changes the speed alone; a state of another `identity` is refused. evaluate:
    clean latents (B, ...), B <= batch, on the model's device -> rewards (B,). transition: ancestral where it is not
    given. noise: candidate's number -> its unit noise (of `prior.shape`); default: from its seed. keep: how many of the
    best to keep.

    state: one of `Config.fresh` or of an earlier run, which goes on as if uninterrupted (same seed, same config).
    It changes in place, so that whoever holds it has tree and best whatever `callback`, the model or `evaluate` raises;
    nothing is caught here. callback(state) after each forward and each scored batch.

    Raises ValueError for settings, rewards and states that do not fit, and when calls do not pay for one candidate.
    """
    run = Run(prior, budget, evaluate, transition or Transition(), seed, callback, noise)
    fresh = config.fresh(run.setting(), keep)
    if state is None:
        state = fresh
    elif type(state) is not type(fresh):
        raise ValueError(f"search: the saved search is {state.method!r}, and this one is {fresh.method!r}")
    state.check(fresh.setting)
    state.configure(config)
    run.begin(state)
    try:
        stopped = run.over()
        while stopped is None:
            stopped = state.round(run) or run.over()
    finally:
        run.tick()
    if not state.best.found:
        raise ValueError(
            f"search: {budget.calls} calls do not pay for one candidate, which takes {run.steps} steps of "
            f"{prior.calls_per_eval} calls; raise the budget"
        )
    return Result(state.best.found[0], list(state.best.found), state, replace(state.ledger), stopped)
