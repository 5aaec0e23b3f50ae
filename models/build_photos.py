"""Build the photograph model: `python -m retort.models.build_photos [--work DIR] [--only STEP] [--out DIR]`.

Steps, in order: teacher, pairs, regression, restorer, baseline, eye, export. Each is seeded, resumes where it was
stopped and is skipped when it is finished. About an hour on two cores; what came of it is in README.md beside this.

The restorer goes on from the regression with InstaRevive's losses: what the teacher thinks of the output against what
a fake score does (DMD2, arXiv 2405.14867, with the normaliser of DMD, 2311.18828), a distance in the teacher's own
features, and the regression; the baseline goes on with the regression alone for as many steps. What is shipped lies
between both (network interpolation, Wang et al. 2018, ESRGAN, arXiv 1809.00219, section 3.4): a quarter of the way to
the restorer, where the eye finds the training photographs nearest.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..files import atomic as files
from ..restoration.perceptual import feature_distance
from . import loader, photo_network, photographs
from .photo_eye import Eye
from .photo_network import PhotoText, PhotoTokenizer, new_network
from .training import Schedule, channels_last, train

BATCH = 16
SIDE = 48
PAIRS = 6144
LOOKS_AT = 0.1  # the level at which the teacher's features are compared
LOW, HIGH = 0.1, 0.9  # levels at which teacher and fake score are compared
MATCHING, FEATURES, CRITIC = 0.5, 1.0, 0.03
SHARE = 0.25  # of the restorer in what is shipped
LEVEL = 0.4  # the restorer's only call: InstaRevive's t = 400
SCHEDULES = {
    "teacher": Schedule(2000, rate=1e-3, warmup=100, decay=0.5, ema=0.998),
    "regression": Schedule(1500, rate=6e-4, warmup=100, decay=0.5, ema=0.997),
    "restorer": Schedule(1000, rate=3e-4, warmup=50, decay=0.4, ema=0.995, save_every=100),
    "baseline": Schedule(1000, rate=3e-4, warmup=50, decay=0.4, ema=0.995),
    "eye": Schedule(800, rate=1e-3, warmup=50, decay=0.5, ema=0.99),
}


class Model(nn.Module):
    """The network and the text encoder that it learns with."""

    def __init__(self) -> None:
        super().__init__()
        self.network = channels_last(new_network())
        self.text = PhotoText()

    def told(self, captions: list[str]) -> Tensor:
        """Captions to what the network is told (B, WIDTH)."""
        ids, weights = zip(*map(PhotoTokenizer().encode, captions), strict=True)
        return self.text(torch.tensor(ids), torch.tensor(weights))[1]


def build_teacher(work: Path) -> Model:
    """Flow matching on patches: x_t = (1 - t) x0 + t n, the network predicts n - x0."""
    torch.manual_seed(41)
    model = Model()

    def loss(generator: torch.Generator) -> Tensor:
        drawn = [photographs.patch(generator, SIDE) for _ in range(BATCH)]
        x0 = torch.stack([image for image, _ in drawn]) * 2 - 1
        told = model.told([photographs.said(generator, chosen) for _, chosen in drawn])
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(1.2 * torch.randn(BATCH, generator=generator))
        level = t[:, None, None, None]
        x = ((1 - level) * x0 + level * noise).to(memory_format=torch.channels_last)
        return (model.network(x, 1000 * t, told) - (noise - x0)).square().mean()

    return train("teacher", model, loss, SCHEDULES["teacher"], 41, work)


def build_pairs(work: Path) -> dict[str, Tensor]:
    """Patches and their degraded twins, drawn once."""
    path = work / "pairs.safetensors"
    if not path.exists():
        files.write_atomically(path, files.tensors(photographs.pairs(PAIRS, 42)))
    return load_file(path)


def drawn_pairs(rows: dict[str, Tensor], generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """(clean, degraded) latents (count, 3, SIDE, SIDE) and captions, cut and turned at random."""
    chosen = torch.randint(len(rows["clean"]), (count,), generator=generator)
    both = torch.stack([rows["clean"][chosen], rows["degraded"][chosen]], 1).float() / 127.5 - 1
    cut = []
    for pair in both:
        top, left, way = (int(torch.randint(n, (), generator=generator)) for n in (*[pair.shape[-1] - SIDE + 1] * 2, 8))
        cut.append(photographs.turned(pair[..., top : top + SIDE, left : left + SIDE], way))
    clean, degraded = (part.contiguous(memory_format=torch.channels_last) for part in torch.stack(cut, 1))
    return clean, degraded, [photographs.said(generator, int(which)) for which in rows["photograph"][chosen]]


def regression_loss(model: Model, rows: dict[str, Tensor]):
    """Mean distance of the one-call output from the clean patch, as a function of a generator."""

    def loss(generator: torch.Generator) -> Tensor:
        clean, degraded, captions = drawn_pairs(rows, generator, BATCH)
        velocity = model.network(degraded, torch.full((BATCH,), 1000 * LEVEL), model.told(captions))
        error = degraded - LEVEL * velocity - clean
        return (error.square() + 1e-4).sqrt().mean()

    return loss


def build_regression(work: Path) -> Model:
    """The restorer's start: from the teacher's weights, regression alone."""
    model = build_teacher(work)
    model.text.requires_grad_(False)
    return train("regression", model, regression_loss(model, build_pairs(work)), SCHEDULES["regression"], 43, work)


class Restoring(nn.Module):
    """The student and its fake score, which learn at once, beside the frozen teacher."""

    def __init__(self, regression: Model, teacher: Model):
        super().__init__()
        self.student = regression
        self.fake = copy.deepcopy(teacher.network)
        self.critic = critic()
        self.teacher = [teacher.requires_grad_(False)]  # in a list, so that it is no part of what is trained

    def loss(self, rows: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Of one batch; every part gives its gradient to its own network alone."""
        teacher = self.teacher[0]
        clean, degraded, captions = drawn_pairs(rows, generator, BATCH)
        told = self.student.told(captions)
        x = degraded - LEVEL * self.student.network(degraded, torch.full((BATCH,), 1000 * LEVEL), told)
        regression = ((x - clean).square() + 1e-4).sqrt().mean()
        # The networks see patches of four pixels, and what repeats with them they would not miss: so the others look at
        # the student's picture from another corner every time.
        top, left = (int(torch.randint(photo_network.STRIDE, (), generator=generator)) for _ in range(2))
        side = SIDE - photo_network.STRIDE
        x, clean = (part[..., top : top + side, left : left + side] for part in (x, clean))
        noise = torch.randn(x.shape, generator=generator)
        t = LOW + (HIGH - LOW) * torch.rand(BATCH, generator=generator)
        level = t[:, None, None, None]
        with torch.no_grad():
            noisy = (1 - level) * x + level * noise
            real = noisy - level * teacher.network(noisy, 1000 * t, told)
            fake = noisy - level * self.fake(noisy, 1000 * t, told)
            scale = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-3)
            towards = x - (fake - real) / scale
        features = feature_distance(seen(teacher, x, told), seen(teacher, clean, told)).mean()
        matching = 0.5 * (x - towards).square().mean()
        noisy = (1 - level) * x.detach() + level * noise
        fitted = (self.fake(noisy, 1000 * t, told) - (noise - x.detach())).square().mean()
        frozen = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        fooled = -torch.func.functional_call(self.critic, frozen, (x,)).mean()
        told_apart = F.relu(1 - self.critic(clean)).mean() + F.relu(1 + self.critic(x.detach())).mean()
        return regression + FEATURES * features + MATCHING * matching + CRITIC * fooled + fitted + told_apart


