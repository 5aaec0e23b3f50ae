"""The trainable denoiser of a host: what both hosts' have beside the engine's contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...models.layouts.lora_names import Note
from ...sampling.parts import WHOLE, Parts
from ...trainers.denoiser import Denoiser
from . import conditions
from .conditions import Joined
from .lora_files import LoraNames


class HostDenoiser(Denoiser):
    """See `trainers.denoiser.Denoiser`. A condition of one sample is on the CPU; those of a batch are `Joined`.

    names: of the network's layers in LoRA files. base_hash: of its weights, empty without any. architecture: as the
    metadata of LoRA files calls it.
    """

    names: LoraNames
    base_hash: str
    architecture: str

    def encode(self, conditioning: Any, shape: Sequence[int], input: str = "positive", parts: Parts = WHOLE) -> Any:
        """What the network is told of one CONDITIONING for latents of a shape (1, C, H, W) or with T, on the CPU.

        parts: of what latents (1, 1, N) are packed. ValueError, naming the node's `input`, for a conditioning that is
        more than one plain prompt, and for latents that the network does not take.
        """
        raise NotImplementedError

    def join(self, conds: Sequence[Any]) -> Joined:
        """The conditions of a batch; prompts whose lengths do not fit one call stand in groups of their own."""
        raise NotImplementedError

    def together(self, conds: Sequence[Joined]) -> Joined | None:
        """See the engine's."""
        whole = self.join([part for cond in conds for part in cond.parts])
        return whole if len(whole.groups) == 1 else None

    def chosen(self, cond: Joined, rows: Sequence[int]) -> Joined:
        """See the contract."""
        return self.join([cond.parts[row] for row in rows])

    def features(self, x: Tensor, sigma: Tensor, cond: Joined) -> list[Tensor]:
        """See the contract; ValueError where the batch's prompts differ in length and features with them."""
        found = [super(HostDenoiser, self).features(*each) for each in self._groups(x, sigma, cond)]
        return [conditions.in_order(layer, cond) for layer in zip(*found, strict=True)]

    def features_and_x0(self, x: Tensor, sigma: Tensor, cond: Joined) -> tuple[list[Tensor], Tensor]:
        """See the contract and `features`."""
        found = [super(HostDenoiser, self).features_and_x0(*each) for each in self._groups(x, sigma, cond)]
        features = [conditions.in_order(layer, cond) for layer in zip(*(each for each, _ in found), strict=True)]
        return features, conditions.in_order([x0 for _, x0 in found], cond)

    def _groups(self, x: Tensor, sigma: Tensor, cond: Joined) -> Iterator[tuple[Tensor, Tensor, Joined]]:
        """What each of a batch's calls of the network is given."""
        if len(cond.groups) == 1:
            yield x, sigma, cond
            return
        for rows, _ in cond.groups:
            yield x[list(rows)], sigma[list(rows)], self.chosen(cond, rows)

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one latent (C, H, W) or with T as the network takes it, from that of a stored one; here the same."""
        return tuple(shape)

    def latents_in(self, samples: Tensor, parts: Parts = WHOLE) -> Tensor:
        """Stored LATENT samples (B, C, ...), or packed, in the network's scale, fp32 on the CPU.

        ValueError for other channels.
        """
        raise NotImplementedError

    def to_file(self, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA of this network under names that ComfyUI's loader and diffusers read."""
        return self.names.to_file(lora)

    def from_file(self, state: dict[str, Tensor], note: Note | None = None) -> dict[str, Tensor]:
        """A LoRA file's tensors as this network names its layers; see `LoraNames.from_file`."""
        return self.names.from_file(state, note)

    def preview(self, x0: Tensor) -> Tensor:
        """IMAGE (B, h, w, 3) of network latents where there is no VAE."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of the network and its adapters; the denoiser cannot be used afterwards."""
        raise NotImplementedError
