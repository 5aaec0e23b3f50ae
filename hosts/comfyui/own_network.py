"""A network of its own for a MODEL: its modules once more, over the same weights, which are read and never written.

So the base lies in host memory once, whatever trains on it. Where ComfyUI streams a model from its mapped file, that
file is mapped a second time, which takes no memory of the process either. Only weights that patches change are new.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from . import work
from .coordinates import path_of

Named = Iterator[tuple[nn.Module, str, Tensor]]


def own_network(model, baked: bool = True):
    """A ModelPatcher of its own for a MODEL, in host memory and outside inference mode.

    baked: with the patches in the weights; else they are the patcher's, as they are the MODEL's. The MODEL is unloaded
    first and stays as it is. ValueError for patches that cannot be kept, for weights of a kind that cannot be shared,
    and for a MODEL that is streamed from a file which its loader does not name.
    """
    path_of(model.get_model_object("model_sampling"))
    with torch.inference_mode(False):
        # Loaded, its weights may be partly elsewhere, and hold its patches.
        comfy.model_management.unload_model_and_clones(model)
        base = _mapped_again(model) if model.is_dynamic() else _shared(model.model)
        patcher = model.clone(disable_dynamic=True, model_override=(base, ({}, {}, {}, set())))
        patcher.hook_backup = {}
        for name, patch in patcher.object_patches.items():
            # Made in a node, its tensors belong to inference mode; and the training must not share it with the MODEL.
            comfy.utils.set_attr(base, name, copy.deepcopy(patch))
        for name, functions in patcher.weight_wrapper_patches.items():
            layer, _, kind = name.rpartition(".")
            getattr(comfy.utils.get_attr(base, layer), f"{kind}_function").extend(functions)
        for name in patcher.patches if baked else ():
            comfy.utils.set_attr_param(base, name, with_patches(patcher, name))
    return patcher


def with_patches(patcher, name: str) -> Tensor:
    """A weight of a patcher of one's own with its patches in it, in host memory.

    One at a time, where ComfyUI computes it and as it does, so that it is the same to the bit.
    """
    weight = patcher.patch_weight_to_device(name, device_to=patcher.load_device, return_weight=True)
    return weight.to(patcher.offload_device)


def load_sparingly(patcher) -> None:
    """Let a patcher of one's own compute with its weights left in host memory, its patches added as each layer runs.

    As ComfyUI does it where memory is short: neither a second set of weights nor room for the network on the device.
    """
    base, device = patcher.model, patcher.load_device
    patcher.patch_model(device, lowvram_model_memory=1)  # 0 would mean all
    for part in base.children():
        if part is not base.diffusion_model:
            part.to(device)
    for module, name, weight in named_weights(base.diffusion_model):
        if not isinstance(module, comfy.ops.CastWeightBiasOp):
            _put(module, name, weight, weight.to(device))


def _mapped_again(model) -> nn.Module:
    """The BaseModel of a MODEL whose weights are a mapped file's, mapped once more."""
    if model.cached_patcher_init is None:
        raise ValueError(
            "model cannot be read a second time, because its loader does not tell ComfyUI how (cached_patcher_init): "
            "load it with Load Checkpoint, Load Diffusion Model or RetortEmbeddedModel"
        )
    factory, arguments, *which = model.cached_patcher_init
    made = factory(*arguments)
    base = (made[which[0]] if which else made).model
    for module, name, weight in named_weights(base):
        # The file may hold another precision; ComfyUI converts each weight when it streams it.
        wanted = vars(module).get(f"{name}_comfy_model_dtype")
        if wanted not in (None, weight.dtype) and not hasattr(weight, "__tensor_flatten__"):
            _put(module, name, weight, weight.to(wanted))
    return base


