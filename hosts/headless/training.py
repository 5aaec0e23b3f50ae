"""A headless MODEL made trainable: a network of its own with the model's LoRAs in its weights."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...sampling.parts import WHOLE, Parts, first_of
from ...trainers.adapters import LoraConfig
from ...trainers.checkpointing import units
from ...trainers.dataset import Dataset
from ...trainers.export import weights_hash
from ...trainers.offload import forget_unused
from ...trainers.weightless import bare
from ..training import conditions
from ..training.conditions import Joined, shape_of
from ..training.denoiser import HostDenoiser
from ..training.lora_files import LoraNames
from . import residents, work
from .device import has_bf16
from .model import Conditioning, Model

Keywords = dict[str, Tensor]
DOWN = ".lora_A.weight"


class HeadlessDenoiser(HostDenoiser):
    """See `objectives.contract.TrainableDenoiser`. A condition is a dict of tensors (1, ...) on the CPU.

    compute: precision of the arithmetic; None leaves the network's own, unless that is fp16. made: the network, where
    it is not to be loaded.
    """

    def __init__(self, model: Model, compute: torch.dtype | None = None, made: Any = None):
        self._made = made or model.source.anew(model.loras)
        module: torch.nn.Module = self._made.module
        # An outline's weights have no numbers.
        self.base_hash = "" if bare(module) else weights_hash(module.state_dict())
        held = next(module.parameters()).dtype
        if compute is None and held == torch.float16:  # its gradients overflow
            compute = torch.bfloat16 if has_bf16() else torch.float32
        if compute not in (None, held) and (held != torch.float32 or bare(module)):
            # Once, and not in every call; fp32 weights are left to autocast, which keeps the norms precise.
            self._made.dtype = compute
            module.to(compute)
            compute = None
        if bare(module):  # autocast does not know the meta device
            compute = None
        super().__init__(module, model.path, model.schedule, model.prediction, self._made.device, compute)
        self.model = model
        self.architecture = self._made.architecture
        self.names = LoraNames.of_diffusers(module, self._made.kind, self._made.table)

    def call(self, x: Tensor, sigma: Tensor, cond: Joined) -> Tensor:
        """x0 (B, C, ...) of x at sigma (B,), as the guider computes it."""
        return conditions.run(self._x0, x.float(), sigma, cond)

    def _x0(self, x: Tensor, sigma: Tensor, **keywords: Tensor) -> Tensor:
        shown = self.parametrisation.shown(x, sigma)
        raw = self._made(shown, self.schedule.timestep(sigma).float(), **keywords)
        return self.parametrisation.x0(raw, x, sigma)

    @torch.no_grad()
    def encode(
        self, conditioning: Conditioning, shape: Sequence[int], input: str = "positive", parts: Parts = WHOLE
    ) -> Keywords:
        """What the network is told of one CONDITIONING for latents of a shape (1, C, H, W), on the CPU.

        ValueError, naming the node's `input`, for one that is more than one plain prompt, and for latents of several
        parts.
        """
        if parts.shapes:
            raise ValueError("the latents hold several tensors (video with sound), which are trained in ComfyUI alone")
        tokens, extra = conditions.single(conditioning, input)
        if "reference_latents" in extra:
            raise ValueError(f"{input} shows the model a reference: edit models are trained in ComfyUI alone")
        with torch.inference_mode(False):
            made = self._made.conditions(tokens, extra, torch.Size(shape))
            return {name: value.detach().cpu().clone() for name, value in made.items()}

    def join(self, conds: Sequence[Keywords]) -> Joined:
        """The conditions of a batch; prompts whose lengths do not fit one call stand in groups of their own."""

        def fits(a: Keywords, b: Keywords) -> bool:
            if a.keys() != b.keys():
                return False
            unequal = [name for name in a if a[name].shape != b[name].shape]
            return not unequal or (self._made.repeats_context and unequal == ["context"])

        return conditions.join(conds, fits, self._merged)

    def _merged(self, conds: Sequence[Keywords]) -> Keywords:
        out = {}
        for name in conds[0]:
            values = [cond[name] for cond in conds]
            if name == "context":
                length = math.lcm(*(value.shape[1] for value in values))
                values = [value.repeat(1, length // value.shape[1], 1) for value in values]
            out[name] = torch.cat(values).to(self.device)
        return out

    def latents_in(self, samples: Tensor, parts: Parts = WHOLE) -> Tensor:
        """Stored LATENT samples (B, C, H, W) in the network's scale, fp32 on the CPU; ValueError for other channels."""
        return work.latents_in(self.model, samples)

    def latents_out(self, x0: Tensor) -> Tensor:
        """Network latents as a LATENT stores them, fp32, with gradients where there are any."""
        return self.model.latent.process_out(x0.float())

    def preview(self, x0: Tensor) -> Tensor:
        """IMAGE (B, h, w, 3) of network latents where there is no VAE: three channels, stretched to 0..1."""
        pixels = x0.detach().float().cpu()[:, :3].movedim(1, -1)
        low, high = (f(pixels.flatten(1), 1)[0].view(-1, 1, 1, 1) for f in (torch.min, torch.max))
        return (pixels - low) / (high - low).clamp_min(1e-6)

    def release(self) -> None:
        """Let go of the network and its adapters; the denoiser cannot be used afterwards."""
        self.end_streaming()
        del self.network, self.adapters, self._made
        gc.collect()
        forget_unused(self.device)


@contextmanager
def training_session() -> Iterator[None]:
    """See `hosts.contract`."""
    with torch.inference_mode(False), torch.enable_grad(), residents.frugal():
        yield


def output_change(model: Model, path: Path, dataset: Dataset) -> float:
    """See `hosts.contract`. The card needs no room for the network, all of whose blocks are streamed there."""
    noise = torch.randn(1, *first_of(shape_of(dataset)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(False), torch.no_grad():
        denoiser = HeadlessDenoiser(model)
        try:
            lora = denoiser.from_file(load_file(path))
            ranks = {key.removesuffix(DOWN): len(down) for key, down in lora.items() if key.endswith(DOWN)}
            denoiser.adapters.add("file", LoraConfig(max(ranks.values()), targets=",".join(ranks)), seed=0)
            denoiser.adapters.load_lora("file", lora)
            denoiser.place(0 if denoiser.device.type == "cpu" else len(units(denoiser.network)))
            levels = denoiser.schedule.sigmas
            sigma = levels[len(levels) // 2].to(denoiser.device, torch.float32).view(1)
            cond = denoiser.join([denoiser.encode([list(dataset.entries[0])], noise.shape)])
            x = denoiser.path.unit_start(sigma, noise.to(denoiser.device))
            outputs = []
            for adapter in (None, "file"):
                with denoiser.adapter(adapter):
                    outputs.append(denoiser.predict_x0(x, sigma, cond))
            return float((outputs[1] - outputs[0]).abs().max())
        finally:
            denoiser.release()
