"""Teleport and dopri5 on the embedded model: what skipped steps cost in quality, and how many calls a tolerance needs.

`python -m retort.benchmarks.small_samplers [--quick] [--json FILE]`. Euler with guidance 4 on the simple grid of 20
steps, the same prompts and noise in every row. Error: root mean square difference of the latents to the solved ODE
(dopri5, atol = rtol = 1e-4), over the latents' deviation. A teleport is compared with Euler at as many calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..hosts.headless import embedded
from ..hosts.headless.guider import Guider
from ..hosts.headless.host import host
from ..hosts.headless.progress import heard
from ..hosts.headless.samplers import StandardSampler
from ..hosts.methods import Dopri5, Method, Teleported
from ..hosts.statistics import load
from ..models import evaluate, judge, loader
from ..sampling.dopri5 import Dopri5Config
from ..sampling.grids import simple
from ..sampling.teleport import Teleport
from .report import Figure, Report, arguments, finish

STEPS, CFG, BATCH = 20, 4.0, 32


class Runs:
    """One twin on fixed prompts and noise."""

    def __init__(self, kind: str, count: int):
        self.model, clip, self.vae = embedded.load(kind)
        captions, self.wanted = evaluate.requests(count, 0)
        self.noise = torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(0)).split(BATCH)
        entries = [clip.encode(text)[0] for text in captions]
        parts = [entries[i : i + BATCH] for i in range(0, count, BATCH)]
        self.positive = [
            [[torch.cat([t for t, _ in part]), {"pooled_output": torch.cat([e["pooled_output"] for _, e in part])}]]
            for part in parts
        ]
        self.negative = clip.encode("")
        self.reader = loader.load_judge()

    def sample(self, sampler: Method, steps: int) -> tuple[Tensor, float]:
        """(stored latents, calls of the guided model as dopri5 says them, or 0)."""
        sigmas, out, calls = simple(self.model.schedule, steps), [], []
        for positive, noise in zip(self.positive, self.noise, strict=True):
            guider = Guider(self.model, positive, self.negative, CFG)
            with heard() as lines:
                out.append(guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0))
            calls += [int(line.split()[1]) for line in lines if line.startswith("dopri5")]
        return torch.cat(out), sum(calls) / len(calls) if calls else 0.0

    @torch.inference_mode()
    def judged(self, latents: Tensor) -> tuple[float, float]:
        """(share of right prompts, Fréchet distance)."""
        images = torch.cat([self.vae.decode(part).movedim(-1, 1) for part in latents.split(BATCH)])
        right = evaluate.prompt_share(self.reader(images), self.wanted)
        return right, judge.frechet_distance(self.reader.features(images), evaluate.reference())


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__).parse_args()
    report, figures = Report("small_samplers"), {}
    statistics = load(host.statistics_folders(), "digits.safetensors")
    euler = StandardSampler("euler")
    for kind in ("flow", "eps"):
        runs = Runs(kind, 64 if options.quick else 256)
        solved, calls = runs.sample(Dopri5(Dopri5Config(1e-4, 1e-4)), 2)
        figures[f"{kind}: dopri5 to 1e-4, calls"] = Figure(calls)
        rough, calls = runs.sample(Dopri5(Dopri5Config(1e-3, 1e-3)), 2)
        figures[f"{kind}: dopri5 to 1e-3, calls"] = Figure(calls)
        figures[f"{kind}: dopri5 to 1e-3, error"] = Figure(_error(rough, solved))
        rows: dict[str, tuple[Method, int, str]] = {f"euler, {n} calls": (euler, n, "") for n in (20, 19, 18, 17)}
        for skip, infer in ((1, False), (2, True), (3, True), (3, False)):
            calls = STEPS - skip + infer
            sampler: Method = Teleported(euler, Teleport(statistics, skip, infer=infer))
            mean = "mean inferred" if infer else "mean of all digits"
            rows[f"teleport, {skip} skipped, {mean}, {calls} calls"] = sampler, STEPS, f"euler, {calls} calls"
        errors: dict[str, float] = {}
        for name, (sampler, steps, equal) in rows.items():
            latents, _ = runs.sample(sampler, steps)
            errors[name] = _error(latents, solved)
            right, distance = runs.judged(latents)
            figures[f"{kind}: {name}: error"] = Figure(errors[name], target=errors.get(equal))
            figures[f"{kind}: {name}: prompt right"] = Figure(right, better="higher")
            figures[f"{kind}: {name}: Fréchet distance"] = Figure(distance)
    report.figures.update(figures)
    finish(report, options)


def _error(latents: Tensor, solved: Tensor) -> float:
    return float((latents - solved).square().mean().sqrt() / solved.std())


if __name__ == "__main__":
    main()
