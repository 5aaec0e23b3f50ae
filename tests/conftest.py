"""What every test shares: one thread, and the ComfyUI checkout when there is one."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import time
from pathlib import Path

# Before torch is imported, which sizes its pools once. Beside another job two threads make tiny steps 20 times slower.
os.environ["OMP_NUM_THREADS"] = "1"

# Thousands of tests and what they import are made and none is garbage: looking for it is a quarter of the collection.
gc.disable()

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Spare the tests themselves at every collection of garbage, which runs that end ask for."""
    gc.collect()
    gc.freeze()


def pytest_runtestloop() -> None:
    """Look for garbage again, also in the process that hands tests out and collects none."""
    gc.enable()


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Folder of the ComfyUI checkout named by COMFYUI_PATH; skips the test when the variable is not set."""
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        pytest.skip("COMFYUI_PATH is not set: give it the folder of a ComfyUI checkout to run this test")
    path = Path(given).resolve()
    if not (path / "comfy" / "samplers.py").is_file():
        pytest.fail(f"COMFYUI_PATH={given} is not a ComfyUI checkout: it has no comfy/samplers.py")
    return path


@pytest.fixture
def slowness() -> float:
    """How many times slower than an idle core this machine is now, at least 1: limits of time are multiplied by it.

    A machine shared with others gives a fraction of its cores, at some hours a tenth, and no clock of its own tells.
    """

    def loop() -> float:
        began, total = time.process_time(), 0
        for i in range(100_000):
            total += i * i
        return time.process_time() - began

    return max(1.0, sorted(loop() for _ in range(5))[2] / 6e-3)


@pytest.fixture
def where(tmp_path):
    """The model and output folders of the headless host, in a folder of the test's own."""
    from retort.hosts.headless.folders import Folders, use

    found = Folders(models=(tmp_path / "models",), output=tmp_path / "out")
    with use(found):
        yield found


@pytest.fixture
def disk(tmp_path):
    """disk("64k") -> a folder on a disk of that size; skips the test where none can be mounted."""
    mounted = []

    def mount(size: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs cannot be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


class ContinuousEDM:
    """ComfyUI's ModelSamplingContinuousEDM by its formulas: any level, told as a quarter of its logarithm."""

    def __init__(self, low=0.002, high=120.0):
        self.sigmas = torch.linspace(math.log(low), math.log(high), 1000).exp()
        self.log_sigmas = self.sigmas.log()

    sigma_min = property(lambda self: self.sigmas[0])
    sigma_max = property(lambda self: self.sigmas[-1])

    def timestep(self, sigma):
        return 0.25 * sigma.log()

    def sigma(self, timestep):
        return (timestep / 0.25).exp()

    def percent_to_sigma(self, percent):
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return math.exp((high - low) * (1.0 - percent) + low)


class ContinuousV(ContinuousEDM):
    """Its ModelSamplingContinuousV: the network is told the angle."""

    def timestep(self, sigma):
        return sigma.atan() / math.pi * 2

    def sigma(self, timestep):
        return (timestep * math.pi / 2).tan()


class CosmosRFlow(ContinuousEDM):
    """Its ModelSamplingCosmosRFlow: a rectified flow's network is told the time."""

    def __init__(self, low=0.002, high=80.0):
        super().__init__(low, high)

    def timestep(self, sigma):
        return sigma / (sigma + 1)

    def sigma(self, timestep):
        top = self.sigma_max
        return top if timestep >= top / (top + 1) else timestep / (1 - timestep)


class Cascade(ContinuousEDM):
    """Its StableCascadeSampling: a cosine schedule over times in (0, 1], shifted; a table of 10,000 for samplers."""

    def __init__(self, shift=2.0):
        self.shift, self.cosine_s = shift, torch.tensor(8e-3)
        self.first = torch.cos(self.cosine_s / (1 + self.cosine_s) * torch.pi * 0.5) ** 2
        self.sigmas = self.sigma((torch.arange(10_000) + 1) / 10_000)
        self.log_sigmas = self.sigmas.log()

    def sigma(self, timestep):
        abar = torch.cos((timestep + self.cosine_s) / (1 + self.cosine_s) * torch.pi * 0.5) ** 2 / self.first
        if self.shift != 1.0:
            abar = ((abar / (1 - abar)).log() + 2 * math.log(1.0 / self.shift)).sigmoid()
        abar = abar.clamp(0.0001, 0.9999)
        return ((1 - abar) / abar) ** 0.5

    def timestep(self, sigma):
        abar = (1 / (sigma * sigma + 1)).clamp(0, 1.0)
        return (((abar * self.first) ** 0.5).acos() / (torch.pi * 0.5)) * (1 + self.cosine_s) - self.cosine_s

    def percent_to_sigma(self, percent):
        return super().percent_to_sigma(percent) if not 0 < percent < 1 else self.sigma(torch.tensor(1.0 - percent))


# Name: schedule, sigma_data, what the network predicts.
CONTINUOUS = {
    "Playground 2.5": (lambda: ContinuousEDM(0.002, 80.0), 0.5, "edm"),
    "SVD": (lambda: ContinuousEDM(0.002, 700.0), 1.0, "v"),
    "SDXL behind ModelSamplingContinuousEDM": (lambda: ContinuousEDM(0.03, 14.6), 1.0, "eps"),
    "ModelSamplingContinuousV": (lambda: ContinuousV(0.03, 500.0), 1.0, "v"),
    "Stable Cascade": (lambda: Cascade(), 1.0, "eps"),
}


@pytest.fixture(params=list(CONTINUOUS))
def continuous(request):
    """(schedule, NoisePath, prediction) of each kind of model whose levels are not those of a table."""
    from retort.sampling.path import NoisePath

    schedule, data, prediction = CONTINUOUS[request.param]
    return schedule(), NoisePath("VE", sigma_data=data), prediction


def _rectified():
    from retort.sampling.path import RECTIFIED

    return CosmosRFlow(), RECTIFIED, "flow"


@pytest.fixture
def rectified():
    """The same of a rectified flow that is carried as VE: Cosmos Predict2."""
    return _rectified()


@pytest.fixture(params=[*CONTINUOUS, "Cosmos Predict2"])
def off_table(request):
    """The same of every model whose levels are not those of a table, rectified flows among them."""
    if request.param not in CONTINUOUS:
        return _rectified()
    from retort.sampling.path import NoisePath

    schedule, data, prediction = CONTINUOUS[request.param]
    return schedule(), NoisePath("VE", sigma_data=data), prediction
