"""What reflection needs: further guiders run inside the sampling of the one that samples.

A leg's guider lends its denoiser (`lending`). Clones of a ModelPatcher share one network, and preparing one puts its
patches into the other's; a leg whose weights differ gets a network of its own, read again from its file, or where no
file is known the patches are swapped before each leg, which core undoes exactly.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...sampling.path import NoisePath, vp_scale
from ...sampling.reflection import Keep
from ...sampling.standard import Model
from ..methods import Beside
from .lending import Lent, Outer, check, hooked
from .work import say

_log = logging.getLogger("retort")


def beside(
    copies: dict[int, Any], strong: Any, path: NoisePath, sigmas: Tensor, extra_args: dict[str, Any], noise: Tensor,
    latent: Tensor, mask: Tensor | None, guiders: Mapping[str, Any], job: Beside, many: int, standing: list[Any],
) -> Tensor:  # fmt: skip
    """See `hosts.methods.Run.beside`; copies: networks that were read again, kept by the SAMPLER.

    many: see `lending.Outer`. standing: holds, while the guiders stand there, where their networks are.
    """
    placement = _Placement()
    outer = Outer(strong, path, sigmas, extra_args, noise, latent, mask, many)
    own = _Leg(outer, strong, extra_args, placement)
    prepared = _prepared(strong, guiders, placement, copies)

    def nested(waiting: list[str], legs: dict[str, Model]) -> Tensor:
        if not waiting:
            placement.settle()
            standing.append(placement)
            try:
                return job(own, legs)
            finally:
                standing.remove(placement)
        name, *others = waiting

        def lent(guider: Any, extra: dict[str, Any]) -> Tensor:
            return nested(others, {**legs, name: _Leg(outer, guider, extra, placement)})

        return outer.within(prepared[name], lent)

    return nested(list(prepared), {})


def keeping(
    strong: Any, path: NoisePath, sigmas: Tensor, extra_args: dict[str, Any], noise: Tensor, latent: Tensor,
    mask: Tensor,
) -> Keep:  # fmt: skip
    """See `hosts.methods.Run.keep`; what the mask keeps in part is mixed at each call, as core does it."""
    mask_function = extra_args["model_options"].get("denoise_mask_function")

    def kept(x: Tensor, sigma: Tensor) -> Tensor:
        each, now = sigma * x.new_ones([x.shape[0]]), mask
        if mask_function is not None:
            now = mask_function(each, mask, extra_options={"model": strong, "sigmas": sigmas})
        image = strong.inner_model.scale_latent_inpaint(
            x=x, sigma=each, noise=noise, latent_image=latent, denoise_mask=now
        )
        if path.kind == "VP":
            image = image / vp_scale(sigma)
        return torch.where(now > 0, x, image)

    return kept


def _prepared(strong: Any, guiders: Mapping[str, Any], placement: _Placement, copies: dict[int, Any]) -> dict[str, Any]:
    """Copies of the guiders, on networks that can stand beside the others."""
    made: dict[str, Any] = {}
    for name, guider in guiders.items():
        check(strong, guider, name)
        # A copy, since the same guider may be strong too, and a guider holds its run's state.
        mine = made[name] = copy.copy(guider)
        others = [strong, *(other for key, other in made.items() if key != name)]
        sharing = [o for o in others if mine.model_patcher.is_clone(o.model_patcher)]
        twin = next((o for o in sharing if _same(mine, o)), None)
        if sharing and twin is not None:
            _lean(mine, twin.model_patcher)
        elif sharing:
            mine.model_patcher = _own(mine, sharing, placement, copies)
    return made


def _own(guider: Any, sharing: list[Any], placement: _Placement, copies: dict[int, Any]) -> Any:
    """The guider's patcher on a network of its own, or the same to be swapped."""
    patcher = guider.model_patcher
    if patcher.cached_patcher_init is None:
        if any(map(hooked, [guider, *sharing])):
            raise ValueError(
                "a conditioning of the pair carries hooks (a LoRA on the prompt), and the pair shares a network "
                "that cannot be read a second time: load the weak model with a loader of its own, or take the "
                "hooks away"
            )
        placement.swap(
            "the models differ by patches and share one network that cannot be read a second time (its loader "
            "names no file), so the patches are swapped before each leg"
        )
        return patcher
    key = id(patcher)
    if key not in copies:
        _log.info("the pair differs by patches: the weak leg gets a network of its own, read again from its file")
        own = copies[key] = patcher.clone(force_deepcopy=True)
        # Core's clone still shares what hooks put aside; with it one network's weights would go into the other.
        own.hook_backup = {}
    return copies[key]


