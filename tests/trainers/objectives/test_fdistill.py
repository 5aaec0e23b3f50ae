"""f-distill against closed forms: its gradient, where training ends, and the normalisation of the ratio."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.trainers.objectives.dmd2 import DMD2, DMD2Config
from retort.trainers.objectives.fdistill import BINS, WEIGHTS, Averages, FDistill, FDistillConfig
from retort.trainers.objectives.parts.contract import Batch, Draws, alpha_sigma

SCALAR = (1, 1, 1)
# Nothing between the exact ratio and h, and a GAN too faint to be felt.
BARE = {
    "normalise": False, "cfg": 1.0, "gan_weight": 1e-12, "ratio_low": 1e-6, "ratio_high": 1e6,
    "ratio_normalise": False,
}  # fmt: skip

# dD_f / db, dD_f / dA of p = N(-2, 1/4) / 2 + N(2, 1/4) / 2 and a student with b = 0.7, A = 1.4 at a = 0.6, s = 0.8.
GRADIENTS = {
    "reverse_kl": (0.091345, -0.173733),
    "forward_kl": (0.187277, -0.278577),
    "jensen_shannon": (0.059568, -0.099273),
    "softened_reverse_kl": (0.031777, -0.074459),
    "squared_hellinger": (0.032109, -0.052813),
    "jeffreys": (0.278622, -0.452310),
    "neyman": (0.105328, -0.273878),
    "pearson": (0.901347, -1.242127),
}
# Where the student's A settles at b = 0, levels t = 20, 40, .. 960, matching in x0 without the normaliser.
SETTLES_AT = {
    "reverse_kl": 1.922,
    "softened_reverse_kl": 1.866,
    "squared_hellinger": 2.023,
    "jensen_shannon": 2.039,
    "jeffreys": 1.973,
    "forward_kl": 4.25**0.5,
}


class Exact(FDistill):
    """With the true density ratio in the discriminator's place."""

    def critic_and_x0(self, batch, x_t, sigma):
        with torch.no_grad():
            x0 = self.denoiser.predict_x0(x_t, sigma, batch.cond)
        return self.critic(batch, x_t, sigma), x0

    def critic(self, batch, x_t, sigma):
        return self.denoiser.log_ratio(x_t, sigma)


def bimodal(exact, path):
    return exact(path, std=0.5, modes=(-2.0, 2.0))


def student_gradient(objective, batch) -> tuple[float, float]:
    objective.denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"].grad = None
    loss = next(iter(objective.losses(batch, 0)))
    assert loss.player == "student"
    with objective.denoiser.adapter("student"):
        loss.value.backward()
    return objective.denoiser.gradient()


def batch_of(count: int, draws, shape=SCALAR) -> Batch:
    return Batch(draws=draws, shape=shape, cond=None, latents=torch.zeros(count, *shape))


@pytest.mark.parametrize("divergence", list(GRADIENTS))
@pytest.mark.parametrize("path", [VE, NoisePath("FLOW", 2.0), VP], ids=["VE", "FLOW", "VP"])
def test_the_gradient_is_that_of_the_divergence(exact, quadrature, nodes, path, divergence):
    denoiser = bimodal(exact, path)
    denoiser.set_student(1.4, 0.7)
    if path.kind == "FLOW":
        # 1 - t = 0.6 and twice the noise at t = 0.4.
        config = FDistillConfig(divergence=divergence, low=0.4, high=0.4 + 1e-7, **BARE)
    else:
        table = torch.tensor([1.0, 4 / 3])
        denoiser.schedule = SimpleNamespace(sigmas=table, timestep=lambda sigma: (table - sigma).abs().argmin())
        config = FDistillConfig(divergence=divergence, low=0.5, high=1.0, **BARE)
    kind, z, noise = quadrature(Exact, points=81)
    objective = kind(config, denoiser)
    given = {"start": z, "matching noise": noise, "matching level": 0.0}
    batch = batch_of(len(z), nodes(len(z), given))
    a, s = (float(v) for v in alpha_sigma(path, denoiser.levels.drawn(torch.zeros(1), config.low, config.high)))
    assert (a, s) == pytest.approx((0.6, 0.8))
    dA, db = student_gradient(objective, batch)
    # From x0 to scores, and the constant that h's normaliser takes out.
    scale = a**2 / s**2 * float(WEIGHTS[divergence](torch.ones(())))
    assert (db * scale, dA * scale) == pytest.approx(GRADIENTS[divergence], abs=1e-4)


