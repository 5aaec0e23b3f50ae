"""What searches spend and find: a budget, a ledger of calls, and the best candidates so far; and seeds by name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


def seed_of(*parts: object) -> int:
    """A generator's seed from anything that has a name."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def candidate_seed(seed: int, number: int) -> int:
    """The seed of candidate `number`; number 0 has the search's own, so that one candidate is the plain sample."""
    return seed if number == 0 else seed_of(seed, "candidate", number)


@dataclass(frozen=True)
class Budget:
    """When one run of a search ends: at the first of these that is reached. ValueError when none is given, or 0.

    calls: network calls of this run, never exceeded. seconds: looked at between rounds. reward: good enough.
    """

    calls: int | None = None
    seconds: float | None = None
    reward: float | None = None

    def __post_init__(self) -> None:
        if self.calls is None and self.seconds is None and self.reward is None:
            raise ValueError("the search would never end; give calls, seconds or a reward that is enough")
        if self.calls is not None and self.calls < 1:
            raise ValueError(f"calls must be at least 1, got {self.calls!r}: a search of 0 calls finds nothing")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds!r}")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"enough must be a finite number, got {self.reward!r}; leave it out for no limit")


@dataclass
class Ledger:
    """What was spent, over all runs of a search.

    calls: network calls, one per latent and guidance branch. forwards: batches that they were made in. rewards:
    latents scored, each decoded once. seconds: inside `search`.
    """

    calls: int = 0
    forwards: int = 0
    rewards: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A scored latent on the CPU (without batch), its number, and the calls spent when it was found.

    finished: False for a model's x0 halfway, which any finished one beats.
    """

    latent: Tensor
    reward: float
    number: int
    calls: int
    finished: bool = True


@dataclass
class Best:
    """The `keep` best candidates, best first; `history` is (calls, reward) at each new best finished one.

    offered: numbers of the finished candidates that were offered last.
    """

    keep: int = 4
    found: list[Candidate] = field(default_factory=list)
    history: list[tuple[int, float]] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)

    def offer(
        self, latents: Tensor, rewards: Sequence[float], numbers: Sequence[int], calls: int, finished: bool = True
    ) -> None:
        """Take in latents (B, ...) in the order that they were drawn in: of equals the first stays."""
        self.offered = list(numbers) if finished else []
        for latent, reward, number in zip(latents, rewards, numbers, strict=True):
            beaten = len(self.found) >= self.keep and self.found[-1].reward >= reward
            if self.found and self.found[-1].finished and (beaten or not finished):
                continue
            if beaten and not finished:
                continue
            if finished and not (self.found and self.found[0].finished and self.found[0].reward >= reward):
                self.history.append((calls, reward))
            kept = latent.detach().to("cpu", copy=True)
            self.found.append(Candidate(kept, reward, number, calls, finished))
            self.found.sort(key=lambda c: (not c.finished, -c.reward))
            if self.found[0].finished:
                self.found = [c for c in self.found if c.finished]
            del self.found[self.keep :]

    @property
    def reward(self) -> float:
        """Of the best finished candidate; -inf when there is none."""
        return self.found[0].reward if self.found and self.found[0].finished else -math.inf
