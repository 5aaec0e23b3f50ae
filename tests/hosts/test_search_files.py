"""Searches in files: what is read equals what was written, and a broken or hostile file is one clear error."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from retort.graphs.core.sampling import grid
from retort.hosts import api
from retort.hosts.headless import folders
from retort.hosts.headless.folders import Folders
from retort.hosts.headless.noise import NoNoise, RandomNoise
from retort.hosts.noise import StudentTNoise
from retort.hosts.rewards import kinds as rewards
from retort.hosts.search import files as search_files
from retort.nodes.noise_policy import RetortNoisePolicy, RetortPolicyNoise
from retort.nodes.search import METHODS, RetortResumeSearch, RetortTreeSearch
from retort.nodes.search_files import RetortDrawFromSearch, RetortLoadSearch, RetortSaveSearch

STEPS, PROMPT = 4, "a blue seven on yellow paper"
CALLS = 10 * STEPS
DEFAULTS = {name: {i.id: i.default for i in inputs()} for name, inputs in METHODS.items()}


@pytest.fixture(scope="module")
def parts():
    """guider, sigmas, vae, reward."""
    model, clip, vae = api.host.embedded("flow")
    guider = api.host.cfg_guider(model, clip.encode(PROMPT), None, 1.0)
    return guider, grid(model, "simple", STEPS), vae, rewards.make(api.host, "embedded_judge", {"boldness": 1.0})


@pytest.fixture(scope="module")
def tree(parts):
    return search(parts)


@pytest.fixture(autouse=True)
def output(tmp_path):
    with folders.use(Folders(output=tmp_path)):
        yield tmp_path / "retort_searches"


def empty(batch=1):
    return {"samples": torch.zeros(batch, 16, 8, 8)}


def search(parts, name="dts", latent=None, changes=None, **given):
    guider, sigmas, vae, reward = parts
    given = {"calls": CALLS, "prompt": PROMPT, "seed": 3, **given}
    method = {"method": name, **DEFAULTS[name], **(changes or {})}
    return RetortTreeSearch.execute(guider, sigmas, latent or empty(), vae, reward, method, **given).args[2]


def kept(saved, name="a search"):
    """Through a file."""
    return RetortLoadSearch.execute(RetortSaveSearch.execute(saved, name).args[0]).args[0]


def more(parts, saved, **given):
    guider, _, vae, reward = parts
    return RetortResumeSearch.execute(saved, guider, vae, reward, calls=CALLS, **given).args


@pytest.mark.parametrize("name", list(METHODS))
def test_a_search_goes_on_from_its_file_as_from_memory(parts, name, output):
    saved = search(parts, name)
    loaded = kept(saved)
    assert loaded.request.config == saved.request.config and torch.equal(loaded.request.sigmas, saved.request.sigmas)
    assert loaded.request.transition == saved.request.transition and loaded.request.seed == 3
    here, there = more(parts, saved), more(parts, loaded)
    assert torch.equal(here[0]["samples"], there[0]["samples"]) and torch.equal(here[1]["samples"], there[1]["samples"])
    assert here[2].states[0].ledger.calls == there[2].states[0].ledger.calls
    assert [p.name for p in output.iterdir()] == ["a search.safetensors"]


def test_items_masks_and_a_cancelled_batch_are_kept(parts):
    mask = torch.ones(1, 1, 64, 64)
    saved = search(parts, "best_of_n", {"samples": torch.zeros(2, 16, 8, 8), "noise_mask": mask}, keep=2)
    cut = replace(saved, states=(saved.states[0], None))
    loaded = kept(cut)
    assert loaded.states[1] is None and torch.equal(loaded.request.latent["noise_mask"], mask)
    assert len(more(parts, loaded)[0]["samples"]) == 2


def test_half_precision_halves_the_file_and_nothing_is_overwritten(parts, output):
    for half in (False, True, True):
        RetortSaveSearch.execute(search(parts, changes={"half": half}), "tree")
    full, half, second = (output / f"tree{end}.safetensors" for end in ("", "_2", "_3"))
    assert half.stat().st_size < 0.75 * full.stat().st_size
    assert second.is_file()
    loaded = RetortLoadSearch.execute("tree_2").args[0]
    assert loaded.states[0].setting["half"] and loaded.states[0].latents([1]).dtype == torch.float32


def test_a_noise_is_asked_for_again(parts):
    loaded = kept(search(parts, noise=RandomNoise(5)))
    with pytest.raises(ValueError, match="NOISE of seed 5"):
        more(parts, loaded)
    with pytest.raises(ValueError, match="seed 5, not from one of seed 6"):
        more(parts, loaded, noise=RandomNoise(6))
    assert more(parts, loaded, noise=RandomNoise(5))[2].states[0].ledger.calls > CALLS
    with pytest.raises(ValueError, match="its own seed"):
        more(parts, search(parts), noise=RandomNoise(5))


def test_draws_of_a_tree_follow_its_values(parts):
    saved = search(parts, "dts", calls=30 * STEPS)
    drawn = RetortDrawFromSearch.execute(saved, parts[0], count=4000, seed=1).args[0]["samples"]
    tree = saved.states[0]
    chances = {0: 1.0}
    for node in range(tree.size):
        kids = tree.children(node)
        if len(kids):
            weights = np.exp(tree.value[kids] - tree.value[kids].max())
            chances |= dict(zip(kids.tolist(), chances[node] * weights / weights.sum(), strict=True))
    wanted = torch.tensor([chances[int(leaf)] for leaf in tree.leaves])
    leaves = parts[0].model.latent.process_out(tree.latents(tree.leaves))
    nearest = torch.cdist(drawn.flatten(1), leaves.flatten(1)).argmin(1)
    shares = torch.bincount(nearest, minlength=len(leaves)) / len(drawn)
    assert (shares - wanted).abs().sum() / 2 < 0.03
    greedy = RetortDrawFromSearch.execute(saved, parts[0], count=3, greedy=True).args[0]["samples"]
    assert torch.equal(greedy[0], greedy[2])
    assert len(RetortDrawFromSearch.execute(search(parts, "fk"), parts[0], count=3).args[0]["samples"]) == 3
    with pytest.raises(ValueError, match="best-of-n, with nothing to draw from"):
        RetortDrawFromSearch.execute(search(parts, "best_of_n"), parts[0])


def test_a_noise_policy_is_noise_for_any_sampler_and_lives_in_a_file(parts):
    guider, sigmas, vae, reward = parts
    noise, best, top, saved, report, text = RetortNoisePolicy.execute(
        guider, sigmas, empty(2), vae, reward, prompt=PROMPT, calls=24 * STEPS, seed=9, rate=0.2
    ).args
    assert "policy: 3 steps" in text and len(best["samples"]) == 2 and len(report) == 2
    drawn = noise.generate_noise(empty(4))
    plain = RandomNoise(9).generate_noise(empty(4))
    for i in range(4):
        policy = saved.states[i % 2].policy
        assert torch.equal(drawn[i], policy.mean.float() + policy.log_std.exp().float() * plain[i])
        assert policy.mean.abs().max() > 0.01
    loaded = kept(saved)
    again = RetortPolicyNoise.execute(loaded, 9).args[0]
    assert again.seed == 9 and torch.equal(again.generate_noise(empty(4)), drawn)
    assert not torch.equal(RetortPolicyNoise.execute(saved, 10).args[0].generate_noise(empty(4)), drawn)
    with pytest.raises(ValueError, match="learnt for latents of shape"):
        again.generate_noise({"samples": torch.zeros(1, 16, 4, 8)})
    with pytest.raises(ValueError, match="only a noise policy"):
        RetortPolicyNoise.execute(search(parts))


def test_noise_of_ours_may_start_a_search_and_noise_without_a_seed_may_not(parts):
    tailed = StudentTNoise(RandomNoise, 5, 6.0)
    latents = [c.latent for c in search(parts, "best_of_n", noise=tailed).states[0].best.found]
    assert not torch.allclose(latents[0], latents[1], atol=1e-3)
    with pytest.raises(ValueError, match="the same for every seed"):
        search(parts, noise=NoNoise())


class Odd:
    """A reward that goes wrong on its third batch."""

    name, differentiable, range = "odd", False, (0.0, 1.0)

    def __init__(self, error):
        self.error, self.seen = error, 0

    def __call__(self, images, prompts):
        self.seen += 1
        if self.seen > 2:
            raise self.error
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("error", [ValueError("the reward broke"), RuntimeError("the reward broke")])
def test_an_error_leaves_what_was_found_in_a_file(parts, error, output, caplog):
    guider, sigmas, vae, _ = parts
    with pytest.raises(type(error), match="the reward broke") as caught:
        search((guider, sigmas, vae, Odd(error)), batch_size=2)
    (file,) = output.iterdir()
    assert file.name in (str(caught.value) if isinstance(error, ValueError) else caplog.text)
    loaded = RetortLoadSearch.execute(file.name).args[0]
    assert len(loaded.states[0].leaves) == 4
    assert more(parts, loaded)[2].states[0].ledger.calls > loaded.states[0].ledger.calls


def test_a_full_disk_does_not_hide_the_error(parts, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search_files, "write_new", full)
    guider, sigmas, vae, _ = parts
    with pytest.raises(ValueError, match=r"the reward broke.*could not be saved.*No space left"):
        search((guider, sigmas, vae, Odd(ValueError("the reward broke"))), batch_size=2)
    with pytest.raises(OSError, match="No space left"):
        RetortSaveSearch.execute(search(parts), "x")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "", "a/b", "..\\x"])
def test_names_stay_in_the_folder(tree, name):
    with pytest.raises(ValueError, match="cannot be a file's name"):
        RetortSaveSearch.execute(tree, name)
    with pytest.raises(ValueError, match="cannot be a file's name"):
        RetortLoadSearch.execute(name)


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def poisoned(tensors, header):
    """(what is done to the file, what the error says)."""

    def setting(**changes):
        return lambda: header.update(changes)

    def item(**changes):
        return lambda: header["items"][0].update(changes)

    yield setting(method="pickle"), "not known"
    yield setting(method=["dts"]), "cannot be used"
    yield setting(seed=-1), "seed -1 is out of range"
    yield setting(keep=10**9), "out of range"
    yield setting(config={"lam": "x"}), "config.lam"
    yield setting(config={"evil": 1}), "config.evil"
    yield setting(transition={"kind": "magic"}), "transition"
    yield setting(items=[]), "do not fit"
    yield setting(items=[{}]), "cut off or altered"
    yield setting(latent=[1]), "cannot be used"
    yield item(drawn=-5), "out of range"
    yield item(pending=[[10**6, 1]]), "cut off or altered"
    yield item(setting={}), "cut off or altered"
    yield item(best=[[float("nan"), 0, 0, True]]), "cut off or altered"
    yield lambda: tensors.pop("item.0.parent"), "cut off or altered"
    yield lambda: tensors.update({"item.0.parent": tensors["item.0.parent"] + 5}), "no tree"
    yield lambda: tensors.update({"item.0.latents": tensors["item.0.latents"] * float("inf")}), "do not fit"
    yield lambda: tensors.update({"item.0.value": tensors["item.0.value"].float()}), "length or type"
    yield lambda: tensors.update({"sigmas": torch.zeros(0)}), "no schedule"
    yield lambda: tensors.update({"latent.samples": torch.zeros(3)}), "do not fit"


@pytest.mark.parametrize("which", range(20))
def test_a_forged_file_is_one_clear_error(tree, output, which):
    RetortSaveSearch.execute(tree, "tree")
    tensors, metadata = contents(output / "tree.safetensors")
    header = json.loads(metadata["search"])
    cases = list(poisoned(tensors, header))
    assert len(cases) == 20
    poison, said = cases[which]
    poison()
    save_file(tensors, output / "tree.safetensors", {**metadata, "search": json.dumps(header)})
    with pytest.raises(ValueError, match=said) as caught:
        RetortLoadSearch.execute("tree")
    assert str(caught.value).startswith("file: tree.safetensors cannot be used")


def test_what_is_no_search_is_refused(tree, output):
    with pytest.raises(ValueError, match=r"no search 'tree'.*found there: nothing"):
        RetortLoadSearch.execute("tree")
    RetortSaveSearch.execute(tree, "tree")
    whole = (output / "tree.safetensors").read_bytes()
    (output / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (output / "text.safetensors").write_text("hello")
    save_file({"a": torch.zeros(1)}, output / "other.safetensors")
    deep = {"format": search_files.FORMAT, "search": "[" * 100_000}
    save_file({"a": torch.zeros(1)}, output / "deep.safetensors", deep)
    for name in ("cut", "text", "other", "deep"):
        with pytest.raises(ValueError, match=f"{name}.safetensors cannot be used"):
            RetortLoadSearch.execute(name)
    assert RetortLoadSearch.fingerprint_inputs("tree") > 0 == RetortLoadSearch.fingerprint_inputs("nothing")


def test_a_tree_of_another_model_is_refused(parts):
    loaded = kept(search(parts))
    model, clip, vae = api.host.embedded("eps")
    other = api.host.cfg_guider(model, clip.encode(PROMPT), None, 1.0)
    with pytest.raises(ValueError, match="made with"):
        RetortResumeSearch.execute(loaded, other, vae, parts[3], calls=CALLS)
