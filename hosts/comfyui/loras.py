"""LoRA files on a MODEL of ComfyUI, whatever they call their layers: what core's loader reads of them, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from uuid import uuid4

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.patcher_extension import PatcherInjection
from comfy.weight_adapter import BypassInjectionManager, LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ...files.errors import UsageError
from ...models.layouts.lora_keys import BIAS, DORA, MAGNITUDE
from ...models.layouts.lora_places import Names, Place
from ...models.layouts.lora_state import Piece, Reading, alphas_of, read, whole, with_alphas

_ROOT = "diffusion_model."
BYPASS = "bypass_lora"  # as core calls the injections of its own


class PeftDora(LoRAAdapter):
    """A LoRA with magnitudes as PEFT has them: each row of weight and LoRA together gets the length of its magnitude.

    Liu et al. 2024, arXiv 2402.09353, eq. 5. Core's own adapter divides by the lengths of the weight's rows without the
    LoRA.
    """

    def calculate_weight(
        self, weight: Tensor, key: str, strength: float, strength_model: float, offset: Any, function: Any,
        intermediate_dtype: Any = torch.float32, original_weight: Any = None,
    ) -> Tensor:  # fmt: skip
        """As core's, in place."""
        *lora, magnitude, reshape = self.weights
        both = LoRAAdapter(self.loaded_keys, (*lora, None, reshape)).calculate_weight(
            weight.clone(), key, 1.0, strength_model, offset, function, intermediate_dtype, original_weight
        )
        lengths = both.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in both.shape[1:]))
        weight += strength * (both * (magnitude.to(both) / lengths) - weight)
        return weight


def applied(
    model: Any,
    lora: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    strength: float,
    say: Callable[[str], None],
    bypass: bool = False,
    what: str = "the LoRA",
) -> Any:
    """A clone of a MODEL with a LoRA file's tensors; `say` is told of those that are left out. Messages call it `what`.

    bypass: beside the layers, as core's Load LoRA (Bypass) has it, instead of in their weights, and beside what another
    bypass computes there. UsageError where no
    tensor belongs to the model, and for what a bypass cannot compute.
    """
    keys, given = parameters(model), comfy.lora_convert.convert_lora(dict(lora))
    reading = read(with_alphas(given, alphas_of(metadata)), names_of(model, keys), what)
    patched = _beside(model, reading, keys, strength) if bypass else _patched(model, reading, keys, strength)
    if told := reading.told(what):
        say(told)
    return patched


def parameters(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Layer, or bare parameter -> (name in the MODEL's state, shape)."""
    found = {}
    for name, parameter in model.model.diffusion_model.named_parameters():
        # Outside training a layer is wrapped by nobody, so that these are the names that patches go by.
        found[name.removesuffix(".weight")] = f"{_ROOT}{name}", tuple(parameter.shape)
    return found


def names_of(model: Any, keys: Mapping[str, tuple[str, tuple[int, ...]]]) -> Names:
    """The names of a MODEL's layers, with those that core knows."""
    return Names({layer: shape for layer, (_, shape) in keys.items()}, _core(model, keys))


def _core(model: Any, keys: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, Place]]:
    layers = {name: layer for layer, (name, _) in keys.items()}
    for stem, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        if isinstance(target, str):
            if target in layers:
                yield stem, Place(layers[target])
            continue
        name, offset, *function = target
        # Rows of the weight, all of them or some; core's one function exchanges halves.
        known = function in ([], [comfy.utils.swap_scale_shift]) and (offset is None or offset[0] == 0)
        if name in layers and known:
            yield stem, Place(layers[name], None if offset is None else (offset[1], offset[2]), bool(function))


def _patched(model: Any, reading: Reading, keys: Mapping[str, tuple[str, tuple[int, ...]]], strength: float) -> Any:
    clone = model.clone()
    clone.add_patches(_core_patches(reading.pieces, keys), strength)
    return clone


def _core_patches(pieces: list[Piece], keys: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[Any, Any]:
    state: dict[str, Tensor] = {}
    to_load: dict[str, Any] = {}
    magnitudes: dict[Any, Tensor] = {}
    biases: dict[Any, Any] = {}
    for i, piece in enumerate(pieces):
        name, rows = keys[piece.place.layer][0], piece.place.rows
        to_load[f"{i}"] = name if rows is None else (name, (0, *rows))
        for what, tensor in piece.tensors.items():
            if what == BIAS and rows is not None:
                # Core takes biases of whole layers only.
                biases[name.removesuffix(".weight") + ".bias", (0, *rows)] = ("diff", (tensor,))
            elif what == MAGNITUDE:
                magnitudes[to_load[f"{i}"]] = tensor
            else:
                state[f"{i}.{what}"] = tensor
    found = comfy.lora.load_lora(state, to_load, log_missing=False)
    for target, magnitude in magnitudes.items():
        *lora, _, reshape = found[target].weights
        found[target] = PeftDora(found[target].loaded_keys, (*lora, magnitude, reshape))
    return found | biases


def _beside(model: Any, reading: Reading, keys: Mapping[str, tuple[str, tuple[int, ...]]], strength: float) -> Any:
    for piece in reading.pieces:
        if DORA in piece.tensors or MAGNITUDE in piece.tensors:
            raise UsageError(
                f"bypass: the LoRA has the magnitudes of a DoRA ({piece.keys[0]}), which only weights can be scaled "
                "by: switch bypass off"
            )
    fused = whole(reading, {layer: shape[0] for layer, (_, shape) in keys.items()})
    pieces = [Piece(layer, Place(layer), tensors, []) for layer, tensors in fused.items()]
    clone, beside = model.clone(), BypassInjectionManager()
    changed = {}
    for name, patch in _core_patches(pieces, keys).items():
        if isinstance(patch, WeightAdapterBase):
            beside.add_adapter(name, patch, strength=strength)
        else:
            changed[name] = patch
    clone.add_patches(changed, strength)
    there = [name for name in clone.injections if name.startswith(BYPASS)]
    nested = [each for name in there for each in clone.get_injections(name)]
    for name in there:
        clone.remove_injections(name)
    # Under a name of its own: models are told apart by the names of their injections alone.
    clone.set_injections(f"{BYPASS}_{uuid4().hex}", [_nested([*nested, *beside.create_injections(clone.model)])])
    return clone


def _nested(each: list[PatcherInjection]) -> PatcherInjection:
    """Several as one, taken off in the reverse order: each puts back the layers as it found them."""

    def inject(patcher: Any) -> None:
        for one in each:
            one.inject(patcher)

    def eject(patcher: Any) -> None:
        for one in reversed(each):
            one.eject(patcher)

    return PatcherInjection(inject=inject, eject=eject)
