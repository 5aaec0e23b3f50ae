"""Ways in: recipes on trainers, the picker as the front door and on a phone, the offer to watch a first training."""

from __future__ import annotations

import importlib
import json
from itertools import combinations
from pathlib import Path

import page_server
import pytest
import torch

pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.slow]
app, page = page_server.app, page_server.page
SIZES = [(1366, 768), (1800, 1100)]
WINDOW = "document.querySelector('.retort-window')"
TASTE = "app.graph._nodes.find((one) => one.type === 'RetortPreferencePicker')"


def sound(audit):
    assert audit["count"] > 0 and not audit["unnamed"] and not audit["unseen"] and not audit["poor"], audit


@pytest.fixture(scope="module")
def taste(app):
    """A set of five pairs that wait for "pick"."""
    preferences, tickets = (importlib.import_module(f"retort.preferences.{name}") for name in ("store", "tickets"))
    folder = app.base / "output" / "retort_preferences" / "by_hand"
    names = [preferences.keep_image(folder, torch.full((48, 64, 3), i / 10)) for i in range(10)]
    tickets.ask(folder, [tickets.Ticket(f"pair {i}", tuple(names[2 * i : 2 * i + 2]), by="pick") for i in range(5)])
    return folder


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_recipe_fills_in_a_trainer(page, size, vue):
    """Its widgets have the recipe's values, and are stored as before: the button takes no place among them."""
    page("size", width=size[0], height=size[1])
    page("look", vue=vue, theme="light" if vue else "dark")
    page("fresh", types=["RetortTrainDistillation"])
    node = "app.graph._nodes[0]"
    stored = page("evaluate", code=f"{node}.serialize().widgets_values.length")
    assert page("evaluate", code=f"{node}.widgets.at(-2).label ?? {node}.widgets.at(-2).name").lower() == "recipes"
    page("evaluate", code=f"() => {{ {node}.widgets.find((one) => one.name === 'recipes').callback(); }}")
    page("until", condition=f"{WINDOW}?.querySelectorAll('.retort-window-body button').length === 5")
    told = page("evaluate", code=f"{WINDOW}.textContent")
    listed = json.loads((ROOT / "extensions" / "comfyui" / "recipes.json").read_text(encoding="utf-8"))
    flux = next(one for one in listed if one["title"] == "Flux.1, 24 GB, 4 steps")
    assert flux["title"] in told and f"{flux['gb']} GB on the card" in told and "TFLOP/s" in told
    sound(page("audit"))
    page("shot", name=f"recipes_{size[0]}_{'nodes2' if vue else 'canvas'}")
    page("click", where=".retort-window button", text="Flux.1, 24 GB, 4 steps", keys="Enter")
    page("until", condition=f"!{WINDOW}")
    values = page("evaluate", code=f"Object.fromEntries({node}.widgets.map((one) => [one.name, one.value]))")
    assert values["method"] == "tdm" and values["method.steps"] == 4 and values["method.cfg"] == 3.5
    assert (values["rank"], values["accumulation"], values["steps"]) == (16, 4, 5000)
    assert values["gradient_checkpointing"] is True
    page("shot", name=f"filled_{size[0]}_{'nodes2' if vue else 'canvas'}")
    toasts = "document.querySelectorAll('.p-toast-message, [data-testid=toast]')"
    said = f"[...{toasts}].map((one) => one.textContent).join()"
    page("until", condition=f"{said}.includes('Flux.1, 24 GB, 4 steps') && {said}.includes('method tdm')")
    assert page("evaluate", code=f"{node}.serialize().widgets_values.includes('recipes')") is False and stored > 20
    assert not page("heard")


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_a_recipe_leaves_nothing_of_the_demo_and_what_samples_the_student_follows(page, vue):
    """Digits' settings go, name and prompts stay; a typed grid behind this trainer becomes the student's own."""
    page("look", vue=vue, theme="dark")
    page("template", name="2 Train a student that draws in 1 step", vue=vue)
    types = ["RetortTrainDistillation", "RetortDistilledSetup"]
    trainer, setup = (f"app.graph._nodes.filter((one) => one.type === '{type}')" for type in types)
    values = "Object.fromEntries(one.widgets.filter((w) => w.type !== 'button').map((w) => [w.name, w.value]))"
    before = page("evaluate", code=f"{trainer}.map((one) => {values})[0]")
    assert (before["method.regression_steps"], before["previews"], before["ema"]) == (180, 8, 0.95)
    page("evaluate", code=f"""() => {{ const [, after] = {setup};
      for (const [name, value] of [["preset", "custom"], ["steps", 1], ["timesteps", "1000"]])
        after.widgets.find((one) => one.name === name).value = value;
      {trainer}[0].widgets.find((one) => one.name === "recipes").callback(); }}""")
    page("until", condition=f"{WINDOW}?.querySelectorAll('.retort-window-body button').length === 5")
    page("click", where=".retort-window button", text="Z-Image, 12 GB, 4 steps")
    page("until", condition=f"!{WINDOW}")
    now = page("evaluate", code=f"{trainer}.map((one) => {values})[0]")
    grids = page("evaluate", code=f"{setup}.map((one) => one.widgets.slice(0, 3).map((w) => w.value))")
    assert grids == [["custom", 1, "1000"], ["auto", 0, ""]]
    page("fresh", types=["RetortTrainDistillation"])
    new = page("evaluate", code=f"{trainer}.map((one) => {values})[0]")
    listed = json.loads((ROOT / "extensions" / "comfyui" / "recipes.json").read_text(encoding="utf-8"))
    recipe = next(one for one in listed if one["title"] == "Z-Image, 12 GB, 4 steps")["values"]
    kept = {name: before[name] for name in ("name", "prompts", "seed")}
    assert {**new, **recipe, **kept} == now


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
@pytest.mark.parametrize("way", ["One file", "Three files"])
def test_the_demo_model_gives_way_to_a_model_of_the_users(page, vue, way):
    """What it was connected to is connected to the loaders, and empty pictures have another size."""
    page("size", width=1366, height=768)
    page("look", vue=vue, theme="dark")
    page("template", name="4 Search for a better picture", vue=vue)
    ends = """(types) => Object.fromEntries(app.graph._nodes.filter((one) => types.includes(one.type)).flatMap((one) =>
      one.outputs.filter(({ type }) => ["MODEL", "CLIP", "VAE"].includes(type)).map(({ type, links }) => [type,
        (links ?? []).map((id) => app.graph.links.get?.(id) ?? app.graph.links[id])
          .map((link) => [link.target_id, link.target_slot]).sort()])))"""
    before = page("evaluate", code=ends, given=["RetortEmbeddedModel"])
    assert all(len(before[type]) >= 2 for type in ("MODEL", "CLIP", "VAE"))
    demo = "app.graph._nodes.find((one) => one.type === 'RetortEmbeddedModel')"
    assert page("evaluate", code=f"{demo}.serialize().widgets_values") == ["flow"]
    page("evaluate", code=f"() => {{ {demo}.widgets.find((one) => one.name === 'own_model').callback(); }}")
    page("until", condition=f"{WINDOW}?.querySelectorAll('.retort-window-body button').length === 3")
    sound(page("audit"))
    page("click", where=".retort-window button", text=way, keys="Enter")
    page("until", condition=f"!{WINDOW} && !{demo}")
    loaders = ["CheckpointLoaderSimple"] if way == "One file" else ["UNETLoader", "CLIPLoader", "VAELoader"]
    assert page("evaluate", code=ends, given=loaders) == before
    size = "app.graph._nodes.find((one) => one.type === 'EmptySD3LatentImage').widgets.map(({ value }) => value)"
    assert page("evaluate", code=size)[:2] == [1024, 1024]
    page("shot", name=f"own_model_{way.split()[0].lower()}_{'nodes2' if vue else 'canvas'}")
    assert not page("heard")


