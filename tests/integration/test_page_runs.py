"""What the page shows of runs: their previews over time, several beside one another, charts with phases.

Runs are written as files, so that nothing is trained here. Needs what test_page.py needs.
"""

from __future__ import annotations

import importlib
import json

import page_server
import pytest
import torch

pytestmark = [pytest.mark.integration, pytest.mark.slow]
app, page = page_server.app, page_server.page
HOSTILE = "<img src=x onerror='window.hurt=1'>"
PROMPTS = ["a red two", f"a blue four {HOSTILE}", "a green seven", "a black nine"]
STEPS = (20, 40, 60, 80)
SIZES = [(1366, 768), (1800, 1100)]
WINDOW = "document.querySelector('.retort-window')"
# The middle of the canvas of a row and a column, as colour.
COLOUR = """([row, column]) => {
  const canvas = document.querySelector(".retort-time tbody").rows[row].cells[column].querySelector("canvas");
  return [...canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data].slice(0, 3); }"""
OUTSIDE = f"""(() => {{ const box = {WINDOW}.getBoundingClientRect();
  return Math.max(-box.left, -box.top, box.right - innerWidth, box.bottom - innerHeight); }})()"""


def sound(audit):
    assert audit["count"] > 0 and not audit["unnamed"] and not audit["unseen"] and not audit["poor"], audit


def shade(step: int, row: int) -> list[int]:
    """The colour of a prompt's picture at a step."""
    return [2 * step, 60 * row, 100]


def write(runs, name, regression=0, rate=1e-4, steps=STEPS):
    """A run that has ended: 100 steps, previews of four prompts, checkpoints."""
    modules = {one: importlib.import_module(f"retort.trainers.{one}") for one in ("job_watch", "watch")}
    folder = runs / name
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "method": "dmd2", "objective": {"regression_steps": regression, "steps": 4},
        "training": {"steps": 100, "learning_rate": rate, "previews": 4}, "lora": {"rank": 8},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": i, "student_loss": (0.4 / i + 0.1) if i <= regression else 3 - i / 50, "rate": rate,
         **({} if i <= regression else {"fake_loss": 0.5 + 1 / i})}
        for i in range(1, 101)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in steps:
        colours = torch.tensor([shade(step, row) for row in range(4)]) / 255
        images = colours[:, None, None].expand(4, 24, 32, 3)
        modules["watch"].save_sheet(images, folder / "previews" / f"step_{step:07d}.png")
        (folder / "checkpoints" / f"step_{step:07d}.safetensors").write_bytes(b"lora of " + str(step).encode())
    (folder / "previews.json").write_text(json.dumps({"columns": 2, "prompts": PROMPTS}))
    status = modules["job_watch"].Status("finished", 100, 100, machine="another", memory=9 * 2**30, card=12 * 2**30)
    modules["job_watch"].write_status(folder, status)
    return folder


@pytest.fixture(scope="module")
def runs(app):
    folder = app.base / "output" / "retort"
    write(folder, "copied first", regression=40)
    write(folder, "without copies", rate=3e-4, steps=(20, 60, 100))
    return folder


@pytest.fixture
def opened(page, runs):
    """The panel with the run that has phases open."""
    page("open")
    page("look", vue=False, theme="dark")
    page("panel", section="Training")
    page("until", condition="document.querySelectorAll('.retort-title').length >= 2")
    page("click", where=".retort-title", text="copied first")
    page("until", condition="document.querySelector('.retort-strip img')?.naturalWidth > 0")


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_previews_over_time(page, opened, size, theme):
    """Rows are prompts and columns steps, each cell is the sheet's part; slider, play and keys show each of them."""
    page("size", width=size[0], height=size[1])
    page("look", vue=False, theme=theme)
    page("click", where=".retort-previews > button")
    page("until", condition="document.querySelector('.retort-time')?.ariaBusy === 'false'")
    heads = page("evaluate", code="[...document.querySelectorAll('.retort-step')].map((one) => one.textContent)")
    assert heads == [str(step) for step in STEPS]
    texts = "[...document.querySelectorAll('.retort-time tbody th')].map((one) => one.textContent)"
    rows = page("evaluate", code=texts)
    assert rows == PROMPTS and page("evaluate", code="window.hurt ?? null") is None
    for row in range(4):
        for column, step in enumerate(STEPS):
            assert page("evaluate", code=COLOUR, given=[row, column + 2]) == shade(step, row), (row, step)
        # The column that plays shows the latest step first.
        assert page("evaluate", code=COLOUR, given=[row, 1]) == shade(STEPS[-1], row)
    assert page("evaluate", code=OUTSIDE) <= 0
    sound(page("audit"))
    page("shot", name=f"gallery_{size[0]}_{theme}")
    page("click", where=".retort-gallery [type=range]", keys="Home")
    assert page("evaluate", code=COLOUR, given=[3, 1]) == shade(STEPS[0], 3)
    now = "document.querySelector('.retort-gallery output').textContent"
    page("click", where=".retort-gallery button", text="Play")
    page("until", condition=f"{now} === 'step {STEPS[2]}'")
    page("click", where=".retort-gallery button", text="Pause")
    # Large by keys: to the right is later, down is the next prompt.
    page("click", where=".retort-time td button", keys="Enter")
    said = "document.querySelector('.retort-lightbox img')?.alt"
    page("until", condition=f"{said} === 'step {STEPS[0]}: {PROMPTS[0]}'")
    page("press", keys="ArrowRight")
    page("press", keys="ArrowRight")
    page("press", keys="ArrowDown")
    page("until", condition=f"{said}?.startsWith('step {STEPS[2]}: a blue four')")
    page("press", keys="ArrowUp")
    page("press", keys="ArrowUp")
    page("until", condition=f"{said} === 'step {STEPS[2]}: {PROMPTS[0]}'")
    page("press", keys="Escape")
    page("press", keys="Escape")
    page("until", condition=f"!{WINDOW}")
    assert not page("heard")


