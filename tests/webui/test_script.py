"""The script as the host treats it: loading and reloading, the accordion, and the link that it is reached by."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT, SCRIPT, STAND_INS, Processing, load_script

OURS = ["Retort Distilled", "Retort Reflection"]


def test_its_samplers_join_the_hosts_and_a_reload_puts_new_ones_in_their_place(host, script) -> None:
    def names() -> list[str]:
        return [sampler.name for sampler in host.sd_samplers.all_samplers]

    assert names() == ["Euler", *OURS]
    first = host.sd_samplers.all_samplers_map["Retort Distilled"]
    again = load_script()
    assert names() == ["Euler", *OURS]
    second = host.sd_samplers.all_samplers_map["Retort Distilled"]
    assert second is not first and second.constructor is again.DistilledSampler
    assert host.sd_samplers.all_samplers[1] is second
    assert host.sd_samplers.samplers_map["retort_distilled"] == "Retort Distilled"


def test_the_host_finds_one_script_in_it(host, script) -> None:
    found = [
        value for value in vars(script).values() if isinstance(value, type) and issubclass(value, host.scripts.Script)
    ]
    assert found == [script.RetortScript]
    made = script.RetortScript()
    assert made.title() == "Retort"
    assert made.show(False) is made.show(True) is host.scripts.AlwaysVisible


def test_the_accordion_hands_over_its_settings_in_their_order(host, script) -> None:
    made = script.RetortScript()
    components = made.ui(False)
    values = [component.value for component in components]
    assert tuple(values) == script.Settings()
    p = Processing()
    made.process(p, *values[:4], 0.5, *values[5:])
    assert p.retort == script.Settings(weak_cfg=0.5)
    assert script.settings_of(p) is p.retort
    assert script.settings_of(Processing()) == script.Settings()
    assert [component for component, _ in made.infotext_fields] == components
    written = [name for fields in script.INFOTEXT.values() for name in fields.values()]
    assert [name for _, name in made.infotext_fields] == written


def test_a_student_tells_what_it_needs(host, script) -> None:
    preset = script.RetortScript().ui(True)[0]
    assert preset.told("DMD2, SDXL, 4 steps").startswith("Steps: 4. Put dmd2_sdxl_4step_lora_fp16.safetensors")
    assert not [title for title in preset.choices if "digits" in title or "CogVideoX" in title]
    notes = [preset.told(title) for title in preset.choices]
    folders = {word for note in notes for word in re.findall(r"models/[\w-]+", note)}
    assert folders == {"models/Lora", "models/Stable-diffusion"}, "the web UI's folders, not ComfyUI's"


# ---- the link ----

PROBE = """
import importlib.util, json, sys
sys.path[:0] = [{host!r}, {extension!r}]
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("retort.py", {script!r})
module = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(module)
except ImportError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([sys.modules["retort"].__file__, sorted(set(sys.modules) - before)]))
"""


def probe(extension: Path, before: str = "") -> str | list:
    code = PROBE.format(host=str(STAND_INS), extension=str(extension), script=str(extension / "scripts" / "retort.py"))
    command = [sys.executable, "-I", "-c", before + code]
    done = subprocess.run(command, cwd=extension.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def installer() -> ModuleType:
    return load_script(ROOT / "install.py")


def test_through_the_link_it_finds_its_package_and_brings_only_the_maths(installer, tmp_path: Path) -> None:
    installer.make_link(tmp_path / "Retort", ROOT / "extensions" / "webui")
    # Torch is there long before any extension is.
    file, modules = probe(tmp_path / "Retort", "import torch\n")
    assert Path(file).resolve() == ROOT / "__init__.py"
    ours = {name for name in modules if name.split(".")[0] == "retort"}
    assert {name.split(".")[1] for name in ours if "." in name} == {"sampling"}
    others = {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"retort", "modules", "gradio"}
    assert others <= {"tqdm", "numpy", "torch"}, "the host has these; the link brings no requirements with it"


def test_a_copy_in_place_of_the_link_tells_what_to_do(tmp_path: Path) -> None:
    shutil.copytree(SCRIPT.parent, tmp_path / "a" / "b" / "Retort" / "scripts")
    told = probe(tmp_path / "a" / "b" / "Retort")
    assert "is not Retort's folder" in told and "install.py link" in told


def test_another_package_of_its_name_is_told(installer, tmp_path: Path) -> None:
    installer.make_link(tmp_path / "Retort", ROOT / "extensions" / "webui")
    (tmp_path / "other" / "retort").mkdir(parents=True)
    (tmp_path / "other" / "retort" / "__init__.py").touch()
    told = probe(tmp_path / "Retort", f"import sys; sys.path.insert(0, {str(tmp_path / 'other')!r}); import retort\n")
    assert f"from {tmp_path / 'other' / 'retort'}: remove it" in told