def with_own_model(page, template):
    """Open a template, and put three files in the demo model's place."""
    page("look", vue=False, theme="dark")
    page("template", name=template, vue=False)
    demo = "app.graph._nodes.find((one) => one.type === 'RetortEmbeddedModel')"
    page("evaluate", code=f"() => {{ {demo}.widgets.find((one) => one.name === 'own_model').callback(); }}")
    page("click", where=".retort-window button", text="Three files", keys="Enter")
    page("until", condition=f"!{demo}")


def test_students_of_the_demo_model_are_no_others(page):
    """Their LoRAs are bypassed, and a preset of theirs gives way to auto, which says so where it finds no student."""
    with_own_model(page, "1 Quick start - 4 steps instead of 50")
    of = "app.graph._nodes.filter((one) => one.type === '{}').map((one) => {})".format
    assert page("evaluate", code=of("LoraLoaderModelOnly", "one.mode")) == [4, 4]
    assert page("evaluate", code=of("RetortDistilledSetup", "one.widgets[0].value")) == ["auto", "auto"]
    page("until", condition="document.body.innerText.includes('LoRAs of digits suit no other model')")
    assert not page("heard")


def test_a_model_of_the_users_begins_sets_and_runs_of_its_own(page):
    """Choices between the demo model's pictures are none between another model's, nor are its batch and rate."""
    with_own_model(page, "3 Teach it your taste")
    value = "app.graph._nodes.find((one) => one.type === '{}').widgets.find((one) => one.name === '{}').value".format
    page("until", condition=f"{value('RetortPreferencePicker', 'name')}.endsWith('_own')")
    keeping = ("PreferencePicker", "PreferenceSet", "TrainPreference", "BlindTest")
    names = [page("evaluate", code=value(f"Retort{one}", "name")) for one in keeping]
    assert names == ["bold_by_hand_own"] * 3 + ["bold_own_blind_test"]
    settings = ("batch_size", "learning_rate", "gradient_checkpointing")
    sizes = [page("evaluate", code=value("RetortTrainPreference", one)) for one in settings]
    assert sizes == [1, 1e-4, True]
    assert not page("heard")


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_the_picker_says_how_far_it_is_and_leads_on(page, app, taste, vue):
    """The bar counts choices; full screen shows the same pictures; a phone's address, or why there is none."""
    page("size", width=1366, height=768)
    page("look", vue=vue, theme="dark")
    page("fresh", types=["RetortPreferencePicker"])
    page("change", type="RetortPreferencePicker", values={"name": "by_hand", "by": "pick"})
    page("fit", type="RetortPreferencePicker")
    shown = "[...document.querySelectorAll('.retort-picker-cell img')].every((one) => one.naturalWidth)"
    page("until", condition=f"document.querySelectorAll('.retort-picker-cell').length === 2 && {shown}")
    before = page("evaluate", code="document.querySelector('.retort-picker progress').value")
    page("evaluate", code="() => new Promise((done) => setTimeout(done, 500))")
    page("click", where=".retort-picker-cell")
    page("until", condition=f"document.querySelector('.retort-picker progress').value === {before} + 1")
    said = page("evaluate", code="document.querySelector('.retort-picker-far').textContent")
    assert said == f"{int(before) + 1} of about 20 choices for a first LoRA"
    sound(page("audit"))
    page("shot", name=f"door_{'nodes2' if vue else 'canvas'}")
    page("click", where=".retort-picker button", text="Full screen")
    page("until", condition="document.fullscreenElement?.classList.contains('retort-picker')")
    page("shot", name=f"full_{'nodes2' if vue else 'canvas'}")
    page("evaluate", code="() => document.exitFullscreen()")
    page("click", where=".retort-picker button", text="Phone")
    page("until", condition=f"{WINDOW}")
    # This server listens to this machine alone.
    assert "--listen" in page("evaluate", code=f"{WINDOW}.textContent")
    page("press", keys="Escape")
    # No trainer is there: one is put on the canvas, with the set.
    page("click", where=".retort-picker button", text="Train now")
    trainer = "app.graph._nodes.find((one) => one.type === 'RetortTrainPreference')"
    page("until", condition=f"{trainer}?.inputs.find((one) => one.name === 'pairs').link != null")
    sets = "app.graph._nodes.find((one) => one.type === 'RetortPreferenceSet').widgets[0].value"
    assert page("evaluate", code=sets) == "by_hand" and not page("heard")


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_train_now_connects_a_trainer_and_a_blind_test(page, app, vue):
    """To what draws for the picker, with its sampler; prompts of the picker's list."""
    page("size", width=1366, height=768)
    page("look", vue=vue, theme="dark")
    page("template", name="3 Teach it your taste", vue=vue)
    page("evaluate", code="""() => {
        for (const node of [...app.graph._nodes]) if (node.mode === 2) app.graph.remove(node); }""")  # fmt: skip
    page("fit", type="RetortPreferencePicker")
    page("click", where=".retort-picker button", text="Train now")
    page("until", condition="app.graph._nodes.some((one) => one.type === 'RetortBlindTest')")
    made = page("evaluate", code="""Object.fromEntries(app.graph._nodes.map((node) => [node.type,
        Object.fromEntries((node.inputs ?? []).filter((one) => one.link != null).map((one, slot) =>
          [one.name, node.getInputNode(node.inputs.indexOf(one)).type]))]))""")  # fmt: skip
    model = "RetortEmbeddedModel"
    assert made["RetortTrainPreference"] == {
        "model": model, "clip": model, "pairs": "RetortPreferenceSet", "vae": model}  # fmt: skip
    assert made["LoraModelLoader"] == {"model": model, "lora": "RetortTrainPreference"}
    assert made["RetortBlindTest"] == {
        "base": model, "tuned": "LoraModelLoader", "clip": model, "vae": model, "sampler": "KSamplerSelect",
        "sigmas": "BasicScheduler", "latent": "EmptySD3LatentImage"}  # fmt: skip
    kinds = ["KSamplerSelect", "BasicScheduler", "RetortBlindTest"]
    values = page("evaluate", given=kinds, code="""(kinds) => Object.fromEntries(kinds.flatMap((type) =>
        app.graph._nodes.find((one) => one.type === type).widgets.map((one) => [one.name, one.value])))""")  # fmt: skip
    assert (values["sampler_name"], values["scheduler"], values["steps"], values["cfg"]) == ("euler", "simple", 20, 3)
    assert values["prompts"].startswith("a regular black zero") and len(values["prompts"].splitlines()) == 10
    boxes = page("evaluate", code="app.graph._nodes.slice(-7).map((node) => [...node.getBounding()])")
    for one, two in combinations(boxes, 2):
        across, down = (min(one[i] + one[i + 2], two[i] + two[i + 2]) - max(one[i], two[i]) for i in (0, 1))
        assert min(across, down) <= 2, (one, two)
    page("shot", name=f"train_now_{'nodes2' if vue else 'canvas'}")
    assert not page("heard")


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_a_blind_test_says_who_won_after_its_last_pair(page, app, vue):
    """By mouse and key; undo hides it again; the order is what the set's file says, which tells nothing."""
    preferences, tickets = (importlib.import_module(f"retort.preferences.{one}") for one in ("store", "tickets"))
    folder, by = app.base / "output" / "retort_preferences" / f"blind{int(vue)}", "blind 12345678"
    names = sorted(preferences.keep_image(folder, torch.full((8, 8, 3), i / 4)) for i in range(4))
    tickets.ask(folder, [tickets.Ticket(f"prompt {i}", tuple(names[2 * i : 2 * i + 2]), by=by, models=("base", "tuned"))
                         for i in range(2)])  # fmt: skip
    page("size", width=1366, height=768)
    page("look", vue=vue, theme="dark")
    page("fresh", types=["RetortBlindTest"])
    page("fit", type="RetortBlindTest")
    # As the node is told when it has run.
    page("evaluate", given=[folder.name, by], code="""([name, by]) => {
        const node = app.graph._nodes[0];
        node.widgets.find((one) => one.name === "name").value = name;
        node.onExecuted({ set: [name], by: [by] }); }""")  # fmt: skip
    shown = "[...document.querySelectorAll('.retort-picker-cell img')].every((one) => one.naturalWidth)"
    far = "document.querySelector('.retort-picker-far').textContent"
    page("until", condition=f"document.querySelectorAll('.retort-picker-cell').length === 2 && {shown}")
    assert "Generate" not in page("evaluate", code="document.querySelector('.retort-picker').innerText")
    assert page("evaluate", code=far).startswith("0 of 2")
    page("evaluate", code="() => new Promise((done) => setTimeout(done, 500))")
    page("evaluate", code="() => document.querySelectorAll('.retort-picker-cell')[1].click()")
    page("until", condition=f"{far}.startsWith('1 of 2')")
    page("until", condition=f"document.querySelectorAll('.retort-picker-cell').length === 2 && {shown}")
    page("evaluate", code="() => new Promise((done) => setTimeout(done, 500))")
    page("evaluate", code="() => document.querySelectorAll('.retort-picker-cell')[0].click()")
    page("until", condition=f"{far}.startsWith('Yours against the base: 1 of 2 (95 % interval 1 to 99 %)')")
    sound(page("audit"))
    page("shot", name=f"blind_{'nodes2' if vue else 'canvas'}")
    page("click", where=".retort-picker button", text="Open LoRA", keys="Enter")
    page("until", condition="document.querySelector('.retort-picker-note').textContent.includes('No run with a LoRA')")
    page("click", where=".retort-picker button", text="Undo")
    page("until", condition=f"{far}.startsWith('1 of 2')")
    opens = "[...document.querySelectorAll('.retort-picker button')].find((one) => one.textContent === 'Open LoRA')"
    assert page("evaluate", code=f"{opens}.offsetParent === null")
    # A file keeps which test it was.
    assert page("evaluate", code="app.graph.serialize().nodes[0].properties.retort_blind") == by
    assert not page("heard")


