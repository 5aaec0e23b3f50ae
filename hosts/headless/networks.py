"""diffusers' networks behind `model.Network`: UNets of SD1.5 and SDXL, transformers of SD3 and Flux."""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...models.layouts.lora_names import for_network, merged
from ...models.layouts.renames import Layout
from .model import Lora
from .work import say


class _Adapters:
    """The LoRAs that were put on a module, and those that are switched on now."""

    def __init__(self, module, table: Layout):
        self.module, self.table = module, table
        self.names: dict[Lora, str] = {}
        self.active: tuple[Lora, ...] = ()

    def add(self, lora: Lora) -> None:
        """Load a LoRA beside the weights, switched off. UsageError when it does not fit or peft is missing."""
        if lora in self.names:
            return
        if find_spec("peft") is None:
            raise UsageError('LoRAs on this model need peft: pip install "retort[train]"')
        named = _named(lora, self.module, self.table)
        parameter = next(self.module.parameters())
        name = f"retort_{len(self.names)}"
        given = {key: value.to(parameter.device, parameter.dtype) for key, value in named.items()}
        self.module.load_lora_adapter(given, prefix=None, adapter_name=name)
        self.module.requires_grad_(False)
        self.names[lora] = name
        # Loading switches it on.
        self.switch_on(())

    def switch_on(self, loras: tuple[Lora, ...]) -> None:
        """Exactly these, at their strengths."""
        if loras:
            self.module.enable_lora()
            self.module.set_adapters([self.names[lora] for lora in loras], [lora.strength for lora in loras])
        else:
            self.module.disable_lora()
        self.active = loras


def _named(lora: Lora, module, table: Layout) -> dict[str, Tensor]:
    return for_network(lora.state, table, (name for name, _ in module.named_modules()), partial(say, warn=True))


Own = TypeVar("Own", bound="Diffusers")


class Diffusers:
    """What all of them share: device, precision, LoRAs."""

    kind: Literal["unet", "transformer"] = "transformer"
    architecture: str
    repeats_context = False

    def __init__(self, module: Any, table: Layout):
        self.module: Any = module.eval().requires_grad_(False)
        self.table = table
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._loras: tuple[Lora, ...] = ()
        self._adapters = _Adapters(module, table)

    def with_loras(self: Own, loras: tuple[Lora, ...]) -> Own:
        """The same weights with these LoRAs; both can be used in turn."""
        for lora in loras:
            self._adapters.add(lora)
        clone = copy.copy(self)
        clone._loras = loras
        return clone

    def merge(self: Own, loras: tuple[Lora, ...]) -> Own:
        """This network with LoRAs added to its weights for good."""
        weights = dict(self.module.named_parameters())
        for lora in loras:
            for name, weight in merged(weights, _named(lora, self.module, self.table), lora.strength):
                weights[name].data.copy_(weight)
        return self

    def __call__(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """See model.Network."""
        if self._adapters.active is not self._loras:
            self._adapters.switch_on(self._loras)
        given = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in conditions.items()}
        return self.forward(x.to(self.dtype), timestep, **given).float()

    def conditions(self, tokens: Tensor, extra: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
        """See model.Network."""
        raise NotImplementedError

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The network in its own precision."""
        raise NotImplementedError

    def _expect(self, name: str, given: int, wanted: int) -> None:
        if given != wanted:
            raise UsageError(
                f"this CONDITIONING has {name} of {given} numbers and the model takes {wanted}; use the CLIP that "
                "belongs to the model"
            )

    def _expect_channels(self, shape: torch.Size) -> None:
        channels = self.module.config["in_channels"]
        if shape[1] != channels:
            raise UsageError(f"the latent has {shape[1]} channels and the model takes {channels}")


def _pooled(extra: dict[str, Any]) -> Tensor:
    pooled = extra.get("pooled_output")
    if pooled is None:
        raise UsageError("this CONDITIONING has no pooled output; use the CLIP that belongs to the model")
    return pooled


class UNet(Diffusers):
    """SD1.5 and SDXL."""

    kind = "unet"
    repeats_context = True

    def __init__(self, module, table: Layout):
        super().__init__(module, table)
        self.is_xl = module.config["addition_embed_type"] == "text_time"
        self.architecture = "stable-diffusion-xl-v1-base" if self.is_xl else "stable-diffusion-v1"

    def conditions(self, tokens: Tensor, extra: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
        """Tokens; for SDXL also the pooled state and the picture's size, crop and target size in pixels."""
        self._expect_channels(shape)
        self._expect("tokens", tokens.shape[-1], self.module.config["cross_attention_dim"])
        if not self.is_xl:
            return {"context": tokens}
        pooled = _pooled(extra)
        sizes = 6 * self.module.config["addition_time_embed_dim"]
        wanted = self.module.config["projection_class_embeddings_input_dim"] - sizes
        self._expect("a pooled output", pooled.shape[-1], wanted)
        width, height = extra.get("width", shape[3] * 8), extra.get("height", shape[2] * 8)
        ids = [
            height, width, extra.get("crop_h", 0), extra.get("crop_w", 0), extra.get("target_height", height),
            extra.get("target_width", width),
        ]  # fmt: skip
        return {"context": tokens, "pooled": pooled, "sizes": torch.tensor([ids], dtype=torch.float32)}

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """x (B, 4, h, w) with sides a multiple of the UNet's own reduction."""
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]} if self.is_xl else None
        return self.module(x, timestep, conditions["context"], added_cond_kwargs=added, return_dict=False)[0]


