"""ComfyUI's page with the plugin: every template, live charts, the panel; both renderers and themes, mouse and keys.

Needs COMFYUI_PATH, Chromium, and playwright: in this Python, or in another one that PLAYWRIGHT_PYTHON names. Pictures
are left in the folder that RETORT_SCREENSHOTS names.
"""

from __future__ import annotations

import importlib
import json
import time
from itertools import combinations
from pathlib import Path

import page_server
import pytest
import torch

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
app, page = page_server.app, page_server.page
REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(path.stem for path in (REPOSITORY / "workflows").glob("*.json"))
ADVANCED = [
    "RetortTrainDistillation", "RetortTrainRestorer", "RetortTrainingJob", "RetortTrainReward", "RetortTrainFlow",
    "RetortTrainPreference", "RetortFewShotAdapt", "RetortRestore",
]  # fmt: skip
HOSTILE = "<img src=x onerror='window.hurt=1'>"
MOST_BYTES = 150_000
# The smallest training that a page can watch; it is stopped before its end.
TINY = {
    "steps": 4000, "batch_size": 1, "warmup": 0, "rank": 2, "preview_every": 0, "previews": 2,
    "method.regression_steps": 0, "method.pairs": 2, "method.pair_steps": 2,
}  # fmt: skip
STEP = "document.querySelector('.retort-run canvas')?.getAttribute('aria-label')?.match(/at step (\\d+)/)?.[1] ?? 0"
# How long the page's frames take (ms) while the pointer goes over the chart and the smoothing is moved.
FRAMES = """async () => {
  const canvas = document.querySelector(".retort-run canvas");
  const slider = document.querySelector(".retort-run [type=range]");
  const { left, width, top } = canvas.getBoundingClientRect();
  const frame = () => new Promise(requestAnimationFrame);
  const frames = [];
  for (let i = 0; i < 60; i++) {
    const before = performance.now();
    canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: left + (width * i) / 60, clientY: top + 20 }));
    if (i % 4 === 0) { slider.value = String(i); slider.dispatchEvent(new Event("input")); }
    await frame();
    frames.push(performance.now() - before);
  }
  return frames;
}"""
# What is wider than the panel lets it be.
WIDE = """[...document.querySelectorAll(".retort-panel *")].filter((one) => one.scrollWidth > one.clientWidth + 1
  && one.clientWidth && getComputedStyle(one).overflowX === "visible").map((one) => one.className)"""
# Boxes of ours that show nothing and take the clicks on what lies below them.
IN_THE_WAY = """[...document.querySelectorAll(".dom-widget:has(> .retort-run[hidden])")].map((one) => {
  const { width, height } = one.getBoundingClientRect();
  return getComputedStyle(one).pointerEvents === "none" ? 0 : width * height;
}).filter(Boolean)"""
SEEN = """(() => { const one = document.querySelector(".retort-strip img");
  return [getComputedStyle(one).objectFit, one.clientWidth, one.clientHeight]; })()"""
NOTE = "document.querySelector('.retort-body .retort-note').textContent"


@pytest.fixture(scope="module")
def state(app):
    """state(run): where a run stands, as the server says it; None where there is none."""

    def one(name):
        found = [run for run in json.loads(app.get("/retort/runs")) if run["name"] == name]
        return found[0] if found else None

    return one


