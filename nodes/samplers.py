"""Small samplers and a NOISE that plug into core's: later starts, heavy-tailed noise, structure, adaptive steps."""

from __future__ import annotations

from ..hosts.api import host, io, methods, noise
from ..sampling.dopri5 import Dopri5Config
from ..sampling.teleport import Teleport
from .checks import CheckedNode, check_range
from .gaussian import GAUSS_STATS
from .inputs import number, schema, seed_input

CATEGORY = "model/sampling/retort"
ALIASES = ["retort", "sampler", "custom sampler"]
STEPS = {"deterministic": "ode", "ancestral": "ancestral"}


def _sampler_output(tooltip: str):
    return io.Sampler.Output(tooltip=tooltip)


class RetortTeleportSampler(CheckedNode):
    """Another sampler, begun some steps later."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortTeleportSampler",
            display_name="Teleport Sampler",
            category=CATEGORY,
            description=(
                "Skips the first steps of any sampler: in heavy noise the data is one Gaussian, whose path to a later "
                "step is a formula. Where it cannot be used, the sampler runs as it is and the node says why."
            ),
            search_aliases=[*ALIASES, "teleport", "gaussian", "skip steps", "analytical"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="What samples from there on."),
                GAUSS_STATS.Input("statistics", tooltip="Of latents like those that are sampled, for this model."),
                number(
                    "skip_steps", 2, 0, 1000,
                    "Steps of the sigmas that are skipped; flow models allow more than SD1.5 and SDXL.",
                ),
                number(
                    "sigma_skip", 0.0, 0.0, 1e6,
                    "Above 0 in place of skip_steps: begin at the first of the sigmas that is not above this.",
                    step=0.01, round=False,
                ),
                io.Boolean.Input(
                    "infer_mean",
                    default=True,
                    tooltip=(
                        "Take the mean from one call of the model, so that it is the prompt's; it costs one step. Off: "
                        "the statistics' own mean, right when they are of this very prompt."
                    ),
                ),
            ],
            outputs=[_sampler_output("For SamplerCustomAdvanced, with sigmas from the model's highest level.")],
        )

    @classmethod
    def execute(cls, sampler, statistics, skip_steps=2, sigma_skip=0.0, infer_mean=True):
        plan = Teleport(statistics, skip_steps, sigma_skip, infer_mean)
        return io.NodeOutput(host.method_sampler(methods.Teleported(sampler, plan)))


class RetortStudentTNoise(CheckedNode):
    """The start noise of PFGM++."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortStudentTNoise",
            display_name="Student-t Noise (PFGM++)",
            category=CATEGORY,
            description=(
                "Start noise with heavier tails: RandomNoise's numbers, each sample with a random radius. For models "
                "that were trained with it (PFGM++, or Train Flow with aug_dim); for others a change of contrast."
            ),
            search_aliases=[*ALIASES, "noise", "pfgm", "pfgm++", "student-t", "heavy tail", "random noise"],
            is_experimental=True,
            inputs=[
                seed_input("Draws the noise, as RandomNoise's, and the radii."),
                number(
                    "aug_dim", 0.0, 0.0, 1e12,
                    "PFGM++'s D, what the model was trained with. 0 is infinity: RandomNoise to the bit.",
                    step=1.0, round=False,
                ),
            ],
            outputs=[io.Noise.Output(tooltip="For SamplerCustomAdvanced, in place of RandomNoise.")],
        )

    @classmethod
    def execute(cls, seed, aug_dim=0.0):
        return io.NodeOutput(noise.StudentTNoise(host.random_noise, seed, aug_dim))


class RetortStructureSampler(CheckedNode):
    """Sampling with the structure of a reference."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortStructureSampler",
            display_name="Structure Sampler (ILVR, ICSG)",
            category=CATEGORY,
            description=(
                "Samples a new picture with the coarse structure of a reference: after each step the coarse part is "
                "replaced by the reference's, noised alike. With iterations the model first redraws the reference in "
                "its own style."
            ),
            search_aliases=[*ALIASES, "ilvr", "icsg", "structure", "reference", "low pass", "layout"],
            inputs=[
                io.Latent.Input("reference", tooltip="Encoded by the model's VAE, at the size that is sampled."),
                number(
                    "factor", 4, 1, 1024,
                    "Side of a block in latent cells: more keeps less of the reference, 1 keeps all.",
                ),
                number(
                    "iterations", 0, 0, 16,
                    "0 is ILVR. More: the model redraws the reference so often, a call each in a guided step.",
                ),
                number("start_percent", 0.0, 0.0, 1.0, "From where on steps are guided; 0 is the first.", step=0.01),
                number(
                    "end_percent", 0.6, 0.0, 1.0,
                    "Up to where steps are guided; 1 holds the structure to the end.", step=0.01,
                ),
                io.Combo.Input(
                    "steps",
                    options=list(STEPS),
                    default="deterministic",
                    tooltip="deterministic: euler. ancestral: fresh noise in every step, as in the papers.",
                ),
            ],
            outputs=[_sampler_output("For SamplerCustomAdvanced.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        check_range(given)

    @classmethod
    def execute(cls, reference, factor=4, iterations=0, start_percent=0.0, end_percent=0.6, steps="deterministic"):
        method = methods.Structure(reference["samples"], factor, iterations, STEPS[steps], start_percent, end_percent)
        return io.NodeOutput(host.method_sampler(method))


class RetortDopri5Sampler(CheckedNode):
    """Adaptive steps to a tolerance."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortDopri5Sampler",
            display_name="Dopri5 Sampler",
            category=CATEGORY,
            description=(
                "Solves the model's ODE to a tolerance with adaptive Dormand-Prince steps and says how many calls that "
                "took. The sigmas give only where to begin and end: a yardstick for samplers of few steps."
            ),
            search_aliases=[*ALIASES, "dopri5", "rk45", "adaptive", "ode", "runge-kutta", "nfe"],
            inputs=[
                number(
                    "atol", 1e-3, 1e-10, 1.0,
                    "Error that a step may make, in the latent's own units. 1e-5 is the paper's.",
                    step=1e-5, round=False,
                ),
                number(
                    "rtol", 1e-3, 1e-10, 1.0,
                    "The same in proportion to the latent; the two are added.", step=1e-5, round=False,
                ),
                number(
                    "max_calls", 1000, 10, 1_000_000,
                    "Where the tolerance needs more calls of the model, the run ends with an error.",
                ),
            ],
            outputs=[_sampler_output("For SamplerCustomAdvanced; the calls are shown on that node and in the log.")],
        )

    @classmethod
    def execute(cls, atol=1e-3, rtol=1e-3, max_calls=1000):
        return io.NodeOutput(host.method_sampler(methods.Dopri5(Dopri5Config(atol, rtol, max_calls))))
