"""Sampling with few-step students: grid, sampler, and one node that sets both up together with model and guider."""

from __future__ import annotations

from ..hosts.api import host, io, methods, recognise, students
from ..sampling import presets
from ..sampling.distilled import Mode, Rule
from ..sampling.presets import Preset
from .checks import Asked, CheckedNode
from .inputs import number, schema

CATEGORY = "model/sampling/retort"
ALIASES = [
    "retort", "distil", "few step", "one step", "turbo", "lightning", "dmd", "dmd2", "tdm", "lcm", "diff-instruct",
    "instarevive", "sdxl lightning", "sdxl turbo", "sd turbo", "lcm lora",
]  # fmt: skip
FROM_PRESET = "from preset"
MODES: dict[str, Mode] = {"re-noise": "renoise", "deterministic": "deterministic", "single call": "single"}
STARTS = {"unit noise": "unit", "noised latent": "noised", "clean latent": "latent"}


def _preset_input(tooltip: str, *first: str):
    options = [*first, *students.known(host.presets_folders())]
    return io.Combo.Input("preset", options=options, default="dmd2_sdxl_4step", tooltip=tooltip)


def _grid_inputs():
    return [
        number(
            "steps", 0, 0, 64,
            "Calls of the network. 0 takes the preset's own number; any other must be one it was made for.",
        ),
        io.String.Input(
            "timesteps",
            default="",
            tooltip="Only for the preset 'custom': timesteps from high to low, such as 999, 749, 499, 249.",
        ),
        number(
            "denoise", 1.0, 0.0, 1.0,
            "Below 1, image to image: the run begins at the student's own level that is nearest to where a full "
            "schedule would begin with this denoise: no level is new to the student. A grid of one step stays whole. "
            "The node says which levels are left.",
            step=0.01,
        ),
    ]


def _latent_input():
    return io.Latent.Input(
        "latent",
        optional=True,
        tooltip=(
            "The latent that will be sampled, for its size: the levels of some students (FLUX.2 klein, Hyper-FLUX) "
            "follow it. Without one 1024 x 1024 is assumed."
        ),
    )


def _fitting(model, key: str | Preset, timesteps: str) -> Preset:
    """The preset, checked against the model."""
    path = host.noise_path(model)
    if key == "custom":
        preset = presets.custom(timesteps, highest=1000 if path.kind == "FLOW" else 999)
    else:
        preset = students.named(key, host.presets_folders())
    presets.check(preset, path.kind, host.prediction(model), *host.latent_format(model))
    return preset


def _check(given: Asked) -> None:
    """What of a grid can be known without a model."""
    if not given.knows("preset"):
        return
    if given["preset"] == students.AUTO:
        _check_auto(given)
        return
    if given["preset"] != "custom":
        preset = students.named(given["preset"], host.presets_folders())
    elif given.knows("timesteps"):
        # As far as any model goes; whether this one is a flow is not known yet.
        preset = presets.custom(given["timesteps"], highest=1000)
    else:
        return
    if given.knows("steps"):
        presets.count(preset, given["steps"] or None)


def _grid(model, preset: Preset, steps: int, denoise: float, latent=None):
    """The preset's levels, or the end of them; tells which."""
    schedule, path = host.schedule(model), host.noise_path(model)
    size = None if latent is None else host.picture_size(model, latent)
    sigmas = presets.sigmas(preset, steps or None, schedule, path, size)
    if denoise <= 0:
        # An empty grid is how ComfyUI says that nothing is to be sampled.
        return sigmas[:0]
    if denoise < 1:
        sigmas = presets.cut(preset, sigmas, denoise, schedule, path, size)
    names = "levels" if path.kind == "FLOW" else "timesteps"
    text = f"{preset.title}: {len(sigmas) - 1} calls at {names} {presets.told(sigmas, schedule, path)}"
    if preset.sized:
        width, height = size or presets.SIZE
        text += f", for {width} x {height} pixels" + ("" if size else ", since no latent is connected")
    host.say(text)
    return sigmas


def _check_auto(given: Asked) -> None:
    """What of the preset "auto" can be known without a model: a name or a recipe there must be."""
    names = recognise.files_of(given.links.get("model"))
    every = students.known(host.presets_folders()).values()
    loras = set(host.lora_names()).intersection(names)
    if not recognise.by_name(every, names) and not any(recognise.has_recipe(host, name) for name in loras):
        raise presets.PresetMismatch(recognise.none_found(every, names))