def eventually(look, seconds=60):
    """What `look` gives as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.25)
    return found


def sound(audit):
    assert audit["count"] > 0 and not audit["unnamed"] and not audit["unseen"] and not audit["poor"], audit


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_every_template_opens_whole(page, app, vue):
    listed = json.loads(app.get("/workflow_templates"))["retort"]
    assert sorted(listed) == TEMPLATES and [name[:2] for name in listed[:6]] == [f"{i} " for i in range(1, 7)]
    page("look", vue=vue, theme="light" if vue else "dark")
    wrong = []
    for name in TEMPLATES:
        seen = page("template", name=name, vue=vue)
        assert seen["picture"] > 200 and not seen["errors"], (name, seen["errors"])
        written = {str(node["id"]): node for node in seen["file"]["nodes"]}
        assert page("evaluate", code=IN_THE_WAY) == [], name
        # It can be read: at full size, where its note begins.
        assert seen["view"] == [1, *seen["file"]["extra"]["ds"]["offset"]], (name, seen["view"])
        assert {str(node["id"]) for node in seen["nodes"]} == set(written)
        for node in seen["nodes"]:
            assert node["known"], (name, node["type"])
            # Inputs that came after the file was written are last and have a default.
            values = written[str(node["id"])].get("widgets_values", [])
            if node["values"][: len(values)] != values:
                wrong.append(f"{name}: {node['type']} {node['id']} has {node['values']}, not {values}")
            if vue:
                assert node["shown"] is not None, (name, node["type"])
                # LoadImage's upload is a button.
                fields = [one for one in node["names"] if one != "upload"]
                folded = written[str(node["id"])]["flags"].get("collapsed")
                assert folded or node["shown"]["fields"] >= len(fields), (name, node["type"], fields)
        for one, two in combinations(seen["nodes"], 2):
            (a, b, c, d), (e, f, g, h) = one["box"], two["box"]
            across, down = min(c, g) - max(a, e), min(d, h) - max(b, f)
            if min(across, down) > 2:
                wrong.append(f"{name}: {one['type']} {one['id']}, {two['type']} {two['id']}: {across:.0f} x {down:.0f}")
        # What is missing is named with its folder: on the page, and in the note.
        note = " ".join(str(node["values"]) for node in seen["nodes"] if node["type"] == "MarkdownNote")
        for model in (m for node in seen["file"]["nodes"] for m in node.get("properties", {}).get("models", [])):
            assert model["name"] in seen["told"] and model["directory"] in seen["told"], (name, model)
            assert all(word in note for word in (model["name"], model["directory"], "ComfyUI/models")), (name, model)
        page("shot", name=f"{name}_{'nodes2' if vue else 'canvas'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_new_nodes_are_as_tall_as_what_they_show(page, vue):
    """Folded settings take no room, and none of them is drawn over an input."""
    page("look", vue=vue, theme="dark")
    seen = page("fresh", types=ADVANCED)
    for kind, node in seen.items():
        assert not node["stray"], (kind, node["stray"])
        assert node["rows"] < node["widgets"] and node["folded"] == node["widgets"] - node["rows"], (kind, node)
        # Nodes 2.0 measures rows of its own, which are a little higher.
        assert node["height"] <= node["needed"] * (1.3 if vue else 1) + 1, (kind, node)
    assert 500 < seen["RetortTrainDistillation"]["needed"] < 620
    page("shot", name=f"fresh_{'nodes2' if vue else 'canvas'}")
    # Unfolded, everything has a row of its own.
    for kind, node in page("fresh", types=ADVANCED, unfolded=True).items():
        assert node["rows"] == node["widgets"] and not node["stray"], (kind, node)


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_counts_of_the_picker_stay_inside(page, vue):
    page("look", vue=vue, theme="dark")
    page("fresh", types=["RetortPreferencePicker"])
    page("fit", type="RetortPreferencePicker")
    beyond = """() => { const counts = document.querySelector(".retort-picker-counts");
      counts.textContent = "1000 judged · 100 waiting · 100 skipped · 10 lost";
      const edge = document.querySelector(".retort-picker").getBoundingClientRect();
      const box = counts.getBoundingClientRect();
      return [box.width, box.right - edge.right, box.bottom - edge.bottom]; }"""
    width, across, down = page("evaluate", code=beyond)
    assert width > 50 and across <= 0 and down <= 0
    page("shot", name=f"picker_{'nodes2' if vue else 'canvas'}")


def test_a_name_that_no_run_can_have_is_not_asked_for(page):
    page("look", vue=False, theme="dark")
    page("fresh", types=["RetortTrainFlow"])
    page("heard")
    for name in ("../my student", "..", "what?"):
        page("change", type="RetortTrainFlow", values={"name": name})
        page("evaluate", code="() => app.graph._nodes[0].onExecuted({})")
        time.sleep(0.5)
    assert not [one for one in page("heard") if "retort/runs" in one]


def by_type(seen):
    """What nodes of each type hold."""
    values = {}
    for node in seen:
        values.setdefault(node["type"], []).append(node["values"])
    return values


def beside(seen):
    """No node lies over another."""
    for one, two in combinations(seen, 2):
        (a, b, c, d), (e, f, g, h) = one["box"], two["box"]
        across, down = min(c, g) - max(a, e), min(d, h) - max(b, f)
        assert min(across, down) <= 2, (one["type"], two["type"])


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
@pytest.mark.parametrize("method", ["tdm", "flow", "instarevive"])
def test_a_lora_is_opened_as_it_is_sampled(page, vue, method):
    """The run's prompt and size; with the LoRA, and without it from the same noise; no node over another."""
    student = method == "tdm"
    run = {
        "method": method, "lora": "digits_flow_tdm_4step.safetensors", "student": method != "flow",
        "name": "none", "base": {"kind": "embedded", "variant": "flow"}, "prompt": "a red two", "latent": [16, 8, 12],
    }  # fmt: skip
    page("look", vue=vue, theme="dark")
    seen = page("lora", run=run, vue=vue)
    values = by_type(seen)
    if method == "instarevive":
        assert [one[0] for one in values["RetortRestore"]] == ["a red two"] * 2
    else:
        assert values["EmptyLatentImage"] == [[96, 64, 4]] and values["CLIPTextEncode"][0] == ["a red two"]
    if student:
        assert values["RetortLoadStudent"] == [[run["lora"], 1, 0, False]]
        assert values["RandomNoise"] == [[1, "fixed"]] and len(values["SamplerCustomAdvanced"]) == 2
    elif method == "flow":
        assert values["KSampler"] == [[1, "fixed", 20, 4, "euler", "simple", 1]] * 2
    assert len(values["RetortCompareImages"]) == 1
    assert len(values["RetortLoadStudent" if student else "LoraLoaderModelOnly"]) == 1
    beside(seen)
    page("shot", name=f"open_{method}_{'nodes2' if vue else 'canvas'}")


