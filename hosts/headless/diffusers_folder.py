"""SD1.5, SDXL, SD3 and Flux from a folder that a diffusers pipeline saved, with its own tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...files.errors import UsageError
from ...files.strangers import MOST_BYTES, parse
from ...sampling.schedule import DiscreteSchedule
from .. import model_folder
from . import text_encoders, tokenizers, vaes
from .device import device, dtype
from .families import FLUX, SD3, SD15, SDXL, Family, as_model, bare_module, coordinates, require_diffusers
from .model import Clip, Model, Vae

_PIPELINES = {
    "StableDiffusionPipeline": SD15,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
}


class Folder:
    """One pipeline folder. Raises UsageError when it is none, or of a pipeline that is not known."""

    def __init__(self, path: Path):
        self.path = path
        name = self.json("model_index.json").get("_class_name")
        if name not in _PIPELINES:
            raise UsageError(f"{path} holds a {name}; known are {', '.join(_PIPELINES)}")
        self.family: Family = _PIPELINES[name]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object in the folder."""
        try:
            with (self.path / name).open("rb") as file:
                return dict(parse(file.read(MOST_BYTES + 1)))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.path / name} cannot be read ({error}); download the model again") from error

    def component(self, name: str, cls: Any, **options: Any) -> Any:
        """A part of the pipeline, from safetensors files."""

        def read(**how: Any) -> Any:
            how |= options
            return cls.from_pretrained(self.path / name, local_files_only=True, use_safetensors=True, **how)

        try:
            model_folder.check(self.path / name)
            # Those of transformers let a config name what computes attention.
            return model_folder.with_attention(read) if name.startswith("text_encoder") else read()
        except Exception as error:  # whatever the libraries raise of a stranger's file
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UsageError(
                f"{self.path / name} cannot be read: {reason[0][:300]}; download the model again"
            ) from error

    def model(self) -> Model:
        """MODEL, whose network is read at its first use."""
        import diffusers

        family = self.family
        part = "unet" if family in (SD15, SDXL) else "transformer"
        network_class = getattr(diffusers, family.diffusers_class)
        config = self.json(f"{part}/config.json")
        schedule, way, prediction = coordinates(family, {}, config)
        settings = self.json("scheduler/scheduler_config.json")
        if settings.get("prediction_type") == "v_prediction":
            schedule, prediction = DiscreteSchedule(zsnr=bool(settings.get("rescale_betas_zero_snr"))), "v"
        precision = dtype(family.precision)
        return as_model(
            family,
            lambda: self.component(part, network_class, torch_dtype=precision),
            schedule,
            way,
            prediction,
            lambda: bare_module(family, {name: value for name, value in config.items() if not name.startswith("_")}),
        )

    def clip(self) -> Clip:
        """CLIP of the family's text encoders."""
        clip_l = self._clip("text_encoder", "tokenizer", ("lora_te_", "lora_te1_", "text_encoder."))
        if self.family is SD15:
            return text_encoders.sd15(clip_l)
        if self.family is FLUX:
            return text_encoders.flux(clip_l, self._t5("text_encoder_2", "tokenizer_2", 256))
        clip_g = self._clip("text_encoder_2", "tokenizer_2", ("lora_te2_", "text_encoder_2."), projected=True)
        if self.family is SDXL:
            return text_encoders.sdxl(clip_l, clip_g)
        last = self._t5("text_encoder_3", "tokenizer_3", 77) if (self.path / "text_encoder_3").is_dir() else None
        return text_encoders.sd3(clip_l, clip_g, last, self.json("transformer/config.json")["joint_attention_dim"])

    def vae(self) -> Vae:
        """VAE."""
        import diffusers

        return vaes.from_module(self.component("vae", diffusers.AutoencoderKL))

    def _clip(self, name: str, tokenizer: str, prefixes: tuple[str, ...], projected: bool = False):
        import transformers

        module = self.component(
            name, transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        )
        projection = module.text_projection.weight.to(device()) if projected else None
        inner = module.text_model if projected else module
        return text_encoders.Encoder(
            inner.to(device()).eval().requires_grad_(False),
            tokenizers.Chunks.clip(tokenizers.load(self.path / tokenizer, "clip"), pad_with_end=not projected),
            hidden="last" if self.family in (SD15, FLUX) else "penultimate",
            projected=projected,
            projection=projection,
            lora_prefixes=prefixes,
        )

    def _t5(self, name: str, tokenizer: str, least: int):
        import transformers

        module = self.component(name, transformers.T5EncoderModel, torch_dtype=dtype(torch.bfloat16))
        return text_encoders.Encoder(
            module.to(device()).eval().requires_grad_(False),
            tokenizers.Chunks.t5(tokenizers.load(self.path / tokenizer, "t5"), least),
            lora_prefixes=("lora_te3_",),
        )


def load_folder(path: Path) -> tuple[Model, Clip, Vae]:
    """MODEL, CLIP and VAE of a pipeline folder. UsageError names the fault."""
    require_diffusers()
    with torch.inference_mode(False):
        folder = Folder(path)
        return folder.model(), folder.clip(), folder.vae()
