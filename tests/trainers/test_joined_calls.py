"""Several calls of the network as one: by one adapter, by several, and of a network that is left early."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from retort.sampling.path import FLOW, VE
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule
from retort.trainers import checkpointing
from retort.trainers.adapters import LoraConfig
from retort.trainers.denoiser import Denoiser
from retort.trainers.objectives.align_prop import AlignProp, AlignPropConfig
from retort.trainers.objectives.di_star import DIStar, DIStarConfig
from retort.trainers.objectives.dmd2 import DMD2, DMD2Config
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.fdistill import FDistill, FDistillConfig
from retort.trainers.objectives.few_shot import FewShot, FewShotConfig
from retort.trainers.objectives.flow_grpo import FlowGRPO, FlowGRPOConfig
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from retort.trainers.objectives.instarevive import InstaRevive, InstaReviveConfig
from retort.trainers.objectives.mapo import MaPO, MaPOConfig
from retort.trainers.objectives.parts.contract import Asked, Batch, Draws
from retort.trainers.objectives.parts.discriminator import Discriminator
from retort.trainers.objectives.smpo import SmPO, SmPOConfig
from retort.trainers.objectives.spo import SPO, SPOConfig
from retort.trainers.objectives.tdm import TDM, TDMConfig
from retort.trainers.streaming import Ring

WIDTH, SHAPE = 64, (4, 8, 8)


def attention_work(q, k, v, *_, out_shape=None, **__):
    return sdpa_flop_count(q, k, v)


def attention_backward_work(gradient, q, k, v, *_, out_shape=None, **__):
    return sdpa_backward_flop_count(gradient, q, k, v)


# The kernels that a CPU takes, which torch's counter does not know.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_work,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_work,
}


class Block(nn.Module):
    """Attention and a perceptron, told of the prompt and the level by what is added."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        """(B, N, C) -> the same."""
        q, k, v = self.qkv(nn.functional.layer_norm(x, (WIDTH,))).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(nn.functional.layer_norm(x, (WIDTH,)))))


class Transformer(nn.Module):
    """Blocks over the places of a latent and the tokens of a prompt."""

    def __init__(self, folded=False, blocks=8):
        super().__init__()
        self.enter, self.leave, self.time = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.folded, self.visits = folded, 0

    def forward(self, x, sigma, text):
        """(B, 4, H, W), (B,), (B, L, C) -> (B, 4, H, W)."""
        h = torch.cat([text, self.enter(x.flatten(2).transpose(1, 2))], 1) + self.time(sigma[:, None])[:, None]
        for block in self.blocks:
            self.visits += 1
            h = block(h.flatten(0, 1)[None]).view(h.shape) if self.folded else block(h)
        return self.leave(h[:, text.shape[1] :]).transpose(1, 2).reshape(x.shape)


class Tokens(Denoiser):
    """A flow, or an eps network, whose conditions are lists of prompts (1, L, C)."""

    def __init__(self, dtype=torch.float32, folded=False, blocks=8, adapters=("student", "fake"), path=FLOW):
        torch.manual_seed(0)
        network = Transformer(folded, blocks).to(dtype)
        kind = (FLOW, FlowSchedule(), "flow") if path is FLOW else (VE, DiscreteSchedule(), "eps")
        super().__init__(network, *kind, torch.device("cpu"))
        self.dtype, self.calls = dtype, 0
        for seed, name in enumerate(adapters):
            self.adapters.add(name, LoraConfig(rank=2, targets="blocks*"), seed)
            for key, weight in self.adapters.parameters(name).items():
                if "lora_B" in key:
                    nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(seed + 1))

    def join(self, conds):
        """The prompts' list."""
        return list(conds)

    def together(self, conds):
        """One list, where the prompts are of one length."""
        whole = [text for cond in conds for text in cond]
        return whole if len({text.shape for text in whole}) == 1 else None

    def chosen(self, cond, rows):
        """Those prompts."""
        return [cond[row] for row in rows]

    def call(self, x, sigma, cond):
        """x0 by what the network predicts."""
        self.calls += 1
        shown = x if self.path is FLOW else x / (1 + sigma.square()).sqrt().view(-1, 1, 1, 1)
        told = sigma if self.path is FLOW else sigma.log()
        v = self.network(shown.to(self.dtype), told.to(self.dtype), torch.cat(cond).to(self.dtype))
        return x - sigma.view(-1, 1, 1, 1) * v


