"""What the kill test starts: it forks runs to be killed, then finishes and compares with an uninterrupted one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]
import conftest  # noqa: E402
import torch  # noqa: E402
from two_players import Two, TwoConfig  # noqa: E402

from retort.sampling.path import VE  # noqa: E402
from retort.trainers.adapters import LoraConfig  # noqa: E402
from retort.trainers.config import RunConfig, TrainingConfig  # noqa: E402
from retort.trainers.data import Data  # noqa: E402
from retort.trainers.loop import Trainer  # noqa: E402

torch.set_num_threads(1)
STEPS = 600


def trainer(folder: Path) -> Trainer:
    denoiser = conftest.AffineDenoiser(VE, (1.0,), 0.5, 0.7)
    for seed, name in enumerate(("student", "fake")):
        denoiser.adapters.add(name, LoraConfig(rank=1), seed)
    values = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    rows = {"mean": torch.zeros(1)}
    settings = TrainingConfig(steps=STEPS, batch_size=4, save_every=1, save_minutes=0, preview_every=0, ema=0.9, keep=1)
    config = RunConfig("two", TwoConfig(), settings, LoraConfig(rank=1))
    data = Data([rows] * 12, latents=list(values), uncond=rows)
    return Trainer(denoiser, Two(config.objective, denoiser), data, config, folder)


def main() -> None:
    run, whole = Path(sys.argv[1]), Path(sys.argv[2])
    trainer(run.with_name("warm"))  # imports peft once, before any fork
    for line in sys.stdin:
        if line.strip() == "finish":
            break
        pid = os.fork()
        if pid == 0:
            trainer(run).train()
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        # Until the signal is out the pid must stay taken, also where the run came to its end first.
        sys.stdin.readline()
        os.waitpid(pid, 0)
        sys.stdout.write("ended\n")
        sys.stdout.flush()
    ours, theirs = trainer(run).train(), trainer(whole).train()
    equal = all(torch.equal(ours[k], theirs[k]) for k in theirs)
    sys.stdout.write("equal\n" if equal else "different\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