def test_a_phone_picks(page, app, taste):
    """The page by itself: a choice is in the set's file, undo takes it back, and no button needs the workflow."""
    page("size", width=390, height=844)
    lines = taste / "pairs.jsonl"
    before = len(lines.read_text().splitlines()) if lines.is_file() else 0
    page("evaluate", code="() => { location.href = '/retort/pick?set=by_hand&by=pick'; }")
    shown = "[...document.querySelectorAll('.retort-picker-cell img')].every((one) => one.naturalWidth)"
    page("until", condition=f"document.querySelectorAll('.retort-picker-cell').length === 2 && {shown}")
    page("shot", name="phone")
    wide = page("evaluate", code="document.documentElement.scrollWidth")
    assert wide <= 390 and "Generate" not in page("evaluate", code="document.body.innerText")
    page("evaluate", code="() => new Promise((done) => setTimeout(done, 500))")
    page("click", where=".retort-picker-cell")
    counted = "document.querySelector('.retort-picker-counts').textContent"
    page("until", condition=f"{counted}.startsWith('{before + 1} judged')")
    page("until", condition="!document.querySelector('.retort-picker-trouble')")
    page("evaluate", code="() => new Promise((done) => setTimeout(done, 1500))")
    assert len(lines.read_text().splitlines()) == before + 1
    page("click", where=".retort-picker button", text="Undo")
    page("until", condition=f"{counted}.startsWith('{before} judged')")
    # The audit asks ComfyUI's page for the colour of a node.
    page("evaluate", code="() => { window.LiteGraph = { NODE_DEFAULT_BGCOLOR: '#202020' }; }")
    sound(page("audit"))
    assert not page("heard")
    page("open")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_first_training_offers_to_be_watched(page, app, size):
    """Once in a session; the panel opens with the run."""
    page("size", width=size[0], height=size[1])
    page("open")
    page("look", vue=False, theme="dark")
    page("evaluate", code="() => { localStorage.setItem('retort.panel', '2'); }")
    job_watch = importlib.import_module("retort.trainers.job_watch")
    folder = app.base / "output" / "retort" / "offered"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "student_loss": 1.0}) + "\n")
    job_watch.write_status(folder, job_watch.Status("finished", 1, 1, machine="another"))
    if page("evaluate", code="Boolean(document.querySelector('.retort-panel'))"):
        page("evaluate", code="() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.retort')")
        page("until", condition="!document.querySelector('.retort-panel')")
    offer = """async () => {
      (await import("/extensions/retort/panel/toast.mjs")).offerPanel("offered"); }"""
    page("evaluate", code=offer)
    page("until", condition="document.querySelector('.retort-toast')?.textContent.includes('offered')")
    sound(page("audit"))
    page("shot", name=f"toast_{size[0]}")
    page("click", where=".retort-toast button", text="Show")
    page("until", condition="document.querySelector('.retort-list .retort-run canvas')")
    opened = "document.querySelector('.retort-title[aria-expanded=true]').textContent"
    assert page("evaluate", code=opened) == "offered"
    page("shot", name=f"offered_{size[0]}")
    page("evaluate", code=offer)
    assert not page("evaluate", code="document.querySelector('.retort-toast')") and not page("heard")


