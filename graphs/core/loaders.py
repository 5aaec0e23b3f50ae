"""Core's loaders: checkpoints, single networks, VAEs and LoRAs, from safetensors files only."""

from __future__ import annotations

from ...files import weights as files
from ...files.errors import UsageError
from ...hosts.headless import folders, loaders
from ...hosts.headless.model import Clip, Lora, Model
from ..api import io
from ..file_inputs import ModelFile
from .declare import core_node


@core_node(
    display_name="Load Checkpoint",
    category="model/loaders",
    inputs=[ModelFile("ckpt_name", "checkpoints", tooltip="A file in models/checkpoints.")],
    outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
)
def CheckpointLoaderSimple(ckpt_name):
    """MODEL, CLIP and VAE of a checkpoint file."""
    return io.NodeOutput(*loaders.checkpoint(ckpt_name))


@core_node(
    category="model/loaders",
    inputs=[ModelFile("model_path", "diffusers", tooltip="A folder in models/diffusers.")],
    outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
    is_deprecated=True,
)
def DiffusersLoader(model_path):
    """MODEL, CLIP and VAE of a folder that diffusers saved."""
    return io.NodeOutput(*loaders.diffusers(model_path))


@core_node(
    display_name="Load Diffusion Model",
    category="model/loaders",
    inputs=[
        ModelFile("unet_name", "diffusion_models"),
        io.Combo.Input("weight_dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"], advanced=True),
    ],
    outputs=[io.Model.Output()],
)
def UNETLoader(unet_name, weight_dtype):
    """MODEL of a file that holds the network alone."""
    if weight_dtype != "default":
        raise UsageError(f"weight_dtype {weight_dtype!r} needs ComfyUI; choose default")
    return io.NodeOutput(loaders.diffusion_model(unet_name))


@core_node(
    display_name="Load VAE",
    category="model/loaders",
    inputs=[ModelFile("vae_name", "vae")],
    outputs=[io.Vae.Output()],
)
def VAELoader(vae_name):
    """VAE of a file of its own."""
    return io.NodeOutput(loaders.vae(vae_name))


def _strength(id: str):
    return io.Float.Input(id, default=1.0, min=-100.0, max=100.0, step=0.01)


def _lora(lora_name: str, strength: float) -> Lora:
    return Lora(lora_name, files.load(folders.current().model("loras", lora_name)), strength)


def _patched(model: Model, lora: Lora) -> Model:
    patched = model.with_lora(lora)
    # Loaded here, so that a LoRA that does not fit is this node's error and not the sampler's.
    return patched if patched.network is not None else model


@core_node(
    display_name="Load LoRA (Model and CLIP)",
    category="model/loaders",
    inputs=[
        io.Model.Input("model"),
        io.Clip.Input("clip"),
        ModelFile("lora_name", "loras"),
        _strength("strength_model"),
        _strength("strength_clip"),
    ],
    outputs=[io.Model.Output(), io.Clip.Output()],
)
def LoraLoader(model: Model, clip: Clip | None, lora_name, strength_model, strength_clip):
    """A LoRA on a model and its text encoder."""
    if clip is not None and strength_clip != 0:
        clip = clip.with_lora(_lora(lora_name, strength_clip))
    if strength_model != 0:
        model = _patched(model, _lora(lora_name, strength_model))
    return io.NodeOutput(model, clip)


@core_node(
    display_name="Load LoRA",
    category="model/loaders",
    inputs=[io.Model.Input("model"), ModelFile("lora_name", "loras"), _strength("strength_model")],
    outputs=[io.Model.Output()],
)
def LoraLoaderModelOnly(model: Model, lora_name, strength_model):
    """A LoRA on a model."""
    if strength_model == 0:
        return io.NodeOutput(model)
    return io.NodeOutput(_patched(model, _lora(lora_name, strength_model)))


@core_node(
    display_name="Load LoRA Model",
    category="model/loaders",
    inputs=[
        io.Model.Input("model"),
        io.LoraModel.Input("lora"),
        io.Float.Input("strength_model", default=1.0, min=-100.0, max=100.0),
        io.Boolean.Input("bypass", default=False, tooltip="Makes no difference here: no weights are changed."),
    ],
    outputs=[io.Model.Output(display_name="model")],
)
def LoraModelLoader(model: Model, lora, strength_model, bypass=False):
    """A LoRA that a trainer has just made, on a model."""
    if strength_model == 0:
        return io.NodeOutput(model)
    # No file has it, so it has no name that a job could be told.
    return io.NodeOutput(_patched(model, Lora("", lora, strength_model)))


NODES = [
    CheckpointLoaderSimple, DiffusersLoader, UNETLoader, VAELoader, LoraLoader, LoraLoaderModelOnly, LoraModelLoader,
]  # fmt: skip
