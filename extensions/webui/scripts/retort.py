"""Retort in Forge Neo: a sampler for few-step students, one for Weak-to-Strong reflection, and an accordion for both.

The host runs this file at its start and at each reload of its UI. The maths is that of `sampling/`, and nothing of
ComfyUI is imported. What is used of the host, as read in the sources of its branch neo, release 2.26: `all_samplers`,
`all_samplers_map` and `set_samplers` of `sd_samplers`; `KDiffusionSampler`, whose function is called as k-diffusion's
are, with a CFGDenoiser; `predictor`, the model's noise schedule; and `scripts.Script`.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from modules import scripts, sd_samplers, sd_samplers_common, sd_samplers_kdiffusion

ROOT = Path(__file__).resolve().parents[3]


def find_package() -> None:
    """Make the repository that this file lies in the package `retort`: the host sees a link to a part of it."""
    if "retort" in sys.modules:
        other = Path(str(sys.modules["retort"].__file__)).resolve().parent
        if other != ROOT:
            raise ImportError(f"another package called retort is loaded, from {other}: remove it, then start again")
        return
    entry = ROOT / "__init__.py"
    if not (ROOT / "sampling" / "distilled.py").is_file():
        raise ImportError(
            f"{ROOT} is not Retort's folder: this extension must be a link to its extensions/webui, which "
            "`python install.py link FORGE` makes"
        )
    spec = importlib.util.spec_from_file_location("retort", entry, submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = sys.modules["retort"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


find_package()

from retort.sampling import presets  # noqa: E402
from retort.sampling.distilled import MODES, STARTS, sample_distilled, start  # noqa: E402
from retort.sampling.path import FLOW, VE, NoisePath  # noqa: E402
from retort.sampling.presets import PRESETS, Preset, PresetMismatch  # noqa: E402
from retort.sampling.reflection import BASES, INVERSIONS, ReflectionConfig, sample_reflection  # noqa: E402

DISTILLED, REFLECTION = "Retort Distilled", "Retort Reflection"
# The host has no model of the embedded digits, none that samples in VP, no way to tell a network another timestep, and
# no caches of autoregressive video.
OFFERED = {
    p.title: p
    for p in PRESETS.values()
    if not p.key.startswith("digits") and p.paths != ("VP",) and p.label_scale == 1 and p.frames_per_block is None
}
CUSTOM = PRESETS["custom"].title
# The presets' notes name ComfyUI's folders; these are the host's.
FOLDERS = {
    "models/loras": "models/Lora",
    "models/checkpoints": "models/Stable-diffusion",
    "models/diffusion_models": "models/Stable-diffusion",
}
KINDS: dict[str, tuple[NoisePath, str]] = {
    "epsilon": (VE, "eps"),
    "v_prediction": (VE, "v"),
    "const": (FLOW, "flow"),
}


class Settings(NamedTuple):
    """The accordion's values in the order of its components, which is also that of an API request's `args`."""

    preset: str = PRESETS["dmd2_sdxl_4step"].title
    timesteps: str = ""
    mode: str = "renoise"
    start: str = "unit"
    weak_cfg: float = 1.0
    begin: float = 0.0
    end: float = 1.0
    rounds: int = 1
    inversion: str = "euler"
    iterations: int = 3
    base: str = "euler"


# How an image's infotext calls them, by the sampler that reads them.
INFOTEXT = {
    DISTILLED: {
        "preset": "Retort preset",
        "timesteps": "Retort timesteps",
        "mode": "Retort mode",
        "start": "Retort start",
    },
    REFLECTION: {
        "weak_cfg": "Retort weak CFG",
        "begin": "Retort begin",
        "end": "Retort end",
        "rounds": "Retort rounds",
        "inversion": "Retort inversion",
        "iterations": "Retort iterations",
        "base": "Retort base",
    },
}


def settings_of(p: Any) -> Settings:
    """What the accordion said for this generation; the defaults where a request came with no scripts."""
    return vars(p).get("retort", Settings())


def kind_of(predictor: Any) -> tuple[NoisePath, str]:
    """The noise path of the host's model and what its network predicts. ValueError for a kind that is not known."""
    if predictor.prediction_type not in KINDS:
        raise ValueError(
            f"Retort: this model predicts {predictor.prediction_type!r}; its samplers know {', '.join(KINDS)}: choose "
            "another sampler"
        )
    return KINDS[predictor.prediction_type]