JOINED = """() => {
  const of = (type) => app.graph._nodes.find((one) => one.type === type);
  for (const [i, type] of ["VAEDecode", "PreviewImage"].entries()) {
    const node = LiteGraph.createNode(type); node.pos = [2400, 200 * i]; app.graph.add(node); }
  for (const [from, slot, to, name] of [
    ["RetortEmbeddedModel", 0, "LoraLoaderModelOnly", "model"], ["RetortEmbeddedModel", 1, "CLIPTextEncode", "clip"],
    ["LoraLoaderModelOnly", 0, "KSampler", "model"], ["EmptySD3LatentImage", 0, "KSampler", "latent_image"],
    ["CLIPTextEncode", 0, "KSampler", "positive"], ["CLIPTextEncode", 0, "KSampler", "negative"],
    ["KSampler", 0, "VAEDecode", "samples"], ["RetortEmbeddedModel", 2, "VAEDecode", "vae"],
    ["VAEDecode", 0, "PreviewImage", "images"],
  ]) of(from).connect(slot, of(to), of(to).inputs.findIndex((one) => one.name === name)); }"""
# The node before each input of a node.
SOURCES = """(type) => Object.fromEntries(app.graph._nodes.find((one) => one.type === type).inputs
  .map(({ name, link }) => [name, app.graph.links.get?.(link) ?? app.graph.links[link]]).filter(([, link]) => link)
  .map(([name, link]) => [name, app.graph.getNodeById(link.origin_id).type]))"""
