"""The parts of restoration by themselves: degrade, fix colours, compare, guide by spectra."""

from __future__ import annotations

import torch

from ..hosts.api import host, io, picture_compare, restoration, ui
from ..restoration import degradation
from ..restoration.color_fix import METHODS, color_fix
from ..restoration.resize import region
from ..restoration.spectral import SpectralConfig, guided
from .checks import Asked, CheckedNode, check_range
from .inputs import chosen, inputs_of, number, schema, seed_input
from .restoration_inputs import ALIASES, CATEGORY
from .rewards import REWARD

DEGRADATIONS: dict[str, type[degradation.Degradation]] = {
    "real world": degradation.RealWorld,
    "face": degradation.Face,
    "infrared": degradation.Infrared,
}


class RetortDegrade(CheckedNode):
    """Bad pictures made of good ones."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortDegrade",
            display_name="Degrade",
            category=CATEGORY,
            description=(
                "Blurs, shrinks, adds noise and saves as JPEG, as restorers are trained (Real-ESRGAN's two stages, "
                "faces, infrared), to try a restorer on pictures whose original is known."
            ),
            search_aliases=[*ALIASES, "degradation", "real-esrgan", "noise", "blur", "jpeg", "low quality"],
            inputs=[
                io.Image.Input("image", tooltip="Good pictures; each draws its own damage."),
                io.DynamicCombo.Input(
                    "kind",
                    options=[io.DynamicCombo.Option(name, inputs_of(config)) for name, config in DEGRADATIONS.items()],
                    tooltip="real world: blur, resizing, noise and JPEG, twice. face: once. infrared: a sensor's.",
                ),
                io.Boolean.Input(
                    "keep_size", default=False, tooltip="Enlarges the degraded picture to the size of the good one."
                ),
                seed_input("Draws the damage. Picture i of a batch depends on the seed and i alone."),
            ],
            outputs=[io.Image.Output(tooltip="The degraded pictures, smaller unless the kind or keep_size keep them.")],
        )

    @classmethod
    def execute(cls, image, kind, keep_size=False, seed=0):
        image = restoration.pictures(image)[..., :3].float().cpu()
        settings = chosen(cls, "kind", kind)
        config = DEGRADATIONS[settings.pop("kind")](**settings)
        progress, made = host.progress(len(image)), []
        for i in range(len(image)):
            host.check_cancelled()
            made.append(degradation.degrade(image[i : i + 1], config, seed, first=i))
            progress.step(i + 1)
        degraded = torch.cat(made)
        if keep_size and degraded.shape != image.shape:
            degraded = region(degraded, tuple(image.shape[1:3])).clamp(0, 1)
        return io.NodeOutput(degraded)


class RetortColorFix(CheckedNode):
    """Colours of one picture for another."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortColorFix",
            display_name="Colour Fix",
            category=CATEGORY,
            description=(
                "Gives a restored or redrawn picture the colours of its source: its coarse part by wavelets, or mean "
                "and contrast of each channel (AdaIN)."
            ),
            search_aliases=[*ALIASES, "color fix", "colour match", "wavelet", "adain", "color transfer"],
            inputs=[
                io.Image.Input("image", tooltip="What gets the colours."),
                io.Image.Input("source", tooltip="Where they come from; one picture or as many, resized where needed."),
                io.Combo.Input(
                    "method",
                    options=[method for method in METHODS if method != "none"],
                    default=METHODS[0],
                    tooltip="wavelet: everything coarser than about 30 pixels. adain: mean and contrast of the whole.",
                ),
                number("strength", 1.0, 0.0, 1.0, "0 leaves the image as it is.", step=0.05),
            ],
            outputs=[io.Image.Output(tooltip="The image in the colours of the source; an alpha is kept.")],
        )

    @classmethod
    def execute(cls, image, source, method=METHODS[0], strength=1.0):
        image, source = (restoration.pictures(x, name).float() for x, name in ((image, "image"), (source, "source")))
        if len(source) not in (1, len(image)):
            raise ValueError(f"source holds {len(source)} pictures and image {len(image)}: give one for all, or each")
        colours = region(source[..., :3], tuple(image.shape[1:3])).to(image).expand(len(image), -1, -1, -1)
        fixed = torch.lerp(image[..., :3], color_fix(image[..., :3], colours, method), strength).clamp(0, 1)
        return io.NodeOutput(torch.cat([fixed, image[..., 3:]], -1))


