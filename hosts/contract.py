"""What nodes, and the code that both hosts share, may ask of whoever runs us: `Host`, in groups of methods.

`hosts/comfyui/host.py` and `hosts/headless/host.py` implement it. Nothing else may be asked of a host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ..rewards.contract import Holder
from ..sampling.levels import Prediction
from ..sampling.parts import Parts, Shape
from ..sampling.path import NoisePath
from ..sampling.schedule import Schedule
from ..trainers.dataset import Dataset, Entry
from ..trainers.decoder import Decoder
from ..trainers.dry_run import Outline
from ..trainers.sources import Base, Vae
from .methods import Method
from .training.denoiser import HostDenoiser

# What nodes hand to each other, by the names that it has in ComfyUI. Only the host that made one may look inside, and
# the classes of the two hosts have nothing in common: to everyone else these are opaque.
MODEL: TypeAlias = Any
CLIP: TypeAlias = Any
VAE: TypeAlias = Any
GUIDER: TypeAlias = Any
SAMPLER: TypeAlias = Any
NOISE: TypeAlias = Any
CONDITIONING: TypeAlias = Any
LATENT: TypeAlias = dict[str, Any]


class Progress(Protocol):
    """A bar on the running node."""

    def step(self, done: int, preview: Image | None = None, text: str = "") -> None:
        """`done` steps are finished; shows a picture and a line on the node where the host can."""
        ...


class Models(Protocol):
    """What a MODEL is, and models made of it."""

    def noise_path(self, model: MODEL) -> NoisePath:
        """The coordinates that the model samples in; ValueError names a sampling class that has none."""
        ...

    def schedule(self, model: MODEL) -> Schedule:
        """Its model_sampling object, the patched one where a patch replaces it."""
        ...

    def prediction(self, model: MODEL) -> Prediction:
        """What the network predicts."""
        ...

    def latent_format(self, model: MODEL) -> tuple[int, int]:
        """(channels, dimensions) of its latents: 2 dimensions for images, 3 for video."""
        ...

    def model_kind(self, model: MODEL) -> str:
        """Name of the class of ComfyUI's models that it is of, such as ZImage; empty where the host has none."""
        ...

    def with_shift(self, model: MODEL, shift: float, audio_shift: float | None = None) -> MODEL:
        """A clone of a flow model with this timestep shift; ValueError for a model that has none to set.

        audio_shift: the sound's own, for a model of video with sound; None leaves it.
        """
        ...

    def sound_shifts(self, model: MODEL) -> tuple[float, float] | None:
        """The timestep shift of a model of video with sound and the sound's own; None for one whose sound has none."""
        ...

    def with_noise_scale(self, model: MODEL, noise_scale: float) -> MODEL:
        """A clone of a flow model whose noise has this deviation; ValueError for a model that has none to set."""
        ...

    def with_x0_patch(self, model: MODEL, patch: Callable[[Tensor, Tensor], Tensor]) -> MODEL:
        """A clone whose guided x0 goes through `patch(x0, sigma (B,))` at every call."""
        ...

    def with_lora(
        self, model: MODEL, name: str, strength: float, bypass: bool = False, note: Callable[[str], None] | None = None
    ) -> MODEL:
        """A clone with a LoRA file of the host's list; ValueError where it does not fit.

        bypass: beside the layers instead of in their weights, where the host tells the two apart. note: is told of
        tensors that are left out, besides the log; None: the user is.
        """
        ...

    def with_weights(self, model: MODEL, lora: dict[str, Tensor], name: str, strength: float) -> MODEL:
        """The same with a LoRA's tensors; name: of the LoRA, for messages."""
        ...

    def embedded(self, variant: str) -> tuple[MODEL, CLIP, VAE]:
        """The small model that comes with Retort; ValueError for an unknown variant."""
        ...

    def picture_size(self, model: MODEL, latent: LATENT) -> tuple[int, int]:
        """(width, height) in pixels of what a LATENT becomes."""
        ...

    def latents_in(self, model: MODEL, samples: Tensor) -> Tensor:
        """LATENT samples (B, C, ...) in the model's own scale, fp32 on the CPU; ValueError for those of another."""
        ...