ALONE = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "z_image_bf16.safetensors", "weight_dtype": "default"}},
    "2": {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["1", 0], "shift": 4.5}},
    "3": {"class_type": "CLIPLoader", "inputs": {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}},
    "4": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
    "5": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}},
    "8": {"class_type": "UNETLoader", "inputs": {"unet_name": "low.safetensors", "weight_dtype": "default"}},
    "9": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 0], "text": "a cat in ink"}},
}


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
@pytest.mark.parametrize("kind", ["image", "two networks", "video"])
def test_a_lora_is_opened_with_what_its_model_came_from(page, app, vue, kind):
    """Loaders of their own, what was set on the model, an encoded prompt; guidance and steps as of the previews."""
    node = {"model": ["2", 0], "vae": ["4", 0], "images": ["5", 0], "positive": ["9", 0], "name": "ink"}
    if kind == "two networks":
        node["other_expert"] = ["8", 0]
    prompt = ALONE | {"6": {"class_type": "RetortTrainFlow", "inputs": node}}
    folder = app.base / "output" / "retort" / f"ink {kind}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.json").write_text(json.dumps({"node": "6", "prompt": prompt}))
    run = {
        "name": folder.name, "method": "flow", "lora": "ink.safetensors", "student": False, "sigmas": [], "prompt": "",
        "base": {"kind": "diffusion_model", "file": "z_image_bf16.safetensors"}, "size": [1024, 768],
        "latent": [16, 5, 96, 128] if kind == "video" else [16, 96, 128],
        "sampling": {"steps": 14, "cfg": 3, "expert": "low noise"},
    }  # fmt: skip
    page("look", vue=vue, theme="dark")
    seen = page("lora", run=run, vue=vue)
    values = by_type(seen)
    unets = ["z_image_bf16.safetensors", *(["low.safetensors"] if kind == "two networks" else [])]
    assert sorted(one[0] for one in values["UNETLoader"]) == sorted(unets)
    assert values["ModelSamplingAuraFlow"] == [[4.5]]
    assert values["CLIPLoader"][0][:2] == ["qwen_3_4b.safetensors", "lumina2"]
    assert values["VAELoader"] == [["ae.safetensors"]]
    assert values["CLIPTextEncode"] == [["a cat in ink"], [""]] and "LoadImage" not in values
    if kind == "two networks":
        first, second = (["enable", 1, "fixed", 14, 3, "euler", "simple", 0, 7, "enable"],
                         ["disable", 1, "fixed", 14, 3, "euler", "simple", 7, 10000, "disable"])  # fmt: skip
        assert values["KSamplerAdvanced"] == [first, second] * 2 and "KSampler" not in values
    else:
        assert values["KSampler"] == [[1, "fixed", 14, 3, "euler", "simple", 1]] * 2
    if kind == "video":
        assert values["EmptyHunyuanLatentVideo"] == [[1024, 768, 17, 1]]
    else:
        assert values["EmptyLatentImage"] == [[1024, 768, 1]], "one of a megapixel takes long enough"
    # Everything is connected: the LoRA to what the training had, both branches to both pictures.
    joined = page("evaluate", code="""() => Object.fromEntries(app.graph._nodes.map((one) => [one.id, [one.type,
      Object.fromEntries((one.inputs ?? []).filter((each) => each.link != null).map((each) =>
        [each.name, app.graph.links.get?.(each.link)?.origin_id ?? app.graph.links[each.link].origin_id]))]]))""")
    of = {}
    for id, (type, links) in joined.items():
        of.setdefault(type, []).append((id, {name: str(origin) for name, origin in links.items()}))
    ((lora, links),) = of["LoraLoaderModelOnly"]
    assert links["model"] == of["ModelSamplingAuraFlow"][0][0]
    samplers = [links for type in ("KSampler", "KSamplerAdvanced") for _, links in of.get(type, [])]
    assert all({"model", "positive", "negative", "latent_image"} <= set(links) for links in samplers)
    if kind == "two networks":
        low = next(id for id, _ in of["UNETLoader"] if id != of["ModelSamplingAuraFlow"][0][1]["model"])
        assert [links["model"] for links in samplers] == [low, lora, low, of["ModelSamplingAuraFlow"][0][0]]
    else:
        assert [links["model"] for links in samplers] == [lora, of["ModelSamplingAuraFlow"][0][0]]
    assert set(of["RetortCompareImages"][0][1]) == {"before", "after"}
    assert all(set(links) == {"samples", "vae"} for _, links in of["VAEDecode"])
    beside(seen)
    page("shot", name=f"open_{kind}_{'nodes2' if vue else 'canvas'}")