class RetortSampler(sd_samplers_kdiffusion.KDiffusionSampler):
    """A sampler of the host whose function is its own method `run`."""

    label: str

    def __init__(self, sd_model: Any) -> None:
        super().__init__(self.run, sd_model)

    def run(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        raise NotImplementedError

    def write_down(self, p: Any) -> None:
        values = settings_of(p)._asdict()
        named = {name: values[field] for field, name in INFOTEXT[self.label].items() if self.reads(field, values)}
        p.extra_generation_params.update(named)

    def reads(self, field: str, values: dict[str, Any]) -> bool:
        """Whether a setting matters beside the others."""
        return True


class DistilledSampler(RetortSampler):
    """`sampling.distilled` at the levels of a preset; the host's schedule type is not asked."""

    label = DISTILLED

    def reads(self, field: str, values: dict[str, Any]) -> bool:
        return field == "preset" or values["preset"] == CUSTOM

    def get_sigmas(self, p: Any, steps: int):
        """The preset's grid. The host cuts its end off for image to image, and asks for steps / strength at hires."""
        preset = self.preset_of(p)
        if steps not in preset.step_counts:
            known = ", ".join(map(str, sorted(preset.step_counts)))
            raise PresetMismatch(
                f"Retort: {steps} steps are asked for and {preset.title!r} has {known}: set Sampling Steps to that (at "
                "hires, and with exact img2img steps, it is the steps divided by the denoising strength that counts)"
            )
        predictor = self.model_wrap.predictor
        return presets.sigmas(preset, steps, predictor, kind_of(predictor)[0])

    def preset_of(self, p: Any) -> Preset:
        """The chosen preset, or a custom one. PresetMismatch names what is wrong with it."""
        chosen = settings_of(p)
        if chosen.preset not in OFFERED:
            raise PresetMismatch(f"Retort: preset {chosen.preset!r} is not known; use one of {', '.join(OFFERED)}")
        if chosen.preset != CUSTOM:
            return OFFERED[chosen.preset]
        path, _ = kind_of(self.model_wrap.predictor)
        return presets.custom(chosen.timesteps, chosen.mode, chosen.start, presets.highest(path))

    def sample(self, p, x, *arguments, **named):
        """Text to image; x is unit noise."""
        self.begin(p, noise=x, latent=None)
        return super().sample(p, x, *arguments, **named)

    def sample_img2img(self, p, x, noise, *arguments, **named):
        """Image to image and hires; x is the latent image."""
        self.begin(p, noise=noise, latent=x)
        return super().sample_img2img(p, x, noise, *arguments, **named)

    def begin(self, p: Any, noise, latent) -> None:
        """Check the preset against the model before it is loaded, and keep what the host adds to one latent."""
        path, prediction = kind_of(self.model_wrap.predictor)
        presets.check(self.preset_of(p), path.kind, prediction, noise.shape[1], noise.ndim - 2)
        self.unit_noise, self.latent = noise, latent
        self.write_down(p)
        cfg = p.hr_cfg if p.is_hr_pass else p.cfg_scale
        if cfg > 2:
            logging.getLogger("retort").warning("CFG Scale is %g; few-step students want 1, or at most 2", cfg)

    def run(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        preset, predictor = self.preset_of(self.p), self.model_wrap.predictor
        path = preset.rule.noised(kind_of(predictor)[0])
        latent = None if self.latent is None else self.latent.to(x)
        highest = presets.start_level(preset, predictor, path)
        noise = self.unit_noise.to(x)
        first = start(path, sigmas[0], noise, latent, preset.start, start_sigma=highest)
        # Where it is a noised latent that is wanted, the host's own has its extra noise in it.
        if latent is None or not first.equal(path.add_noise(latent, sigmas[0], noise)):
            x = first
        return sample_distilled(
            model,
            x,
            sigmas,
            extra_args,
            callback,
            disable,
            path=path,
            rule=preset.rule,
            schedule=predictor,
            # The host's generators: one per image, so that a batch gives what single images give.
            noise_sampler=lambda *_: self.p.rng.next().to(x),
        )


class ReflectionSampler(RetortSampler):
    """`sampling.reflection` where strong and weak are one model at two CFG scales, along the host's schedule."""

    label = REFLECTION

    def run(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        chosen, extra = settings_of(self.p), dict(extra_args or {})
        config = ReflectionConfig(
            chosen.begin, chosen.end, int(chosen.rounds), chosen.inversion, int(chosen.iterations), chosen.base
        )
        self.check(chosen, extra)
        self.write_down(self.p)
        step = 0

        def steady(cfg: float) -> Callable[..., Any]:
            def ask(y, sigma, **_):
                # The host counts calls to know the step, for prompts that change on the way; a leg is no step.
                model.step = step
                with self.hires_cfg(cfg):
                    return model(y, sigma, **{**extra, "cond_scale": cfg})

            return ask

        def told(state: dict[str, Any]) -> None:
            nonlocal step
            if callback is not None:
                callback(state)
            step = state["i"] + 1

        strong = self.p.hr_cfg if self.p.is_hr_pass else extra["cond_scale"]
        path, _ = kind_of(self.model_wrap.predictor)
        return sample_reflection(
            steady(strong), x, sigmas, None, told, disable, path=path, weak=steady(chosen.weak_cfg), config=config
        )

    def check(self, chosen: Settings, extra: dict[str, Any]) -> None:
        """ValueError where the host cannot run the weak leg."""
        if extra["uncond"] is None and chosen.weak_cfg != 1:
            raise ValueError(
                f"Retort: weak CFG is {chosen.weak_cfg:g} and CFG Scale 1, at which the host leaves the negative "
                "prompt out: raise CFG Scale above 1"
            )
        if self.p.refiner_checkpoint_info is not None:
            raise ValueError(
                "Retort: a refiner changes the model by the noise level, which a reflection raises and lowers: turn "
                f"the refiner off or choose another sampler than {REFLECTION}"
            )

    @contextmanager
    def hires_cfg(self, cfg: float) -> Iterator[None]:
        """In the hires pass the host's denoiser takes the scale from `p.hr_cfg`, whatever it is given."""
        if not self.p.is_hr_pass:
            yield
            return
        held, self.p.hr_cfg = self.p.hr_cfg, cfg
        try:
            yield
        finally:
            self.p.hr_cfg = held


def register() -> None:
    """Put the samplers into the host's lists, in the place of those that an earlier load of this file put there."""
    for sampler in (DistilledSampler, ReflectionSampler):
        alias = sampler.label.lower().replace(" ", "_")
        data = sd_samplers_common.SamplerData(sampler.label, sampler, [alias], {})
        names = [known.name for known in sd_samplers.all_samplers]
        if data.name in names:
            sd_samplers.all_samplers[names.index(data.name)] = data
        else:
            sd_samplers.all_samplers.append(data)
        sd_samplers.all_samplers_map[data.name] = data
    sd_samplers.set_samplers()


class RetortScript(scripts.Script):
    """The accordion; what it says travels to the samplers on the processing object."""

    def title(self) -> str:
        return "Retort"

    def show(self, is_img2img: bool):
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        first = Settings()
        with gr.Accordion(label="Retort", open=False, elem_id=self.elem_id("accordion")):
            gr.Markdown(f"For the sampler **{DISTILLED}**. Set Sampling Steps to what the student was made for.")
            preset = gr.Dropdown(label="Student", choices=list(OFFERED), value=first.preset)
            note = gr.Markdown(about(first.preset))
            preset.change(fn=about, inputs=[preset], outputs=[note], show_progress="hidden")
            with gr.Row():
                timesteps = gr.Textbox(label=f"Timesteps (for {CUSTOM}), such as 999, 749, 499, 249", value="")
                mode = gr.Dropdown(label=f"Between steps (for {CUSTOM})", choices=list(MODES), value=first.mode)
                begin_with = gr.Dropdown(label=f"Start (for {CUSTOM})", choices=list(STARTS), value=first.start)
            gr.Markdown(
                f"For the sampler **{REFLECTION}**: before a step, down at CFG Scale and up again at the weak CFG. "
                "With euler a reflected step costs two model calls more."
            )
            with gr.Row():
                weak = gr.Slider(label="Weak CFG", minimum=0.0, maximum=10.0, step=0.1, value=first.weak_cfg)
                begin = gr.Slider(label="Begin", minimum=0.0, maximum=1.0, step=0.05, value=first.begin)
                end = gr.Slider(label="End", minimum=0.0, maximum=1.0, step=0.05, value=first.end)
                rounds = gr.Slider(label="Rounds", minimum=1, maximum=8, step=1, value=first.rounds)
            with gr.Row():
                inversion = gr.Dropdown(label="Way up", choices=list(INVERSIONS), value=first.inversion)
                times = gr.Slider(label="Fixed-point iterations", minimum=1, maximum=16, step=1, value=first.iterations)
                base = gr.Dropdown(label="Base step", choices=list(BASES), value=first.base)
        parts = Settings(preset, timesteps, mode, begin_with, weak, begin, end, rounds, inversion, times, base)
        named = {field: name for fields in INFOTEXT.values() for field, name in fields.items()}
        self.infotext_fields = [(component, named[field]) for field, component in parts._asdict().items()]
        return list(parts)

    def process(self, p: Any, *values: Any) -> None:
        p.retort = Settings(*values)


def about(title: str) -> str:
    """What a student needs: its step counts and which file goes where."""
    preset = OFFERED[title]
    counts = ", ".join(map(str, sorted(preset.step_counts))) or "as many as the timesteps"
    note = preset.note
    for theirs, here in FOLDERS.items():
        note = note.replace(theirs, here)
    return f"Steps: {counts}. {note}"


register()
