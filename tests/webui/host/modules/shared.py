"""The settings that samplers look at."""

from types import SimpleNamespace

opts = SimpleNamespace(sgm_noise_multiplier=False, img2img_extra_noise=0.0)
state = SimpleNamespace(interrupted=False)
