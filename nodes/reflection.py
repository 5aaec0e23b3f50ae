"""Weak-to-strong reflection: a sampler, a set-up that makes the pair, and a comparison that shows whether it helps."""

from __future__ import annotations

from typing import Any

from ..hosts.api import host, io, methods, reflection, ui
from ..sampling.reflection import ReflectionConfig
from .checks import Asked, CheckedNode
from .inputs import chosen, file_input, inputs_of, schema, seed_input

CATEGORY = "model/sampling/retort"
ALIASES = ["retort", "reflection", "w2sd", "weak to strong", "z-sampling", "zigzag", "autoguidance", "inversion"]


def _float(id: str, default: float, low: float, high: float, tooltip: str, step: float = 0.05, **more: Any) -> Any:
    return io.Float.Input(id, default=default, min=low, max=high, step=step, round=1e-4, tooltip=tooltip, **more)


def _config(end, begin, rounds, inversion, iterations, base) -> ReflectionConfig:
    return ReflectionConfig(begin, end, rounds, inversion, iterations, base)


def _check(given: Asked) -> None:
    names = ("end", "begin", "rounds", "inversion", "iterations", "base")
    if given.knows(*names):
        _config(*(given[name] for name in names))


class RetortReflectionSampler(CheckedNode):
    """Reflect any guider off any weaker one."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortReflectionSampler",
            display_name="Reflection Sampler",
            category=CATEGORY,
            description=(
                "Before each step goes down with the strong guider and back up with a weak one, which moves the latent "
                "to where the strong one is better. The pair may differ in anything: weights, a LoRA's strength, the "
                "prompt, cfg, a ControlNet. The strong guider is the one of SamplerCustomAdvanced."
            ),
            search_aliases=[*ALIASES, "sampler"],
            inputs=[
                io.Guider.Input("weak", tooltip="The weaker guider, of a model with the same latents."),
                *inputs_of(ReflectionConfig),
                io.Guider.Input(
                    "reflecting",
                    optional=True,
                    tooltip="Goes down in place of the strong guider; the paper takes the strong model at cfg 1.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced, beside the strong guider.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        _check(given)

    @classmethod
    def execute(
        cls, weak, end=1.0, begin=0.0, rounds=1, inversion="euler", iterations=3, base="euler", reflecting=None
    ):
        config = _config(end, begin, rounds, inversion, iterations, base)
        return io.NodeOutput(host.method_sampler(methods.Reflected(weak, config, reflecting)))


def _reflecting_cfg() -> Any:
    return _float(
        "reflecting_cfg", 1.0, 0.0, 100.0, "Cfg of both while reflecting; the paper's 1 needs one call.", 0.1,
        advanced=True,
    )  # fmt: skip


PAIRS = {
    "cfg": lambda: [_float("weak_cfg", 0.0, -100.0, 100.0, "Cfg of the weak one; 0 draws without the prompt.", 0.1)],
    "lora": lambda: [
        file_input("lora", host.lora_names(), "A file in models/loras; MODEL comes without it."),
        _float("strong_strength", 0.8, -100.0, 100.0, "Of the LoRA in the strong model."),
        _float("weak_strength", -1.5, -100.0, 100.0, "Of the LoRA in the weak model; below 0 is the opposite style."),
        _reflecting_cfg(),
    ],
    "prompt": lambda: [
        io.Conditioning.Input("weak_positive", tooltip="The plainer prompt; `positive` is the refined one."),
        _reflecting_cfg(),
    ],
    "model": lambda: [
        io.Model.Input("weak_model", tooltip="The weaker model, such as the base that MODEL was tuned from."),
        _reflecting_cfg(),
    ],
}


def _pair(model, positive, negative, cfg: float, pair: dict[str, Any]):
    """(strong, weak, reflecting or None) guiders of a kind of pair, as the paper sets them."""
    kind = pair["pair"]
    if kind == "cfg":
        return (
            host.cfg_guider(model, positive, negative, cfg),
            host.cfg_guider(model, positive, negative, pair["weak_cfg"]),
            None,
        )
    strong_model, weak_model, weak_positive = model, model, positive
    if kind == "lora":
        strong_model = host.with_lora(model, pair["lora"], pair["strong_strength"])
        weak_model = host.with_lora(model, pair["lora"], pair["weak_strength"])
    elif kind == "prompt":
        weak_positive = pair["weak_positive"]
    else:
        weak_model = pair["weak_model"]
    level = pair["reflecting_cfg"]
    weak = host.cfg_guider(weak_model, weak_positive, negative, level)
    down = None if level == cfg else host.cfg_guider(strong_model, positive, negative, level)
    return host.cfg_guider(strong_model, positive, negative, cfg), weak, down


class RetortReflectionSetup(CheckedNode):
    """Guider and sampler of a pair: the node to reach for first."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortReflectionSetup",
            display_name="Reflection Setup",
            category=CATEGORY,
            description=(
                "Makes the pair of a reflection, as the paper sets it, and says what it costs. cfg: guided against "
                "unguided, which is Z-Sampling. lora: a LoRA against its opposite. prompt: a refined prompt against a "
                "plain one. model: a tuned model against its base."
            ),
            search_aliases=[*ALIASES, "setup", "guider"],
            inputs=[
                io.Model.Input("model", tooltip="The strong model; for a LoRA pair, the model without the LoRA."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, or an empty one."),
                io.DynamicCombo.Input(
                    "pair",
                    options=[io.DynamicCombo.Option(name, inputs()) for name, inputs in PAIRS.items()],
                    tooltip="What the strong and the weak one differ in.",
                ),
                _float("cfg", 5.5, 0.0, 100.0, "Guidance of the steps themselves.", 0.1),
                *inputs_of(ReflectionConfig),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Only for the cost in the text: your schedule."),
            ],
            outputs=[
                io.Guider.Output(tooltip="The strong guider, for SamplerCustomAdvanced."),
                io.Sampler.Output(tooltip="The sampler that reflects it, for SamplerCustomAdvanced."),
                io.String.Output(id="text", display_name="text", tooltip="What it costs, in calls."),
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        _check(given)

    @classmethod
    def execute(
        cls, model, positive, negative, pair, cfg=5.5, end=1.0, begin=0.0, rounds=1, inversion="euler", iterations=3,
        base="euler", sigmas=None,
    ):  # fmt: skip
        strong, weak, reflecting = _pair(model, positive, negative, cfg, chosen(cls, "pair", pair))
        config = _config(end, begin, rounds, inversion, iterations, base)
        method = methods.Reflected(weak, config, reflecting)
        text = reflection.told(host, strong, method, sigmas)
        return io.NodeOutput(strong, host.method_sampler(method), text, ui=ui.PreviewText(text))


class RetortReflectionCompare(CheckedNode):
    """Does it help here?"""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortReflectionCompare",
            display_name="Reflection Compare",
            category=CATEGORY,
            description=(
                "The same noise side by side: plain, at the cfg that the reflection amounts to (for a cfg pair), plain "
                "with as many calls as the reflection takes, and reflected. Takes the place of the sampler."
            ),
            search_aliases=[*ALIASES, "compare", "grid", "side by side"],
            is_output_node=True,
            inputs=[
                io.Guider.Input("guider", tooltip="The strong guider."),
                io.Sampler.Input("sampler", tooltip="From Reflection Setup or Reflection Sampler."),
                io.Sigmas.Input("sigmas", tooltip="The schedule of the plain and of the reflected run."),
                io.Latent.Input("latent", tooltip="Empty for its size, or a picture; a row for each of a batch."),
                io.Vae.Input("vae", tooltip="Decodes what is shown."),
                seed_input("Draws the noise."),
            ],
            outputs=[
                io.Image.Output(id="image", display_name="image", tooltip="The four side by side, with their calls."),
                io.Latent.Output(id="latent", display_name="latent", tooltip="The reflected latents."),
                io.String.Output(id="text", display_name="text", tooltip="What is what, and its cost."),
            ],
        )

    @classmethod
    def execute(cls, guider, sampler, sigmas, latent, vae, seed=0):
        found = reflection.compare(host, guider, sampler, sigmas, latent, vae, seed)
        return io.NodeOutput(found.images, found.latent, found.text, ui=ui.PreviewImage(found.images, cls=cls))