@pytest.mark.parametrize("vue", [False, True], ids=["canvas by mouse", "nodes2 by keys"])
def test_a_training_is_watched_and_led(page, app, state, vue):
    keys = "Enter" if vue else None
    name = "watched_by_keys" if vue else "watched_by_mouse"
    page("look", vue=vue, theme="light" if vue else "dark")
    page("template", name="2 Train a student that draws in 1 step", vue=vue)
    assert "steps" in page("change", type="RetortTrainDistillation", values=TINY | {"name": name})
    page("queue", type="RetortTrainDistillation")
    page("until", condition=f"Number({STEP}) > 5", seconds=120)
    before = int(page("until", condition=STEP))
    page("until", condition=f"Number({STEP}) > {before + 3}")
    # A reload: the same workflow, the chart from its first step on.
    page("open")
    page("until", condition=f"Number({STEP}) > {before}", seconds=60)
    page("fit", type="RetortTrainDistillation")
    page("click", where=".retort-run canvas", keys="Home")
    assert page("until", condition="document.querySelector('.retort-run output').textContent").startswith("step 1:")
    page("press", keys="PageUp")
    assert not page("until", condition="document.querySelector('.retort-run output').textContent").startswith("step 1:")
    page("click", where=".retort-run button", text="Sample now", keys=keys)
    page("until", condition="document.querySelectorAll('.retort-strip img').length > 0", seconds=60)
    page("click", where=".retort-run button", text="Save now", keys=keys)
    eventually(lambda: json.loads(app.get(f"/retort/runs/{name}/log"))["saves"])
    sound(page("audit"))
    page("fit", type="RetortTrainDistillation")
    page("shot", name=name)
    # A preview is seen whole.
    (fit, across, down) = page("evaluate", code=SEEN)
    assert fit == "contain" and across > 60 and down > 60
    # A preview, large: arrow keys and Escape.
    page("click", where=".retort-strip button", keys=keys)
    page("until", condition="document.querySelector('dialog.retort-lightbox[open] img')?.naturalWidth > 0")
    sound(page("audit"))
    page("shot", name=f"{name}_preview")
    page("press", keys="Escape")
    page("until", condition="!document.querySelector('.retort-lightbox')")
    page("click", where=".retort-run button", text="Stop", keys=keys)
    stopped = eventually(lambda: (run := state(name)) and run["state"] == "stopped" and run)
    page("until", condition="document.querySelector('.retort-run .retort-line').textContent.startsWith('stopped')")
    # Its LoRA so far was handed out: the workflow has ended well.
    assert stopped["lora"] == f"{name}_step_{stopped['step']}.safetensors"
    last = "async () => Object.values(await (await fetch('/history?max_items=1')).json())[0]?.status?.status_str"
    eventually(lambda: page("evaluate", code=last) == "success")
    # It goes on where it was, and ComfyUI's own cancel saves it as well.
    page("queue", type="RetortTrainDistillation")
    eventually(lambda: (run := state(name)) and run["state"] == "running" and run["step"] > stopped["step"])
    page("evaluate", code="async () => { await fetch('/interrupt', { method: 'POST' }); }")
    again = eventually(lambda: (run := state(name)) and run["state"] == "stopped" and run)
    assert again["step"] > stopped["step"]
    page("until", condition=f"document.querySelector('.retort-run').textContent.includes('step {again['step']} of')")
    # The student learns on every other step.
    page("until", condition=f"Number({STEP}) >= {again['step']} - 2")
    # It ends: the panel opens its LoRA in a workflow of its own.
    page("change", type="RetortTrainDistillation", values={"steps": again["step"] + 2})
    page("queue", type="RetortTrainDistillation")
    eventually(lambda: state(name)["state"] == "finished")
    page("panel", section="Training", keys=vue)
    row = f".retort-list > li:has(.retort-title:text-is('{name}'))"
    page("click", where=f"{row} button", text="Open LoRA", keys=keys)
    alone = "app.graph._nodes.every((one) => one.type !== 'RetortTrainDistillation')"
    lora = f"app.graph._nodes.find((one) => one.type === 'RetortLoadStudent' && {alone})?.widgets[0].value"
    lora = page("until", condition=lora)
    assert lora == state(name)["lora"]
    # In a tab that says what it is, with every node beside the panel.
    assert page("evaluate", code="app.extensionManager.workflow.activeWorkflow.filename").startswith(f"{name} with and")
    left = "(one) => (one.getBounding()[0] + app.canvas.ds.offset[0]) * app.canvas.ds.scale"
    left = f"Math.min(...app.graph._nodes.map({left}))"
    assert page("evaluate", code=f"{left} >= document.querySelector('.retort-panel').getBoundingClientRect().right")
    page("shot", name=f"opened_lora_{'nodes2' if vue else 'canvas'}")
    # Written just now, and no file that the page would call missing.
    listed = "app.graph._nodes.find((one) => one.type === 'RetortLoadStudent').widgets[0].options.values"
    assert lora in page("evaluate", code=listed)
    page("queue", type="RetortCompareImages")
    drawn = "document.querySelectorAll('.retort-panel').length && app.nodeOutputs"
    page("until", condition=f"{drawn} && Object.values(app.nodeOutputs).some((one) => one.retort_after?.length)")
    assert not page("heard")


