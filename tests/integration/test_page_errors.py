"""Mistakes on ComfyUI's page: their input is marked at once where nothing had to run, or the sentence is read in full.

Needs what test_page.py needs; COMFYUI_FRONTEND names another frontend. Pictures are left in RETORT_SCREENSHOTS.
"""

from __future__ import annotations

import page_server
import pytest

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
app, page = page_server.app, page_server.page
MOST_SECONDS = 2
# A prompt in API format as nodes on the canvas.
BUILD = """async (nodes) => {
  await app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
  await new Promise((done) => setTimeout(done, 400));
  const made = {};
  let x = 0;
  for (const [id, { class_type }] of Object.entries(nodes)) {
    const node = LiteGraph.createNode(class_type);
    node.pos = [x, 0];
    x += node.size[0] + 60;
    app.graph.add(node);
    made[id] = node;
  }
  for (const [id, { inputs }] of Object.entries(nodes)) {
    for (const [name, value] of Object.entries(inputs)) {
      if (Array.isArray(value)) continue;
      const widget = made[id].widgets.find((one) => one.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
    for (const [name, value] of Object.entries(inputs)) {
      if (!Array.isArray(value)) continue;
      made[value[0]].connect(value[1], made[id], made[id].inputs.findIndex((one) => one.name === name));
    }
  }
  Object.assign(app.canvas.ds, { scale: 0.7, offset: [60, 160] });
  app.canvas.setDirty(true, true);
}"""
QUEUE = "() => { app.queuePrompt(0, 1); }"
MARKED = """app.graph._nodes.flatMap((node) => (node.inputs ?? []).filter((one) => one.hasErrors)
  .map((one) => `${node.type}.${one.name}`)).join()"""
OVERLAY = "document.querySelector('[data-testid=error-overlay]')?.innerText ?? ''"
# Ours alone: on the node, and in a toast, which frontends make in two ways.
ON_NODE = "document.querySelector('.retort-error')?.textContent ?? ''"
TOASTS = "[...document.querySelectorAll('.p-toast-message, [data-testid=toast]')].map((one) => one.innerText).join()"
QUICK = {"steps": 2, "batch_size": 1, "rank": 2, "warmup": 0, "preview_every": 0}


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": {name.replace("__", "."): value for name, value in inputs.items()}}


MODEL = node("RetortEmbeddedModel", variant="flow")
LATENT = node("EmptySD3LatentImage", width=64, height=64, batch_size=2)
TEXT = node("CLIPTextEncode", clip=["m", 1], text="a red two")
SETUP = {"model": ["m", 0], "positive": ["c", 0]}


def training(**changes):
    given = {"model": ["m", 0], "clip": ["m", 1], "latents": ["l", 0], "method": "tdm", "prompts": "a red two", **QUICK}
    given |= {"name": "page errors", **changes}
    return {"m": MODEL, "l": LATENT,
            "t": node("RetortTrainDistillation", **{k: v for k, v in given.items() if v is not None})}  # fmt: skip


def shown(kind, slot=0, beside=(), /, **inputs):
    return {**dict(beside), "n": node(kind, **inputs), "p": node("PreviewAny", source=["n", slot])}