class RetortDistilledSigmas(CheckedNode):
    """The levels that a few-step student was trained at."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortDistilledSigmas",
            display_name="Distilled Sigmas",
            category=CATEGORY,
            description=(
                "The noise levels of a few-step student, such that its network receives exactly the timesteps that it "
                "was trained with. No stock scheduler gives them for one-step students."
            ),
            search_aliases=[*ALIASES, "timesteps", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="The student: its noise schedule turns timesteps into sigmas."),
                _preset_input("The published student whose levels are wanted; 'custom' takes timesteps typed below."),
                *_grid_inputs(),
                _latent_input(),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced, beside Distilled Sampler.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        _check(given)

    @classmethod
    def execute(cls, model, preset, steps, timesteps="", denoise=1.0, latent=None):
        return io.NodeOutput(_grid(model, _fitting(model, preset, timesteps), steps, denoise, latent))


class RetortDistilledSampler(CheckedNode):
    """Few-step sampling with the start that the student was trained on."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortDistilledSampler",
            display_name="Distilled Sampler",
            category=CATEGORY,
            description=(
                "Samples as a few-step student was trained to be sampled: between its levels either fresh noise or the "
                "predicted one, and a first input scaled as in training. Works on eps, v and flow models, images and "
                "video, with masks and through every guider."
            ),
            search_aliases=[*ALIASES, "sampler", "re-noise"],
            inputs=[
                _preset_input("The published student; the two inputs below follow it unless they are set."),
                io.Combo.Input(
                    "mode",
                    options=[FROM_PRESET, *MODES],
                    default=FROM_PRESET,
                    tooltip=(
                        "re-noise: fresh noise between steps (DMD2, LCM, Turbo). deterministic: the predicted noise is "
                        "kept (TDM, Lightning). single call: one step."
                    ),
                ),
                io.Combo.Input(
                    "start",
                    options=[FROM_PRESET, *STARTS],
                    default=FROM_PRESET,
                    tooltip=(
                        "What enters the network first. unit noise: the seed's noise as it is, at any level. noised "
                        "latent: the latent image with noise of the first level, image to image. clean latent: the "
                        "latent image itself (restoration)."
                    ),
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced, beside Distilled Sigmas.")],
        )

    @classmethod
    def execute(cls, preset, mode=FROM_PRESET, start=FROM_PRESET):
        chosen = students.named(preset, host.presets_folders())
        rule = chosen.rule if mode == FROM_PRESET else Rule(MODES[mode])
        start = chosen.start if start == FROM_PRESET else STARTS[start]
        known = chosen if chosen.step_counts else None
        return io.NodeOutput(host.method_sampler(methods.Distilled(rule, start, known)))


class RetortDistilledSetup(CheckedNode):
    """Model, guider, sampler and sigmas for one student: the node to reach for first."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortDistilledSetup",
            display_name="Distilled Setup",
            category=CATEGORY,
            description=(
                "Everything that SamplerCustomAdvanced needs for a few-step student, set as its authors published it: "
                "timestep shift, cfg, sampler and sigmas. Says what is wrong when the preset cannot fit the model."
            ),
            search_aliases=[*ALIASES, "quick start", "guider", "auto"],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The student: its checkpoint, or the base model with its LoRA loaded."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Only used by presets with a cfg above 1; most students have guidance built in.",
                ),
                _preset_input(
                    "The published student; its help page says which file goes where. auto: the one that the names of "
                    "the files behind `model` say, or the recipe in a LoRA; the node says which, and does not guess "
                    "between two.",
                    students.AUTO,
                ),
                *_grid_inputs(),
                _latent_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the preset's timestep shift."),
                io.Guider.Output(tooltip="The guider with the preset's cfg."),
                io.Sampler.Output(tooltip="The sampler that the student was trained for."),
                io.Sigmas.Output(tooltip="The levels that the student was trained at."),
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        _check(given)

    @classmethod
    def recognised(cls, model) -> Preset:
        """What "auto" means in the prompt that runs; PresetMismatch where that is not clear."""
        names = recognise.behind(cls.hidden.prompt, cls.hidden.unique_id, "model")
        what = host.noise_path(model).kind, host.prediction(model), *host.latent_format(model)
        every = students.known(host.presets_folders()).values()
        return recognise.of_model(host, every, names, model, lambda preset: presets.check(preset, *what))

    @classmethod
    def execute(cls, model, positive, preset, steps, timesteps="", denoise=1.0, negative=None, latent=None):
        chosen = _fitting(model, cls.recognised(model) if preset == students.AUTO else preset, timesteps)
        if chosen.guidance is not None:
            positive = host.with_guidance(positive, chosen.guidance)
        if chosen.shift is not None:
            model = host.with_shift(model, chosen.shift)
        return io.NodeOutput(
            model,
            host.cfg_guider(model, positive, negative, chosen.cfg),
            host.method_sampler(methods.Distilled(chosen.rule, chosen.start, chosen)),
            _grid(model, chosen, steps, denoise, latent),
        )
