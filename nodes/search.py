"""Searches: spend more compute on one prompt and get the picture that scores best."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ..hosts.api import host, io, ui
from ..hosts.api import search as searches
from ..sampling.accounts import Budget
from ..sampling.particles import BestOfConfig, SteeringConfig, ValueConfig, check_kind
from ..sampling.settings import declared
from ..sampling.transition import Transition
from ..sampling.tree import DTS_STAR, TreeConfig
from ..trainers.objectives.flow_matching import FlowMatchingConfig
from .checks import Asked, CheckedNode, about, within
from .inputs import chosen, input_of, inputs_of, number, schema, seed_input

CATEGORY = "model/sampling/retort"
ALIASES = ["retort", "search", "tree", "dts", "best of n", "inference-time scaling", "alignment", "steering"]
SEARCH_TREE = io.Custom("SEARCH_TREE")
REWARD = io.Custom("REWARD")
AUTO = "auto"


def searched(sigmas: str, latent: str) -> list[Any]:
    """What is sampled, decoded and scored; sigmas, latent: their tooltips."""
    return [
        io.Guider.Input("guider", tooltip="Model, prompts and guidance, from CFGGuider or another."),
        io.Sigmas.Input("sigmas", tooltip=sigmas),
        io.Latent.Input("latent", tooltip=latent),
        io.Vae.Input("vae", tooltip="Decodes what the reward looks at."),
        REWARD.Input("reward", tooltip="What is sought, from Reward or Combine Rewards."),
        io.String.Input("prompt", default="", multiline=True, tooltip="What rewards compare the picture with."),
    ]


def _tree(usual: TreeConfig, first: str) -> list:
    """The settings of a tree; first: the one that stands before what both kinds of tree have."""
    shown = ("lam", first, "widening", "growth", "leaves", "half")
    changes: dict[str, Any] = {name: getattr(usual, name) for name in shown}
    changes |= {"lam": {"default": usual.lam, "max": 1e6}, "growth": {"default": usual.growth, "min": 0.01}}
    # UCT is the other method.
    changes["selection"] = {"options": ["uniform", "mixed", "boltzmann"]}
    by_name = {one.id: one for one in inputs_of(TreeConfig, **changes)}
    return [by_name[name] for name in shown]


# The inputs of each method.
METHODS = {
    "dts_star": lambda: _tree(DTS_STAR, "exploration"),
    "dts": lambda: _tree(TreeConfig(), "selection"),
    "best_of_n": lambda: [],
    "fk": lambda: inputs_of(SteeringConfig, particles={"max": 1024}),
    "svdd": lambda: [
        *inputs_of(ValueConfig),
        number(
            "temperature", 0.0, 0.0, 1e4, "0 takes the best of them, more chooses more freely.", step=0.05, round=1e-6
        ),
    ],
}


def _values(temperature: float, **given: Any) -> ValueConfig:
    return ValueConfig(lam=1 / temperature if temperature else math.inf, **given)


# What the search takes, of the values of those inputs.
CONFIGS: dict[str, Callable[..., Any]] = {
    "dts_star": partial(TreeConfig, selection="uct"),
    "dts": TreeConfig,
    "best_of_n": BestOfConfig,
    "fk": SteeringConfig,
    "svdd": _values,
}


def config_of(method: dict[str, Any]):
    """The settings of a method, as the search takes them."""
    given = dict(method)
    return CONFIGS[given.pop("method")](**given)


def budget_of(calls: int, seconds: float, enough: str) -> Budget:
    """The limits that are set. ValueError when there is none, or `enough` is no number."""
    try:
        goal = float(enough) if enough.strip() else None
    except ValueError as error:
        raise ValueError(f"enough {enough!r} is no number: type the reward to stop at, or leave it empty") from error
    return Budget(calls or None, seconds or None, goal)


def limits(calls: int = 400) -> list:
    """Inputs of a budget."""
    return [
        io.Int.Input(
            "calls",
            default=calls,
            min=0,
            max=100_000_000,
            tooltip="Network calls to spend on each latent, guidance counted twice; 0: no limit.",
        ),
        io.Float.Input(
            "seconds", default=0.0, min=0.0, max=1e7, step=1.0, tooltip="Time to spend on each latent; 0: no limit."
        ),
        io.String.Input(
            "enough",
            default="",
            advanced=True,
            tooltip="Stop at this reward; empty: go on while the budget lasts.",
        ),
        io.Int.Input(
            "batch_size", default=8, min=1, max=1024, tooltip="Latents at once: speed and memory, never the result."
        ),
    ]


def outputs() -> list:
    """What every search gives."""
    return [
        io.Latent.Output(id="best", display_name="best", tooltip="The latent with the highest reward."),
        io.Latent.Output(id="top", display_name="top", tooltip="The best few, best first."),
        SEARCH_TREE.Output(id="search", display_name="search", tooltip="For Resume Search, which goes on from here."),
        io.Image.Output(id="report", display_name="report", tooltip="Best reward against calls, and the best few."),
        io.String.Output(id="text", display_name="text", tooltip="What was found and what it cost."),
    ]


def output(found) -> io.NodeOutput:
    """What was found. The best picture is on the node already: a report beside it would show that one twice."""
    shown = ui.PreviewText(found.text).as_dict()
    return io.NodeOutput(found.best, found.top, found.saved, found.report, found.text, ui=shown)


def check_budget(given: Asked) -> None:
    """ValueError for limits that are none, where they are known."""
    if given.knows("calls", "seconds", "enough"):
        budget_of(given["calls"], given["seconds"], given["enough"])


class RetortTreeSearch(CheckedNode):
    """More compute, better pictures."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortTreeSearch",
            display_name="Tree Search",
            category=CATEGORY,
            description=(
                "Takes the place of a sampler: draws many pictures of one prompt, scores them with a reward and spends "
                "the next calls where that pays. Diffusion Tree Search and its baselines; cancelling gives the best so "
                "far."
            ),
            search_aliases=[*ALIASES, "better picture", "fk steering", "svdd", "reward"],
            is_output_node=True,
            inputs=[
                *searched(
                    "The whole schedule of one sample, down to 0.",
                    "Empty for its size, or a picture; each of a batch on its own.",
                ),
                io.DynamicCombo.Input(
                    "method",
                    options=[io.DynamicCombo.Option(name, inputs()) for name, inputs in METHODS.items()],
                    tooltip="dts_star finds the best; dts samples without bias; the others are baselines.",
                ),
                io.Combo.Input(
                    "transition",
                    options=[AUTO, "ancestral", "sde", "ode"],
                    default=AUTO,
                    advanced=True,
                    tooltip="auto is ancestral; sde is for flow models; ode draws no noise and branches at the start.",
                ),
                number(
                    "noise_level", 0.7, 0.01, 10.0, "sde only: how much fresh noise a step draws.", step=0.05,
                    round=1e-6, advanced=True,
                ),
                *limits(),
                io.Int.Input("keep", default=4, min=1, max=64, tooltip="How many of the best are given back."),
                seed_input("Draws all candidates. The first is this seed's plain sample; on a GPU with ode only."),
                io.Noise.Input("noise", optional=True, tooltip="Starts are drawn from it; its seed is then the seed."),
                io.Guider.Input(
                    "low_noise_guider",
                    optional=True,
                    tooltip=(
                        "The second of two networks (Wan 2.2's low-noise model), which makes the steps below the "
                        "boundary; `guider` is then the first one's."
                    ),
                ),
                input_of(
                    declared(FlowMatchingConfig)["boundary"],
                    {"tooltip": "Where the second network goes on: 0.875 for Wan 2.2 from text, 0.9 from a picture."},
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, seed=None, keep=None, calls=None, seconds=None, **given):
        """A search that was cancelled has given the best so far; queued again, it begins anew."""
        return searches.times_cancelled(host, seed, keep, calls, seconds)

    @classmethod
    def check(cls, given):
        """See the base."""
        check_budget(given)
        if not given.knows("method"):
            return
        with about(*within("method", given["method"])):
            config = config_of(given["method"])
        if given.knows("transition") and isinstance(config, SteeringConfig | ValueConfig):
            check_kind(given["transition"])

    @classmethod
    def execute(
        cls, guider, sigmas, latent, vae, reward, method=None, prompt="", transition=AUTO, noise_level=0.7, calls=400,
        seconds=0.0, enough="", batch_size=8, keep=4, seed=0, noise=None, low_noise_guider=None, boundary=0.875,
    ):  # fmt: skip
        step = Transition("ancestral" if transition == AUTO else transition, noise_level)
        config = config_of(chosen(cls, "method", method))
        edge = 0.0 if low_noise_guider is None else float(boundary)
        request = searches.SearchRequest(sigmas, latent, prompt, config, step, seed, noise, keep, edge)
        budget = budget_of(calls, seconds, enough)
        return output(searches.run(host, guider, vae, reward, request, budget, batch_size, second=low_noise_guider))


class RetortResumeSearch(CheckedNode):
    """Go on where a search stopped."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortResumeSearch",
            display_name="Resume Search",
            category=CATEGORY,
            description=(
                "Goes on with a search and more budget, as if it had never stopped: nothing that was drawn is drawn "
                "again. Needs the same guider; the reward must be the same for its scores to be compared."
            ),
            search_aliases=[*ALIASES, "continue"],
            is_output_node=True,
            inputs=[
                SEARCH_TREE.Input("search", tooltip="From Tree Search, or from this node; it stays as it is."),
                io.Guider.Input("guider", tooltip="The same as before."),
                io.Vae.Input("vae", tooltip="The same as before."),
                REWARD.Input("reward", tooltip="The same as before."),
                *limits(),
                io.Noise.Input("noise", optional=True, tooltip="The same as before, for a loaded search that had one."),
                io.Guider.Input(
                    "low_noise_guider", optional=True, tooltip="The same as before, for a search with two networks."
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        check_budget(given)

    @classmethod
    def execute(
        cls, search, guider, vae, reward, calls=400, seconds=0.0, enough="", batch_size=8, noise=None,
        low_noise_guider=None,
    ):  # fmt: skip
        earlier = search if noise is None else searches.with_noise(search, noise)
        budget = budget_of(calls, seconds, enough)
        found = searches.run(
            host, guider, vae, reward, earlier.request, budget, batch_size, earlier, low_noise_guider
        )  # fmt: skip
        return output(found)
