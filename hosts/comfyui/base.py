"""A MODEL named so that another process loads the same: its file, or a file with its patches merged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy.model_sampling import ModelSamplingFlux
from torch import Tensor

from ...files.folder import inside
from ...files.in_turn import write_in_turn
from . import embedded, photographs
from .coordinates import path_of, prediction_of, with_shift
from .own_network import own_network, with_patches
from .training import refuse_foreign_patches

LOADERS = {
    "checkpoint": comfy.sd.load_checkpoint_guess_config,
    "diffusion model": comfy.sd.load_diffusion_model,
    "embedded eps": embedded.load_eps,
    "photographs": photographs.load_network,
}


def describe(model) -> dict[str, Any] | None:
    """What loads the MODEL again (loader, file, shift); None where its patches cannot be named."""
    named = _named(model)
    if named is None or model.patches or set(model.object_patches) - {"model_sampling"}:
        return None
    return {**named, "shift": _shift(model)}


def save_merged(model, path: Path) -> dict[str, Any]:
    """Write the MODEL's network with its patches merged; what loads it."""
    loader = (_named(model) or {"loader": "checkpoint"})["loader"]
    what = {
        "loader": "checkpoint" if loader == "diffusion model" else loader,
        "file": str(path),
        "shift": _shift(model),
    }
    refuse_foreign_patches(model)
    patcher = own_network(model, baked=False)
    with torch.inference_mode(False):
        state, patched = _to_save(patcher)

        def made(name: str) -> Tensor:
            return with_patches(patcher, patched[name]) if name in patched else state[name]

        write_in_turn(inside(path.parent) / path.name, {name: value.dtype for name, value in state.items()}, made)
    return what


def _to_save(patcher) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A network's tensors as its file names them, and by these names the weights whose patches are still to come.

    A weight that the file does not hold as it is, such as a quantised one, has its patches in it already.
    """
    base = patcher.model
    whole = {name: comfy.utils.get_attr(base, name) for name in patcher.patches}
    places = {_place(weight): name for name, weight in whole.items() if not hasattr(weight, "__tensor_flatten__")}
    state = base.state_dict_for_saving(base.diffusion_model.state_dict())
    found = {saved: places[_place(value)] for saved, value in state.items() if _place(value) in places}
    late = {name for name, times in Counter(found.values()).items() if times == 1}
    for name in whole.keys() - late:
        comfy.utils.set_attr_param(base, name, with_patches(patcher, name))
    state = base.state_dict_for_saving(base.diffusion_model.state_dict())
    return state, {saved: name for saved, name in found.items() if name in late}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def load_described(what: Mapping[str, Any]):
    """The MODEL that `describe` or `save_merged` told of."""
    if what["loader"] not in LOADERS:
        raise ValueError(f"loader {what['loader']!r} is not known; it is one of {', '.join(LOADERS)}")
    file = str(what["file"])
    if what["loader"] == "checkpoint":
        model = comfy.sd.load_checkpoint_guess_config(file, output_vae=False, output_clip=False)[0]
    else:
        model = LOADERS[what["loader"]](file)
        if what["loader"] == "embedded eps":
            model.cached_patcher_init = (embedded.load_eps, (file,))
    return model if what["shift"] is None else with_shift(model, what["shift"])


def _named(model) -> dict[str, str] | None:
    if model.cached_patcher_init is None:
        return None
    factory, args = model.cached_patcher_init[:2]
    # Further arguments are options of the loader, such as a weight's type, which the name does not carry.
    if any(args[1:]) and not (factory is LOADERS["checkpoint"] and not any(args[6:])):
        return None
    return next(({"loader": name, "file": args[0]} for name, known in LOADERS.items() if known is factory), None)


def _shift(model) -> float | None:
    """The shift that a patch has set; ValueError for a patch that says more than a shift."""
    if "model_sampling" not in model.object_patches:
        return None
    patched = model.object_patches["model_sampling"]
    plain = model.clone()
    del plain.object_patches["model_sampling"]
    if "model_sampling" in model.object_patches_backup:
        plain.add_object_patch("model_sampling", model.object_patches_backup["model_sampling"])
    base = plain.get_model_object("model_sampling")
    shifts = path_of(base).kind == "FLOW"
    if shifts and path_of(base) == path_of(patched) and prediction_of(base) == "flow" == prediction_of(patched):
        shift = math.exp(patched.shift) if isinstance(base, ModelSamplingFlux) else patched.shift
        shifted = with_shift(plain, shift).get_model_object("model_sampling")
        if torch.allclose(shifted.sigmas.cpu(), patched.sigmas.cpu(), atol=1e-6):
            return float(shift)
    raise ValueError(
        "model carries a sampling patch that is more than a timestep shift, which a job in another process cannot be "
        "told of: train inside the node, or connect the MODEL from before that patch"
    )
