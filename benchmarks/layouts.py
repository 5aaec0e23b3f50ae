"""Networks of ComfyUI's own classes with random weights, written as files of their own: at true size, and tiny.

A file is written piece by piece from one table of random numbers, so that twelve gigabytes take the disk's time and no
memory; `comfy.sd.load_diffusion_model` finds out what it holds, as it does with published files.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = 2**20 - 3  # numbers; not a multiple of any width, so that rows differ
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class Layout:
    """kind: a class of comfy.supported_models; config: its network. latent: (C, H, W) or with T; text: tokens, width.

    stored: type of the matrices in the file, and `loaded`: in memory (None: ComfyUI's choice).
    """

    kind: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    stored: torch.dtype = torch.float32
    loaded: torch.dtype | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What Load Diffusion Model passes on for its `weight_dtype`."""
        return {} if self.loaded is None else {"dtype": self.loaded}

    def conditioning(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """One random prompt: its tokens, and what goes with them."""
        extra = dict(self.extra)
        if self.pooled:
            extra["pooled_output"] = torch.randn(1, self.pooled, generator=generator)
        return torch.randn(1, *self.text, generator=generator), extra

    def latents(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Random latents (C, H, W)."""
        return [torch.randn(self.latent, generator=generator) for _ in range(count)]

    def shapes(self) -> dict[str, Tensor]:
        """Names and shapes of the network's weights, without memory. ComfyUI must be importable."""
        config = self._class()(dict(self.config))
        config.set_inference_dtype(torch.float32, None)
        with torch.device("meta"):
            return config.get_model({}, "", device="meta").diffusion_model.state_dict()

    def _class(self) -> Any:
        """ComfyUI's class, or for a network of other sizes a class below it that ComfyUI will know it by."""
        kinds: Any = importlib.import_module("comfy.supported_models")
        known = getattr(kinds, self.kind)
        own = {name: self.config[name] for name in known.unet_config}
        if own == known.unet_config:
            return known
        for each in kinds.models:
            if issubclass(each, known) and each.unet_config == own:
                return each
        # Of some networks ComfyUI reads only the width off the weights and knows the rest by heart.
        extra = {**known.unet_extra_config, **self.config}
        kinds.models.insert(0, type(self.kind, (known,), {"unet_config": own, "unet_extra_config": extra}))
        return kinds.models[0]

    def write(self, path: Path, seed: int = 0) -> int:
        """Write a file of random weights and return its bytes. OSError where the disk is full."""
        shapes = self.shapes()
        table = torch.randn(TABLE, generator=torch.Generator().manual_seed(seed))
        header, at = {}, 0
        kinds = {name: self.stored if value.ndim >= 2 else _plain(self.stored) for name, value in shapes.items()}
        for name, value in shapes.items():
            size = value.numel() * kinds[name].itemsize
            header[name] = {"dtype": TYPES[kinds[name]], "shape": list(value.shape), "data_offsets": [at, at + size]}
            at += size
        scaled: dict[tuple[int, torch.dtype], Tensor] = {}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, value in shapes.items():
                if value.ndim < 2:
                    one = float(name.endswith(("weight", "scale")))  # norms are 1, biases 0
                    _put(file, torch.full((value.numel(),), one, dtype=kinds[name]))
                    continue
                key = (value[0].numel(), kinds[name])
                if key not in scaled:
                    scaled[key] = (table * min(0.2, key[0] ** -0.5)).to(key[1])
                numbers, left = scaled[key], value.numel()
                while left:
                    _put(file, numbers[:left])
                    left -= min(left, TABLE)
        return path.stat().st_size

    def load(self, path: Path) -> Any:
        """The MODEL, as Load Diffusion Model makes it."""
        self._class()
        loader: Any = importlib.import_module("comfy.sd").load_diffusion_model
        with torch.inference_mode():
            return loader(str(path), model_options=self.options)


def _plain(stored: torch.dtype) -> torch.dtype:
    """What biases and norms have in files whose matrices are stored so."""
    return torch.bfloat16 if stored.itemsize == 1 else stored


def _put(file: Any, numbers: Tensor) -> None:
    raw: Any = numbers.contiguous().view(torch.uint8).numpy()
    file.write(memoryview(raw))


def _unet(**given: Any) -> dict[str, Any]:
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "use_checkpoint": False, "use_spatial_transformer": True,
        "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False, "adm_in_channels": None,
        **given,
    }  # fmt: skip


def _sdxl(channels: int, deep: int, deepest: int) -> dict[str, Any]:
    return _unet(
        model_channels=channels, num_classes="sequential", adm_in_channels=2816, num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4], transformer_depth=[0, 0, deep, deep, deepest, deepest],
        transformer_depth_middle=deepest, use_linear_in_transformer=True, context_dim=2048, num_head_channels=64,
        transformer_depth_output=[0, 0, 0, deep, deep, deep, deepest, deepest, deepest],
    )  # fmt: skip


def _flux(width: int, double: int, single: int, text: int, pooled: int) -> dict[str, Any]:
    return {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": pooled, "context_in_dim": text,
        "hidden_size": width, "mlp_ratio": 4.0, "num_heads": width // 128, "depth": double,
        "depth_single_blocks": single, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
        "guidance_embed": True, "txt_ids_dims": [], "yak_mlp": False, "txt_norm": False,
    }  # fmt: skip


def _zimage(width: int, heads: int, layers: int, text: int, refiners: int = 2) -> dict[str, Any]:
    return {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": width, "cap_feat_dim": text,
        "n_layers": layers, "n_refiner_layers": refiners, "qk_norm": True, "n_heads": heads, "n_kv_heads": heads,
        "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }  # fmt: skip


def _sd3(depth: int, text: int, pooled: int) -> dict[str, Any]:
    return {
        "input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": depth,
        "adm_in_channels": pooled, "num_patches": 256, "pos_embed_max_size": 16, "qk_norm": "rms",
        "pos_embed_scaling_factor": None,
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": text, "out_features": 64 * depth},
        },
    }  # fmt: skip


HALF, BF16, FP8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
SIZE = {"width": 1024, "height": 1024}
# As published, at 1024 x 1024 pixels: SDXL 2.6, Flux.1 dev 11.9 and Z-Image 6.2 thousand million weights.
TRUE = {
    "SDXL": Layout("SDXL", _sdxl(320, 2, 10), (4, 128, 128), (77, 2048), 1280, SIZE, HALF),
    "Flux fp8": Layout(
        "Flux", _flux(3072, 19, 38, 4096, 768), (16, 128, 128), (256, 4096), 768, {"guidance": 3.5}, FP8, FP8
    ),
    "Z-Image": Layout("ZImage", _zimage(3840, 30, 30, 2560), (16, 128, 128), (128, 2560), stored=BF16),
}
# The same classes, for a processor.
SMALL = {
    "SDXL": Layout("SDXL", _sdxl(32, 1, 1), (4, 8, 8), (77, 2048), 1280, SIZE, HALF),
    "Flux fp8": Layout("Flux", _flux(128, 2, 2, 64, 48), (16, 8, 8), (8, 64), 48, {"guidance": 3.5}, FP8, FP8),
    "Z-Image": Layout("ZImage", _zimage(256, 2, 2, 64), (16, 8, 8), (8, 64), stored=BF16),
}
# What core's own trainer is timed on.
TINY = {
    "SD3, depth 2": Layout("SD3", _sd3(2, 64, 32), (16, 8, 8), (8, 64), 32),
    "SD3, depth 4": Layout("SD3", _sd3(4, 64, 32), (16, 8, 8), (8, 64), 32),
    "Flux": Layout("Flux", _flux(128, 1, 2, 64, 32), (16, 8, 8), (8, 64), 32, {"guidance": 3.5}),
    "SD1.5": Layout(
        "SD15",
        _unet(
            model_channels=320, num_res_blocks=[1], channel_mult=[1], transformer_depth=[1], num_heads=8,
            transformer_depth_output=[1, 1], transformer_depth_middle=-2, use_linear_in_transformer=False,
            context_dim=768,
        ),
        (4, 8, 8), (77, 768),
    ),
}  # fmt: skip
