"""Everything that a node may ask of whoever runs it; nodes import nothing else from `hosts`.

`io`, `ui` and `ComfyExtension` are the names of `comfy_api.latest`. `host` is a module with these functions:

* `noise_path(model) -> NoisePath`: the coordinates of the model; ValueError names a sampling class that has none.
* `schedule(model)`: its model_sampling object (`sigmas`, `sigma_max`, `timestep(sigma)`, `sigma(timestep)`).
* `prediction(model) -> "eps" | "v" | "flow" | "x0" | "edm"`: what the network predicts.
* `latent_format(model) -> (channels, dims)`: 2 dims for images, 3 for video.
* `with_shift(model, shift) -> MODEL`: a clone of a flow model with this timestep shift.
* `distilled_sampler(mode, start, preset=None) -> SAMPLER`: few-step sampling (`sampling.distilled`); a Preset tells the
  level that its student starts from, so that a grid which begins below it is taken as image to image.
* `cfg_guider(model, positive, negative, cfg) -> GUIDER`: `negative` may be None where cfg is 1.
* `embedded(variant) -> (MODEL, CLIP, VAE)`: the small model that comes with Retort.
* `models_folder() -> Path`: where its weights lie.
* `add_model_folders()`: shows that folder to the host's own loaders.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

# The process tells who runs us: ComfyUI has imported its API long before it loads packs. That ComfyUI could be imported
# says nothing, since the command line may be started inside a ComfyUI checkout.
IN_COMFYUI = "comfy_api" in sys.modules

if TYPE_CHECKING or not IN_COMFYUI:
    from .headless import host, io, ui
    from .headless.io import ComfyExtension
else:
    from comfy_api.latest import ComfyExtension, io, ui

    from .comfyui import host

__all__ = ["IN_COMFYUI", "ComfyExtension", "host", "io", "ui"]
