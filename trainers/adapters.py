"""Named LoRAs (PEFT) on one frozen network, of which one or none is on at a time."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..sampling.settings import Settings, setting
from .products import use_input_precision

# PEFT's name for rows of a batch without an adapter.
NOBODY = "__base__"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Shape of an adapter: the effective weight is alpha / rank times B A."""

    rank: int = setting(16, 1, 1024, help="Size of the LoRA.", remedy="16 suits styles, 64 distillation")
    alpha: float = setting(
        0.0, 0, 4096, step=0.5, advanced=True, help="The LoRA learns at alpha / rank; 0 takes alpha = rank.",
        page="The LoRA learns at alpha / rank; 0 takes alpha = rank. It is multiplied into the file: load it at "
        "strength 1.",
    )
    targets: str = setting(
        "*", advanced=True,
        help="Layers to train: patterns of their names with commas between, such as *attn*, *.mlp.* and so on.",
        page="Layers to train: patterns of their names with commas between, such as `*attn*, *.mlp.*`.",
    )
    exclude: str = setting("", advanced=True, help="Patterns of layers to leave out.")
    convolutions: bool = setting(
        True, advanced=True, help="Train convolutions too.",
        page="Train convolutions too; they are an eighth of SDXL's LoRA and three fifths of SD1.5's.",
    )
    dropout: float = setting(0.0, 0, 0.9, step=0.01, advanced=True, help="Dropout before the LoRA.")

    def check(self) -> None:
        """See the base."""
        if not self.targets.strip():
            raise ValueError('targets is empty: give patterns of layer names, or "*" for all of them')

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return (self.alpha or self.rank) / self.rank


def require_peft() -> None:
    """ImportError, with the command that installs it, where PEFT is missing."""
    if find_spec("peft") is None:
        raise ImportError('training needs peft: python -m pip install "peft>=0.15"')


class RowsDiffer(RuntimeError):
    """A layer's input does not have one row for each sample of the batch."""


