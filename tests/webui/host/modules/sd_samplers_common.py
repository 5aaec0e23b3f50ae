"""SamplerData, the exception of the Interrupt button, and how many steps of image to image there are."""

from typing import Any, NamedTuple


class SamplerData(NamedTuple):
    name: str
    constructor: Any
    aliases: list
    options: dict

    def total_steps(self, steps):
        return steps * 2 if self.options.get("second_order", False) else steps


class InterruptedException(BaseException):
    pass


def setup_img2img_steps(p, steps=None):
    if steps is not None:
        return int(steps / min(p.denoising_strength, 0.999)), steps - 1
    return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)
