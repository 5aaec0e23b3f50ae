"""Timings of reflection inside ComfyUI's process; `benchmarks.reflection` starts it.

`python -m retort.benchmarks.reflection_comfyui CHECKOUT PAIRS` prints one JSON line. Every leg runs one branch on eight
latents of the embedded flow twin, so that core's euler along as many steps makes as many equal calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from .comfyui import ROOT, STEPS, core_nodes

BATCH = 8


def main(checkout: Path, pairs: int) -> None:
    """Inside ComfyUI: a cfg pair beside core's euler at equal calls, and a LoRA pair beside the cfg pair."""
    nodes, custom = core_nodes(checkout)
    asyncio.run(nodes.load_custom_node(str(ROOT)))
    retort = nodes.NODE_CLASS_MAPPINGS
    import torch

    from ..models import loader
    from .timing import paired

    with torch.inference_mode():
        model, clip, _ = retort["RetortEmbeddedModel"].execute("flow").args
        positive = nodes.CLIPTextEncode().encode(clip, "a blue seven on yellow paper")[0]
        negative = nodes.CLIPTextEncode().encode(clip, "")[0]
        latent = {"samples": torch.zeros(BATCH, 16, 8, 8)}
        (sigmas,) = custom.BasicScheduler.execute(model, "simple", STEPS, 1.0).args
        (euler,) = custom.KSamplerSelect.execute("euler").args
        (noise,) = custom.RandomNoise.execute(0).args
        lora = Path(loader.STYLES["flow_bold"]).name

        def setup(pair: dict) -> tuple[Any, Any]:
            guider, sampler, _ = retort["RetortReflectionSetup"].execute(model, positive, negative, pair, cfg=1.0).args
            return guider, sampler

        strong, cfg = setup({"pair": "cfg", "weak_cfg": 0.0})
        bold, styled = setup(
            {"pair": "lora", "lora": lora, "strong_strength": 0.8, "weak_strength": -1.5, "reflecting_cfg": 1.0}
        )
        calls = STEPS + 2 * (STEPS - 1)
        (longer,) = custom.BasicScheduler.execute(model, "simple", calls, 1.0).args

        def sampled(guider, sampler, levels) -> None:
            custom.SamplerCustomAdvanced.execute(noise, guider, sampler, levels, latent)

        a, b = paired(lambda: sampled(strong, cfg, sigmas), lambda: sampled(strong, euler, longer), pairs)
        c, d = paired(lambda: sampled(bold, styled, sigmas), lambda: sampled(strong, cfg, sigmas), pairs)
    sys.stdout.write(json.dumps({"cfg": a, "core": b, "lora": c, "cfg_again": d}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), int(sys.argv[2]))
