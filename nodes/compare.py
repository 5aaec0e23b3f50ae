"""Did it help? Two models on the same prompts and seeds, judged by a reward, or blindly by you."""

from __future__ import annotations

from typing import Any

from ..files import texts
from ..hosts.api import compare, host, io, ui
from ..preferences import tickets
from .checks import CheckedNode, at
from .inputs import SEED_MAX, schema, seed_input
from .preference import ALIASES as PREFERENCE_ALIASES
from .preference import CATEGORY as PREFERENCE
from .preference import set_folder
from .rewards import ALIASES, CATEGORY, REWARD


def _models(decodes: str) -> list[Any]:
    """What is compared. decodes: the VAE's tooltip."""
    return [
        io.Model.Input("base", tooltip="The model as it was."),
        io.Model.Input("tuned", tooltip="The same with the LoRA, or another model of the same latents."),
        io.Clip.Input("clip", tooltip="Text encoder of the prompts, for both."),
        io.Vae.Input("vae", tooltip=decodes),
    ]


def _sampling(prompts: str) -> list[Any]:
    """How both are sampled, and on what. prompts: their tooltip."""
    return [
        io.Sampler.Input("sampler", tooltip="How both sample, from KSamplerSelect or another."),
        io.Sigmas.Input("sigmas", tooltip="The schedule of both, down to 0."),
        io.Latent.Input("latent", tooltip="An empty latent, for the size of the pictures."),
        io.String.Input("prompts", default="", multiline=True, tooltip=prompts),
        io.String.Input("negative", default="", multiline=True, tooltip="What guidance compares with."),
        io.Float.Input("cfg", default=4.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance; 1 is none."),
    ]


class RetortCompareModels(CheckedNode):
    """How often a tuned model beats its base."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortCompareModels",
            display_name="Compare Models",
            category=CATEGORY,
            description=(
                "Samples two models on the same prompts and seeds, scores both with a reward, and tells how often the "
                "second wins, with a confidence interval. Use prompts, and better a reward, that were not trained on."
            ),
            search_aliases=[*ALIASES, "compare", "win rate", "a/b test", "evaluate lora", "before after"],
            is_output_node=True,
            inputs=[
                *_models("Decodes what the reward looks at."),
                REWARD.Input("reward", tooltip="Who judges, from Reward or Combine Rewards."),
                *_sampling("One prompt in each line."),
                io.Int.Input(
                    "per_prompt", default=4, min=1, max=1024, tooltip="Pictures of each prompt, sampled together."
                ),
                seed_input("Of the first picture of each prompt; the next has the next seed."),
                io.Int.Input(
                    "shown", default=16, min=1, max=256, advanced=True, tooltip="Pairs on the sheet, the first ones."
                ),
            ],
            outputs=[
                io.Float.Output(
                    id="win_rate", display_name="win_rate", tooltip="Share of the decided pairs that tuned wins."
                ),
                io.Float.Output(id="low", display_name="low", tooltip="Lower end of its 95 % interval."),
                io.Float.Output(id="high", display_name="high", tooltip="Upper end of its 95 % interval."),
                io.Image.Output(id="sheet", display_name="sheet", tooltip="Pairs with their scores, base on the left."),
                io.String.Output(id="text", display_name="text", tooltip="The win rate in words, and every score."),
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("prompts"):
            compare.refuse_no_prompts(texts.prompts(given["prompts"]))

    @classmethod
    def execute(
        cls, base, tuned, clip, vae, reward, sampler, sigmas, latent, prompts="", negative="", cfg=4.0, per_prompt=4,
        seed=0, shown=16,
    ):  # fmt: skip
        seeds = [(seed + i) & SEED_MAX for i in range(per_prompt)]
        how = compare.Sampling(sampler, sigmas, cfg, latent)
        found = compare.run(host, (base, tuned), clip, vae, reward, texts.prompts(prompts), negative, how, seeds)
        low, high = found.comparison.interval()
        sheet, text = found.sheet(shown), found.text(reward.name)
        # ComfyUI shows the text that the progress leaves on the node, the command line this one.
        shows = {**ui.PreviewImage(sheet, cls=cls).as_dict(), "text": (text.splitlines()[0],)}
        return io.NodeOutput(found.comparison.share, low, high, sheet, text, ui=shows)


class RetortBlindTest(CheckedNode):
    """Which of two models do you like better, when you do not know which drew what?"""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortBlindTest",
            display_name="Blind Test (Yours against the Base)",
            category=PREFERENCE,
            description=(
                "Samples two models on the same prompts and seeds, and shows both pictures side by side without saying "
                "which is which. You choose on the node; after the last choice it says how often the tuned model won."
            ),
            search_aliases=[
                *PREFERENCE_ALIASES, "a/b test", "blind", "evaluate lora", "compare models", "win rate", "vote",
            ],
            is_output_node=True,
            inputs=[
                *_models("Decodes what you look at."),
                *_sampling("One prompt in each line, best others than those that were trained on."),
                io.Int.Input(
                    "per_prompt", default=2, min=1, max=64, tooltip="Pairs of each prompt, sampled together."
                ),
                seed_input("Of the first pair of each prompt; the next has the next seed."),
                io.String.Input(
                    "name", default="blind_test",
                    tooltip="The set in output/retort_preferences that keeps pictures and choices; made if new.",
                ),
            ],
            outputs=[
                io.Int.Output(id="waiting", display_name="waiting", tooltip="Pairs that wait for you."),
                io.String.Output(id="text", display_name="text", tooltip="How many wait and are judged."),
            ],
        )  # fmt: skip

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("prompts"):
            compare.refuse_no_prompts(texts.prompts(given["prompts"]))
        if given.knows("name"):
            with at("name"):
                set_folder(given["name"])

    @classmethod
    def execute(
        cls, base, tuned, clip, vae, sampler, sigmas, latent, prompts="", negative="", cfg=4.0, per_prompt=2, seed=0,
        name="blind_test",
    ):  # fmt: skip
        folder, seeds = set_folder(name), [(seed + i) & SEED_MAX for i in range(per_prompt)]
        how = compare.Sampling(sampler, sigmas, cfg, latent)
        by, made, alike = compare.asked(
            host, folder, (base, tuned), clip, vae, texts.prompts(prompts), negative, how, seeds
        )
        with tickets.at(folder, by) as state:
            waiting = len(state.waiting)
            text = f"{waiting} of {len(made)} pairs wait, {state.count(skipped=False)} are judged"
        if alike:
            text += f"; {alike} pairs were left out, since both models drew the same picture"
        shown = {"text": (text,), "set": (folder.name,), "by": (by,)}
        return io.NodeOutput(waiting, text, ui=shown)
