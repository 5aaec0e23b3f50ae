"""Folders as people have them: links to another disk, subfolders, Windows' separators, extra_model_paths.yaml."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from retort.files import pictures
from retort.files.errors import UsageError
from retort.files.paths import PathError
from retort.hosts.headless import doctor, extra_paths, folders
from retort.hosts.headless.folders import EMBEDDED, KINDS, Folders, use
from retort.hosts.headless.host import host
from retort.hosts.statistics import load, names

FILES = [kind for kind in KINDS if kind != "diffusers"]


def file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(2, 3)}, path)
    return path


def own(where, kind):
    """What a folder lists beside the embedded files."""
    return [name for name in where.names(kind) if name not in Folders().names(kind)]


@pytest.mark.parametrize("kind", FILES)
def test_linked_files_and_folders_of_every_kind_are_listed_and_found(where, tmp_path, kind):
    far = file(tmp_path / "disk" / "deep" / "x.safetensors")
    here = where.models[0] / KINDS[kind][-1]
    here.mkdir()
    (here / "far").symlink_to(tmp_path / "disk")
    (here / "one.safetensors").symlink_to(far)
    file(here / "Sub" / "y.sft")
    assert own(where, kind) == ["Sub/y.sft", "far/deep/x.safetensors", "one.safetensors"]
    for name in (*own(where, kind), "far\\deep\\x.safetensors", "Sub\\y.sft"):
        assert where.model(kind, name).is_file()
    for name in ("far/deep/X.safetensors", "sub\\y.sft", "far/x.safetensors"):
        with pytest.raises(UsageError, match="was not found"):
            where.model(kind, name)
    for name in ("../x", "far/../../x.safetensors", str(far), "C:\\x.safetensors"):
        with pytest.raises(PathError):
            where.model(kind, name)


def test_the_folder_of_a_kind_may_itself_be_a_link(where, tmp_path):
    file(tmp_path / "disk" / "a" / "x.safetensors")
    (where.models[0] / "loras").symlink_to(tmp_path / "disk")
    assert own(where, "loras") == ["a/x.safetensors"]
    assert list(host.read_lora("a\\x.safetensors")) == ["x"]


def test_a_linked_pipeline_is_listed_and_found(where, tmp_path):
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blob").write_text("{}")
    (snapshot / "model_index.json").symlink_to(tmp_path / "hub" / "blob")
    here = where.models[0] / "diffusers"
    (here / "sub").mkdir(parents=True)
    (here / "sub" / "sd").symlink_to(snapshot)
    assert own(where, "diffusers") == ["sub/sd"]
    assert where.model("diffusers", "sub\\sd").is_dir()


def test_pictures_of_the_input_folder_may_be_links(where, tmp_path):
    pictures.save_png(torch.rand(4, 6, 3), tmp_path / "disk" / "a.png")
    (where.inputs[0] / "one.png").symlink_to(tmp_path / "disk" / "a.png")
    (where.inputs[0] / "far").symlink_to(tmp_path / "disk")
    assert where.images() == ["one.png"]
    for name in ("one.png", "one.png [input]", "far/a.png", "far\\a.png", "far/a.png [input]"):
        assert pictures.load_image(where.image(name.replace("\\", "/")))[0].shape == (1, 4, 6, 3)
    where.output.mkdir()
    (where.output / "far").symlink_to(tmp_path / "disk")
    with pytest.raises(PathError, match="is a link to"):
        where.image("far/a.png [output]")


def test_statistics_may_be_links_in_subfolders(where, tmp_path):
    from retort.hosts import statistics
    from retort.sampling.teleport import low_rank

    made = low_rank(torch.randn(4, 2, 3, 3), 2)
    path = statistics.save(tmp_path / "disk", "cats", made)
    here = where.models[0] / "gaussian_statistics"
    here.mkdir()
    (here / "far").symlink_to(tmp_path / "disk")
    (here / "one.safetensors").symlink_to(path)
    roots = host.statistics_folders()
    assert {"far/cats.safetensors", "one.safetensors"} <= set(names(roots))
    for name in ("far/cats.safetensors", "far\\cats.safetensors", "one.safetensors"):
        assert torch.equal(load(roots, name).mean, made.mean)
    with pytest.raises(ValueError, match="leaves its folder"):
        load(roots, "far/../../x")


# --- extra_model_paths.yaml -------------------------------------------------------------------------------------------

CONFIG = """
# several sections, as people have them
a111:
    base_path: {base}/webui
    checkpoints: models/Stable-diffusion
    loras: |
        models/Lora
        models/LyCORIS
    upscale_models: models/ESRGAN
    custom_nodes: extensions
relative:
    base_path: near
    unet: unet
    clip: te
    is_default: true
    loras: mine
bare:
    vae: vaes
    rewards: {base}/judges
    gaussian_statistics: statistics