def text(count, seed=0, length=5):
    return list(torch.randn(count, 1, length, WIDTH, generator=torch.Generator().manual_seed(seed)))


def batch_of(count=2, step=0, columns=()):
    draws = Draws(3, step, tuple(range(count)))
    more = {"loser": draws.normal("loser", SHAPE), "strength": torch.ones(count), "degraded": draws.normal("d", SHAPE)}
    return Batch(
        draws, SHAPE, text(count), text(count, 1), draws.normal("latents", SHAPE), ("",) * count,
        {name: more[name] for name in columns},
    )  # fmt: skip


def asked(count=2):
    draws = Draws(0, 0, tuple(range(count)))
    return [
        Asked(draws.normal(f"x {i}", SHAPE), draws.uniform(f"s {i}", 0.1, 0.9), text(count, i)) for i in range(3)
    ]  # fmt: skip


# ---- calls -------------------------------------------------------------------------------------------


def test_rows_of_three_networks_are_three_calls():
    denoiser, calls, adapters = Tokens(), asked(), ["fake", None, "student"]
    with torch.no_grad():
        together = denoiser.predict_each(calls, adapters)
        assert denoiser.calls == 1
        denoiser.most_places = 0
        apart = denoiser.predict_each(calls, adapters)
    assert denoiser.calls == 4 and denoiser.adapters.current is None
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    assert not torch.allclose(apart[0], apart[2], atol=1e-3)
    # Nothing of the mixture stays: hooks, and adapters that are on.
    assert all(layer.disable_adapters and not layer._forward_pre_hooks for layer in denoiser.adapters._layers.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision_agree_to_its_rounding(dtype):
    denoiser = Tokens(dtype)
    with torch.no_grad():
        together = denoiser.predict_each(asked(), ["fake", None, "student"])
        denoiser.most_places = 0
        apart = denoiser.predict_each(asked(), ["fake", None, "student"])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.03)


def test_an_adapter_on_some_layers_alone_takes_part():
    denoiser = Tokens(adapters=("student",))
    denoiser.adapters.add("narrow", LoraConfig(rank=3, targets="*qkv"), 5)
    for weight in denoiser.adapters.parameters("narrow").values():
        nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        together = denoiser.predict_each(asked(), ["narrow", "student", None])
        denoiser.most_places = 0
        apart = denoiser.predict_each(asked(), ["narrow", "student", None])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_calls_of_one_adapter_share_a_pass_with_its_gradient():
    denoiser = Tokens()
    found = []
    for most in (denoiser.most_places, 0):
        denoiser.most_places = most
        with denoiser.adapter("student"):
            sum(x0.square().sum() for x0 in denoiser.predict_each(asked())).backward()
        weights = denoiser.adapters.parameters("student").values()
        found.append([weight.grad.clone() for weight in weights])
        for weight in weights:
            weight.grad = None
    assert denoiser.calls == 1 + 3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_unlike_adapters_never_share_a_pass_with_gradients():
    denoiser = Tokens()
    denoiser.predict_each(asked(), ["fake", None, None])
    assert denoiser.calls == 2
    with pytest.raises(RuntimeError, match="only without gradients"), denoiser.adapters.rows(["fake", None]):
        pass


def test_prompts_of_unlike_length_and_large_calls_stand_alone():
    denoiser = Tokens()
    calls = asked()
    calls[1] = calls[1]._replace(cond=text(2, 1, length=7))
    with torch.no_grad():
        found = denoiser.predict_each(calls, ["fake", None, "student"])
        assert denoiser.calls == 2
        for one, name, x0 in zip(calls, ("fake", None, "student"), found, strict=True):
            with denoiser.adapter(name):
                torch.testing.assert_close(denoiser.predict_x0(*one), x0, rtol=0, atol=2e-6)
    denoiser.most_places = 2 * 64 - 1
    assert denoiser.joined(asked()) is None
    denoiser.most_places = 2 * 64
    assert len(denoiser.joined(asked()).x) == 6