def settled(exact, quadrature, nodes, config, path=VE) -> float:
    """A > 0 at b = 0 where the expected gradient over all levels changes sign."""
    denoiser = bimodal(exact, path)
    levels = 48
    kind, z, noise = quadrature(Exact, points=37, reach=5.5, levels=levels)
    objective = kind(config, denoiser)
    t = torch.arange(20, 961, 20).repeat_interleave(37 * 37)
    given = {"start": z, "matching noise": noise, "matching level": (t - 20 + 0.5) / 960}
    batch = batch_of(len(z), nodes(len(z), given))
    if path == VE:
        sigma = denoiser.levels.drawn(given["matching level"], 0.02, 0.98)
        assert torch.equal(sigma, denoiser.schedule.sigmas[t])
    low, high = 1.5, 2.5
    for _ in range(9):
        middle = (low + high) / 2
        denoiser.set_student(middle, 0.0)
        dA, db = student_gradient(objective, batch)
        assert abs(db) < 1e-3
        low, high = (middle, high) if dA < 0 else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("divergence", list(SETTLES_AT))
def test_the_student_settles_where_the_divergence_says(exact, quadrature, nodes, divergence):
    found = settled(exact, quadrature, nodes, FDistillConfig(divergence=divergence, **BARE))
    assert found == pytest.approx(SETTLES_AT[divergence], abs=0.01 if divergence != "forward_kl" else 0.005)


def test_forward_kl_matches_moments_on_flow_too(exact, quadrature, nodes):
    """Its optimum is the data's variance at every level and under every weight, so also on another path."""
    config = FDistillConfig(divergence="forward_kl", **BARE)
    assert settled(exact, quadrature, nodes, config, FLOW) == pytest.approx(SETTLES_AT["forward_kl"], abs=0.005)


# ---- the ratio's normalisation ------------------------------------------------------------------


def objective(exact, **settings) -> FDistill:
    return FDistill(FDistillConfig(**{"cfg": 1.0, "ratio_low": 1e-3, "ratio_high": 1e3} | settings), exact(VE))


def weigh(made, logits, uniform):
    g, metrics = made.weighted(torch.ones(len(logits), *SCALAR), torch.as_tensor(logits), torch.as_tensor(uniform))
    return g.flatten(), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("divergence", list(WEIGHTS))
@pytest.mark.parametrize("normalised", [True, False])
def test_a_constant_ratio_weighs_nothing(exact, divergence, normalised):
    made = objective(exact, divergence=divergence, ratio_normalise=normalised)
    uniform = torch.linspace(0, 0.999, 40)
    for step in range(2):
        # The bins first, then h, which is taken after them.
        _, metrics = weigh(made, torch.full((40,), 1.3), uniform)
        made.after_step(metrics, step)
    if not normalised:
        torch.testing.assert_close(weigh(made, torch.full((40,), 1.3), uniform)[0], torch.ones(40), rtol=1e-4, atol=0)
        return
    torch.testing.assert_close(made.bins.means(), torch.full((BINS,), 1.3).exp())
    for step in range(200):
        made.after_step(weigh(made, torch.full((40,), 1.3), uniform)[1], step)
    torch.testing.assert_close(weigh(made, torch.full((40,), 1.3), uniform)[0], torch.ones(40), rtol=1e-4, atol=0)


def test_one_sample_at_a_time_still_has_a_weight(exact):
    made = objective(exact, divergence="forward_kl", ratio_normalise=False)
    draw, weights, ratios = torch.Generator().manual_seed(0), [], []
    for step in range(300):
        logit = torch.randn(1, generator=draw)
        g, metrics = weigh(made, logit, torch.rand(1, generator=draw))
        made.after_step(metrics, step)
        weights.append(float(g))
        ratios.append(float(logit.exp()))
    kept = torch.tensor([weights[100:], ratios[100:]]).log()
    assert float(kept[0].std()) > 0.5
    assert float(torch.corrcoef(kept)[0, 1]) > 0.9


def test_weights_follow_their_samples_and_not_the_batch(exact):
    made = objective(exact, divergence="jensen_shannon")
    made.bins.update(torch.linspace(1, 3, BINS), torch.ones(BINS))
    made.mean.update(torch.tensor([0.4]), torch.ones(1))
    logits, uniform = torch.randn(16), torch.rand(16)
    whole, _ = weigh(made, logits, uniform)
    order = torch.randperm(16)
    assert torch.equal(weigh(made, logits[order], uniform[order])[0], whole[order])
    alone = torch.cat([weigh(made, logits[i : i + 1], uniform[i : i + 1])[0] for i in range(16)])
    assert torch.equal(alone, whole)


