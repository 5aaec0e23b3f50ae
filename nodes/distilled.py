"""Sampling with few-step students: grid, sampler, and one node that sets both up together with model and guider."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ..hosts.api import host, io, methods, recognise, students
from ..sampling import presets
from ..sampling.between import handover
from ..sampling.distilled import Mode
from ..sampling.presets import Preset
from ..sampling.students.preset import MOST_STEPS
from .checks import Asked, CheckedNode
from .inputs import PROMPTED, number, schema

CATEGORY = "model/sampling/retort"
ALIASES = [
    "retort", "distil", "few step", "one step", "turbo", "lightning", "dmd", "dmd2", "tdm", "lcm", "diff-instruct",
    "instarevive", "sdxl lightning", "sdxl turbo", "sd turbo", "lcm lora",
]  # fmt: skip
FROM_PRESET = "from preset"
MODES: dict[str, Mode] = {
    "re-noise": "renoise", "deterministic": "deterministic", "single call": "single", "ancestral": "ancestral",
    "TCD": "tcd",
}  # fmt: skip
STAGES = ["first", "refine"]
STARTS = {"unit noise": "unit", "noised latent": "noised", "clean latent": "latent"}


def _preset_input(tooltip: str, *first: str):
    options = [*first, *students.known(host.presets_folders())]
    return io.Combo.Input("preset", options=options, default=(*first, "dmd2_sdxl_4step")[0], tooltip=tooltip)


def _grid_inputs():
    return [
        number(
            "steps", 0, 0, MOST_STEPS,
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


def latent_input():
    """The latent whose size some students' levels follow."""
    return io.Latent.Input(
        "latent",
        optional=True,
        tooltip=(
            "The latent that will be sampled, for its size: the levels of some students (FLUX.2 klein, Hyper-FLUX) "
            "follow it. Without one 1024 x 1024 is assumed."
        ),
    )


def _stage_input():
    return io.Combo.Input(
        "stage",
        options=STAGES,
        default="first",
        tooltip=(
            "refine: the second stage of a student that was published with two (LTX-2), on the enlarged latent of the "
            "first, with its own levels and the noise of the first of them."
        ),
    )


def _split_output():
    return io.Int.Output(
        id="split",
        display_name="split",
        tooltip=(
            "After how many of these steps the second of two networks goes on (Wan 2.2), for SplitSigmas and two "
            "samplers; all of them for a student of one network."
        ),
    )


def _named(key: str | Preset, stage: str) -> Preset:
    """A preset, or its second stage."""
    preset = key if isinstance(key, Preset) else students.named(key, host.presets_folders())
    return presets.refining(preset) if stage == "refine" else preset


def known() -> Collection[Preset]:
    """Every preset there is."""
    return students.known(host.presets_folders()).values()


def check_of(model) -> Callable[[Preset], None]:
    """What raises PresetMismatch for a preset that cannot be the model's."""
    what = host.noise_path(model).kind, host.prediction(model), *host.latent_format(model), host.model_kind(model)
    return lambda preset: presets.check(preset, *what)


def _fitting(model, key: str | Preset, timesteps: str, stage: str) -> Preset:
    """The preset, checked against the model."""
    if key == "custom" and stage == "first":
        preset = presets.custom(timesteps, highest=presets.highest(host.noise_path(model)))
    else:
        preset = _named(key, stage)
    check_of(model)(preset)
    return preset


def _check(given: Asked) -> None:
    """What of a grid can be known without a model."""
    if not given.knows("preset"):
        return
    if given["preset"] == students.AUTO:
        _check_auto(given)
        return
    if not given.knows("stage"):
        return
    if given["preset"] != "custom" or given["stage"] == "refine":
        preset = _named(given["preset"], given["stage"])
    elif given.knows("timesteps"):
        # As far as any model goes; whether this one is a flow is not known yet.
        preset = presets.custom(given["timesteps"], highest=1000)
    else:
        return
    if given.knows("steps"):
        presets.count(preset, given["steps"] or None)


def _boundary(preset: Preset, name: str) -> float:
    """The level at which the second network goes on. name: the input that it is connected to."""
    if preset.boundary is None:
        raise presets.PresetMismatch(
            f"{name} is connected, and {preset.title!r} was published with one network; disconnect it, or choose a "
            "preset of two, such as wan22_lightx2v_t2v"
        )
    return preset.boundary


def _sampler(preset: Preset, method: methods.Distilled):
    """The SAMPLER of a method; of autoregressive video the host's own."""
    blocks = preset.frames_per_block
    return host.method_sampler(method) if blocks is None else host.block_sampler(blocks)


def _split(preset: Preset, sigmas) -> int:
    """After how many steps of the grid the second network goes on."""
    return max(0, len(sigmas) - 1) if preset.boundary is None else handover(sigmas, preset.boundary)


def _sampled_as(model, preset: Preset):
    """The model with what the preset sets on it."""
    if preset.shift is not None:
        model = host.with_shift(model, preset.shift, preset.audio_shift)
    return model if preset.noise_scale is None else host.with_noise_scale(model, preset.noise_scale)


