"""A ComfyUI MODEL made trainable: a network of its own over the MODEL's weights, the user's patches in them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.ops
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import load_file
from torch import Tensor

from ...sampling.parts import WHOLE, Parts, first_of, several
from ...trainers.dataset import Dataset
from ...trainers.export import weights_hash
from ...trainers.weightless import bare
from ..training import conditions
from ..training.conditions import Joined, shape_of
from ..training.denoiser import HostDenoiser
from ..training.lora_files import LoraNames
from . import work
from .coordinates import path_of, prediction_of
from .eager import differentiable
from .exact import exact_layers
from .kinds import family_of, forget_earlier_calls, refuse_untrainable
from .own_network import linear_kinds, load_sparingly, own_network, set_precision
from .parts import gains, one_at_a_time, one_level_in_a_call, packed, refuse_alone, shapes_of

# The Stability metadata convention's names; others are called as ComfyUI calls them.
ARCHITECTURES = {
    "SD15": "stable-diffusion-v1", "SDXL": "stable-diffusion-xl-v1-base", "SD3": "stable-diffusion-3",
    "Flux": "flux-1-dev", "FluxSchnell": "flux-1-schnell",
}  # fmt: skip
Conds = dict[str, comfy.conds.CONDRegular]


class ComfyDenoiser(HostDenoiser):
    """See `objectives.contract.TrainableDenoiser`. A condition is the model's own conds of one sample, on the CPU.

    patcher: a ModelPatcher of its own (`own_network`).
    """

    def __init__(self, patcher):
        self._patcher, self._model = patcher, patcher.model
        exact_layers(self._model.diffusion_model)
        network, sampling = self._model.diffusion_model, self._model.model_sampling
        super().__init__(
            network,
            path_of(sampling),
            sampling,
            prediction_of(sampling),
            patcher.load_device,
            None,
            linear_kinds(network),
        )
        self.gains = gains(self._model)
        self.names = LoraNames.of_published(network, family_of(network))
        # An outline's weights have no numbers.
        self.base_hash = "" if bare(network) else weights_hash(network.state_dict())
        self.architecture = ARCHITECTURES.get(kind := type(self._model.model_config).__name__, kind.lower())
        # Patches of attention and blocks stay in force.
        self._options = {
            **patcher.model_options["transformer_options"],
            "cond_or_uncond": [0],
            "optimized_attention_override": fixed_attention,
        }

    def _precision(self) -> AbstractContextManager:
        # ComfyUI's layers cast for themselves; autocast on top would take the norms' output back to fp32.
        return nullcontext()

    def call(self, x: Tensor, sigma: Tensor, cond: Joined) -> Tensor:
        """x0 (B, C, ...) of x at sigma (B,), as ComfyUI computes it when it samples."""
        return conditions.run(self._x0, x.float(), sigma, cond)

    def _x0(self, x: Tensor, sigma: Tensor, **conds: Any) -> Tensor:
        forget_earlier_calls(self.network)
        return self._model.apply_model(x, sigma, transformer_options={**self._options, "sigmas": sigma}, **conds)

    @torch.no_grad()
    def encode(self, conditioning: Any, shape: Sequence[int], input: str = "positive", parts: Parts = WHOLE) -> Conds:
        """What the network is told of one CONDITIONING for latents of a shape (1, C, H, W) or with T, on the CPU.

        See the base.
        """
        refuse_alone(self._model, parts)
        tokens, extra = conditions.single(conditioning, input)
        with torch.inference_mode(False), packed(self._model, parts):
            empty = torch.zeros(*shape, device=self.device)
            entry = comfy.sampler_helpers.convert_cond([[_moved(tokens, None), _moved(extra, None)]])
            made = comfy.samplers.encode_model_conds(
                self._model.extra_conds, entry, empty, self.device, "positive",
                latent_image=empty, denoise_mask=None, seed=0,
                latent_shapes=shapes_of(parts) or [empty.shape],
            )[0]["model_conds"]  # fmt: skip
            if "reference_latents" in extra and not any(name.startswith("ref") for name in made):
                raise ValueError(
                    f"{input} shows the model a reference, of which this one takes no notice: load an edit model "
                    "(Qwen-Image-Edit, Flux Kontext), or disconnect `references`"
                )
            whole = {name: cond.process_cond(batch_size=1, area=None) for name, cond in made.items()}
            return {name: type(cond)(_moved(cond.cond, torch.device("cpu"))) for name, cond in whole.items()}

    def join(self, conds: Sequence[Conds]) -> Joined:
        """The conditions of a batch; prompts whose lengths do not fit one call stand in groups of their own."""

        def merged(group: Sequence[Conds]) -> dict[str, Any]:
            joined = {name: first.concat([cond[name] for cond in group[1:]]) for name, first in group[0].items()}
            return {name: _moved(value, self.device) for name, value in joined.items()}

        # The levels of a training's batch differ.
        parts = conds[0]["latent_shapes"].cond if "latent_shapes" in conds[0] else ()
        alone = one_at_a_time(self._model) or one_level_in_a_call(self._model, len(parts) > 1)
        fits = never if alone else comfy.samplers.cond_equal_size
        return conditions.join(conds, fits, merged)

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """See the base: formats of video have an axis of frames."""
        return work.whole(self._model.latent_format, shape)

    def latents_in(self, samples: Tensor, parts: Parts = WHOLE) -> Tensor:
        """See the base."""
        if not parts.shapes:
            return work.process_in(self._model, samples)
        with torch.inference_mode(False), packed(self._model, parts):
            return self._model.process_latent_in(samples.detach().clone().float().cpu())

    def latents_out(self, x0: Tensor) -> Tensor:
        """Network latents as a LATENT stores them, fp32, with gradients where there are any."""
        return self._model.process_latent_out(x0.float())

    def preview(self, x0: Tensor) -> Tensor:
        """IMAGE (B, h, w, 3) of network latents where there is no VAE: ComfyUI's rough colours of the latents."""
        x0, form = x0.detach().float().cpu(), self._model.latent_format
        if form.latent_rgb_factors_reshape is not None:
            x0 = form.latent_rgb_factors_reshape(x0)
        x0 = (x0[:, :, 0] if x0.ndim == 5 else x0).movedim(1, -1)
        if form.latent_rgb_factors is None:
            pixels = x0[..., :1].expand(*x0.shape[:-1], 3)
        else:
            pixels = x0 @ torch.tensor(form.latent_rgb_factors)
            if form.latent_rgb_factors_bias is not None:
                pixels = pixels + torch.tensor(form.latent_rgb_factors_bias)
        return ((pixels + 1) / 2).clamp(0, 1)

    def release(self) -> None:
        """Let go of the network and its adapters; the denoiser cannot be used afterwards."""
        self.end_streaming()
        self._model.current_patcher = None
        del self.network, self.adapters, self.schedule, self._model, self._patcher
        gc.collect()
        comfy.model_management.soft_empty_cache()