ITEM = """(type) => app.collectNodeMenuItems(app.graph._nodes.find((one) => one.type === type))
  .find((one) => one?.content?.startsWith("Sample as a few-step student"))"""


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_a_ksampler_gives_way_to_what_samples_a_student(page, vue):
    """All that it was connected to stays so; what the setup says of its levels stays after the job is over."""
    page("size", width=1366, height=768)
    page("look", vue=vue, theme="dark")
    loaders = ["RetortEmbeddedModel", "LoraLoaderModelOnly"]
    page("fresh", types=[*loaders, "CLIPTextEncode", "EmptySD3LatentImage", "KSampler"])
    page("change", type="LoraLoaderModelOnly", values={"lora_name": "digits_flow_dmd2_4step.safetensors"})
    page("change", type="CLIPTextEncode", values={"text": "a red three on white paper"})
    page("change", type="EmptySD3LatentImage", values={"width": 64, "height": 64, "batch_size": 1 + vue})
    page("change", type="KSampler", values={"seed": 11, "denoise": 1.0})
    page("evaluate", code=JOINED)
    assert not page("evaluate", code=f"(type) => !!({ITEM})(type)", given="RetortEmbeddedModel")
    page("evaluate", code=f"(type) => {{ ({ITEM})(type).callback(); }}", given="KSampler")
    node = "app.graph._nodes.find((one) => one.type === '{}')".format
    page("until", condition=f"{node('RetortDistilledSetup')} && !{node('KSampler')}")
    assert page("evaluate", code=SOURCES, given="RetortDistilledSetup") == {
        "model": "LoraLoaderModelOnly", "positive": "CLIPTextEncode", "negative": "CLIPTextEncode",
        "latent": "EmptySD3LatentImage"}  # fmt: skip
    own = {"noise": "RandomNoise", **dict.fromkeys(("guider", "sampler", "sigmas"), "RetortDistilledSetup")}
    found = page("evaluate", code=SOURCES, given="SamplerCustomAdvanced")
    assert found == {**own, "latent_image": "EmptySD3LatentImage"}
    assert page("evaluate", code=SOURCES, given="VAEDecode")["samples"] == "SamplerCustomAdvanced"
    first = "{}.widgets[0].value".format
    assert page("evaluate", code=first(node("RandomNoise"))) == 11
    assert page("evaluate", code=first(node("RetortDistilledSetup"))) == "auto"
    over = "() => { window.over = 0; app.api.addEventListener('execution_success', () => window.over++); }"
    page("evaluate", code=over)
    page("queue", type="PreviewImage")
    page("until", condition="window.over")
    page("evaluate", code="() => new Promise((done) => setTimeout(done, 1000))")
    widgets = f"{node('RetortDistilledSetup')}.widgets"
    said = page("evaluate", code=f"{widgets}.find((one) => one.name === '$$node-text-preview')?.value ?? ''")
    assert "auto, by the name of digits_flow_dmd2_4step.safetensors): 1 calls" in said
    page("shot", name=f"few_steps_{'nodes2' if vue else 'canvas'}")
    assert not page("heard")