def test_a_phase_has_a_scale_of_its_own(page, opened):
    """The chart of a run that copied pairs is drawn in two parts, and the picture and the table of it can be saved."""
    page("size", width=1366, height=768)
    page("shot", name="phases")
    # The loss of the second phase is twenty times the first one's, and both fill the height.
    high = """() => { const canvas = document.querySelector(".retort-run canvas"), pen = canvas.getContext("2d");
      const { width, height } = canvas, data = pen.getImageData(0, 0, width, height).data;
      const tops = [Infinity, Infinity], lows = [0, 0];
      for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
        const at = 4 * (y * width + x);
        if (!(data[at + 2] > 200 && data[at] < 90)) continue;
        const part = x < width * 0.45 ? 0 : 1;
        tops[part] = Math.min(tops[part], y / height); lows[part] = Math.max(lows[part], y / height); }
      return [tops, lows]; }"""
    tops, lows = page("evaluate", code=high)
    assert max(tops) < 0.4 and min(lows) > 0.6, (tops, lows)
    name, text = page("saved", where=".retort-chart button", text="CSV")
    assert name == "copied first.csv" and text.startswith("run,step,student_loss,fake_loss\ncopied first,1,0.5,\n")
    name, text = page("saved", where=".retort-chart button", text="PNG")
    assert name == "copied first.png" and "PNG" in text[:8]
    assert "9.0 of 12 GB" in page("evaluate", code="document.querySelector('.retort-memory').textContent")
    sound(page("audit"))


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_runs_are_compared(page, opened, size, theme):
    """Two ticked runs: curves of each number, the settings that differ and no others, previews at the nearest step."""
    page("size", width=size[0], height=size[1])
    page("look", vue=False, theme=theme)
    assert page("evaluate", code="document.querySelector('.retort-wide').hidden")
    for name in ("copied first", "without copies"):
        page("click", where=f".retort-list > li:has(.retort-title:text-is('{name}')) .retort-tick")
    page("click", where=".retort-wide", text="Compare 2 runs")
    page("until", condition=f"{WINDOW}?.querySelectorAll('.retort-differ tbody tr').length > 0")
    told = page("evaluate", code=f"[...{WINDOW}.querySelectorAll('.retort-differ tr')].map((row) => "
                "[...row.cells].map((one) => one.textContent))")  # fmt: skip
    assert told[1:] == [
        ["objective.regression_steps", *(["40", "0"] if told[0][1] == "copied first" else ["0", "40"])],
        ["training.learning_rate", *(["0.0001", "0.0003"] if told[0][1] == "copied first" else ["0.0003", "0.0001"])],
    ]
    page("click", where=".retort-window fieldset label", text="fake loss")
    assert page("evaluate", code=f"{WINDOW}.querySelectorAll('.retort-charts canvas').length") == 2
    page("until", condition=f"[...{WINDOW}.querySelectorAll('.retort-beside img')].every((one) => one.naturalWidth)")
    shown = f"[...{WINDOW}.querySelectorAll('.retort-beside img')].map((one) => one.alt).sort()"
    assert page("evaluate", code=shown) == ["copied first, step 80", "without copies, step 100"]
    page("click", where=".retort-compared [type=range]", keys="Home")
    assert page("evaluate", code=shown) == ["copied first, step 20", "without copies, step 20"]
    assert page("evaluate", code=OUTSIDE) <= 0
    sound(page("audit"))
    page("shot", name=f"compared_{size[0]}_{theme}")
    name, text = page("saved", where=".retort-compared button", text="CSV")
    assert name == "runs.csv" and text.startswith("run,step,student_loss,fake_loss\n")
    page("press", keys="Escape")
    assert not page("heard")