def critic() -> nn.Module:
    """Says of each neighbourhood of a picture (B, 3, H, W) whether it is a photograph's (hinge loss)."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 48, 1), (48, 96, 2), (96, 128, 2), (128, 128, 1)):
        layers += [spectral_norm(nn.Conv2d(before, after, 4, stride, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(128, 1, 3, padding=1)))


def seen(teacher: Model, x: Tensor, told: Tensor) -> list[Tensor]:
    """The teacher's features of pictures (B, 3, H, W) that it is told are nearly clean."""
    found: list[Tensor] = []
    network = teacher.network
    layers = [network.before[-1], network.middle[0], network.middle[-1]]
    hooks = [layer.register_forward_hook(lambda _m, _i, out: found.append(out)) for layer in layers]
    try:
        network(x, torch.full((len(x),), 1000 * LOOKS_AT), told)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def build_restorer(work: Path) -> Model:
    """See the module."""
    torch.manual_seed(44)
    rows, both = build_pairs(work), Restoring(build_regression(work), build_teacher(work))
    train("restorer", both, lambda generator: both.loss(rows, generator), SCHEDULES["restorer"], 44, work)
    return both.student


def build_baseline(work: Path) -> Model:
    """Regression alone, as many steps."""
    model, rows = build_regression(work), build_pairs(work)
    return train("baseline", model, regression_loss(model, rows), SCHEDULES["baseline"], 44, work)


def build_eye(work: Path) -> Eye:
    """What judges the restorers; it sees as many clean patches as degraded ones."""
    torch.manual_seed(45)
    rows, eye = build_pairs(work), channels_last(Eye(len(photographs.TRAINING)))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(rows["clean"]), (4 * BATCH,), generator=generator)
        clean = torch.rand(len(chosen), generator=generator) < 0.5
        seen = torch.where(clean[:, None, None, None], rows["clean"][chosen], rows["degraded"][chosen]).float() / 255
        top, left, way = (int(torch.randint(n, (), generator=generator)) for n in (*[seen.shape[-1] - SIDE + 1] * 2, 8))
        cut = photographs.turned(seen[..., top : top + SIDE, left : left + SIDE], way)
        which, good = eye.answers(cut.movedim(1, -1))
        return F.cross_entropy(which, rows["photograph"][chosen]) + F.binary_cross_entropy_with_logits(
            good, clean.float()
        )

    return train("eye", eye, loss, SCHEDULES["eye"], 45, work)


def between(work: Path) -> Model:
    """What is shipped: weights between the baseline's and the restorer's."""
    model, sharp = build_baseline(work), build_restorer(work).state_dict()
    model.load_state_dict({name: torch.lerp(value, sharp[name], SHARE) for name, value in model.state_dict().items()})
    return model


def export(work: Path, out: Path) -> None:
    """Write restorer, baseline and eye in fp16 where the loader looks for them."""
    made = {
        loader.PHOTOGRAPHS: between(work).state_dict(),
        loader.PHOTO_EYE: build_eye(work).state_dict(),
    }
    notes = {"modelspec.author": "Retort", "modelspec.license": "Apache-2.0"}
    for name, state in made.items():
        small = {key: value.half() for key, value in state.items()}
        files.write_atomically(out / name, files.tensors(small, notes))


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/photos"), help="folder of resumable training state")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder that receives the weights")
    actions = {
        "teacher": build_teacher,
        "pairs": build_pairs,
        "regression": build_regression,
        "restorer": build_restorer,
        "baseline": build_baseline,
        "eye": build_eye,
    }
    parser.add_argument("--only", choices=actions, help="run one step (and what it needs)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.only:
        actions[options.only](options.work)
        return
    for action in actions.values():
        action(options.work)
    export(options.work, options.out)


if __name__ == "__main__":
    main()