class _Placement:
    """Which networks are where: all stay loaded where they fit, else the one that is asked next is fetched."""

    def __init__(self) -> None:
        self.legs: list[_Leg] = []
        self._swaps = False
        self._there: _Leg | None = None
        self._left: set[int] = set()  # networks whose place others may have taken

    def swap(self, why: str) -> None:
        """From now on each leg fetches its weights."""
        if not self._swaps:
            say(f"two guiders: {why}", warn=True)
        self._swaps = True

    def settle(self) -> None:
        """Called when every leg has been loaded once: see whether the first of them still are."""
        networks = {id(leg.network) for leg in self.legs}
        # One network streams what the device has no room for; several are swapped where one had to leave for another.
        if len(networks) > 1 and not all(leg.loaded() for leg in self.legs):
            size = sum({id(leg.network): leg.patcher.model_size() for leg in self.legs}.values()) / 2**30
            self.swap(
                f"the networks ({size:.1f} GB) do not fit together, so they take turns; each change moves them there "
                "and back, which can cost more than the calls"
            )

    def disturbed(self) -> None:
        """Other networks, such as a VAE, may have taken the place of some on the device."""
        self._left = {id(leg.network) for leg in self.legs}

    def enter(self, leg: _Leg) -> None:
        """Before each call of a leg."""
        turns = self._swaps and (self._there is None or self._there.needed() != leg.needed())
        if turns or id(leg.network) in self._left:
            leg.fetch()
            self._there = leg
            if self._left:
                self._left.discard(id(leg.network))
                if not self._left:
                    self.settle()


class _Leg(Lent):
    """A guider's denoiser, whose network is fetched where it had to leave."""

    def __init__(self, outer: Outer, guider: Any, extra_args: dict[str, Any], placement: _Placement):
        super().__init__(outer, guider, extra_args)
        self._placement = placement
        self._shape = [outer.many * outer.noise.shape[0], *outer.noise.shape[1:]]
        placement.legs.append(self)

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        self._placement.enter(self)
        return super().__call__(x, sigma)

    def loaded(self) -> bool:
        """Whether the network lies on its device, at least in part with the rest streamed, or pages by itself."""
        if self.patcher.is_dynamic() or comfy.model_management.is_device_cpu(self.patcher.load_device):
            return True
        return self.patcher.loaded_size() > 0

    def needed(self) -> list[Any]:
        """What has to be loaded for a call: the guider's patcher, and those of its conditions."""
        return [self.patcher, *self.guider.loaded_models]

    def fetch(self) -> None:
        """Load the network and what its conditions need, with this guider's patches."""
        comfy.model_management.load_models_gpu(
            self.needed(),
            memory_required=self.network.memory_required([2 * self._shape[0], *self._shape[1:]]),
            minimum_memory_required=self.network.memory_required(self._shape),
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two guiders on one network want the same of it."""
    if hooked(one) or hooked(other):
        return False
    a, b = one.model_patcher, other.model_patcher
    written = ("object_patches", "weight_wrapper_patches", "wrappers", "callbacks", "injections")
    return a is b or bool(a.clone_has_same_weights(b)) and all(getattr(a, n) == getattr(b, n) for n in written)


def _lean(guider: Any, patcher: Any) -> None:
    """Let a guider use the patcher that has loaded its network already; loading its own would turn the other out."""
    own, guider.model_patcher = guider.model_patcher, patcher
    if own is not patcher:
        # What the guider's options hold is its own still, and belongs on the device.
        own.model_patches_to(own.load_device)
        own.model_patches_to(own.model_dtype())
        extra = own.model_patches_models()
        if extra:
            comfy.model_management.load_models_gpu([patcher, *extra])