def test_a_network_that_folds_its_batch_runs_its_adapters_one_after_another():
    denoiser = Tokens(folded=True)
    with torch.no_grad():
        found = denoiser.predict_each(asked(), ["fake", None, None])
        assert not denoiser.adapters.mixes and denoiser.adapters.current is None
        denoiser.calls = 0
        again = denoiser.predict_each(asked(), ["fake", None, None])
    assert denoiser.calls == 2
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_features_leave_the_network_behind_the_last_one():
    denoiser = Tokens()
    x, sigma, cond = asked()[0]
    seen, blocks = [], [module for _, module in checkpointing.blocks(denoiser.network)]
    hooks = [blocks[i].register_forward_hook(lambda module, args, output: seen.append(output)) for i in (4, 6)]
    denoiser.predict_x0(x, sigma, cond)
    for hook in hooks:
        hook.remove()
    denoiser.network.visits = 0
    found = denoiser.features(x, sigma, cond)
    assert denoiser.network.visits == 7
    assert all(torch.equal(one, other) for one, other in zip(found, seen, strict=True))
    assert not any(block._forward_hooks for block in blocks)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_features_and_x0_of_one_pass_are_those_of_two(checkpoints):
    denoiser = Tokens()
    if checkpoints:
        checkpointing.enable(denoiser.network)
    x, sigma, cond = asked()[0]

    def pulled(made):
        leaf = x.clone().requires_grad_()
        features = made(leaf)
        return features, torch.autograd.grad(sum(part.square().sum() for part in features), leaf)[0]

    with denoiser.adapter("fake"):
        denoiser.network.visits = 0
        both = []
        found, pull = pulled(lambda leaf: both.append(denoiser.features_and_x0(leaf, sigma, cond)) or both[0][0])
        assert denoiser.network.visits == 8 and torch.is_grad_enabled()
        separate, wanted = pulled(lambda leaf: denoiser.features(leaf, sigma, cond))
        assert not both[0][1].requires_grad and torch.equal(both[0][1], denoiser.predict_x0(x, sigma, cond))
    assert all(torch.equal(one, other) for one, other in zip(found, separate, strict=True))
    assert torch.equal(pull, wanted) and bool(pull.any())
    with torch.no_grad():
        denoiser.features_and_x0(x, sigma, cond)
        assert not torch.is_grad_enabled()


# ---- methods: as if every call were made by itself ----------------------------------------------------


def score(latents, prompts, batch):
    return -latents.square().flatten(1).mean(1)


METHODS = {
    "dmd2": (DMD2, DMD2Config(steps=4, cfg=3.0, ratio=1), ()),
    "decoupled": (DMD2, DMD2Config(steps=2, cfg=3.0, ratio=1, decoupled=True), ()),
    "gan": (DMD2, DMD2Config(steps=4, cfg=3.0, ratio=1, gan_weight=0.1), ()),
    "gan on fake": (DMD2, DMD2Config(steps=4, cfg=3.0, ratio=1, gan_weight=0.1, gan_on="fake"), ()),
    "f_distill": (FDistill, FDistillConfig(steps=4, cfg=3.0, ratio=1, gan_weight=0.1), ()),
    "f_distill on fake": (FDistill, FDistillConfig(steps=4, ratio=1, gan_weight=0.1, gan_on="fake"), ()),
    "f_distill decoupled": (FDistill, FDistillConfig(steps=4, ratio=1, gan_weight=0.1, decoupled=True), ()),
    "di_star": (DIStar, DIStarConfig(steps=4, cfg=3.0, ratio=1, alpha_rew=0.1), ()),
    "tdm": (TDM, TDMConfig(steps=4), ()),
    "few_shot": (FewShot, FewShotConfig(), ()),
    "dpo": (DPO, DPOConfig(beta=10.0), ("loser",)),
    "smpo": (SmPO, SmPOConfig(beta=1.0, inversion_steps=2), ("loser", "strength")),
    "mapo": (MaPO, MaPOConfig(scale=10.0), ("loser",)),
    "align_prop": (AlignProp, AlignPropConfig(steps=4, cfg=3.0, truncation="fixed", last=2), ()),
    "instarevive": (InstaRevive, InstaReviveConfig(cfg=3.0), ("degraded",)),
    "flow_grpo": (FlowGRPO, FlowGRPOConfig(steps=3, cfg=3.0, group=3, clip=1.0, updates=1), ()),
    "spo": (SPO, SPOConfig(steps=6, cfg=3.0, step="sde", trained=2, beta=1.0), ()),
}