def test_a_job_outlives_comfyui(page, app, state):
    """The page stays open while ComfyUI is stopped and started again."""
    page("look", vue=False, theme="dark")
    page("template", name="Distil - Train in a process of its own", vue=False)
    page("change", type="RetortTrainingJob", values=TINY | {"name": "outlives"})
    page("queue", type="RetortTrainingJob")
    page("panel", section="Training")
    before = eventually(
        lambda: (run := state("outlives")) and run["state"] == "running" and run["step"] > 3 and run, 120
    )
    app.stop()
    page(
        "until",
        condition="document.querySelector('.retort-panel .retort-note').textContent.includes('does not answer')",
    )
    app.start()
    app.wait()
    after = eventually(lambda: (run := state("outlives")) and run["step"] > before["step"] and run)
    assert after["state"] == "running"
    shown = "[...document.querySelectorAll('.retort-list li')].find((li) => li.textContent.startsWith('outlives'))"
    page("until", condition=f"/running, step [1-9]/.test({shown}?.textContent)")
    page("open")
    page("panel", section="Training")
    page("until", condition=f"/running, step [1-9]/.test({shown}?.textContent)")
    page("click", where=".retort-title", text="outlives", keys="Enter")
    page("until", condition=f"Number({STEP}) > {before['step']}")
    sound(page("audit"))
    page("click", where=".retort-list > li:has(.retort-title:text-is('outlives')) button", text="Stop", keys="Space")
    eventually(lambda: state("outlives")["state"] == "stopped")


