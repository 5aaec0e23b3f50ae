"""A search from the LATENT that a user connects to the best latents and their report, the same on every host.

`run(host, ...)` serves both search nodes; `host` is a `hosts.contract.Host`. Items of a LATENT batch are searched one
after another, each with a budget of its own.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files.pictures import rounded
from ...rewards.contract import Reward, require_differences
from ...rewards.scoring import score
from ...sampling.accounts import Budget, Candidate, candidate_seed, seed_of
from ...sampling.between import below
from ...sampling.find import Find
from ...sampling.particles import Steering
from ...sampling.parts import Parts, parts_of
from ...sampling.prior import identity, require_steps
from ...sampling.search import State, search
from ...sampling.standard import Model
from ...sampling.tree import Tree
from ..contract import GUIDER, NOISE, VAE, Host
from ..methods import Method, Run
from ..noise import PolicyNoise
from .files import load, path_of, rescue, save, written
from .record import Record, asked, cancelled
from .report import draw, spelt, thumbnail
from .request import Absent, Found, Saved, SearchRequest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Found", "Saved", "SearchRequest", "draw_from", "load", "path_of", "policy_noise", "run", "save", "with_noise",
    "written",
]  # fmt: skip

CANCELLED = "cancelled"
SECOND = "low_noise"  # what messages call the second guider
_log = logging.getLogger("retort.search")
_TICKS = 1000  # of the progress bar, where the budget is no number of calls


def run(
    host: Host,
    guider: GUIDER,
    vae: VAE,
    reward: Reward,
    request: SearchRequest,
    budget: Budget,
    batch: int,
    earlier: Saved | None = None,
    second: GUIDER | None = None,
) -> Found:
    """Search every item with this budget each, going on from `earlier`, which stays as it is.

    second: the guider of the network for the levels below request.boundary, where that is not 0.

    A cancelled search gives back the best so far; where there is none yet the host's own exception goes on. Any other
    error leaves what was found in a file, which its message names. Raises ValueError for a NOISE, reward, budget or
    earlier search that does not fit.
    """
    if isinstance(request.noise, Absent):
        raise ValueError(
            f"noise: the search drew its starts from a NOISE of seed {request.noise.seed}, which its file lacks; "
            "connect the same one"
        )
    if (second is None) != (request.boundary == 0):
        raise ValueError(
            "low_noise_guider: the search was begun with "
            + ("two networks, so connect the second one's guider again" if second is None else "one; disconnect it")
        )
    # A host gives back the latent of an empty schedule without asking any sampler.
    require_steps(request.sigmas, "search")
    require_differences(reward)
    parts = parts_of(host.latents_of(guider, request.latent))
    packing, count = Parts.of(parts), len(parts[0])
    states: list[State | None] = [None] * count
    if earlier is not None:
        states = [None if s is None else _copy(s) for s in earlier.states]
    watch = _Watch(host, budget, count)
    rows: list[tuple[Tensor, _Item]] = []
    wanted = asked(request.seed, request.keep, budget.calls, budget.seconds)
    with Record(host.search_records(), request.prompt, reward.name, count, wanted, reward.range[1]) as record:
        for i in range(count):
            item = _Item(host, vae, reward, request, budget, batch, i, packing, states[i], watch, record, second)
            try:
                latents = item.search(guider, [part[i : i + 1] for part in parts])
            except host.CANCELLED:
                # Nothing was found for this item, but what others found stays.
                if not rows:
                    raise
                break
            except Exception as error:
                states[i] = item.state
                if not any(state is not None and state.best.found for state in states):
                    raise
                kept = _kept(host, Saved(request, tuple(states)))
                if isinstance(error, ValueError):
                    raise ValueError(f"{error}; {kept}") from error
                # The type of others counts: ComfyUI frees memory after its own out-of-memory errors.
                _log.warning("%s", kept)
                raise
            assert item.state is not None
            states[i] = item.state
            rows.append((latents, item))
            if item.stopped == CANCELLED:
                record.cancel()
                break
    return _found(host, request, packing, rows, tuple(states))


def times_cancelled(host: Host, seed: Any, keep: Any, calls: Any, seconds: Any) -> int:
    """How often a search of these was cancelled lately: it is then to be searched again, and not what it had given."""
    return cancelled(host.search_records(), asked(seed, keep, calls, seconds))


def _kept(host: Host, saved: Saved) -> str:
    try:
        return f"what was found so far is in {rescue(host, saved).name}: Load Search goes on with it"
    except OSError as error:
        return f"what was found so far could not be saved: {error}"


def with_noise(saved: Saved, noise: NOISE) -> Saved:
    """The search with the NOISE that its file could not hold. ValueError for one that is not the search's own."""
    own = saved.request.noise
    if own is None or int(own.seed) != int(noise.seed):
        seed = "its own seed" if own is None else f"a NOISE of seed {own.seed}"
        raise ValueError(f"noise: the search draws its starts from {seed}, not from one of seed {noise.seed}")
    return replace(saved, request=replace(saved.request, noise=noise))