empty:
"""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Folders whose models have an extra_model_paths.yaml beside them, and the folder where all is."""
    monkeypatch.setenv("BIG_DISK", str(tmp_path / "disk"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "models").mkdir()

    def write(text=CONFIG, base="$BIG_DISK", **more):
        (tmp_path / extra_paths.NAME).write_text(text.format(base=base))
        return Folders(models=(tmp_path / "models",), output=tmp_path / "out", **more)

    return write


def test_the_file_beside_the_models_is_read_as_comfyui_reads_it(configured, tmp_path):
    where = configured()
    at = tmp_path / "models"
    assert where.own("checkpoints") == [at / "checkpoints", tmp_path / "disk/webui/models/Stable-diffusion"]
    webui = tmp_path / "disk" / "webui" / "models"
    assert where.own("loras") == [tmp_path / "near/mine", at / "loras", webui / "Lora", webui / "LyCORIS"]
    assert where.own("diffusion_models") == [tmp_path / "near/unet", at / "diffusion_models", at / "unet"]
    assert where.own("text_encoders") == [tmp_path / "near/te", at / "text_encoders", at / "clip"]
    assert where.own("vae") == [at / "vae", tmp_path / "vaes"]
    # Without a base_path a variable stays what it is, as there.
    assert where.own("rewards") == [at / "rewards", tmp_path / "$BIG_DISK" / "judges"]
    assert where.own("gaussian_statistics") == [at / "gaussian_statistics", tmp_path / "statistics"]
    assert where.roots("vae")[-1] == EMBEDDED / "vae"


def test_home_and_several_files(configured, tmp_path):
    (tmp_path / "more.yaml").write_text("x:\n  is_default: 1\n  loras: more\ny:\n  is_default: true\n  loras: last\n")
    where = configured("x:\n  base_path: ~/ai\n  loras: Lora\n", configs=(tmp_path / "more.yaml",))
    found = [tmp_path / "last", tmp_path / "more", tmp_path / "models/loras", tmp_path / "home/ai/Lora"]
    assert where.own("loras") == found
    with use(where):
        assert host.loras_folder() == tmp_path / "last"


def test_their_files_are_listed_found_and_written_to(configured, tmp_path):
    where = configured()
    file(tmp_path / "disk/webui/models/Lora/style/x.safetensors")
    file(tmp_path / "disk/webui/models/LyCORIS/y.safetensors")
    assert own(where, "loras") == ["style/x.safetensors", "y.safetensors"]
    with use(where):
        assert host.lora_names()[:2] == ["style/x.safetensors", "y.safetensors"]
        assert list(host.read_lora("style\\x.safetensors")) == ["x"]
        assert host.loras_folder() == tmp_path / "near" / "mine"
        assert host.rewards_folders()[0] == tmp_path / "models" / "rewards"
    with pytest.raises(PathError):
        where.model("loras", "../LyCORIS/y.safetensors")


def test_a_linked_models_folder_has_the_file_beside_the_link(configured, tmp_path):
    where = configured()
    there = tmp_path / "comfy"
    there.mkdir()
    (there / "models").symlink_to(tmp_path / "disk")
    (there / extra_paths.NAME).write_text("x:\n  loras: near\n")
    assert replace(where, models=(there / "models",)).own("loras") == [there / "models/loras", there / "near"]


def test_a_changed_file_is_read_again(configured, tmp_path):
    where = configured("x:\n  vae: a\n")
    assert where.own("vae")[-1] == tmp_path / "a"
    configured("x:\n  vae: other\n")
    assert where.own("vae")[-1] == tmp_path / "other"


@pytest.mark.parametrize(
    ("text", "why"),
    [("- a\n- b", "no sections"), ("x: 3", "'x' has no kinds"), ("x:\n  loras: [a, b]", "'loras' of 'x' is"),
     ("x:\n  loras:\n", "is None and no folder"), ("x:\n  base_path: 3\n  loras: a", "base_path of 'x'"),
     ("x: {{", "mend or remove it"), ("x:\n\tloras: a", "mend or remove it"), ("!!python/object:os.x {{}}", "mend")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(configured, tmp_path, text, why):
    where = configured(text)
    with pytest.raises(UsageError, match=why) as error:
        where.names("loras")
    assert str(error.value).startswith(f"{tmp_path / extra_paths.NAME} cannot be read")


def test_comments_alone_are_no_folders(configured, tmp_path):
    assert configured("# loras: a\n").own("loras") == [tmp_path / "models" / "loras"]
    missing = Folders(configs=(tmp_path / "absent.yaml",))
    with pytest.raises(UsageError, match="absent.yaml cannot be read"):
        missing.own("loras")


def test_a_job_is_told_of_them(configured, tmp_path):
    where = configured(configs=(tmp_path / "more.yaml",))
    with use(where):
        arguments = host.job_arguments()
    assert arguments[arguments.index("--models") + 1] == str(tmp_path / "models")
    assert arguments[arguments.index(extra_paths.OPTION) + 1] == str(tmp_path / "more.yaml")


def test_the_doctor_says_which_folders_are_used(configured, tmp_path):
    where = configured()
    file(tmp_path / "disk/webui/models/Lora/x.safetensors")
    with use(where):
        found = {row.name: row for row in doctor.examine()}
    assert found["own models"].ok and str(tmp_path / "models") in found["own models"].detail
    told = found["further models"]
    assert told.ok and told.detail.startswith(f"{tmp_path / extra_paths.NAME}: ")
    assert f"loras {tmp_path / 'disk/webui/models/Lora'} (1 found)" in told.detail
    assert f"loras {tmp_path / 'near/mine'} (there is no such folder, searched first)" in told.detail
    assert "ESRGAN" not in told.detail and "extensions" not in told.detail
    with use(configured("- a")):
        found = {row.name: row for row in doctor.examine()}
    assert not found["further models"].ok and "has no sections" in found["further models"].detail


def test_a_file_on_a_disk_that_is_away_is_a_sentence(where, monkeypatch):
    def away(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders.Path, "is_file", away)
    with pytest.raises(UsageError, match="cannot be looked at .Permission denied."):
        where.model("loras", "x.safetensors")


def test_without_folders_of_models_loras_are_among_the_results(tmp_path):
    """What a training has written is found by the next workflow; a user's own folder is all there is where one is."""
    made = tmp_path / "results" / "loras" / "mine.safetensors"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"")
    where = Folders(output=tmp_path / "results")
    assert where.loras() == [made.parent] and "mine.safetensors" in where.names("loras")
    assert where.model("loras", "mine.safetensors") == made
    assert "mine.safetensors" not in Folders(models=(tmp_path,), output=tmp_path / "results").names("loras")
