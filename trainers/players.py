"""A player while it trains: its weights, its optimiser, and both as tensors that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import optimisers, state
from .config import TrainingConfig
from .denoiser import Denoiser
from .objectives.parts.contract import Player

HOST = torch.device("cpu")
LEAST = 1024  # numbers; what is smaller stays on the device, counts of steps and the tables of 8-bit optimisers


@dataclass
class Runner:
    """weights: by name, of the adapter and of the player's own modules; optimiser: holds them in that order.

    in_host: between a player's turns (`turn`) its gradients and its optimiser's state lie in host memory, which changes
    no number.
    """

    name: str
    player: Player
    weights: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    in_host: bool = False
    _waiting: dict[str, Tensor] = field(default_factory=dict)  # gradients, while they are in host memory

    @contextmanager
    def turn(self, moves: bool = False) -> Iterator[None]:
        """Within it the gradients are where the weights are; moves: the optimiser's state too."""
        if not self.in_host:
            yield
            return
        for name, gradient in self._waiting.items():
            self.weights[name].grad = _there(gradient, self.weights[name].device)
        self._waiting.clear()
        if moves:
            self._state_to(None)
        try:
            yield
        finally:
            for name, weight in self.weights.items():
                if weight.grad is not None:
                    self._waiting[name], weight.grad = _there(weight.grad, HOST), None
            if moves:
                self._state_to(HOST)

    def _state_to(self, device: torch.device | None) -> None:
        """None: where the weights are."""
        for weight, entries in self.optimiser.state.items():
            for entry, value in entries.items():
                if isinstance(value, Tensor) and value.numel() >= LEAST:
                    entries[entry] = _there(value, device or weight.device)

    def forget_gradients(self) -> None:
        """Wherever they are."""
        self._waiting.clear()
        self.optimiser.zero_grad(set_to_none=True)

    @classmethod
    def of(
        cls, name: str, player: Player, denoiser: Denoiser, settings: TrainingConfig, in_host: bool = False
    ) -> Runner:
        """A player ready to move. ImportError when its optimiser is not installed."""
        weights: dict[str, Tensor] = dict(denoiser.adapters.parameters(player.adapter))
        if player.modules is not None:
            player.modules.to(denoiser.device)
            weights |= {f"modules.{k}": p for k, p in player.modules.named_parameters()}
        optimiser = optimisers.make(
            settings.optimiser,
            list(weights.values()),
            settings.learning_rate * player.rate,
            player.betas or (settings.beta1, settings.beta2),
            settings.weight_decay,
        )
        return cls(name, player, weights, optimiser, in_host)

    def move(self, rate: float, begins: Callable[[], None] = lambda: None) -> None:
        """One step at this rate, which uses the gradients up. begins: called once all is there that it needs."""
        with self.turn(moves=True):
            begins()
            optimisers.set_rate(self.optimiser, rate)
            self.optimiser.step()
            self.forget_gradients()

    def clip(self, most: float) -> Tensor:
        """The gradient's norm, 0-d, before it is clipped to `most` (0 = not at all)."""
        with self.turn():
            return torch.nn.utils.clip_grad_norm_(list(self.weights.values()), most or float("inf"))

    def gradient(self) -> list[Tensor]:
        """Copies of the weights' gradients as they stand, zeros where there is none."""
        return [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in self.weights.values()]

    def saved(self) -> dict[str, Mapping[str, Tensor]]:
        """Groups of tensors for `state.save`."""
        if self.in_host and (device := next(iter(self.weights.values())).device).type != "cpu":
            torch.accelerator.synchronize(device)  # copies to host memory may be under way
        optimiser = state.optimiser_tensors(self.optimiser, list(self.weights))
        return {f"weights {self.name}": self.weights, f"optimiser {self.name}": optimiser}

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `saved` gave. ValueError when it belongs to other weights."""
        state.restore(self.weights, groups.get(f"weights {self.name}", {}), f"{self.name}'s weights")
        state.restore_optimiser(self.optimiser, list(self.weights), groups.get(f"optimiser {self.name}", {}))
        if self.in_host:
            self._state_to(HOST)


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device. In host memory it is one that an accelerator reaches by itself, beside other work."""
    if hasattr(tensor, "__tensor_flatten__"):  # 8-bit state, which knows `to` alone
        return tensor.to(device)
    pin = device.type == "cpu" and tensor.device.type not in ("cpu", "meta")
    try:
        copy = torch.empty_like(tensor, device=device, pin_memory=pin)
    except RuntimeError:
        if not pin:
            raise
        copy = torch.empty_like(tensor, device=device)  # no more memory may be pinned, or on this device none
    return copy.copy_(tensor, non_blocking=True)