def test_a_search_is_looked_through(page, app):
    page("look", vue=False, theme="light")
    page("template", name="4 Search for a better picture", vue=False)
    page("change", type="RetortTreeSearch", values={"calls": 20000, "batch_size": 8})
    page("change", type="PrimitiveString", values={"value": f"a green four on white paper {HOSTILE}"})
    page("evaluate", code="async () => { await app.queuePrompt(0); }")
    page("panel", section="Searches", keys=True)
    page("until", condition="document.querySelectorAll('.retort-grid img').length > 1", seconds=120)
    page("click", where=".retort-list > li > button", text="Stop")
    eventually(lambda: not json.loads(app.get("/retort/searches"))["searches"][0]["going"], 120)
    page("until", condition="/ · cancelled/.test(document.querySelector('.retort-list .retort-line').textContent)")
    assert "best" in page("evaluate", code="document.querySelector('.retort-item .retort-line').textContent")
    assert "finished" in page("evaluate", code="document.querySelector('.retort-tree').getAttribute('aria-label')")
    loads = "app.graph._nodes.filter((one) => one.type === 'LoadLatent').map((one) => one.widgets[0].value)"
    # A candidate is shown large first, and its latent is taken from there.
    large = ".retort-lightbox > button:not(.retort-close)"
    assert page("leaf")
    page("until", condition="document.querySelector('.retort-lightbox img').naturalWidth > 0")
    page("click", where=large)
    (file,) = page("until", condition=f"{loads}.length === 1 && {loads}")
    assert (app.base / "input" / file).is_file()
    page("click", where=".retort-grid button", keys="Enter")
    page("click", where=large, keys="Enter")
    assert len(page("until", condition=f"{loads}.length === 2 && {loads}")) == 2
    # A candidate of the tree by keys alone.
    page("click", where=".retort-tree", keys="Home")
    page("click", where=".retort-tree", keys="ArrowRight")
    page("until", condition="/^candidate /.test(document.querySelector('.retort-treebox output').textContent)")
    page("click", where=".retort-tree", keys="Enter")
    page("click", where=large, keys="Enter")
    page("until", condition=f"{loads}.length === 3")
    page("until", condition="!document.querySelector('.retort-lightbox')")
    sound(page("audit"))
    page("shot", name="search")
    assert HOSTILE in page("evaluate", code="document.querySelector('.retort-list').textContent")
    assert page("evaluate", code="window.hurt ?? null") is None and not page("heard")