def test_bins_that_saw_nothing_stay(exact):
    made = objective(exact)
    made.after_step(weigh(made, torch.full((4,), 0.5), torch.tensor([0.05, 0.05, 0.31, 0.99]))[1], 0)
    changed = made.bins.means() != 1
    assert changed.tolist() == [i in (0, 3, 9) for i in range(BINS)]
    torch.testing.assert_close(made.bins.means()[changed], torch.full((3,), 0.5).exp())
    before = made.bins.state.clone()
    made.after_step(weigh(made, torch.full((1,), -0.5), torch.tensor([0.05]))[1], 1)
    assert torch.equal(made.bins.state[:, 1:], before[:, 1:])
    # Four samples at 0.5 weigh as the two of this bin, the later one as a tenth of itself.
    seen = torch.tensor([0.9 * 0.5, 1.0])
    want = (seen * torch.tensor([0.5, -0.5]).exp()).sum() / seen.sum()
    torch.testing.assert_close(made.bins.means()[0], want)


def test_steps_without_the_student_leave_the_means_alone(exact):
    made = objective(exact)
    made.after_step({"score_loss": 1.0}, 0)
    assert not any(bool(b.any()) for b in made.buffers().values())


def test_the_means_are_restored_in_place(exact):
    made, other = objective(exact), objective(exact)
    made.after_step(weigh(made, torch.randn(8), torch.rand(8))[1], 0)
    for name, value in other.buffers().items():
        value.copy_(made.buffers()[name])
    assert torch.equal(other.bins.means(), made.bins.means())
    assert torch.equal(other.mean.means(), made.mean.means())


def test_an_average_is_unbiased_from_its_first_value():
    kept = Averages(2, 7.0, 0.9)
    assert kept.means().tolist() == [7.0, 7.0]
    kept.update(torch.tensor([6.0, 0.0]), torch.tensor([2.0, 0.0]))
    assert kept.means().tolist() == pytest.approx([3.0, 7.0])


def test_saturation_is_reported(exact):
    made = objective(exact, ratio_low=0.1, ratio_high=20.0)
    _, metrics = weigh(made, torch.tensor([0.0, 50.0, -50.0, 3.5]), torch.rand(4))
    assert metrics["ratio_clipped"] == pytest.approx(0.75)
    assert metrics["weight_min"] <= metrics["weight_mean"] <= metrics["weight_max"]


# ---- as a whole -------------------------------------------------------------------------------------


def test_reverse_kl_is_dmd2(tiny):
    # h is 1 there, and untrained heads do not pull.
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    batch = Batch(draws=Draws(0, 0, (0, 1)), shape=(3, 4, 4), cond={"mean": torch.ones(2)},
                  uncond={"mean": torch.zeros(2)}, latents=x)  # fmt: skip
    made = FDistill(FDistillConfig(divergence="reverse_kl"), tiny())
    made.prepare([batch])
    made.discriminator.double()
    mine, _ = made._gradient(batch, x, 1.0)
    plain, _ = DMD2(DMD2Config(), tiny())._gradient(batch, x, 1.0)
    torch.testing.assert_close(mine, plain, rtol=2e-6, atol=1e-12)


def test_eight_samples_are_eight_times_one(tiny):
    found = []
    for split in ([tuple(range(8))], [(i,) for i in range(8)]):
        denoiser = tiny()
        made = FDistill(FDistillConfig(divergence="forward_kl"), denoiser)
        made.bins.update(torch.linspace(1, 3, BINS), torch.ones(BINS))
        latents = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(9))
        totals: dict[str, float] = {}
        for part in split:
            told = [{"mean": torch.full((len(part),), m)} for m in (1.0, 0.0)]
            batch = Batch(draws=Draws(3, 5, part), shape=(3, 4, 4), cond=told[0], uncond=told[1],
                          latents=latents[list(part)])  # fmt: skip
            if made.discriminator is None:
                made.prepare([batch])
                made.discriminator.double()
                for head in made.discriminator.heads:
                    torch.nn.init.ones_(head.whole[-1].weight)
            for loss in made.losses(batch, 0):
                with denoiser.adapter(loss.player):
                    (loss.value * len(part) / 8).backward()
                for key, value in loss.metrics.items():
                    totals[key] = totals.get(key, 0.0) + float(value) * len(part) / 8
        made.after_step(totals, 0)
        found.append([p.grad for n in ("student", "fake") for p in denoiser.adapters.parameters(n).values()])
        found[-1] += list(made.buffers().values())
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"gan_weight": 0.0}, "gan_weight"), ({"divergence": "kl"}, "divergence"), ({"ratio_low": 0.0}, "ratio_low"),
        ({"ratio_high": 0.5}, "ratio_high"), ({"ratio_ema": 1.0}, "ratio_ema"), ({"steps": 0}, "steps"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        FDistillConfig(**settings)