def _shared(base: nn.Module) -> nn.Module:
    """A BaseModel's copy over the same weights."""
    memo: dict[int, object] = {id(weight): _ordinary(weight, name) for name, weight in _all_weights(base)}
    # A patcher would bring a second network; the others are descriptions that nobody changes.
    memo[id(base.current_patcher)] = None
    memo |= {id(base.model_config): base.model_config, id(base.latent_format): ordinary_format(base.latent_format)}
    made = copy.deepcopy(base, memo)
    for name, module in made.named_modules():
        if isinstance(module, comfy.ops.CastWeightBiasOp):
            comfy.model_patcher.wipe_lowvram_weight(module)
            module.comfy_force_cast_weights = False
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module:
            raise ValueError(
                f"model has a function in place of {name}.forward, which would run the MODEL's own layers and no "
                "adapters: connect the MODEL from before the node that sets it"
            )
    return made


def ordinary_format(form: Any) -> Any:
    """A latent format whose means and deviations autograd takes; a loader's node makes them in inference mode."""
    made = copy.copy(form)
    vars(made).update({name: value.clone() for name, value in vars(form).items() if isinstance(value, Tensor)})
    return made


def _all_weights(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from base.named_parameters()
    yield from base.named_buffers()


def _ordinary(weight: Tensor, name: str) -> Tensor:
    """A weight that autograd takes, over the memory of one which may belong to inference mode."""
    if hasattr(weight, "__tensor_flatten__"):
        names, context = weight.__tensor_flatten__()
        inner = {part: _ordinary(getattr(weight, part), name) for part in names}
        kind: Any = type(weight)
        made = kind.__tensor_unflatten__(inner, context, weight.shape, weight.stride())
    elif type(weight) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ValueError(
            f"model keeps {name} as a {type(weight).__name__}, which another loader brings along: load the model with "
            "Load Checkpoint or Load Diffusion Model"
        )
    elif weight.is_meta:
        made = torch.zeros(weight.shape, dtype=weight.dtype)  # as ComfyUI makes what the file lacks
    else:
        made = torch.empty(0, dtype=weight.dtype, device=weight.device)
        made.set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())
    return nn.Parameter(made, requires_grad=False) if isinstance(weight, nn.Parameter) else made


def named_weights(network: nn.Module) -> Named:
    """(module, name, weight) of each parameter and buffer."""
    for module in network.modules():
        here = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield from ((module, name, weight) for name, weight in here)


def _put(module: nn.Module, name: str, before: Tensor, weight: Tensor) -> None:
    setattr(module, name, nn.Parameter(weight, requires_grad=False) if isinstance(before, nn.Parameter) else weight)


def linear_kinds(network: nn.Module) -> tuple[type[nn.Module], ...]:
    """ComfyUI's linear layers that torch would not call one: those with quantised weights."""
    kinds = {type(module) for module in network.modules()}
    return tuple(
        kind
        for kind in kinds
        if issubclass(kind, comfy.ops.CastWeightBiasOp)
        and kind.__name__ == "Linear"
        and not issubclass(kind, nn.Linear)
    )


def set_precision(base: Any, compute: torch.dtype | None) -> None:
    """Let a BaseModel of one's own compute in a precision, None for the one in which ComfyUI samples with it.

    fp16 is never kept, since gradients overflow in it: bf16 takes its place where the device has it, else fp32. Layers
    that cast their weights for themselves go on doing so; other weights are converted here, once.
    """
    network, arithmetic = base.diffusion_model, base.get_dtype_inference()
    safe = torch.bfloat16 if work.bf16() else torch.float32
    wanted = compute or (safe if arithmetic == torch.float16 else arithmetic)
    held = network.dtype
    casting = bool(linear_kinds(network)) or any(
        isinstance(module, comfy.ops.CastWeightBiasOp) and type(module).comfy_cast_weights
        for module in network.modules()
    )
    if wanted != held and not casting:
        for module, name, weight in named_weights(network):
            # Tables that a network keeps in fp32 beside weights of 16 bits need their precision.
            if weight.dtype == held and (isinstance(weight, nn.Parameter) or held != torch.float32):
                _put(module, name, weight, weight.to(wanted))
        network.dtype = wanted
    if wanted != arithmetic:
        base.manual_cast_dtype = wanted