def _grid(model, preset: Preset, steps: int, denoise: float, latent=None, said: Sequence[str] = (), alone=False):
    """The preset's levels, or the end of them; tells which, after what is said.

    alone: whether no second network goes on, of which a student of two is warned.
    """
    schedule, path = host.schedule(model), host.noise_path(model)
    size = None if latent is None else host.picture_size(model, latent)
    sigmas = presets.sigmas(preset, steps or None, schedule, path, size)
    if denoise <= 0:
        # An empty grid is how ComfyUI says that nothing is to be sampled.
        return sigmas[:0]
    if denoise < 1:
        sigmas = presets.cut(preset, sigmas, denoise, schedule, path, size)
    names = "levels" if path.flow or preset.sigmas else "timesteps"
    text = f"{preset.title}: {len(sigmas) - 1} calls at {names} {presets.told(sigmas, schedule, path)}"
    if preset.sized:
        width, height = size or presets.SIZE
        text += f", for {width} x {height} pixels" + ("" if size else ", since no latent is connected")
    if preset.boundary is not None:
        text += f"; the first of two networks makes {_split(preset, sigmas)}, down to level {preset.boundary:g}"
    # A grid that begins below the boundary may be the second network's own.
    split = _split(preset, sigmas)
    left = len(sigmas) - 1 - split if alone and split else 0
    if left:
        text += (
            f". One network makes the other {left} too here: where it is one of two (Wan 2.2), connect the second to "
            "low_noise_model on Distilled Setup, or let a second sampler go on after the steps of split"
        )
    host.say("; ".join([*said, text]), warn=left > 0)
    return sigmas


def _check_auto(given: Asked) -> None:
    """What of the preset "auto" can be known without a model: a name or a recipe there must be."""
    if recognise.runs_of(given.links.get("model")):
        return  # what this workflow trains says it once it is trained
    names, every = recognise.files_of(given.links.get("model")), known()
    loras = set(host.lora_names()).intersection(names)
    if not recognise.by_name(every, names) and not any(recognise.has_recipe(host, name) for name in loras):
        raise presets.PresetMismatch(recognise.none_found(every, names))


def set_up_outputs() -> list:
    """What `set_up` gives."""
    return [
        io.Model.Output(tooltip="The model with the preset's timestep shift."),
        io.Guider.Output(tooltip="The guider with the preset's cfg; of two networks, the first one's."),
        io.Sampler.Output(
            tooltip="The sampler that the student was trained for; with a second network it changes over to it."
        ),
        io.Sigmas.Output(tooltip="The levels that the student was trained at."),
        _split_output(),
    ]


def set_up(
    model, preset: Preset, positive, negative, steps: int, denoise: float, latent, low=None, said: Sequence[str] = ()
):
    """Model, guider, sampler, levels and split of a preset that fits the model.

    low: the second network's MODEL. said: what the node has to say besides.
    """
    if preset.guidance is not None:
        positive = host.with_guidance(positive, preset.guidance)
    model = _sampled_as(model, preset)
    sigmas = _grid(model, preset, steps, denoise, latent, said, alone=low is None)
    split, second, boundary = _split(preset, sigmas), None, 0.0
    if low is None:
        guider = host.cfg_guider(model, positive, negative, preset.cfg)
    else:
        boundary = _boundary(preset, "low_noise_model")
        low = _sampled_as(_fitting_too(low, preset), preset)
        guider = host.cfg_guider(low, positive, negative, preset.cfg)
        if split:
            second, guider = guider, host.cfg_guider(model, positive, negative, preset.cfg, boundary)
    method = methods.Distilled(preset.rule, preset.start, preset, second, boundary)
    return io.NodeOutput(model, guider, _sampler(preset, method), sigmas, split)


class PresetNode(CheckedNode):
    """A node that runs again once the preset that it was given has been edited."""

    @classmethod
    def fingerprint_inputs(cls, preset=None, **given):
        """What the choice means now."""
        return students.fingerprint(preset, host.presets_folders())


class RetortDistilledSigmas(PresetNode):
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
                latent_input(),
                _stage_input(),
            ],
            outputs=[
                io.Sigmas.Output(tooltip="For SamplerCustomAdvanced, beside Distilled Sampler."),
                _split_output(),
            ],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        _check(given)

    @classmethod
    def execute(cls, model, preset, steps, timesteps="", denoise=1.0, latent=None, stage="first"):
        chosen = _fitting(model, preset, timesteps, stage)
        sigmas = _grid(model, chosen, steps, denoise, latent)
        return io.NodeOutput(sigmas, _split(chosen, sigmas))


