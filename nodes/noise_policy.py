"""Noise policies: learn which noise makes good pictures of one prompt, and give it to any sampler."""

from __future__ import annotations

from ..hosts.api import host, io
from ..hosts.api import search as searches
from ..sampling.find import FindConfig
from ..sampling.transition import Transition
from .checks import CheckedNode
from .inputs import inputs_of, schema, seed_input
from .search import ALIASES, CATEGORY, SEARCH_TREE, budget_of, check_budget, limits, output, outputs, searched


def _noise() -> io.Noise.Output:
    return io.Noise.Output(id="noise", display_name="noise", tooltip="In place of Random Noise, for any sampler.")


class RetortNoisePolicy(CheckedNode):
    """FIND: the initial noise as what is learnt."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortNoisePolicy",
            display_name="Learn Noise for a Prompt (FIND)",
            category=CATEGORY,
            description=(
                "Learns, for one prompt, the Gaussian that its initial noise is drawn from, so that samples score "
                "higher (FIND). The model stays as it is; the NOISE goes to any sampler, and Save Search keeps it."
            ),
            search_aliases=[*ALIASES, "find", "noise", "initial noise", "golden noise", "policy"],
            is_output_node=True,
            inputs=[
                *searched(
                    "The whole schedule of one sample, down to 0; few steps do.",
                    "Empty, of the size to sample at; each of a batch on its own.",
                ),
                *inputs_of(FindConfig, rate={"min": 0.0001}),
                *limits(4000),
                io.Int.Input("keep", default=4, min=1, max=64, tooltip="How many of the best pictures are given back."),
                seed_input("Draws all pictures, and what `noise` gives first."),
            ],
            outputs=[_noise(), *outputs()],
        )

    @classmethod
    def fingerprint_inputs(cls, seed=None, keep=None, calls=None, seconds=None, **given):
        """A search that was cancelled has given the best so far; queued again, it begins anew."""
        return searches.times_cancelled(host, seed, keep, calls, seconds)

    @classmethod
    def check(cls, given):
        """See the base."""
        check_budget(given)

    @classmethod
    def execute(
        cls, guider, sigmas, latent, vae, reward, prompt="", samples=8, rate=0.05, pull=0.01, divergence="reverse_kl",
        epochs=1, calls=4000, seconds=0.0, enough="", batch_size=8, keep=4, seed=0,
    ):  # fmt: skip
        config = FindConfig(samples=samples, rate=rate, pull=pull, divergence=divergence, epochs=epochs)
        # Without fresh noise on the way the reward is a function of the start, which is all that a policy can choose.
        request = searches.SearchRequest(sigmas, latent, prompt, config, Transition("ode"), seed, keep=keep)
        found = searches.run(host, guider, vae, reward, request, budget_of(calls, seconds, enough), batch_size)
        shown = output(found)
        return io.NodeOutput(searches.policy_noise(host, found.saved, seed), *shown.args, ui=shown.ui)


class RetortPolicyNoise(CheckedNode):
    """Draws of a policy by seed."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortPolicyNoise",
            display_name="Learned Noise",
            category=CATEGORY,
            description="Another seed's noise from a policy that was learnt, resumed or loaded.",
            search_aliases=[*ALIASES, "find", "noise", "seed"],
            inputs=[
                SEARCH_TREE.Input("search", tooltip="From Learn Noise for a Prompt, Resume Search or Load Search."),
                seed_input("Draws the noise."),
            ],
            outputs=[_noise()],
        )

    @classmethod
    def execute(cls, search, seed=0):
        return io.NodeOutput(searches.policy_noise(host, search, seed))
