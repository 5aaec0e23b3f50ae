"""What our sampling costs beside a bare network and beside ComfyUI, as ratios measured pair by pair in one run.

`python -m retort.benchmarks.sampling [--quick] [--json FILE]`. The figures against ComfyUI need COMFYUI_PATH, the
folder of a checkout, and run with the packages of the environment that this is started in.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..graphs.run import run
from ..hosts.headless import embedded
from ..hosts.headless.folders import Folders
from ..hosts.headless.guider import Guider
from ..hosts.headless.samplers import StandardSampler
from ..sampling.grids import simple
from .comfyui import Server, inside
from .report import Figure, Report, arguments, finish
from .timing import paired, ratio

WORKFLOW = Path(__file__).resolve().parents[1] / "workflows" / "1 Quick start - 4 steps instead of 50.json"
STEPS = 20


def headless(pairs: int) -> Figure:
    """Guided euler of a batch of 8 over as many bare forwards of the 16 that it makes at once."""
    model, clip, _ = embedded.load("flow")
    positive, negative = clip.encode("a bold blue seven on yellow paper"), clip.encode("")
    noise = torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    guider = Guider(model, positive, negative, 3.0)
    sigmas, sampler = simple(model.schedule, STEPS), StandardSampler("euler")
    network = model.network
    made = [network.conditions(tokens, extra, noise.shape) for ((tokens, extra),) in (negative, positive)]
    cond = {k: torch.cat([m[k].expand(8, *m[k].shape[1:]) for m in made]) for k in made[0]}
    x, t = torch.cat([noise, noise]), torch.full((16,), 500.0)

    def ours() -> None:
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas)

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(STEPS):
                network(x, t, **cond)

    return ratio(*paired(ours, bare, pairs), 1.05)


def quick_start(server, pairs: int) -> Figure:
    """The bundled workflow, headless over a ComfyUI server; a new seed each time, so that nothing is cached."""
    seeds = iter(range(10_000))

    def ours() -> None:
        run(WORKFLOW, where=Folders(output=server.folder / "headless"), seed=next(seeds))

    return ratio(*paired(ours, lambda: server.run(WORKFLOW, next(seeds)), pairs), 1.0)


def in_comfyui(path: Path, pairs: int) -> dict[str, Figure]:
    """The figures that are taken inside ComfyUI's process."""
    measured = inside("comfyui", path, pairs)
    return {
        "in ComfyUI: our sampler over core euler, per call": ratio(measured["ours"], measured["core"], 1.02),
        "in ComfyUI: importing the plugin, processor seconds": Figure(measured["import"], "s", target=0.3),
    }


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__).parse_args()
    pairs = 9 if options.quick else 31
    report = Report("sampling")
    report.figures["headless: wall time over bare batched forwards"] = headless(pairs)
    given = os.environ.get("COMFYUI_PATH")
    if given:
        report.figures |= in_comfyui(Path(given).resolve(), pairs)
        with Server(Path(given).resolve()) as server:
            report.figures["quick start: headless over ComfyUI"] = quick_start(server, 3 if options.quick else 7)
    finish(report, options)


if __name__ == "__main__":
    main()