def trained(name, batch, joins, blocks=True, streamed=None, keeps=None, path=FLOW):
    """Gradients of every player, and the denoiser; streamed: how many of its blocks are."""
    (kind, config, _), denoiser = METHODS[name], Tokens(path=path)
    if not joins:
        denoiser.most_places = 0
    denoiser.keeps_graphs = keeps
    objective = kind(config, denoiser)
    if kind in (AlignProp, FlowGRPO, SPO, DIStar):
        objective.reward = score
    objective.prepare([batch])
    judge = objective.discriminator if isinstance(objective, DMD2) else None
    for head in [] if judge is None else judge.heads:
        nn.init.normal_(head.whole[-1].weight, generator=torch.Generator().manual_seed(4))
    ring = Ring(denoiser.network, denoiser.device, streamed) if streamed else None
    if blocks:
        checkpointing.enable(denoiser.network)
    for loss in objective.losses(batch, 0):
        with denoiser.adapter(loss.player):
            loss.value.backward()
        assert denoiser.adapters.current is None
    found = {}
    for player in objective.players.values():
        modules = {} if player.modules is None else dict(player.modules.named_parameters())
        for key, weight in {**denoiser.adapters.parameters(player.adapter), **modules}.items():
            found[player.adapter, key] = weight.grad
    assert ring is None or ring.copies > 0
    return found, denoiser


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_one_whose_calls_are_made_by_themselves(name):
    batch = batch_of(columns=METHODS[name][2])
    (joined, one), (apart, other), (plain, _) = (
        trained(name, batch, *how) for how in ((True, True), (False, True), (True, False))
    )
    assert one.calls < other.calls or name == "few_shot"  # none of whose calls join
    assert any(gradient is not None and bool(gradient.any()) for gradient in joined.values())
    for key, gradient in joined.items():
        if gradient is None:
            assert apart[key] is None and plain[key] is None
            continue
        most = float(gradient.abs().max())
        torch.testing.assert_close(apart[key], gradient, rtol=0, atol=2e-4 * most + 1e-9)
        torch.testing.assert_close(plain[key], gradient, rtol=0, atol=2e-4 * most + 1e-9)


@pytest.mark.parametrize("streamed", [5])
@pytest.mark.parametrize("name", METHODS)
def test_a_streamed_base_gives_the_same_step_to_the_bit(name, streamed):
    """With rows of several adapters, graphs that wait and a network that is left early."""
    batch = batch_of(columns=METHODS[name][2])
    (resident, _), (moved, _) = (trained(name, batch, True, streamed=count) for count in (None, streamed))
    for key, gradient in resident.items():
        assert moved[key] is gradient is None or torch.equal(moved[key], gradient)


# Those whose graphs can wait.
WAIT = [name for name, (kind, config, _) in METHODS.items() if kind.graphs_wait(config)]


@pytest.mark.parametrize(("blocks", "streamed"), [(True, None), (True, 5), (False, None)])
@pytest.mark.parametrize("path", [FLOW, VE], ids=["FLOW", "VE"])
@pytest.mark.parametrize("name", WAIT)
def test_graphs_that_wait_spare_calls_and_change_nothing(name, path, blocks, streamed):
    batch = batch_of(columns=METHODS[name][2])
    (kept, one), (again, other), (default, usual) = (
        trained(name, batch, True, blocks, streamed, keeps, path) for keeps in (True, False, None)
    )
    if name == "align_prop":  # whose calls are checkpointed themselves: they are made again in the backward pass
        assert one.calls < other.calls == usual.calls
    else:
        assert one.calls < other.calls and usual.calls == (one if blocks else other).calls
    assert any(gradient is not None and bool(gradient.any()) for gradient in kept.values())
    for key, gradient in kept.items():
        for found in (again, default):
            assert found[key] is gradient is None or torch.equal(found[key], gradient)


def test_methods_whose_graphs_can_wait():
    assert set(METHODS) - set(WAIT) == {
        "dmd2", "decoupled", "dpo", "smpo", "mapo", "instarevive", "flow_grpo", "spo",
    }  # fmt: skip
    assert not AlignProp.graphs_wait(AlignPropConfig(truncation="fixed", last=1))
    assert not AlignProp.graphs_wait(AlignPropConfig(checkpoint=False))
    assert InstaRevive.graphs_wait(InstaReviveConfig(feature_weight=1.0))
    assert not DIStar.graphs_wait(DIStarConfig(distance="kl"))


class Apart(FDistill):
    """One that lets the discriminator look by a pass of its own."""

    def _pull(self, batch, x, sigma, noise, whole=False):
        return super()._pull(batch, x, sigma, noise)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("f_distill")])
