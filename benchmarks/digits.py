"""Quality of the embedded twins: Fréchet distance to held-out digits and prompt accuracy.

`python -m retort.benchmarks.digits [--quick] [--json FILE]`. The judge's own accuracy on held-out digits bounds what a
model can reach. The students are measured by `retort.benchmarks.distillation`.
"""

from __future__ import annotations

import torch

from ..models import digits, evaluate, judge, loader
from .report import Figure, Report, arguments, finish

STEPS = 50


def judge_accuracy(count: int) -> dict[str, float]:
    """The judge's share of right answers on digits drawn from the held-out split."""
    fields, labels = digits.load("held_out")
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(labels), (count,), generator=generator)
    batch = digits.draw(fields[chosen], labels[chosen], generator)
    with torch.inference_mode():
        answers = loader.load_judge()(batch.image)
    return {n: float((answers[n].argmax(1) == getattr(batch, n)).float().mean()) for n in judge.HEADS}


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__).parse_args()
    count = 128 if options.quick else 512
    report = Report("digits")
    for name, share in judge_accuracy(2048).items():
        report.figures[f"judge, {name} right"] = Figure(share, better="higher")
    report.figures[f"{count} held-out digits themselves: Fréchet distance"] = Figure(evaluate.floor(count))
    for kind in ("flow", "eps"):
        for variant in (kind, f"{kind} early"):
            figures, _ = evaluate.figures(kind, loader.load_transformer(variant).network, STEPS, count=count)
            aimed = 0.9 if variant == kind else None
            report.figures[f"{variant}, {STEPS} steps: prompt right"] = Figure(
                figures.prompt, target=aimed, better="higher"
            )
            report.figures[f"{variant}, {STEPS} steps: Fréchet distance"] = Figure(figures.frechet)
    finish(report, options)


if __name__ == "__main__":
    main()