class RetortDistilledSampler(PresetNode):
    """Few-step sampling with the start that the student was trained on."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortDistilledSampler",
            display_name="Distilled Sampler",
            category=CATEGORY,
            description=(
                "Samples as a few-step student was trained to be sampled: between its levels fresh noise, the "
                "predicted one or a part of either, and a first input scaled as in training. Works on eps, v and flow "
                "models, images and video, with masks and through every guider, and with two networks."
            ),
            search_aliases=[*ALIASES, "sampler", "re-noise", "tcd", "ancestral", "high noise low noise"],
            inputs=[
                _preset_input("The published student; the two inputs below follow it unless they are set."),
                io.Combo.Input(
                    "mode",
                    options=[FROM_PRESET, *MODES],
                    default=FROM_PRESET,
                    tooltip=(
                        "re-noise: fresh noise between steps (DMD2, LCM). deterministic: the predicted noise is kept "
                        "(TDM, Lightning). single call: one step. ancestral, TCD: a part of the noise is fresh, see "
                        "eta (SDXL Turbo; TCD, Hyper-SD)."
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
                _stage_input(),
                number(
                    "eta", 1.0, 0.0, 1.0,
                    "How much of the noise is fresh in each step, where the mode above is set to ancestral or TCD; 0 "
                    "is deterministic. TCD's authors advise 0.3. A mode from the preset brings its own.",
                    step=0.01,
                ),
                io.Guider.Input(
                    "low_noise_guider",
                    optional=True,
                    tooltip=(
                        "The guider of the second of two networks (Wan 2.2's low-noise model), which goes on below the "
                        "preset's boundary. The guider on SamplerCustomAdvanced is the first one's."
                    ),
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced, beside Distilled Sigmas.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("preset", "stage"):
            chosen = _named(given["preset"], given["stage"])
            if given.connected("low_noise_guider"):
                _boundary(chosen, "low_noise_guider")

    @classmethod
    def execute(
        cls, preset, mode=FROM_PRESET, start=FROM_PRESET, stage="first", eta=1.0, low_noise_guider=None
    ):
        chosen = _named(preset, stage)
        # What the network is told, and how noise is scaled, is the student's whatever the mode.
        rule = chosen.rule if mode == FROM_PRESET else replace(chosen.rule, mode=MODES[mode], eta=eta)
        start = chosen.start if start == FROM_PRESET else STARTS[start]
        own = chosen if chosen.step_counts else None
        boundary = 0.0 if low_noise_guider is None else _boundary(chosen, "low_noise_guider")
        method = methods.Distilled(rule, start, own, low_noise_guider, boundary)
        return io.NodeOutput(_sampler(chosen, method) if mode == FROM_PRESET else host.method_sampler(method))


class RetortDistilledSetup(PresetNode):
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
            search_aliases=[*ALIASES, "quick start", "guider", "auto", "wan 2.2", "high noise low noise"],
            hidden=[*PROMPTED],
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
                latent_input(),
                _stage_input(),
                io.Model.Input(
                    "low_noise_model",
                    optional=True,
                    tooltip=(
                        "The second of two networks (Wan 2.2's low-noise model with its LoRA), where `model` is the "
                        "first. One SamplerCustomAdvanced then samples with both, and the second goes on exactly at "
                        "the preset's boundary."
                    ),
                ),
            ],
            outputs=set_up_outputs(),
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        _check(given)
        plain = given.knows("preset", "stage") and given["preset"] not in ("custom", students.AUTO)
        if plain and given.connected("low_noise_model"):
            _boundary(_named(given["preset"], given["stage"]), "low_noise_model")

    @classmethod
    def recognised(cls, model) -> Preset:
        """What "auto" means in the prompt that runs; PresetMismatch where that is not clear."""
        names = recognise.behind(host, cls.hidden.prompt, cls.hidden.unique_id, "model")
        return recognise.of_model(host, known(), names, model, check_of(model))

    @classmethod
    def name_another(cls, model, preset: str, error: ValueError) -> None:
        """PresetMismatch that names the one preset that the names of the files say, where there is one that fits."""
        if cls.hidden is None or preset in ("custom", students.AUTO):
            return
        named = recognise.by_name(known(), recognise.behind(host, cls.hidden.prompt, cls.hidden.unique_id, "model"))
        if len(named) == 1 and preset not in named:
            ((key, (other, file)),) = named.items()
            if recognise.fits(check_of(model), other):
                raise presets.PresetMismatch(recognise.another_training(preset, key, file)) from error

    @classmethod
    def execute(
        cls, model, positive, preset, steps, timesteps="", denoise=1.0, negative=None, latent=None, stage="first",
        low_noise_model=None,
    ):  # fmt: skip
        try:
            chosen = _fitting(model, cls.recognised(model) if preset == students.AUTO else preset, timesteps, stage)
        except presets.PresetMismatch as error:
            cls.name_another(model, preset, error)
            raise
        unread = timesteps.strip() and preset != "custom"
        said = ["timesteps are read with the preset custom alone"] if unread else []
        return set_up(model, chosen, positive, negative, steps, denoise, latent, low_noise_model, said)


def _fitting_too(low, preset: Preset):
    """The second network's MODEL; ValueError unless the preset fits it as it fits the first."""
    try:
        check_of(low)(preset)
    except ValueError as error:
        raise ValueError(f"low_noise_model does not fit: {error}") from error
    return low