class RetortCompareImages(CheckedNode):
    """Before and after with a slider, and what measures say."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortCompareImages",
            display_name="Compare Images",
            category=CATEGORY,
            description=(
                "Two pictures under one slider, with PSNR, SSIM and, where its files are, LPIPS, against a clean "
                "picture where there is one, and the score of a reward for both."
            ),
            search_aliases=[*ALIASES, "compare", "before after", "slider", "psnr", "ssim", "lpips", "difference"],
            is_output_node=True,
            inputs=[
                io.Image.Input("before", tooltip="On the left; resized to the size of after where needed."),
                io.Image.Input("after", tooltip="On the right."),
                io.Image.Input("clean", optional=True, tooltip="The undamaged picture: both are measured against it."),
                REWARD.Input("reward", optional=True, tooltip="Scores both, from Reward or Combine Rewards."),
                io.String.Input("prompt", default="", tooltip="What the pictures should show, for the reward."),
            ],
            outputs=[
                io.Image.Output(id="sheet", display_name="sheet", tooltip="Both side by side."),
                io.Float.Output(
                    id="psnr", display_name="psnr", tooltip="Of after, in dB, at most 100: the mean over the batch."
                ),
                io.Float.Output(
                    id="ssim", display_name="ssim", tooltip="Of after, at most 1: the mean over the batch."
                ),
                io.String.Output(id="text", display_name="text", tooltip="All measures in words."),
            ],
        )

    @classmethod
    def execute(cls, before, after, clean=None, reward=None, prompt=""):
        found = picture_compare.compare(before, after, clean, reward, prompt, picture_compare.lpips(host))
        # Under names of their own: core would show what is called images above the slider.
        shown = {
            f"retort_{name}": ui.PreviewImage(images, cls=cls).as_dict()["images"]
            for name, images in (("before", found.before), ("after", found.after))
        }
        # Of two drawings that should differ, measures of alikeness say nothing.
        texts = {"text": (found.text,)} if clean is not None or reward is not None else {}
        return io.NodeOutput(found.sheet, found.psnr, found.ssim, found.text, ui={**shown, **texts})


class RetortSpectralGuidance(CheckedNode):
    """Guidance towards the spectrum and structure of a reference, as a patch on the model."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortSpectralGuidance",
            display_name="Spectral Guidance",
            category=CATEGORY,
            description=(
                "Draws the predicted picture towards the amplitude spectrum and the local structure of a reference, at "
                "every step: for infrared super-resolution, after the idea of DifIISR; the formula is ours."
            ),
            search_aliases=[*ALIASES, "difiisr", "infrared", "thermal", "frequency", "fourier", "fft", "guidance"],
            inputs=[
                io.Model.Input("model", tooltip="Any diffusion model; for one-step restorers too."),
                io.Vae.Input("vae", tooltip="Encodes the reference."),
                io.Image.Input(
                    "reference", tooltip="A picture of the size that is sampled, such as the enlarged input."
                ),
                *inputs_of(SpectralConfig),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Where in the run it begins."
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Where in the run it ends."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the guidance, for any sampler, or for Restore untiled.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        check_range(given)

    @classmethod
    def execute(cls, model, vae, reference, scale=0.5, spectrum=0.2, structure=0.5, start_percent=0.0, end_percent=1.0):
        cls.check(Asked({"start_percent": start_percent, "end_percent": end_percent}))
        schedule = host.schedule(model)
        first, last = (float(schedule.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
        config = SpectralConfig(scale, spectrum, structure, first, last)
        samples = host.encode_images(vae, restoration.pictures(reference, "reference")[..., :3])["samples"]
        aim = host.latents_in(model, samples)
        return io.NodeOutput(host.with_x0_patch(model, lambda x0, sigma: guided(x0, aim, float(sigma[0]), config)))