def test_the_panel_in_every_state(page, app):
    """No runs, a failure with a long error, long and hostile names, more runs than are shown; sets, with pictures."""
    preferences = importlib.import_module("retort.preferences.store")
    job_watch = importlib.import_module("retort.trainers.job_watch")
    runs, sets = (app.base / "output" / name for name in ("retort", "retort_preferences"))
    aside = runs.rename(runs.with_name("aside"))
    page("open")
    for theme in ("dark", "light"):
        page("look", vue=False, theme=theme)
        for section in ("Training", "Preferences"):
            page("panel", section=section)
            page("until", condition=f"{NOTE}.includes('yet')")
            sound(page("audit"))
        page("shot", name=f"panel_empty_{theme}")
    aside.rename(runs)
    long = "an error that says where /models/" + "x" * 90 + " and " + HOSTILE * 8
    # Shown are the 200 latest.
    states = {f"run {i:03d}": ("finished", "") for i in range(204)}
    states |= {"a" * 120: ("stopped", ""), HOSTILE: ("died", HOSTILE), "failed": ("failed", long)}
    for name, (end, message) in states.items():
        (runs / name).mkdir(parents=True)
        job_watch.write_status(runs / name, job_watch.Status(end, 3, 9, machine="another", message=message))
    names = [preferences.keep_image(sets / "taste", torch.full((8, 8, 3), value)) for value in (0.2, 0.8)]
    rows = [{"prompt": HOSTILE, "winner": names[0], "loser": names[1], "by": "me", "strength": s} for s in (1.0, 0.0)]
    preferences.append(sets / "taste", rows)
    for theme in ("dark", "light"):
        page("look", vue=theme == "light", theme=theme)
        page("panel", section="Training")
        page("until", condition="document.querySelectorAll('.retort-list > li').length === 200")
        sound(page("audit"))
        assert page("evaluate", code=WIDE) == []
        page("shot", name=f"panel_runs_{theme}")
        page("click", where=".retort-title", text="failed", keys="Enter")
        sound(page("audit"))
        page("shot", name=f"panel_failed_{theme}")
        page("panel", section="Preferences")
        page("until", condition="document.querySelector('.retort-title')?.textContent === 'taste'")
        page("click", where=".retort-title", text="taste", keys="Enter")
        page("until", condition="[...document.querySelectorAll('.retort-pair img')].some((one) => one.naturalWidth)")
        assert HOSTILE in page("evaluate", code="document.querySelector('.retort-pair').textContent")
        sound(page("audit"))
        page("shot", name=f"panel_sets_{theme}")
    assert "1 judged" in page("evaluate", code="document.querySelector('.retort-list').textContent")
    page("click", where=".retort-row button", text="+ Set", keys="Enter")
    put = "app.graph._nodes.some((one) => one.type === 'RetortPreferenceSet' && one.widgets[0].value === 'taste')"
    page("until", condition=put)
    assert page("evaluate", code="window.hurt ?? null") is None and not page("heard")


def test_runs_are_renamed_and_deleted_in_the_panel(page, app):
    job_watch = importlib.import_module("retort.trainers.job_watch")
    runs = app.base / "output" / "retort"
    for name in ("first try", "second try"):
        (runs / name).mkdir(parents=True)
        job_watch.write_status(runs / name, job_watch.Status("finished", 9, 9, machine="another"))
    page("open")
    # What shows a run follows it to its new name.
    page("evaluate", code="""() => {
      const node = LiteGraph.createNode('RetortLoraGrid');
      app.graph.add(node);
      node.widgets.find((one) => one.name === 'run').value = 'first try';
      const trainer = LiteGraph.createNode('RetortTrainFlow');
      trainer.properties.retort_run = 'first try';
      app.graph.add(trainer);
    }""")
    page("panel", section="Training")
    row = ".retort-list > li:has(.retort-title:text-is('{}'))".format
    listed = "[...document.querySelectorAll('.retort-title')].map((one) => one.textContent)"
    page("until", condition=f"{listed}.includes('first try')")
    page("click", where=f"{row('first try')} summary")
    page("until", condition="document.querySelector('.retort-menu[open] input')")
    page("evaluate", code="() => { document.querySelector('.retort-menu[open] input').value = 'the good one'; }")
    page("shot", name="panel_menu")
    sound(page("audit"))
    assert page("evaluate", code=WIDE) == []
    page("click", where=f"{row('first try')} button", text="Rename")
    eventually(lambda: (runs / "the good one").is_dir() and not (runs / "first try").exists())
    shown = "one.properties.retort_run ?? one.widgets?.find(({name}) => name === 'run')?.value"
    page("until", condition=f"app.graph.nodes.filter((one) => ({shown}) === 'the good one').length === 2")
    page("click", where=f"{row('second try')} summary")
    page("click", where=f"{row('second try')} button", text="Delete")
    page("click", where=f"{row('second try')} button", text="Really delete?")
    eventually(lambda: not (runs / "second try").exists())
    page("until", condition=f"{listed}.includes('the good one') && !{listed}.includes('second try')")
    archive = page("evaluate", code="""async () => {
      const answer = await fetch('/retort/runs/the%20good%20one/export.zip');
      return [answer.status, (await answer.arrayBuffer()).byteLength > 100];
    }""")
    assert archive == [200, True] and not page("heard")