def policy_noise(host: Host, saved: Saved, seed: int) -> PolicyNoise:
    """NOISE of the policies that FIND has learnt, one for each item. ValueError for a search by another method."""
    policies = tuple(state.policy for state in saved.states if isinstance(state, Find))
    if len(policies) < len(saved.states):
        raise ValueError(
            "search: only a noise policy can be drawn from, and this search is none, or was cancelled before all its "
            "items were begun; connect Learn Noise for a Prompt"
        )
    return PolicyNoise(policies, host.random_noise, seed)


def draw_from(host: Host, guider: GUIDER, saved: Saved, count: int, seed: int, greedy: bool) -> dict[str, Any]:
    """LATENT of `count` draws for each item: of a tree by algorithm 2, of particles by their weights. No network calls.

    greedy: down the largest values of a tree. ValueError for a search that keeps no samples of its target.
    """
    found: list[Tensor] = []
    for i, state in enumerate(saved.states):
        own = seed_of(seed, "draw", i)
        if isinstance(state, Tree):
            found.append(state.latents(state.draw(count, own, greedy).tolist()))
        elif isinstance(state, Steering):
            found.append(state.draw(count, own))
        else:
            method = "not begun" if state is None else state.method
            raise ValueError(f"search: item {i + 1} is {method}, with nothing to draw from; search with dts or fk")
    packing = Parts.of(parts_of(host.latents_of(guider, saved.request.latent)))
    return {"samples": host.latents_out(guider, torch.cat(found), packing)}