class Pictures(Protocol):
    """Texts and pictures to what models take, and back."""

    def encode_text(self, clip: CLIP, text: str) -> CONDITIONING:
        """A prompt as CLIP Text Encode encodes it."""
        ...

    def encode_images(self, vae: VAE, images: Tensor) -> LATENT:
        """IMAGE (B, H, W, C) as VAE Encode encodes it."""
        ...

    def decode(self, vae: VAE, samples: Any) -> Tensor:
        """IMAGE (B, H, W, 3) in [0, 1], fp32 on the CPU, of LATENT samples; a video's frames come in one row.

        Of several parts the first is decoded.
        """
        ...

    def differentiable_decoder(self, vae: VAE) -> Decoder:
        """Function from stored latents to images, with gradients."""
        ...

    def hold(self, network: nn.Module) -> Holder:
        """A reward's or captioner's network under the host's memory management."""
        ...


class Sampling(Protocol):
    """Samplers, guiders, and runs of them."""

    def method_sampler(self, method: Method) -> SAMPLER:
        """SAMPLER of a method, such as Distilled or Dopri5."""
        ...

    def block_sampler(self, frames: int) -> SAMPLER:
        """Core's SAMPLER of autoregressive video: so many frames of the latent to their end, then the next.

        ValueError where the host has none.
        """
        ...

    def method_of(self, sampler: SAMPLER) -> Method | None:
        """The method that a SAMPLER was made of; None for one that is not of ours."""
        ...

    def random_noise(self, seed: int) -> NOISE:
        """Core's RandomNoise."""
        ...

    def cfg_guider(
        self, model: MODEL, positive: CONDITIONING, negative: CONDITIONING | None, cfg: float, lowest: float = 0.0
    ) -> GUIDER:
        """GUIDER with classifier-free guidance; ValueError where cfg is not 1 and `negative` is None.

        lowest: the lowest level that its model is for. With sigmas that go on below, which is another model's part, it
        refuses every SAMPLER that does not hand on to another GUIDER (`Method.relays`).
        """
        ...

    def with_guidance(self, conditioning: CONDITIONING, guidance: float) -> CONDITIONING:
        """The same with the number that guidance-distilled networks are told, as Flux Guidance sets it, in each of its
        entries that has none."""
        ...

    def branches(self, guider: GUIDER, leg: bool = False) -> int:
        """Network calls for one latent. leg: beside another guider, where cfg 0 runs the negative branch alone."""
        ...

    def cfgs(self, guiders: Sequence[GUIDER]) -> tuple[float, ...] | None:
        """Their cfg where nothing else differs."""
        ...

    def at_cfg(self, guider: GUIDER, cfg: float) -> GUIDER:
        """The same guider at another cfg."""
        ...

    def sample(
        self, guider: GUIDER, sampler: SAMPLER, sigmas: Tensor, latent: LATENT, seed: int, noise: Any = None
    ) -> Any:
        """LATENT samples of one run, as SamplerCustomAdvanced makes them.

        noise: unit noise of the latents' shape; RandomNoise's of the seed where it is not given.
        """
        ...

    def latents_of(self, guider: GUIDER, latent: LATENT) -> Any:
        """A LATENT's samples (B, C, ...), an empty one with the channels of the guider's model.

        `sampling.parts.parts_of` takes apart those of several parts, such as video with sound; `nested` makes them.
        """
        ...

    def nested(self, parts: Sequence[Tensor]) -> Any:
        """LATENT samples of these parts (B, C, ...); a single one as it is. ValueError on a host without such."""
        ...

    def latents_out(self, guider: GUIDER, x0: Tensor, parts: Parts) -> Any:
        """LATENT samples of the model's own latents (B, C, ...), which may be packed."""
        ...


class Training(Protocol):
    """Networks that can be trained, what they would take in memory, and the memory there is."""

    def trainable(self, model: MODEL, compute: torch.dtype | None = None) -> HostDenoiser:
        """The model's network once more, its LoRAs in its weights. ValueError for patches that have no gradient.

        compute: precision of its arithmetic; None as the host samples, but bf16 or fp32 in place of fp16, in which
        gradients overflow.
        """
        ...

    def outline(self, model: MODEL, compute: torch.dtype | None = None) -> Outline:
        """The same without its weights, none of which is read: for counting what a run takes."""
        ...

    def outlined_decoder(self, vae: VAE) -> Decoder:
        """The VAE's decoder likewise."""
        ...

    def from_header(
        self, path: Path, width: int, height: int, frames: int = 1, tokens: int = 0
    ) -> tuple[MODEL, Entry, tuple[int, ...]]:
        """(MODEL without weights, a CONDITIONING entry, shape of its latents), from a file's header alone.

        width, height: in pixels. tokens: length of the prompt, 0 for the usual one. ValueError for a file that is not
        known.
        """
        ...

    def training_session(self) -> AbstractContextManager[None]:
        """Context in which gradients flow, under whatever mode the node runs."""
        ...

    def empty_latent_shape(self, model: MODEL, samples: Any) -> Shape:
        """Shape (C, ...) of the latents that an empty LATENT stands for, or of their parts."""
        ...

    def output_change(self, model: MODEL, path: Path, dataset: Dataset) -> float:
        """Largest change that a LoRA file makes to one output of the model."""
        ...

    def free_memory(self) -> int | None:
        """Bytes of the accelerator's memory that may be taken; None where there is none."""
        ...

    def make_room(self) -> None:
        """Gives back what the host itself holds of the accelerator's memory, for another process."""
        ...

    def pin(self, tensor: Tensor) -> bool:
        """Lets the device fetch from a tensor in host memory by itself; False where it cannot."""
        ...

    def unpin(self, tensor: Tensor) -> None:
        """Undoes `pin`."""
        ...

    def bf16(self) -> bool:
        """Whether networks had better compute in bf16 here; where a device only emulates it, they had not."""
        ...