def never(*_: Any) -> bool:
    """Whether two conditions may share a call of a network that takes one latent, or one level, at a time."""
    return False


def fixed_attention(_, *args, **kwargs):
    """torch's attention, whatever ComfyUI uses: some of its kernels have no backward pass, and the sub-quadratic one
    splits its work by the memory that is free, so that two runs would differ.
    """
    return attention_pytorch(*args, **kwargs)


def _moved(value: Any, device: torch.device | None) -> Any:
    """Tensors inside lists, tuples and dicts as ordinary ones, on a device; everything else as it is."""
    if torch.is_tensor(value):
        value = value.detach()
        # What a node made belongs to inference mode, and no gradient could pass it.
        value = value.clone() if value.is_inference() else value
        return value if device is None else value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(part, device) for part in value)
    return value


def refuse_foreign_patches(model) -> None:
    """ValueError for patches on a MODEL that hold on to its own network, which a second copy could not obey."""
    held = [f"an object in place of {name}" for name in model.object_patches if name.startswith("diffusion_model")]
    held += [f"an injection ({name})" for name, found in model.injections.items() if found]
    options = model.model_options["transformer_options"].get("wrappers", {})
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        for wrappers in (model.wrappers, options):
            held += [
                f"a wrapper around the network ({name})" for name, found in wrappers.get(kind, {}).items() if found
            ]
    if "model_function_wrapper" in model.model_options:
        held.append("a function around the network (set_model_unet_function_wrapper)")
    if model.hook_patches or model.forced_hooks:
        held.append("hooks")
    if held:
        raise ValueError(
            f"model carries {held[0]}, which cannot be trained through (torch.compile, caches such as EasyCache, LoRAs "
            "in bypass mode): connect the MODEL from before the node that sets it; LoRAs of LoraLoader may stay"
        )