class _Item(Method):
    """One latent of the batch, searched inside one sampling run of the guider."""

    searches = True

    def __init__(
        self, host: Host, vae: VAE, reward: Reward, request: SearchRequest, budget: Budget, batch: int, index: int,
        packing: Parts, state: State | None, watch: _Watch, record: Record, second: GUIDER | None,
    ):  # fmt: skip
        self.host, self.vae, self.reward, self.request = host, vae, reward, request
        self.watch, self.record, self.second = watch, record, second
        self.budget, self.batch, self.index, self.packing = budget, batch, index, packing
        self.state, self.stopped = state, ""
        # Latents that were decoded last, with their pictures, and what of them belongs to the best.
        self._decoded: tuple[Tensor, Tensor] | None = None
        self._pictures: list[tuple[Candidate, Image]] = []
        seed = request.seed if request.noise is None else int(request.noise.seed)
        self.seed = seed if index == 0 else seed_of(seed, "item", index)

    @property
    def relays(self) -> bool:
        """See Method."""
        return self.second is not None

    def search(self, guider: GUIDER, sample: list[Tensor]) -> Tensor:
        """LATENT samples (K, ...) of the best, best first, packed; sample: the item's parts (1, ...)."""
        unit = self._units(sample)
        if self.request.noise is not None and torch.equal(unit(0), unit(1)):
            raise ValueError(
                "noise: it is the same for every seed, so that all candidates would be one; connect Random Noise, or "
                "nothing"
            )
        mask = self.request.latent.get("noise_mask")
        if mask is not None:
            mask = self.host.nested([self._mask(*both) for both in zip(parts_of(mask), sample, strict=False)])

        # As many rows as are searched at once, by which the host judges what memory it needs.
        def rows(parts: list[Tensor]) -> Any:
            return self.host.nested([part.repeat(self.batch, *(1,) * (part.ndim - 1)) for part in parts])

        latent = {"samples": rows(sample), "noise_mask": mask}
        # The noise of one tensor is drawn by the search as core draws it; of parts core draws one after another.
        own = self.request.noise is None and not self.packing.shapes
        self._unit = None if own else lambda number: unit(number)[0]
        found = self.host.sample(
            guider, self.host.method_sampler(self), self.request.sigmas, latent, self.seed % (1 << 64),
            rows(self.packing.unpack(unit(0))),
        )  # fmt: skip
        return self.packing.pack(parts_of(found))

    def _mask(self, mask: Tensor, part: Tensor) -> Tensor:
        """The item's own of a batch of masks; rows of a video's mask without channels are frames."""
        if len(mask) > 1 and (part.ndim == 4 or mask.ndim == part.ndim):
            return mask[self.index % len(mask)].unsqueeze(0)
        return mask

    def _units(self, sample: list[Tensor]) -> Callable[[int], Tensor]:
        """Candidate's number -> its unit noise (1, ...), packed."""
        noise, shapes = self.request.noise, [part.shape for part in sample]

        def unit(number: int) -> Tensor:
            seed = candidate_seed(self.seed, number)
            if noise is None:
                generator = torch.Generator().manual_seed(seed % (1 << 64))
                return self.packing.pack([torch.randn(shape, generator=generator) for shape in shapes])
            drawn = copy.copy(noise)
            # A NOISE has nothing but its seed to tell one draw from another; headless ones are frozen.
            vars(drawn)["seed"] = seed
            found = parts_of(drawn.generate_noise({"samples": self.host.nested(sample)}))
            if [part.shape for part in found] != shapes:
                has, needs = (" and ".join(str(tuple(part.shape)) for part in each) for each in (found, sample))
                raise ValueError(f"noise has shape {has} for a latent of {needs}")
            return self.packing.pack(found)

        return unit

    def sample(self, run: Run) -> Tensor:
        """LATENTs of the best (K, ...) in the model's scale, best first."""
        if self.second is None:
            return self._searched(run)

        def both(high: Model, others: Mapping[str, Model]) -> Tensor:
            boundary = self.request.boundary
            model = by_level(high, others[SECOND], boundary)
            # Each call is of one level, and so of one network.
            name = identity((run.identity, boundary))
            return self._searched(replace(run, model=model, mixed_levels=False, identity=name))

        return run.beside({SECOND: self.second}, both)

    def _searched(self, run: Run) -> Tensor:
        request, host = self.request, self.host

        def evaluate(x0: Tensor) -> Tensor:
            stored = self.packing.unpack(run.latents_out(x0))
            images = host.decode(self.vae, stored[0])
            if len(images) != len(x0):  # a video's frames come in one row
                images = images.view(len(x0), -1, *images.shape[1:])
            rewards = score(self.reward, images, request.prompt)
            run.again()
            self.watch.seen(images, rewards)
            self.record.scored(images, stored, rewards)
            self._decoded = x0.detach().cpu(), images
            return rewards

        def callback(state: State) -> None:
            self.state = state
            self._keep_pictures(state)
            self.watch.tell(state, self.index)
            self.record.tell(state, self.index)
            host.check_cancelled()

        self.watch.begin(self.state)
        try:
            found = search(
                run, request.config, self.budget, evaluate, seed=self.seed, transition=request.transition,
                callback=callback, state=self.state, noise=self._unit, keep=request.keep,
            )  # fmt: skip
            self.state, self.stopped = found.state, found.stopped
        except host.CANCELLED:
            if self.state is None or not self.state.best.found:
                raise
            self.stopped = CANCELLED
        return torch.stack([c.latent for c in self.state.best.found]).to(run.sigmas)

    def _keep_pictures(self, state: State) -> None:
        """Of what was decoded for its reward, those of the best, so that none of them is decoded again."""
        if self._decoded is None:
            return
        (latents, images), self._decoded = self._decoded, None
        kept = []
        for candidate in state.best.found:
            picture = self._picture_of(candidate)
            if picture is None:
                row = next((i for i, latent in enumerate(latents) if torch.equal(latent, candidate.latent)), None)
                picture = None if row is None else thumbnail(images[row])
            if picture is not None:
                kept.append((candidate, picture))
        self._pictures = kept

    def _picture_of(self, candidate: Candidate) -> Image | None:
        return next((picture for one, picture in self._pictures if one is candidate), None)

    def pictures(self, latents: Tensor) -> list[Image]:
        """Thumbnails of the best, whose LATENT samples (K, ...) these are; those of an earlier run are decoded."""
        assert self.state is not None
        found = [self._picture_of(candidate) for candidate in self.state.best.found]
        missing = [i for i, picture in enumerate(found) if picture is None]
        if missing:
            images = self.host.decode(self.vae, self.packing.first(latents[missing]))
            for i, image in zip(missing, images.view(len(missing), -1, *images.shape[1:]), strict=True):
                found[i] = thumbnail(image)
        return [picture for picture in found if picture is not None]


