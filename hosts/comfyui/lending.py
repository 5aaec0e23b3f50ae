"""A guider inside the sampling run of another: it samples for real there, and lends its denoiser instead of sampling.

So its loading, hooks, ControlNets, areas and percentages are core's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.nested_tensor
import comfy.utils
import torch
from comfy.samplers import Sampler
from torch import Tensor

from ...sampling.path import NoisePath
from ..reflection import check_pair
from .coordinates import path_of
from .guiders import unconditional
from .labels import relabelled
from .masks import masked

Job = Callable[[Any, dict[str, Any]], Tensor]
"""(a guider while it samples, its extra_args) -> what comes of it."""


class Outer:
    """A guider's sampling run, whose levels, noise, picture and mask are those of every guider inside it.

    many: how many times as many rows a call may have, by which a guider inside judges what memory it needs.
    """

    def __init__(
        self, guider: Any, path: NoisePath, sigmas: Tensor, extra_args: dict[str, Any], noise: Tensor, latent: Tensor,
        mask: Tensor | None, many: int = 1,
    ):  # fmt: skip
        self.network, self.path, self.many = guider.inner_model, path, many
        self.sigmas, self.noise, self.latent, self.mask = sigmas, noise, latent, mask
        # None, or what makes the mask another at each level: a property of the run, whichever model it was set on.
        self.mask_function = extra_args["model_options"].get("denoise_mask_function")
        self._seed = extra_args.get("seed")

    def within(self, guider: Any, job: Job) -> Tensor:
        """What `job` makes of the guider inside a sampling run of its own."""
        shapes = self.network.latent_shapes
        latent = self.latent
        if torch.count_nonzero(latent):  # the guider processes it again
            latent = self.network.process_latent_out(latent)
        mask = self.mask
        if mask is not None and len(shapes) == 1:
            mask = mask[:, :1]  # core takes the channels of a picture's mask for a batch
        sampler = _Lender(job)
        guider.sample(
            _apart(self._rows(self.noise), shapes), _apart(self._rows(latent), shapes), sampler, self.sigmas,
            denoise_mask=None if mask is None else _apart(mask, shapes), disable_pbar=True, seed=self._seed,
        )  # fmt: skip
        assert sampler.made is not None
        return sampler.made

    def _rows(self, latents: Tensor) -> Tensor:
        return latents.repeat(self.many, *(1,) * (latents.ndim - 1)) if self.many > 1 else latents


class _Lender(Sampler):
    """A SAMPLER that gives the guider to a job."""

    def __init__(self, job: Job):
        self.job = job
        self.made: Tensor | None = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """What the guider calls; its own answer is not used."""
        conds = model_wrap.conds
        if unconditional(model_wrap):
            # Core would run the positive branch and multiply it by zero.
            model_wrap.conds = {name: conds[name] for name in conds if name != "positive"}
        try:
            self.made = self.job(model_wrap, extra_args)
        finally:
            model_wrap.conds = conds
        return noise


class Lent:
    """A guider's denoiser: (x, sigma (B,)) -> x0, masked as core masks.

    label_scale: the network is told the timestep of its level times this.
    """

    def __init__(self, outer: Outer, guider: Any, extra_args: dict[str, Any], label_scale: float = 1.0):
        self.guider, self.network, self.patcher = guider, guider.inner_model, guider.model_patcher
        options = {k: v for k, v in extra_args["model_options"].items() if k != "denoise_mask_function"}
        if outer.mask_function is not None:
            options["denoise_mask_function"] = outer.mask_function
        options = relabelled(options, label_scale, outer.path)
        self._extra = {**extra_args, "model_options": options, "denoise_mask": outer.mask}
        self._model = masked(guider, outer.sigmas, outer.path, outer.latent, outer.noise)

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        # Guiders on one network differ in their callbacks, which core finds here.
        self.network.current_patcher = self.patcher
        return self._model(x, sigma, **self._extra)


def check(strong: Any, guider: Any, name: str) -> None:
    """ValueError unless the guider's model shares latents and coordinates with the strong one's."""
    mine, theirs = (type(g.model_patcher.get_model_object("latent_format")).__name__ for g in (guider, strong))
    own, other = (path_of(g.model_patcher.get_model_object("model_sampling")) for g in (guider, strong))
    check_pair(
        name,
        empty=[branch for branch, entries in guider.original_conds.items() if not entries]
        or ([] if guider.original_conds else ["positive"]),
        formats=(mine, theirs),
        paths=(own, other),
    )


def hooked(guider: Any) -> bool:
    """Whether conditions bring weights of their own, which are written into the network when they are asked."""
    entries = [entry for conds in guider.original_conds.values() for entry in conds]
    return any("hooks" in e or ("control" in e and e["control"].get_extra_hooks()) for e in entries)


def _apart(packed: Tensor, shapes: Sequence[Any]) -> Any:
    """Latents that core has packed into one, as a guider takes them."""
    if len(shapes) < 2:
        return packed
    return comfy.nested_tensor.NestedTensor(comfy.utils.unpack_latents(packed, shapes))