def trainable(model, compute: torch.dtype | None = None) -> ComfyDenoiser:
    """See `hosts.contract`."""
    refuse_foreign_patches(model)
    refuse_untrainable(model.model)
    with torch.inference_mode(False):
        patcher = own_network(model)
        patcher.pre_run()
        denoiser = ComfyDenoiser(patcher)
        set_precision(patcher.model, compute)
        device = patcher.load_device
        if device.type != "cpu":
            # Nothing else has to stay: prompts and images are encoded by now.
            comfy.model_management.free_memory(1e30, device)
        # Not through load_models_gpu: what it keeps account of, it unloads again when a VAE asks for room. The network
        # itself is brought where it is needed, whole or in part, when its adapters are there.
        for part in patcher.model.children():
            if part is not denoiser.network:
                part.to(device)
        return denoiser


@contextmanager
def training_session() -> Iterator[None]:
    """See `hosts.contract`."""
    management = comfy.model_management
    before = management.in_training, management.training_fp8_bwd
    # The second one, which core's trainer sets and leaves set, makes layers keep inputs where no checkpoint sees them.
    management.in_training, management.training_fp8_bwd = True, False
    try:
        with torch.inference_mode(False), torch.enable_grad(), differentiable():
            yield
    finally:
        management.in_training, management.training_fp8_bwd = before


def output_change(model, path: Path, dataset: Dataset) -> float:
    """See `hosts.contract`."""
    lora = load_file(path)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), known, log_missing=False)
    unread = set(lora) - {key for adapter in loaded.values() for key in adapter.loaded_keys}
    if unread:
        raise ValueError(
            f"ComfyUI reads all but {len(unread)} of the {len(lora)} tensors in {path}, not {min(unread)}: leave such "
            "layers out with `exclude`"
        )
    shape = shape_of(dataset)
    parts = Parts(several(shape))
    alone = work.whole(model.model.latent_format, first_of(shape))
    drawn = [torch.randn(1, *part, generator=torch.Generator().manual_seed(0)) for part in parts.shapes or [alone]]
    noise = parts.pack(drawn)
    outputs = []
    with torch.inference_mode(False), torch.no_grad():
        for one in (model, comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]):
            patcher = own_network(one, baked=False)
            load_sparingly(patcher)
            patcher.pre_run()
            denoiser = ComfyDenoiser(patcher)
            levels = denoiser.schedule.sigmas
            sigma = levels[len(levels) // 2].to(denoiser.device).view(1)
            cond = denoiser.join([denoiser.encode([list(dataset.entries[0])], noise.shape, parts=parts)])
            x = denoiser.path.unit_start(sigma, noise.to(denoiser.device))
            outputs.append(denoiser.predict_x0(x, sigma, cond).cpu())
            denoiser.release()
            del denoiser, patcher
    return float((outputs[1] - outputs[0]).abs().max())