def test_the_discriminator_looks_at_the_pass_that_is_matched(monkeypatch, name):
    found, operations = [], []
    for kind in (FDistill, Apart):
        monkeypatch.setitem(METHODS, name, (kind, *METHODS[name][1:]))
        with counting() as counter:
            found.append(trained(name, batch_of(), True)[0])
        operations.append(counter.get_total_flops())
    with counting() as counter, torch.no_grad():
        Tokens().features(*asked()[0])
    # The adapters' part is small.
    assert operations[1] - operations[0] == pytest.approx(counter.get_total_flops(), rel=0.05)
    for key, gradient in found[0].items():
        if gradient is not None:
            most = float(gradient.abs().max())
            torch.testing.assert_close(found[1][key], gradient, rtol=0, atol=2e-4 * most + 1e-9)


# ---- work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "most", "visits"), [(5, None, 5), (7, None, 6), (5, 0, 7)])
def test_visits_of_a_block_in_a_dmd2_step(length, most, visits):
    """Student, fake score with both of the teacher's, student backwards, fake score and it backwards.

    An empty prompt of another length takes a call of its own; with none joined fake score and teacher take three.
    """
    denoiser = Tokens()
    if most is not None:
        denoiser.most_places = most
    checkpointing.enable(denoiser.network)
    seen, block = [], denoiser.network.blocks[4]
    block.up.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    batch = dataclasses.replace(batch_of(), uncond=text(2, 1, length=length))
    objective = DMD2(DMD2Config(steps=1, ratio=1), denoiser)
    for loss in objective.losses(batch, 0):
        with denoiser.adapter(loss.player):
            loss.value.backward()
    assert len(seen) == visits


def counting():
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)


def work(objective, batch):
    """Floating-point operations of a step."""
    with counting() as counter:
        for loss in objective.losses(batch, 0):
            with objective.denoiser.adapter(loss.player):
                loss.value.backward()
    return counter.get_total_flops()


# (settings, limit, name of the draw that chooses the step of the student's grid)
LIMITS = {
    "dmd2": (DMD2Config(steps=4, cfg=3.0, ratio=1), 3.5, "step of the grid"),
    "gan": (DMD2Config(steps=4, cfg=3.0, ratio=1, gan_weight=0.01), 4.6, "step of the grid"),
    "f_distill": (FDistillConfig(steps=4, cfg=3.0, ratio=1, gan_weight=0.01), 4.4, "step of the grid"),
    "tdm": (TDMConfig(steps=4), 3.2, "pick"),
    "dpo": (DPOConfig(), 2.6, ""),
    "align_prop": (AlignPropConfig(steps=20, cfg=4.0, truncation="fixed", last=1), 13.7, ""),
}


class Chosen(Draws):
    """Draws whose student is at the first or the last step of a grid of four."""

    last = False

    def common(self, name):
        return 0.99 * self.last

    def integers(self, name, low, high):
        return torch.full((len(self.indices),), (high - 1) * self.last)


def long_batch(columns=(), last=False):
    """One sample of 12 x 12 places: attention is 28 % of a block's work; in Flux at 1024 px 20 %, in videos half."""
    batch = batch_of(1, columns=columns)
    draws = type("Chosen", (Chosen,), {"last": last})(3, 0, (0,))
    shape = (4, 12, 12)
    more = {name: draws.normal(name, shape) for name in batch.columns}
    return dataclasses.replace(batch, draws=draws, shape=shape, latents=draws.normal("l", shape), columns=more)


@pytest.mark.parametrize("name", LIMITS)
def test_work_of_a_step_over_plain_fine_tunings(name):
    """Of the steps that a draw chooses the work is affine in their number, so the mean is that of first and last."""
    kind, _, columns = METHODS[name]
    config, most, draw = LIMITS[name]
    judged = name in ("gan", "f_distill")
    denoiser = Tokens(blocks=16 if judged else 4)  # many, where the place of the features counts
    checkpointing.enable(denoiser.network)
    plain = work(FlowMatching(FlowMatchingConfig(), denoiser), long_batch())
    objective = kind(config, denoiser)
    if name == "align_prop":
        objective.reward = score
    objective.prepare([long_batch(columns)])
    if judged:
        # As small beside the network as they are beside one of true width.
        objective.discriminator = Discriminator([WIDTH, WIDTH], 0, hidden=8)
    found = [work(objective, long_batch(columns, last)) for last in ((False, True) if draw else (False,))]
    mean = sum(found) / len(found) / plain
    assert mean <= most, f"{name}: {mean:.3f} plain steps"