def by_level(high: Model, low: Model, boundary: float) -> Model:
    """A model of two, of which the second is asked at levels below the boundary; all rows of a call have one level."""

    def model(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        return (low if below(float(sigma[0]), boundary) else high)(x, sigma, **extra_args)

    return model


class _Watch:
    """The node's bar: share of the budget spent, the best picture so far and its reward."""

    def __init__(self, host: Host, budget: Budget, items: int):
        self.budget, self.items = budget, items
        self.share = _TICKS if budget.calls is None else budget.calls
        self._bar = host.progress(self.share * items)
        self._last: tuple[Tensor, Tensor] | None = None
        self.begin(None)

    def begin(self, state: State | None) -> None:
        """Spending is counted from here; an earlier run's best is not shown anew."""
        self._calls, self._seconds, self._shown = 0, 0.0, -math.inf
        if state is not None:
            self._calls, self._seconds, self._shown = state.ledger.calls, state.ledger.seconds, state.best.reward

    def seen(self, images: Tensor, rewards: Tensor) -> None:
        """The last pictures that were scored."""
        self._last = (images, rewards)

    def tell(self, state: State, item: int) -> None:
        """After each forward and each scored batch."""
        if self.budget.calls is not None:
            done = state.ledger.calls - self._calls
        elif self.budget.seconds is not None:
            done = int((state.ledger.seconds - self._seconds) / self.budget.seconds * _TICKS)
        else:
            done = 0
        preview, text = None, ""
        best = state.best.reward
        if best > self._shown and self._last is not None:
            images, rewards = self._last
            preview, self._shown = _picture(images[int(rewards.argmax())]), best
            text = f"best reward {spelt(best)} after {state.ledger.calls} calls"
        self._bar.step(item * self.share + min(done, self.share), preview, text)


def _picture(image: Tensor) -> Any:
    from PIL import Image

    still = image if image.ndim == 3 else image[0]
    return Image.fromarray(rounded(still).numpy())


def _copy(state: State) -> State:
    return type(state).from_file(*state.to_file(), state.config)


def _found(
    host: Host, request: SearchRequest, packing: Parts, rows: list[tuple[Tensor, _Item]], states: tuple
) -> Found:
    kept = {k: v for k, v in request.latent.items() if not k.startswith("downscale_ratio") and k != "batch_index"}
    best = {**kept, "samples": host.nested(packing.unpack(torch.cat([latents[:1] for latents, *_ in rows])))}
    if len(rows) < len(states) and "noise_mask" in best:
        masks = [mask[: len(rows)] if len(mask) == len(states) else mask for mask in parts_of(best["noise_mask"])]
        best["noise_mask"] = host.nested(masks)
    top = {"samples": host.nested(packing.unpack(torch.cat([latents for latents, *_ in rows])))}
    lines, reports = [], []
    height = -(-max(len(latents) for latents, *_ in rows) // 4)
    for i, (latents, item) in enumerate(rows):
        state = item.state
        assert state is not None
        rewards, ledger = [c.reward for c in state.best.found], state.ledger
        name = f"item {i + 1} of {len(states)}: " if len(states) > 1 else ""
        title = f"{name}best {spelt(rewards[0])}, {ledger.calls} calls, {ledger.rewards} rewards"
        reports.append(draw(state, item.pictures(latents), title, height))
        lines.append(
            f"{name}{state.method}, best reward {spelt(rewards[0])} found after {state.best.found[0].calls} calls\n"
            f"spent: {ledger.calls} network calls in {ledger.forwards} batches, {ledger.rewards} rewards and decodes, "
            f"{ledger.seconds:.1f} s; stopped by: {item.stopped}\n"
            f"kept: {', '.join(map(spelt, rewards))}"
        )
        if isinstance(state, Find):
            lines.append(f"policy: {state.step} steps, {float(state.policy.divergence()):.4g} nats from plain noise")
    if len(rows) < len(states):
        lines.append(f"cancelled: {len(states) - len(rows)} of {len(states)} items were not searched")
    return Found(best, top, Saved(request, states), torch.cat(reports), "\n".join(lines))