SEARCH = {
    "m": MODEL, "l": LATENT, "c": TEXT, "g": node("BasicGuider", model=["m", 0], conditioning=["c", 0]),
    "s": node("BasicScheduler", model=["m", 0]), "r": node("RetortReward", kind="sharpness"),
}  # fmt: skip
SEARCHED = {"guider": ["g", 0], "sigmas": ["s", 0], "latent": ["l", 0], "reward": ["r", 0]}
WITH_TEXT = {"m": MODEL, "c": TEXT}
# What is queued, the input that is marked, what is read at once.
MARKED_AT_ONCE = {
    "no prompts": (training(prompts=""), "prompts", "there are no prompts: type one in each line"),
    "no clip": (training(clip=None), "prompts", "typed prompts need their text encoder: connect `clip`"),
    "no latents": (training(latents=None), "images", "the size of the pictures is not known"),
    "no images for a GAN": (
        training(method="dmd2", method__gan_weight=0.01), "images", "DMD2 learns from images here, and there are none"),
    "timesteps": (
        shown("RetortDistilledSetup", 3, WITH_TEXT, **SETUP, preset="custom", timesteps="999 749; abc"),
        "timesteps", "'abc' is not a whole number; write them like 999, 749, 499, 249"),
    "candidates": (
        {"m": MODEL, "l": LATENT, "v": node("VAEDecode", samples=["l", 0], vae=["m", 2]),
         "k": node("RetortPreferencePicker", images=["v", 0], candidates="4")},
        "candidates", "2 images cannot be shared out in sets of 4"),
    "fk with ode": (
        {**SEARCH, "t": node("RetortTreeSearch", **SEARCHED, vae=["m", 2], method="fk", transition="ode")},
        "transition", "transition is ode, which draws no noise"),
    "same name": (training(rank=4, name="there already"), "name", "was started with other settings"),
    "name": (training(name="../x?*"), "name", "name '../x?*' cannot be a file's name"),
    "empty set": (
        {"s": node("RetortPreferenceSet", name="nothing yet")}, "name", "choose some pictures in Preference Picker"),
    "no PickScore": (
        shown("RetortReward", kind="pick_score"), "kind.model", "type yuvalkirstain/PickScore_v1 to download"),
    "no vae": ({**SEARCH, "t": node("RetortTreeSearch", **SEARCHED)}, "vae", "missing a required input: vae"),
    "range": (training(batch_size=5000), "batch_size", "5000"),
    "missing LoRA": (training(start_from="gone.safetensors"), "start_from", ""),
    "reward without a VAE": (
        {**training(method="di_star", reward=["r", 0]), "r": node("RetortReward", kind="sharpness")},
        "reward", "a reward looks at pictures: connect `vae`"),
    "overlap": (
        {"m": MODEL, "i": node("EmptyImage", width=64, height=64), **shown(
            "RetortRestore", model=["m", 0], clip=["m", 1], vae=["m", 2], image=["i", 0], tile=64, overlap=64)},
        "overlap", "overlap 64 must be between 0 and 32"),
    "index": (shown("RetortPromptQueue", prompts="one", index=3), "index", "all 1 prompts have been drawn"),
    "no search of that name": (shown("RetortLoadSearch", file="gone"), "file", "there is no search 'gone'"),
}  # fmt: skip
SAID_IN_FULL = {
    "preset": (
        shown("RetortDistilledSetup", 3, WITH_TEXT, **SETUP, preset="dmd2_sdxl_4step"),
        "is for an eps model (SD1.5, SDXL), and this model predicts 'flow'"),
    "a sampler of ours in a core node": (
        {**WITH_TEXT, "l": LATENT, "g": SEARCH["g"], "s": SEARCH["s"], "z": node("RandomNoise"),
         "d": node("RetortDopri5Sampler", max_calls=10), **shown(
            "SamplerCustomAdvanced", noise=["z", 0], guider=["g", 0], sampler=["d", 0], sigmas=["s", 0],
            latent_image=["l", 0])},
        "max_calls (10) are spent"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(app):
    """A run of the name "there already", which a workflow may not go on with other settings."""
    nodes = training(name="there already")
    done = app.run(nodes)
    assert done["status"]["status_str"] == "success", done


@pytest.fixture(params=[False, True], ids=["canvas", "nodes2"])
def look(request, page, trained):
    page("look", vue=request.param, theme="dark")
    return "nodes2" if request.param else "canvas"


def test_the_input_is_marked_and_nothing_runs(page, look):
    wrong = []
    for case, (nodes, name, sentence) in MARKED_AT_ONCE.items():
        page("evaluate", code=BUILD, given=nodes)
        seconds = page("evaluate", code=f"""async () => {{
            const begin = performance.now();
            app.queuePrompt(0, 1);
            while (!({MARKED}) && performance.now() - begin < 10_000) await new Promise(requestAnimationFrame);
            return (performance.now() - begin) / 1000; }}""")  # fmt: skip
        page("evaluate", code="async () => { await new Promise((done) => setTimeout(done, 300)); }")
        marked, said = page("evaluate", code=MARKED), page("evaluate", code=OVERLAY)
        page("shot", name=f"mistake {look} {case}")
        if not (marked.split(",")[-1].endswith(f".{name}") and sentence in said and seconds < MOST_SECONDS):
            wrong.append((case, marked, said, seconds))
    assert not wrong


def test_what_fails_while_it_runs_is_read_in_a_toast_and_on_the_node(page, look):
    for case, (nodes, sentence) in SAID_IN_FULL.items():
        page("evaluate", code=BUILD, given=nodes)
        page("evaluate", code=QUEUE)
        page("until", condition=f"({ON_NODE}).includes({sentence!r})" if "'" not in sentence else
             f"({ON_NODE}).includes(\"{sentence}\")", seconds=60)  # fmt: skip
        page("until", condition=f"({TOASTS}).includes(\"{sentence}\")", seconds=10)
        page("shot", name=f"failed {look} {case}")
        before = page("evaluate", code="app.graph._nodes.map((node) => node.serialize().widgets_values?.length ?? 0)")
        # The next run clears it, and no widget that holds a value came or went.
        page("evaluate", code="() => { app.api.dispatchCustomEvent('execution_start', { prompt_id: 'another' }); }")
        page("until", condition=f"!({ON_NODE})", seconds=10)
        assert page("evaluate", code="app.graph._nodes.map((n) => n.serialize().widgets_values?.length ?? 0)") == before


def test_an_option_of_another_version_is_marked(page, look):
    """As an old workflow stores it: the page itself takes no such value."""
    page("evaluate", code=BUILD, given=shown("RetortReward", kind="sharpness"))
    page("evaluate", code="""async () => {
        const send = app.graphToPrompt;
        app.graphToPrompt = async function (...given) {
          const made = await send.apply(this, given);
          for (const one of Object.values(made.output)) if ("kind" in one.inputs) one.inputs.kind = "gone";
          return made;
        };
        try { await app.queuePrompt(0, 1); } finally { app.graphToPrompt = send; } }""")  # fmt: skip
    page("until", condition=f"({MARKED}).endsWith('.kind')", seconds=10)
    assert "kind is 'gone', which this version of the node does not know" in page("evaluate", code=OVERLAY)


def test_an_empty_mask_is_told_on_the_node(page, look):
    nodes = {
        "m": node("RetortEmbeddedModel", variant="photographs"), "i": node("EmptyImage", width=64, height=64),
        "k": node("SolidMask", value=0.0, width=64, height=64),
        "n": node("RetortRestore", model=["m", 0], clip=["m", 1], vae=["m", 2], image=["i", 0], mask=["k", 0], scale=1),
        "p": node("PreviewImage", images=["n", 0]),
    }  # fmt: skip
    told = "app.graph._nodes.flatMap((one) => (one.widgets ?? []).map((w) => String(w.value))).join()"
    for colour in range(1, 6):
        # Another picture each time, since what has run is not run again: the page drops a text that overtakes the
        # server's answer to the prompt.
        nodes["i"]["inputs"]["color"] = colour + 10 * (look == "canvas")
        page("evaluate", code=BUILD, given=nodes)
        page("evaluate", code=QUEUE)
        page("until", condition="Object.keys(app.nodeOutputs).length > 0", seconds=90)
        if page("evaluate", code=f"({told}).includes('the mask is empty')"):
            return
    pytest.fail("the node said nothing")


def test_a_student_that_is_sampled_with_guidance_is_warned_of(page, look):
    nodes = {
        "m": MODEL, "l": LATENT, "c": TEXT,
        "a": node("LoraLoaderModelOnly", model=["m", 0], lora_name="there already.safetensors", strength_model=1.0),
        "k": node("KSampler", model=["a", 0], positive=["c", 0], negative=["c", 0], latent_image=["l", 0], seed=0,
                  steps=1, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0),
        "p": node("PreviewAny", source=["k", 0]),
    }  # fmt: skip
    send = "async (output) => { await app.api.queuePrompt(0, { output, workflow: {} }); }"
    nodes["k"]["inputs"]["cfg"] = 4.5 if look == "canvas" else 3.5
    page("evaluate", code=send, given=nodes)
    said = f"cfg is {nodes['k']['inputs']['cfg']}, and there already.safetensors makes a few-step student"
    page("until", condition=f"({TOASTS}).includes(\"{said}\")", seconds=20)
    page("shot", name=f"student {look}")


def test_help_pages_are_there_under_the_address_that_is_asked_first(app):
    for language in ("en", "zh", "ja", "zh-TW"):
        text = app.get(f"/extensions/retort/docs/RetortRestore/{language}.md").decode("utf-8")
        inputs = {"zh": "## 输入", "ja": "## 入力"}.get(language, "## Inputs")
        assert text.startswith("# ") and inputs in text
        assert "](/retort/docs/RetortRestore.md)" in text
    assert app.get("/retort/docs/RetortRestore.md").startswith(b"# Restore in detail\n")