class SD3(Diffusers):
    """SD3 and SD3.5."""

    architecture = "stable-diffusion-3"

    def conditions(self, tokens: Tensor, extra: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
        """Tokens and the pooled state."""
        self._expect_channels(shape)
        _check_patches(shape, self.module.config["patch_size"])
        pooled = _pooled(extra)
        self._expect("tokens", tokens.shape[-1], self.module.config["joint_attention_dim"])
        self._expect("a pooled output", pooled.shape[-1], self.module.config["pooled_projection_dim"])
        return {"context": tokens, "pooled": pooled}

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """x (B, 16, h, w), timestep in 0..1000."""
        return self.module(x, conditions["context"], conditions["pooled"], timestep, return_dict=False)[0]


class Flux(Diffusers):
    """Flux dev and schnell."""

    def __init__(self, module, table: Layout):
        super().__init__(module, table)
        self.architecture = "flux-1-dev" if module.config["guidance_embeds"] else "flux-1-schnell"
        self._places: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def conditions(self, tokens: Tensor, extra: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
        """Tokens, the pooled state and, for dev, the guidance that the network is told."""
        channels = self.module.config["in_channels"] // 4
        if shape[1] != channels:
            raise UsageError(f"the latent has {shape[1]} channels and the model takes {channels}")
        _check_patches(shape, 2)
        pooled = _pooled(extra)
        self._expect("tokens", tokens.shape[-1], self.module.config["joint_attention_dim"])
        self._expect("a pooled output", pooled.shape[-1], self.module.config["pooled_projection_dim"])
        made = {"context": tokens, "pooled": pooled}
        if self.module.config["guidance_embeds"]:
            made["guidance"] = torch.tensor([float(extra.get("guidance", 3.5))])
        return made

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """x (B, 16, h, w), timestep in 0..1; the network sees 2 x 2 patches in a row with their places."""
        b, c, h, w = x.shape
        context = conditions["context"]
        patches = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)
        text_places, image_places = self._places_of(context.shape[1], h // 2, w // 2)
        out = self.module(
            hidden_states=patches,
            encoder_hidden_states=context,
            pooled_projections=conditions["pooled"],
            timestep=timestep,
            guidance=conditions.get("guidance"),
            txt_ids=text_places,
            img_ids=image_places,
            return_dict=False,
        )[0]
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)

    def _places_of(self, tokens: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        key = (tokens, rows, columns)
        if key not in self._places:
            image = torch.zeros(rows, columns, 3)
            image[..., 1] = torch.arange(rows)[:, None]
            image[..., 2] = torch.arange(columns)[None]
            places = torch.zeros(tokens, 3), image.view(-1, 3)
            self._places = {key: (places[0].to(self.device), places[1].to(self.device))}
        return self._places[key]


def _check_patches(shape: torch.Size, patch: int) -> None:
    if shape[2] % patch or shape[3] % patch:
        raise UsageError(
            f"a picture of {shape[3] * 8} x {shape[2] * 8} pixels does not divide into this model's patches; "
            f"use sides that are multiples of {8 * patch}"
        )