def test_a_chart_of_100000_points_stays_smooth(page, app):
    folder = app.base / "output" / "retort" / "long"
    folder.mkdir(parents=True)
    lines = (
        f'{{"step": {i}, "student_loss": {1 / (i + 9) + (i * 7919 % 997) / 9970:.6g}}}\n' for i in range(1, 100_001)
    )
    (folder / "metrics.jsonl").write_text("".join(lines))
    page("look", vue=False, theme="dark")
    page("panel", section="Training")
    page("click", where=".retort-title", text="long", keys="Enter")
    page("until", condition=f"{STEP} === '100000'")
    frames = page("evaluate", code=FRAMES)
    assert sorted(frames)[len(frames) // 2] < 50, frames
    page("shot", name="chart_100000")
    page("click", where=".retort-title", text="long", keys="Enter")


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_picker_and_slider_can_be_read(page, vue, theme):
    page("look", vue=vue, theme=theme)
    for name, type in (
        ("3 Teach it your taste", "RetortPreferencePicker"), ("Restore - Digits in one step", "RetortCompareImages"),
    ):  # fmt: skip
        page("template", name=name, vue=vue)
        # ComfyUI itself draws what is muted dimly, Blind Test before the first training.
        page("evaluate", code="() => { for (const one of app.graph._nodes) one.mode = 0; }")
        page("fit", type=type)
        sound(page("audit"))
        page("shot", name=f"{type}_{'nodes2' if vue else 'canvas'}_{theme}")


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_the_slider_by_mouse_and_keys(page, vue):
    page("look", vue=vue, theme="light" if vue else "dark")
    # What is missing opens the panel that shows a selected node's widgets: it must not take ours from the node.
    page("template", name="SDXL - DMD2 in 4 steps", vue=vue)
    page("template", name="Restore - Digits in one step", vue=vue)
    page("evaluate", code="app.canvas.selectNode(app.graph._nodes.find((one) => one.type === 'RetortCompareImages'))")
    page("change", type="RetortRestore", values={"caption": f"a red three {'on white' if vue else 'upright'}"})
    page("queue", type="RetortCompareImages")
    page("until", condition="[...document.querySelectorAll('.retort-compare img')].every((one) => one.naturalWidth)")
    page("fit", type="RetortCompareImages")
    wide = "document.querySelector('.retort-compare').getBoundingClientRect().width"
    assert page("evaluate", code=wide) > 0.85 * page(
        "evaluate", code="Object.values(app.canvas.selected_nodes)[0].size[0]"
    )
    now = "document.querySelector('.retort-compare-view').getAttribute('aria-valuenow')"
    drawn = "parseFloat(document.querySelector('.retort-compare-line').style.left)"
    page("drag", where=".retort-compare-view", begin=0.5, end=0.2)
    assert abs(int(page("evaluate", code=now)) - 20) <= 1 and abs(page("evaluate", code=drawn) - 20) <= 1
    page("press", keys="Shift+ArrowRight")
    assert abs(int(page("evaluate", code=now)) - 30) <= 1
    page("press", keys="End")
    assert page("evaluate", code=now) == "100"
    page("press", keys="ArrowLeft")
    assert page("evaluate", code=now) == "98"
    page("drag", where=".retort-compare-view", begin=0.98, end=0.4)
    sound(page("audit"))
    page("shot", name=f"slider_{'nodes2' if vue else 'canvas'}")
    assert not page("heard")


def test_it_weighs_little(page):
    """The bytes exactly; the time with room for a busy machine, benchmarks/page_load.py measures it."""
    page("look", vue=False, theme="dark")
    page("evaluate", code="() => { app.graph.clear(); localStorage.clear(); sessionStorage.clear(); }")
    page("open")
    folder = REPOSITORY / "extensions" / "comfyui"
    sizes = {f"/extensions/retort/{path.relative_to(folder)}": path.stat().st_size for path in folder.rglob("*")
             if path.suffix in (".js", ".mjs", ".css")}  # fmt: skip
    entry = "/extensions/retort/retort.js"
    assert [path for path in sizes if path.endswith(".js")] == [entry]
    ((path, size, begin, end),) = page("weight")
    assert (path, size) == (entry, sizes[entry]) and end - begin < 1500
    page("template", name="3 Teach it your taste", vue=False)
    later = {path: size for path, size, *_ in page("weight")}
    assert "/extensions/retort/picker.mjs" in later and later == {path: sizes[path] for path in later}
    assert sum(later.values()) < MOST_BYTES
