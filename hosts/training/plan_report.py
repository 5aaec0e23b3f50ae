"""What a training would take on cards of several sizes, as text: for the node Training Plan and `retort plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...rewards.contract import Reward
from ...sampling.parts import Shape, first_of, several
from ...trainers.config import RunConfig
from ...trainers.dataset import Dataset
from ...trainers.memory import size, smaller
from ...trainers.methods import METHODS, read_config
from ...trainers.planning import CONTEXT, Forecast, on_cards
from ..contract import MODEL, VAE, Host
from ..rewards import kinds
from . import planning
from .assembly import through_decoder

CARDS = "8, 12, 16, 24"
MOST_CARDS = 16
SPEED, TERA = 50, 1e12  # TFLOP/s that a card is taken to reach, as recipes take it


def sizes(cards: str) -> list[int]:
    """Whole GB of cards from a text such as "8, 12". ValueError for anything else."""
    try:
        found = [int(part) for part in cards.split(",")]
    except ValueError:
        found = []
    if not found or len(found) > MOST_CARDS or not all(1 <= card <= 1024 for card in found):
        raise ValueError(f'cards must be sizes in GB with commas between, such as "{CARDS}", got {cards!r:.40}')
    return found


def settings(method: str, rank: int, batch_size: int, optimiser: str, more: Sequence[str] = ()) -> RunConfig:
    """A run with a method's own settings. more: further ones as "name=value". ValueError names what is wrong."""
    parts: dict[str, dict[str, Any]] = {
        "training": {"batch_size": batch_size, "gradient_checkpointing": True, "optimiser": optimiser},
        "lora": {"rank": rank},
        "objective": {},
    }
    known = read_config({"method": method}).to_json()
    for text in more:
        name, equals, value = (part.strip() for part in text.partition("="))
        place = next((part for part in parts if name in known[part]), None)
        if not equals or place is None:
            raise ValueError(f"{method} has no setting {name!r:.60}: give NAME=VALUE, by the name on its node")
        try:
            parts[place][name] = json.loads(value)
        except ValueError:  # a word
            parts[place][name] = value
    return read_config({"method": method, **parts})


def sample(method: str, entry: tuple[Tensor, dict[str, Any]], shape: Shape, downscale: int = 8) -> Dataset:
    """A data set of one picture of this latent size and one prompt, as the method takes it."""
    parts = tuple(torch.zeros(part) for part in several(shape) or [first_of(shape)])
    picture = [parts if len(parts) > 1 else parts[0]]
    needs = METHODS[method].objective.needs
    pairs: dict[str, Any] = {"losers": picture, "strengths": [1.0]} if "comparisons" in needs else {}
    pixels = [side * downscale for side in first_of(shape)[-2:]]
    pictures = [torch.zeros(*pixels, 3, dtype=torch.uint8)] if "pictures" in needs else None
    return Dataset([entry], ["a prompt"], entry, picture, pictures=pictures, **pairs)


def stand_ins(host: Host, config: RunConfig) -> tuple[VAE, tuple[Reward, ...]]:
    """(VAE, rewards) for methods that look at pictures without a gradient: real ones are placed and freed by the host,
    and take nothing of a plan. ValueError for a method whose gradient passes them, which decides its memory."""
    objective = METHODS[config.method].objective
    asked = bool(objective.reward_refusal(config.objective))
    if through_decoder(config, ()) or (asked and objective.rewards == "differentiable"):
        raise ValueError(
            f"{config.method} learns through a reward and a VAE, neither of which this command can be given: use the "
            "node Training Plan, to which they are connected, or choose another method"
        )
    vae = object() if asked or "pictures" in objective.needs else None
    return vae, (kinds.make(host, "jpeg", {}),) if asked else ()


def report(
    host: Host,
    model: MODEL,
    config: RunConfig,
    dataset: Dataset,
    cards: Sequence[int],
    vae: VAE = None,
    rewards: Sequence[Reward | None] = (),
) -> str:
    """A line for each card, what is free here first where there is an accelerator, and one on time; nothing is loaded.

    Arithmetic is bf16 but where the settings say fp32. ValueError for settings that cannot be, and for a network that
    cannot be counted.
    """
    compute = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    given = (host, model, config, dataset, vae, rewards, compute)
    try:
        plain = planning.counted(*given)
        free = host.free_memory()
        least = Forecast(plain, config.training, min(cards) * 2**30, context=CONTEXT).plan
        more = () if least.on_card and not least.streamed else planning.with_measures(*given)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"this network cannot be run without its numbers: {str(error)[:200]}") from error
    training = config.training
    lines = [
        f"{config.method}, rank {config.lora.rank}, batch {training.batch_size}, {training.optimiser}: base "
        f"{size(plain.base)}, {size(plain.beside)} beside it"
    ]
    if free is not None:
        host_free = planning.host_memory(plain.base)
        card = torch.accelerator.current_accelerator()
        here = Forecast(plain, training, free, host_free, more=more)
        plan = planning.with_pace(host, here, host.outline(model, compute).network, card, compute).settled.plan
        lines.append(f"here, {size(free)} free: {_line(plan)}")
    lines += [f"{card} GB: {_line(plan)}" for card, plan in on_cards(plain, training, cards, more)]
    each, steps = Forecast(plain, training).operations / TERA, training.steps
    lines.append(
        f"time: {each:.3g} TFLOP a step, so {steps} steps take about {_duration(each * steps / SPEED)} on a card that "
        f"reaches {SPEED} TFLOP/s, and half of it at {2 * SPEED}; longer where blocks are streamed or a reward "
        "looks at pictures. A run tells the time left by the steps that it has done"
    )
    if any("does not fit" in line for line in lines):
        lines.append(f"To make it smaller: {'; '.join(sum(smaller(training), []))}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _line(plan: Any) -> str:
    if plan.on_card and not plan.in_host:
        return f"does not fit into the {size(plan.host_free)} of host memory that are free ({plan})"
    return str(plan) if plan.fits else f"does not fit ({plan})"
