"""Published students by the names of their files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from .preset import Preset

# Names under which ComfyUI's templates load models that nobody has distilled.
_BASES = (
    "sd_xl_base_1.0*", "v1-5-pruned*", "sd3_medium*", "sd3.5_medium*", "sd3.5_large", "sd3.5_large_fp8*",
    "z_image_bf16*", "z_image_fp8*", "qwen_image_bf16*", "qwen_image_fp8*", "qwen_image_2512_bf16*",
    "qwen_image_2512_fp8*", "qwen_image_edit_*", "flux1-dev*", "flux1-krea-dev*", "flux2_dev*", "flux-2-klein-base*",
    "wan2.1_?2v_*14b_fp*", "wan2.2_?2v_high_noise_*", "wan2.2_?2v_low_noise_*", "wan2.2_ti2v_5b_*",
)  # fmt: skip


# Of what somebody has made of them.
_DISTILLED = re.compile(r"turbo|lightning|hyp|lcm|dmd|tdm|schnell|flash|rdm|distil|\d.?steps?")


def is_base(file: str) -> bool:
    """Whether a file has the name of a published model that is no few-step student, folders and capitals aside."""
    stem = _stem(file)
    return not _DISTILLED.search(stem) and any(fnmatchcase(stem, pattern) for pattern in _BASES)


def _stem(file: str) -> str:
    name = file.replace("\\", "/").rpartition("/")[2].lower()
    return name.rpartition(".")[0] or name


def matching(presets: Iterable[Preset], file: str) -> list[Preset]:
    """The presets that a file's name is of, folders and capitals aside: those with the pattern that says most of it.

    More than one where patterns of several presets say equally much; none where no pattern fits.
    """
    name = file.replace("\\", "/").rpartition("/")[2].lower()
    stem = _stem(file)
    scored: dict[str, tuple[int, Preset]] = {}
    for preset in presets:
        fits = [p for p in preset.files if fnmatchcase(stem, p.lower()) or fnmatchcase(name, p.lower())]
        if fits:
            scored[preset.key] = max(len(p) - p.count("*") - p.count("?") for p in fits), preset
    most = max((score for score, _ in scored.values()), default=0)
    return [preset for score, preset in scored.values() if score == most]