class Files(Protocol):
    """Where files lie. Of several folders the first is where new files belong."""

    def statistics_folders(self) -> list[Path]:
        """Of Gaussian statistics."""
        ...

    def rewards_folders(self) -> list[Path]:
        """Of reward models."""
        ...

    def captioners_folders(self) -> list[Path]:
        """Of captioning models."""
        ...

    def presets_folders(self) -> list[Path]:
        """Of the user's presets of few-step students."""
        ...

    def input_folders(self) -> list[Path]:
        """Of pictures for input."""
        ...

    def loras_folder(self) -> Path:
        """Where LoRAs are written."""
        ...

    def runs_folder(self) -> Path:
        """Where training runs are written."""
        ...

    def search_records(self) -> Path | None:
        """Where a page finds what a search has found so far (`hosts.search.record`); None where there is no page."""
        ...

    def lora_names(self) -> list[str]:
        """The LoRA files that the host lists."""
        ...

    def read_lora(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of them; ValueError for a file that cannot be read."""
        ...

    def lora_metadata(self, name: str) -> dict[str, str]:
        """Its metadata; ValueError likewise."""
        ...

    def lora_stamp(self, name: str) -> tuple[int, int]:
        """When its file was written, in nanoseconds, and its size in bytes; ValueError for a file that is not there."""
        ...

    def add_model_folders(self) -> None:
        """Shows the embedded weights, and folders of ours below models, to the host's own loaders."""
        ...


class Jobs(Protocol):
    """What another process is told of a MODEL, and how it loads the same."""

    NAME: Literal["comfyui", "headless"]
    VERSION: str  # of the program whose classes its networks are; empty where that is not known

    def describe_base(self, model: MODEL) -> Base | None:
        """What loads the model again; None for what no file names."""
        ...

    def describe_vae(self, vae: VAE) -> Vae | None:
        """The same for a VAE."""
        ...

    def merge_base(self, model: MODEL, folder: Path, file: str) -> Base:
        """The model with its patches merged, in a file of a job's folder; ValueError where that cannot be."""
        ...

    def load_base(self, base: Base, folder: Path) -> MODEL:
        """The MODEL that a description means; folder: the job's."""
        ...

    def load_vae(self, vae: Vae) -> VAE:
        """The VAE that a description means."""
        ...

    def job_arguments(self) -> list[str]:
        """Command-line arguments by which `hosts/job.py` finds the same host and folders."""
        ...


class Users(Protocol):
    """Whoever waits for the running node."""

    CANCELLED: type[BaseException]  # by which a user stops what runs

    def progress(self, total: int) -> Progress:
        """A bar of so many steps."""
        ...

    def check_cancelled(self) -> None:
        """Raises CANCELLED when the user has cancelled."""
        ...

    def say(self, text: str, warn: bool = False) -> None:
        """Into the log, and on the running node where the host shows texts."""
        ...

    def prompted(self) -> dict[str, Any] | None:
        """While a prompt is checked, before it runs: what it gives the node that is looked at, by the inputs' names,
        those of a choice with a dot; a `prompted.Link` for what is connected. None at any other time."""
        ...

    def add_routes(self, sets: Callable[[], Path]) -> None:
        """Lets the host's page, where there is one, look at runs and searches and answer what waits beside `sets()`."""
        ...


class Host(Models, Pictures, Sampling, Training, Files, Jobs, Users, Protocol):
    """Whoever runs us."""
