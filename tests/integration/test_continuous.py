"""ComfyUI's own continuous schedules: read as they are, trained at levels within their range, or refused by name."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration


def _beside(name, path):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


methods = _beside("retort_training_methods", "test_training_methods.py")
files, loaded, host, trained, module = methods.files, methods.loaded, methods.host, methods.trained, methods.module
formulas = _beside("retort_formulas", "../conftest.py")

EDM = "ModelSamplingContinuousEDM"
# Node, its settings, sigma_data, what the network predicts.
KINDS = {
    "Playground 2.5": (EDM, ("edm_playground_v2.5", 80.0, 0.002), 0.5, "edm"),
    "EDM": (EDM, ("edm", 120.0, 0.002), 0.5, "edm"),
    "SVD": (EDM, ("v_prediction", 700.0, 0.002), 1.0, "v"),
    "SDXL by EDM's levels": (EDM, ("eps", 14.6, 0.03), 1.0, "eps"),
    "continuous v": ("ModelSamplingContinuousV", ("v_prediction", 500.0, 0.03), 1.0, "v"),
    "Cosmos Predict2": (EDM, ("cosmos_rflow", 80.0, 0.002), 1.0, "flow"),
    "Stable Cascade": ("ModelSamplingStableCascade", (2.0,), 1.0, "eps"),
}


def patched(model, name, settings):
    with torch.inference_mode():
        return getattr(module("comfy_extras.nodes_model_advanced"), name)().patch(model, *settings)[0]


@pytest.fixture(params=list(KINDS))
def kind(request):
    return KINDS[request.param]


def test_levels_and_outputs_are_comfyui_s(ours, loaded, kind):
    name, settings, data, prediction = kind
    theirs = patched(loaded("sd15")[0], name, settings).get_model_object("model_sampling")
    coordinates, levels = ours("hosts.comfyui.coordinates"), ours("sampling.levels")
    path = coordinates.path_of(theirs)
    assert (path.kind, path.sigma_data, coordinates.prediction_of(theirs)) == ("VE", data, prediction)
    found = levels.Levels(theirs, path)
    assert not found.tabulated
    sigma = found.level(torch.tensor([0.0, 200.0, 500.0, 900.0, 1000.0]))
    ends = float(theirs.sigma_min), float(theirs.sigma_max)
    assert (float(sigma[0]), float(sigma[-1])) == pytest.approx(ends, rel=1e-4)
    parametrisation = levels.Parametrisation(prediction, path)
    x, output = torch.randn(2, 5, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(parametrisation.shown(x, sigma), theirs.calculate_input(sigma, x))
    torch.testing.assert_close(
        parametrisation.x0(output, x, sigma), theirs.calculate_denoised(sigma, output, x), rtol=1e-5, atol=1e-4
    )
    noise = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    if path.rectified:
        expected = theirs.noise_scaling(sigma, noise.clone(), torch.zeros_like(noise), True)
        assert torch.equal(path.unit_start(sigma, noise), expected)
    else:
        torch.testing.assert_close(theirs.calculate_input(sigma, path.unit_start(sigma, noise)), noise)
    share = torch.tensor([0.1, 0.5, 0.95])
    expected = [float(theirs.percent_to_sigma(1 - float(part))) for part in share]
    torch.testing.assert_close(found.sampled(share), torch.tensor(expected))


def test_the_unit_tests_schedules_are_comfyui_s(comfy, loaded):
    model = loaded("sd15")[0]
    for (name, settings, *_), mine in (
        (KINDS["Playground 2.5"], formulas.ContinuousEDM(0.002, 80.0)),
        (KINDS["continuous v"], formulas.ContinuousV(0.03, 500.0)),
        (KINDS["Cosmos Predict2"], formulas.CosmosRFlow(0.002, 80.0)),
        (KINDS["Stable Cascade"], formulas.Cascade(2.0)),
    ):
        theirs = patched(model, name, settings).get_model_object("model_sampling")
        torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=1e-5, atol=0)
        torch.testing.assert_close(mine.timestep(mine.sigmas), theirs.timestep(theirs.sigmas), rtol=1e-5, atol=1e-6)
        for percent in (-0.1, 0.0, 0.3, 0.8, 1.0):
            expected = float(theirs.percent_to_sigma(percent))
            assert float(mine.percent_to_sigma(percent)) == pytest.approx(expected, rel=1e-5)


def test_lcm_s_table_is_a_table(ours, loaded):
    theirs = patched(loaded("sd15")[0], "ModelSamplingDiscrete", ("lcm", False)).get_model_object("model_sampling")
    levels = ours("sampling.levels").Levels(theirs, ours("sampling.path").VE)
    found = levels.uniform((torch.arange(500) + 1) / 500)
    assert levels.tabulated and len(theirs.sigmas) == 50
    entries = (found[:, None].log() - theirs.sigmas.log()).abs().argmin(1)
    torch.testing.assert_close(found, theirs.sigmas[entries], rtol=1e-5, atol=0)
    assert torch.bincount(entries, minlength=50).min() >= 9


@pytest.mark.parametrize("method", ["flow", "few_shot", "tdm", "dmd2"])
def test_it_trains(host, loaded, trained, kind, method):
    name, settings, *_ = kind
    model, positive = loaded("sd15")
    model = patched(model, name, settings)
    result, rows = trained(model, positive, "sd15", method)
    assert len(rows) == 2 and all(math.isfinite(row["student_loss"]) for row in rows)
    assert result.path.is_file()


def test_levels_that_no_network_can_be_trained_on_are_refused_before_the_first_step(comfy, loaded, trained, tmp_path):
    model, positive = loaded("sd15")
    reversed_ = patched(model, EDM, ("eps", 0.01, 14.0))
    with pytest.raises(ValueError, match="ModelSamplingContinuousEDM: the levels .* do not rise"):
        trained(reversed_, positive, "sd15", "flow")
    assert not (tmp_path / "flow" / "metrics.jsonl").exists()
