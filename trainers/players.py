"""A player while it trains: its weights, its optimiser, and both as tensors that can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import optimisers, state
from .config import TrainingConfig
from .denoiser import Denoiser
from .objectives.contract import Player


@dataclass
class Runner:
    """weights: by name, of the adapter and of the player's own modules; optimiser: holds them in that order."""

    name: str
    player: Player
    weights: dict[str, Tensor]
    optimiser: torch.optim.Optimizer

    @classmethod
    def of(cls, name: str, player: Player, denoiser: Denoiser, settings: TrainingConfig) -> Runner:
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
        return cls(name, player, weights, optimiser)

    def move(self, rate: float) -> None:
        """One step at this share of the learning rate."""
        optimisers.set_rate(self.optimiser, rate)
        self.optimiser.step()

    def clip(self, most: float) -> Tensor:
        """The gradient's norm, 0-d, before it is clipped to `most` (0 = not at all)."""
        return torch.nn.utils.clip_grad_norm_(list(self.weights.values()), most or float("inf"))

    def gradient(self) -> list[Tensor]:
        """Copies of the weights' gradients as they stand, zeros where there is none."""
        return [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in self.weights.values()]

    def saved(self) -> dict[str, Mapping[str, Tensor]]:
        """Groups of tensors for `state.save`."""
        optimiser = state.optimiser_tensors(self.optimiser, list(self.weights))
        return {f"weights {self.name}": self.weights, f"optimiser {self.name}": optimiser}

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `saved` gave. ValueError when it belongs to other weights."""
        state.restore(self.weights, groups.get(f"weights {self.name}", {}), f"{self.name}'s weights")
        state.restore_optimiser(self.optimiser, list(self.weights), groups.get(f"optimiser {self.name}", {}))
