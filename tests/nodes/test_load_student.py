"""Load Student: every distillation method's LoRA is sampled with nothing typed, to the bit as by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from retort.hosts.headless import embedded, folders
from retort.hosts.headless.host import host
from retort.hosts.jobs import manage
from retort.hosts.training import run as training
from retort.nodes.distilled import RetortDistilledSampler, RetortDistilledSigmas
from retort.nodes.load_student import RetortLoadStudent
from retort.sampling import grids
from retort.trainers import recipes
from retort.trainers.dataset import Dataset
from retort.trainers.methods import read_config
from retort.trainers.watch import Silent

HERE = all((folders.EMBEDDED / name).is_file() for name in embedded.FILES)
pytestmark = pytest.mark.skipif(not HERE, reason="the embedded weights are not built")

# (twin, method, settings): the levels by hand (typed timesteps, or None for core's `simple`), mode, start
STUDENTS = {
    "dmd2 flow": ("flow", "dmd2", {"steps": 4, "ratio": 1}, None, "re-noise", "unit noise"),
    "dmd2 eps": ("eps", "dmd2", {"steps": 1, "ratio": 1}, "399", "re-noise", "unit noise"),
    "f_distill": ("flow", "f_distill", {"steps": 2, "ratio": 1, "gan_on": "fake"}, None, "re-noise", "unit noise"),
    "tdm flow": ("flow", "tdm", {"steps": 3}, None, "deterministic", "unit noise"),
    "tdm eps": ("eps", "tdm", {"steps": 4}, "999, 749, 499, 249", "deterministic", "unit noise"),
    "di_star": ("flow", "di_star", {"steps": 1, "ratio": 1}, None, "re-noise", "unit noise"),
    "instarevive": ("flow", "instarevive", {"timestep": 400}, "400", "single call", "clean latent"),
}


@pytest.fixture
def where(tmp_path):
    found = folders.Folders(models=(tmp_path / "models",), output=tmp_path / "out")
    with folders.use(found):
        yield found


def trained(twin, method, settings, start=None, recipe="", name=""):
    """A LoRA of two steps; (its name, model, CONDITIONING of the prompt)."""
    model, clip, vae = embedded.load(twin)
    positive, empty = clip.encode("a bold blue seven"), clip.encode("")
    generator = torch.Generator().manual_seed(3)
    latents = [torch.randn(16, 8, 8, generator=generator) for _ in range(2)]
    pictures = [torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=generator) for _ in range(2)]
    data = Dataset([tuple(positive[0])] * 2, ["a bold blue seven"] * 2, tuple(empty[0]), latents,
                   pictures=pictures if method == "instarevive" else None)  # fmt: skip
    values = {"steps": 2, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0}
    config = {"method": method, "objective": settings, "training": values, "lora": {"rank": 2}}
    request = training.Request(name or method, read_config(config), data, start, recipe)
    with host.training_session():
        result = training.run(host, model, request, watcher=Silent(), vae=vae)
    return result.path.name, model, positive


def pictures(model, guider, sampler, sigmas, start="unit noise"):
    """Three at once: from noise, or of a latent where the student restores it."""
    latent = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(8))
    return host.sample(guider, sampler, sigmas, {"samples": latent * (start == "clean latent")}, 5)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_trained_student_is_sampled_with_nothing_typed_as_by_hand(where, name):
    twin, method, settings, typed, mode, start = STUDENTS[name]
    file, model, positive = trained(twin, method, settings)
    student, *rest, _ = RetortLoadStudent.execute(model, positive, file).args
    by_hand = host.with_lora(model, file, 1.0)
    steps = settings.get("steps", 1)
    sigmas = (
        grids.simple(model.schedule, steps) if typed is None
        else RetortDistilledSigmas.execute(model, "custom", 0, typed).args[0]
    )  # fmt: skip
    sampler = RetortDistilledSampler.execute("custom", mode, start).args[0]
    expected = pictures(by_hand, host.cfg_guider(by_hand, positive, None, 1.0), sampler, sigmas, start)
    assert torch.equal(rest[2], sigmas) and len(sigmas) == steps + 1
    assert torch.equal(pictures(student, *rest, start), expected)
    plain = pictures(model, host.cfg_guider(model, positive, None, 1.0), sampler, sigmas, start)
    assert not torch.equal(expected, plain)


def test_the_recipe_says_method_and_base_and_leaves_the_other_metadata(where):
    file, _, _ = trained("flow", "tdm", {"steps": 4, "steps_choices": "2, 4"})
    with safe_open(host.loras_folder() / file, "pt") as handle:
        notes = handle.metadata()
    value = json.loads(notes[recipes.KEY])
    assert value["schema"] == 1 and value["method"] == "tdm" and notes["retort.method"] == "tdm"
    assert value["base"] == {"architecture": notes["ss_base_model_version"], "name": "flow"}
    recipe = recipes.read(notes)
    assert recipe.preset.step_counts == (4, 2) and recipe.preset.mode == "deterministic"
    assert recipe.preset.latent_channels == 16 and recipe.preset.latent_dims == 2
    assert recipes.read({recipes.KEY: recipes.written(recipe)}) == recipe
    model, clip, _ = embedded.load("flow")
    assert len(RetortLoadStudent.execute(model, clip.encode("x"), file, steps=2).args[3]) == 3
    with pytest.raises(ValueError, match="steps is 3, and 'tdm' was trained for 2, 4"):
        RetortLoadStudent.execute(model, clip.encode("x"), file, steps=3)


def test_what_begins_as_a_student_stays_one_and_other_loras_carry_nothing(where):
    first, _, _ = trained("flow", "dmd2", {"steps": 1, "ratio": 1})
    notes = host.lora_metadata(first)
    start, recipe = training.start_of(host, first)
    second, _, _ = trained("flow", "flow", {}, start, recipe)
    assert host.lora_metadata(second)[recipes.KEY] == notes[recipes.KEY]
    third, model, positive = trained("flow", "flow", {}, start, "no recipe", "third")
    assert recipes.KEY not in host.lora_metadata(third)
    with pytest.raises(ValueError, match="lora_name: .* carries no recipe of a student, and has no published"):
        RetortLoadStudent.execute(model, positive, third)


def test_a_checkpoint_that_is_kept_carries_the_recipe_of_its_student(where):
    """As *Keep this one* copies it: sampled with nothing typed, as the LoRA of a run that ended there, but for the
    rounding of its file."""
    file, model, positive = trained("flow", "dmd2", {"steps": 4, "ratio": 1})
    kept = manage.keep(host.runs_folder(), host.loras_folder(), "dmd2", 2, "the best")
    last, notes = host.lora_metadata(file), host.lora_metadata(kept)
    assert notes["modelspec.title"] == "dmd2_step_2" and notes["retort.steps"] == "2"
    ours, theirs = recipes.read(notes), recipes.read(last)
    assert ours == replace(theirs, preset=replace(theirs.preset, title="dmd2_step_2"))
    a, b = (RetortLoadStudent.execute(model, positive, name).args for name in (file, kept))
    torch.testing.assert_close(pictures(a[0], *a[1:4]), pictures(b[0], *b[1:4]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("file", "twin", "steps"),
    [("digits_flow_dmd2_4step", "flow", 0), ("digits_flow_tdm_4step", "flow", 0), ("digits_eps_dmd2_1step", "eps", 0)],
)
def test_a_published_file_is_known_by_its_name(where, file, twin, steps):
    """The students that come with Retort, which are older than the recipe: their files say nothing."""
    model, clip, _ = embedded.load(twin)
    name = f"{file}.safetensors"
    assert recipes.KEY not in host.lora_metadata(name)
    made = RetortLoadStudent.execute(model, clip.encode("three"), name, steps=steps).args
    student, guider, sampler, sigmas, split = made
    assert split == len(sigmas) - 1
    assert sampler.preset.key == {"flow": "digits_flow", "eps": "digits_eps"}[twin] + ("_tdm" if "tdm" in file else "")
    assert torch.isfinite(pictures(student, guider, sampler, sigmas)).all()
    other = embedded.load("eps" if twin == "flow" else "flow")[0]
    with pytest.raises(ValueError, match="and this model predicts"):
        RetortLoadStudent.execute(other, clip.encode("three"), name)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "is no JSON"),
        ('{"schema": 2}', "its schema is 2, and this version of Retort knows 1: update Retort"),
        ("[1]", "it is no object"),
        ('{"schema": 1, "preset": {"title": "x", "family": "flow", "levels": [[2.0]]}}', "levels"),
        ('{"schema": 1, "preset": {"title": "x", "family": "flow", "levels": [[NaN]]}}', "is no number"),
        ('{"schema": 1, "schema": 1}', "is given twice"),
    ],
)
def test_a_strangers_recipe_is_refused_by_what_is_wrong_with_it(where, value, says):
    state = load_file(folders.EMBEDDED / "loras" / "digits_flow_dmd2_1step.safetensors")
    (where.models[0] / "loras").mkdir(parents=True)
    save_file(state, where.models[0] / "loras" / "odd.safetensors", {recipes.KEY: value})
    model, clip, _ = embedded.load("flow")
    with pytest.raises(ValueError, match="lora_name: odd.safetensors: the recipe in the LoRA's metadata") as error:
        RetortLoadStudent.execute(model, clip.encode("x"), "odd.safetensors")
    assert says in str(error.value)


def test_a_training_begins_with_the_strength_that_a_file_of_diffusers_says(where):
    """Its metadata hold the alpha, which its tensors lack."""
    up, down = torch.ones(6, 4), torch.ones(4, 3)
    state = {"transformer.a.lora_A.weight": down, "transformer.a.lora_B.weight": up}
    place = where.models[0] / "loras" / "from_diffusers.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, place, {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 1}'})
    start, _ = training.start_of(host, place.name)
    assert {key for key in start if key.endswith("alpha")} and all(
        float(value) == 1 for key, value in start.items() if key.endswith("alpha")
    )
