"""What a run will need before it starts, and which setting to change when that is too much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import checkpointing
from .config import TrainingConfig
from .data import Data
from .decoder import Decoder
from .denoiser import Denoiser
from .objectives.preference import LOSER
from .optimisers import state_bytes
from .players import Runner


@dataclass(frozen=True)
class Estimate:
    """Bytes: what is there already, what the optimisers will add, and one micro-batch's activations."""

    weights: int
    training: int
    activations: int

    @property
    def more(self) -> int:
        """Bytes that will be taken beyond the weights."""
        return self.training + self.activations

    def __str__(self) -> str:
        parts = [f"weights {size(self.weights)}", f"adapters' training {size(self.training)}"]
        return ", ".join([*parts, f"activations {size(self.activations)}"])


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"


def weights(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, tied ones once."""
    return sum(_storages(network).values())


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or a quantised one's numbers and scales.

    Such a tensor has no storage of its own; it says by torch's protocol for subclasses what it is made of.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts(getattr(tensor, name))


def _storages(network: nn.Module) -> dict[int, int]:
    """Address and bytes of each storage that a network's parameters and buffers lie in, streamed ones apart."""
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if not tensor.is_meta]
    found = [part.untyped_storage() for tensor in tensors for part in parts(tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def training(players: Iterable[Iterable[Tensor]], config: TrainingConfig) -> int:
    """Bytes of gradients and of what the optimiser keeps."""
    weights = [weight for player in players for weight in player]
    return sum(4 * weight.numel() + state_bytes(config.optimiser, weight) for weight in weights)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Within it, `count` adds up what autograd keeps for backward, each storage once, apart from weights."""

    def __init__(self, network: nn.Module):
        self.count = 0
        self._seen = set(_storages(network))

        def pack(tensor: Tensor) -> Tensor:
            for part in parts(tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in self._seen:
                    self._seen.add(storage.data_ptr())
                    self.count += storage.nbytes()
            # Not the tensor itself: an operation that keeps its own output would then be held by what it keeps, a
            # cycle that Python's collector cannot see, and the graph and the weights would stay for ever.
            return tensor.detach()

        super().__init__(pack, lambda tensor: tensor)


class WidestBlock:
    """Within it each block runs with a graph of its own, which is let go after it; `count` is the widest one's bytes.

    That is what a checkpointed block makes again in backward. A pass under no_grad, which holds one block at a time.
    """

    def __init__(self, network: nn.Module, blocks: Iterable[tuple[str, nn.Module]] | None = None):
        self.count = 0
        self._network = network
        self._blocks = checkpointing.units(network) if blocks is None else blocks
        self._before: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> WidestBlock:
        for _, module in self._blocks:
            self._before.append((module, vars(module).get("forward")))
            module.forward = self._measured(module)
        return self

    def __exit__(self, *_: object) -> None:
        for module, forward in self._before:
            vars(module).pop("forward")
            if forward is not None:
                module.forward = forward

    def _measured(self, module: nn.Module) -> Any:
        wrapped = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            checkpointing.begin(wrapped)  # a streamed block's weights are none of its activations
            saved = SavedBytes(self._network)
            with torch.enable_grad():
                args, kwargs = tree_map(_differentiable, (args, kwargs))
                with saved:
                    out = type(module).forward(module, *args, **kwargs)
            self.count = max(self.count, saved.count)
            return tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, out)

        return forward


def _differentiable(value: Any) -> Any:
    """As a block is given it where gradients come from before the block, for it may change its inputs in place."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_().clone()
    return value


def decoding(decoder: Decoder, latents: Tensor) -> tuple[int, int]:
    """Bytes that a decoder keeps of these latents for backward, and those that its widest block makes again there."""
    saved, widest = SavedBytes(decoder.network), WidestBlock(decoder.network, decoder.blocks)
    with torch.enable_grad(), saved:
        decoder(latents.detach().requires_grad_())
    with torch.no_grad(), widest:
        decoder(latents)
    return saved.count, widest.count


def estimate(
    denoiser: Denoiser,
    data: Data,
    runners: Iterable[Runner],
    config: TrainingConfig,
    calls: int = 1,
    decoder: Decoder | None = None,
) -> Estimate:
    """Memory of a run; the activations are those of one sample's student pass times the batch, twice for pairs.

    calls: how many such passes keep their graphs at once. decoder: what gradients of pictures pass; a reward's own
    network is not counted. With checkpoints they are what the blocks are given, and what the widest of them makes again
    in backward.
    """
    batch = data.batch(denoiser, [0], [0], config.seed, 0, 0.0)
    sigma = torch.full((1,), denoiser.sigma_range[1], device=denoiser.device)
    x = denoiser.path.unit_start(sigma, batch.draws.normal("estimate", batch.shape))
    saved, widest = SavedBytes(denoiser.network), WidestBlock(denoiser.network)
    with denoiser.adapter("student"):
        with saved:
            x0 = denoiser.predict_x0(x, sigma, batch.cond)
        if config.gradient_checkpointing:
            with torch.no_grad(), widest:
                denoiser.predict_x0(x, sigma, batch.cond)
    trained = training([list(runner.weights.values()) for runner in runners], config)
    passes = calls * (2 if LOSER in data.columns else 1)
    # While the decoder's blocks are made again, those of the network wait, and the other way round.
    pictures = 0 if decoder is None else sum(decoding(decoder, denoiser.latents_out(x0.detach())))
    each = passes * saved.count + max(passes * widest.count, pictures)
    return Estimate(weights(denoiser.network), trained, each * config.batch_size)


def advice(config: TrainingConfig) -> str:
    """The settings that lower memory, the strongest first, as this run has them."""
    ways = []
    if not config.gradient_checkpointing:
        ways.append("turn gradient_checkpointing on")
    if config.batch_size > 1:
        ways.append(f"lower batch_size from {config.batch_size} and raise accumulation by as much")
    ways.append("make the latents smaller (a lower resolution)")
    if config.optimiser == "adamw":
        ways.append("choose optimiser adafactor or adamw8bit")
    ways.append("lower the rank, or train fewer layers (targets)")
    return "; ".join(ways)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ended; without CUDA torch has no class of its own for it."""
    signs = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


def too_much(estimate: Estimate, free: int, config: TrainingConfig) -> str | None:
    """What to tell the user when the estimate exceeds the free memory, else None."""
    if estimate.more <= free:
        return None
    return f"this run needs about {size(estimate.more)} more ({estimate}) and {size(free)} are free: {advice(config)}"