def _patterns(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class Adapters:
    """The adapters of one network; it is frozen, and stays so when they are off.

    linear: further classes that are linear layers in all but name (ComfyUI's quantised ones). mixes: whether one batch
    may be of several adapters (`rows`).
    """

    def __init__(self, network: nn.Module, linear: Sequence[type[nn.Module]] = ()):
        require_peft()
        self.network = network.requires_grad_(False)
        self.linear = tuple(linear)
        self.names: list[str] = []
        self.current: str | None = None
        self.mixes = True
        self._layers: dict[str, Any] = {}  # PEFT's layers, whose parts torch's types do not know
        self._scales: dict[str, float] = {}
        self._carriers: dict[str | None, list[Any]] = {}
        self._weights: dict[str | None, list[Tensor]] = {}

    def candidates(self, config: LoraConfig) -> list[str]:
        """Names of the layers that a configuration covers. ValueError names the pattern that covers none.

        Not convolutions in groups: PEFT wants a rank that their groups divide, and they have as many as channels
        (Stable Cascade, ACE-Step).
        """
        kinds = (nn.Linear, *self.linear, *(CONVOLUTIONS if config.convolutions else ()))
        layers = [
            self._plain(name)
            for name, module in self.network.named_modules()
            if isinstance(module, kinds) and ".lora_" not in name
            and not (isinstance(module, CONVOLUTIONS) and module.groups > 1)
        ]
        chosen: dict[str, None] = {}
        for pattern in _patterns(config.targets):
            found = [name for name in layers if fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(
                    f"targets: no layer's name fits {pattern!r}; the network's are such as {', '.join(layers[:3])}"
                )
            chosen |= dict.fromkeys(found)
        out = _patterns(config.exclude)
        kept = [name for name in chosen if not any(fnmatchcase(name, pattern) for pattern in out)]
        if not kept:
            raise ValueError(f"exclude {config.exclude!r} leaves no layer to train")
        return kept

    @staticmethod
    def _plain(name: str) -> str:
        return name.removesuffix(".base_layer")

    def add(self, name: str, config: LoraConfig, seed: int) -> None:
        """Inject an adapter, switched off; it changes nothing until it is trained. ValueError as `candidates`."""
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
        from peft.tuners.lora import Linear as PeftLinear
        from peft.tuners.tuners_utils import BaseTunerLayer

        if name in self.names:
            raise ValueError(f"adapter {name!r} is there already")
        targets = self.candidates(config)
        peft = PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,  # type: ignore[arg-type]  # a fraction is fine
            lora_dropout=config.dropout,
            target_modules="|".join(re.escape(target) for target in targets),
        )
        if self.linear:
            peft._register_custom_module({cls: PeftLinear for cls in self.linear})
        with warnings.catch_warnings():
            # PEFT warns that a second adapter joins the first: that is what is wanted.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(peft, self.network, adapter_name=name)
        self._layers = {n: m for n, m in self.network.named_modules() if isinstance(m, BaseTunerLayer)}
        for layer in self._layers.values():
            if name in layer.lora_A:
                use_input_precision(layer, name)
        self._initialise(name, seed)
        self.network.requires_grad_(False)
        self.names.append(name)
        self._scales[name] = config.scale
        self._carriers[name] = [layer for layer in self._layers.values() if name in layer.lora_A]
        self._weights[name] = list(self.parameters(name).values())
        # Injection leaves the new adapter on.
        for layer in self._layers.values():
            layer.enable_adapters(False)
        self.current = None
        with self.active(name):
            on = [layer for layer in self._layers.values() if not layer.disable_adapters]
            known = on == self._carriers[name] and all(layer.active_adapters == [name] for layer in on)
        if not (known and all(layer.disable_adapters for layer in self._layers.values())):
            raise RuntimeError("this version of peft switches adapters in a way of its own: install peft 0.21")

    def _initialise(self, name: str, seed: int) -> None:
        """PEFT's own start, but in fp32 on the CPU: on a half-precision base or a GPU it would be another."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self._layers.values():
            if name in layer.lora_A:
                down, up = layer.lora_A[name].float(), layer.lora_B[name].float()
                if down.weight.is_meta:  # a dry run has no numbers
                    continue
                start = torch.empty(down.weight.shape)
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                down.weight.data.copy_(start)
                nn.init.zeros_(up.weight)

    def switch(self, name: str | None) -> None:
        """Turn one adapter on and all others off; None leaves the base alone."""
        if name == self.current:
            return
        if name is not None and name not in self.names:
            raise KeyError(f"there is no adapter {name!r}; there are {', '.join(self.names) or 'none'}")
        # As PEFT's enable_adapters and set_adapter do; those look through every layer's weights each time, which took a
        # quarter of a small network's step. Past Module.__setattr__ for the same reason.
        for changed, on in ((self.current, False), (name, True)):
            for layer in self._carriers.get(changed, ()):
                vars(layer).update(_disable_adapters=not on, _active_adapter=[changed])
            for weight in self._weights.get(changed, ()):
                weight.requires_grad_(on)
        self.current = name

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """One adapter on (or none) inside the block."""
        before = self.current
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it each row of a batch has an adapter of its own, None for the base; only without gradients.

        PEFT's batches of mixed adapters, whose rows are those of every layer's input: RowsDiffer, from the network's
        forward, where a layer has others.
        """
        if torch.is_grad_enabled():
            # In a backward pass a checkpointed block would be computed again with one adapter for all rows.
            raise RuntimeError("adapters share a batch only without gradients")
        told = [NOBODY if name is None else name for name in names]

        def tell(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if not args or len(args[0]) != len(told):
                raise RowsDiffer(f"{type(layer).__name__} is not given one row for each of {len(told)} samples")
            return args, {**kwargs, "adapter_names": told}

        layers = {id(layer): layer for name in set(names) for layer in self._carriers.get(name, ())}.values()
        hooks = []
        with self.active(None):
            try:
                for layer in layers:
                    vars(layer)["_disable_adapters"] = False
                    hooks.append(layer.register_forward_pre_hook(tell, with_kwargs=True))
                yield
            finally:
                for layer in layers:
                    vars(layer)["_disable_adapters"] = True
                for hook in hooks:
                    hook.remove()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's weights by `layer.lora_A.weight` and `layer.lora_B.weight`."""
        found = {}
        for module, layer in self._layers.items():
            if name in layer.lora_A:
                found[f"{module}.lora_A.weight"] = layer.lora_A[name].weight
                found[f"{module}.lora_B.weight"] = layer.lora_B[name].weight
        return found

    def lora(self, name: str, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """An adapter as a LoRA whose alpha is its rank, so that no loader needs one: alpha / rank is in lora_B.

        weights: instead of the adapter's own, such as their running average.
        """
        given = self.parameters(name) if weights is None else weights
        scale = self._scales[name]
        return {
            key: (value.detach().float() * (scale if key.endswith("lora_B.weight") else 1.0)).cpu().contiguous()
            for key, value in given.items()
        }

    def load_lora(self, name: str, lora: dict[str, Tensor]) -> None:
        """Start an adapter from a LoRA of at most its rank (layers as `parameters` names them, alpha = rank).

        ValueError for layers that the adapter lacks, and for a higher rank or other widths.
        """
        mine = self.parameters(name)
        unknown = [key for key in lora if key not in mine]
        if unknown:
            raise ValueError(
                f"the LoRA has {len(unknown) // 2 or 1} layers that are not trained here, such as {unknown[0]}: "
                "widen targets, or use a LoRA for this model"
            )
        with torch.no_grad():
            for key, value in lora.items():
                weight, down = mine[key], key.endswith("lora_A.weight")
                rank, own = (value.shape[0], weight.shape[0]) if down else (value.shape[1], weight.shape[1])
                if rank > own:
                    raise ValueError(f"the LoRA has rank {rank} and the adapter {own}: set rank to at least {rank}")
                part = weight[:rank] if down else weight[:, :rank]
                if value.shape[:2] != part.shape[:2] or value.numel() != part.numel():
                    raise ValueError(
                        f"the LoRA's {key} is of shape {tuple(value.shape)} and takes {tuple(part.shape)} here: use a "
                        "LoRA for this model"
                    )
                if not down:
                    weight.zero_()
                    value = value / self._scales[name]
                part.copy_(value.view_as(part))