def test_losses_of_two_methods_have_a_chart_each(page, app, runs):
    """What one method calls its loss is another number than the other's."""
    folder = write(runs, "by pairs")
    config = json.loads((folder / "config.json").read_text()) | {"method": "dpo"}
    (folder / "config.json").write_text(json.dumps(config))
    page("open")
    page("panel", section="Training")
    for name in ("by pairs", "without copies"):
        page("click", where=f".retort-list > li:has(.retort-title:text-is('{name}')) .retort-tick")
    page("click", where=".retort-wide", text="Compare 2 runs")
    charts = f"[...{WINDOW}.querySelectorAll('.retort-charts canvas')].map((one) => one.getAttribute('aria-label'))"
    page("until", condition=f"{charts}.length === 2")
    assert sorted(page("evaluate", code=charts)) == ["student loss · dmd2 of 1 runs", "student loss · dpo of 1 runs"]
    page("shot", name="compared_methods")
    page("press", keys="Escape")
    assert not page("heard")


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_a_finished_node_opens_its_lora(page, app, runs, vue):
    """The button on the node opens a workflow whose slider says which side has the LoRA."""
    folder = runs / "copied first"
    job_watch = importlib.import_module("retort.trainers.job_watch")
    status = job_watch.Status("finished", 100, 100, machine="another", lora="copied.safetensors")
    job_watch.write_status(folder, status)
    (app.base / "models" / "loras" / status.lora).write_bytes(b"")
    page("open")
    page("size", width=1366, height=768)
    page("look", vue=vue, theme="dark")
    page("fresh", types=["RetortTrainFlow"])
    page("evaluate", code="() => app.graph._nodes[0].onExecuted({ retort_run: ['copied first'] })")
    page("fit", type="RetortTrainFlow")
    opens = "[...document.querySelectorAll('.retort-run .retort-opened')].find((one) => one.offsetParent)"
    page("until", condition=f"Boolean({opens})")
    page("shot", name=f"open_lora_{'nodes2' if vue else 'canvas'}")
    page("evaluate", code=f"() => {opens}.click()")
    compared = "app.graph.nodes.find((one) => one.type === 'RetortCompareImages')"
    page("until", condition=f"{compared}?.inputs.filter((one) => one.link != null).length === 2")
    page("until", condition=f"{compared}.properties.retort_sides?.join() === 'without,with'")
    loaded = "app.graph.nodes.flatMap((one) => one.widgets ?? []).find((one) => one.name === 'lora_name')?.value"
    assert page("evaluate", code=loaded) == status.lora
    page("until", condition="app.canvas.ds.scale < 1")
    page("shot", name=f"opened_lora_{'nodes2' if vue else 'canvas'}")
    assert not page("heard")


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes2"])
def test_a_checkpoint_is_kept_and_all_are_drawn_in_a_grid(page, app, opened, vue):
    """The chosen step's file under the name that was typed; a name that is taken is refused and overwrites nothing."""
    page("look", vue=vue, theme="dark")
    loras, name = app.base / "models" / "loras", f"my best {vue}"
    page("evaluate", code="""(name) => {
      const [select, input] = document.querySelector(".retort-run .retort-menu").querySelectorAll("select, input");
      select.value = "40"; select.dispatchEvent(new Event("change")); window.offered = input.value;
      input.value = name; }""", given=name)  # fmt: skip
    assert page("evaluate", code="window.offered") == "copied first_40"
    page("click", where=".retort-run button", text="Keep this one")
    page("until", condition="document.querySelector('.retort-menu output').textContent.startsWith('kept as')")
    assert (loras / f"{name}.safetensors").read_bytes() == b"lora of 40"
    page("evaluate", code="() => { document.querySelector('.retort-run .retort-menu select').value = '80'; }")
    page("click", where=".retort-run button", text="Keep this one")
    page("until", condition="document.querySelector('.retort-menu output').textContent.includes('already')")
    assert (loras / f"{name}.safetensors").read_bytes() == b"lora of 40"
    sound(page("audit"))
    page("shot", name=f"keep_{'nodes2' if vue else 'canvas'}")
    page("click", where=".retort-run button", text="LoRA grid")
    grid = "app.graph._nodes.find((one) => one.type === 'RetortLoraGrid')"
    page("until", condition=grid + "?.inputs.filter((one) => one.link != null).length >= 6")
    assert page("evaluate", code=f"{grid}.widgets.find((one) => one.name === 'run').value") == "copied first"
    assert page("evaluate", code="app.graph._nodes.every((one) => one.type in LiteGraph.registered_node_types)")
    # All of it is shown at once.
    page("until", condition="app.canvas.ds.scale < 1")
    page("shot", name=f"grid_{'nodes2' if vue else 'canvas'}")
