"""A method that no other file knows: registered here, it has inputs, an estimate, a job, a table and a LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from retort.hosts import api  # noqa: E402
from retort.hosts.headless.folders import Folders, use  # noqa: E402
from retort.hosts.training import plan_report  # noqa: E402
from retort.nodes import help_pages  # noqa: E402
from retort.nodes.jobs import RetortTrainingJob  # noqa: E402
from retort.nodes.training import RetortTrainDistillation  # noqa: E402
from retort.sampling.grids import simple  # noqa: E402
from retort.sampling.settings import Settings, setting  # noqa: E402
from retort.trainers.job import Job  # noqa: E402
from retort.trainers.methods import METHODS, read_config  # noqa: E402
from retort.trainers.objectives.parts.contract import Loss, Objective, guided, mean_each, sample_guided  # noqa: E402
from retort.trainers.objectives.parts.registry import Method, register  # noqa: E402
from retort.trainers.sources import read_base  # noqa: E402


@dataclass(frozen=True)
class GuidanceConfig(Settings):
    """One level at which the student's plain call becomes the teacher's guided one."""

    cfg: float = setting(3.0, 1, 100, step=0.1, help="Guidance that is learnt.", remedy="1 learns nothing")
    place: float = setting(0.5, 0.1, 0.9, step=0.05, advanced=True, help="Where on the schedule it is learnt.")


class Guidance(Objective):
    """Guidance distillation: what the teacher says with guidance, the student says without."""

    name = "guidance"
    needs_uncond = True
    config: GuidanceConfig

    def losses(self, batch, step):
        sigmas = self.denoiser.schedule.sigmas
        level = float(sigmas[round(self.config.place * (len(sigmas) - 1))])
        sigma = torch.full((len(batch),), level, device=self.denoiser.device)
        x = self.denoiser.path.unit_start(sigma[0], batch.draws.normal("noise", batch.shape))
        with torch.no_grad(), self.denoiser.adapter(None):
            target = guided(self.denoiser, x, sigma, batch.cond, batch.uncond, self.config.cfg)
        with self.denoiser.adapter("student"):
            each = mean_each((self.denoiser.predict_x0(x, sigma, batch.cond) - target).square())
        yield Loss("student", each.mean(), {}, each)

    def sample(self, noise, cond, uncond):
        return sample_guided(self.denoiser, simple(self.denoiser.schedule, 4).to(noise.device), noise, cond, None, 1.0)


@pytest.fixture(autouse=True)
def registered(tmp_path):
    register(Method("guidance", GuidanceConfig, Guidance, "distillation"))
    with use(Folders((tmp_path / "models",), output=tmp_path / "output")):
        yield
    del METHODS["guidance"]


@pytest.mark.parametrize("node", [RetortTrainDistillation, RetortTrainingJob])
def test_nodes_offer_its_settings(node):
    choice = next(one for one in node.define_schema().inputs if one.id == "method")
    cfg, place = next(option.inputs for option in choice.options if option.key == "guidance")
    assert (cfg.id, cfg.default, cfg.min, cfg.max, cfg.tooltip) == ("cfg", 3.0, 1.0, 100.0, "Guidance that is learnt.")
    assert place.advanced and place.optional


def test_the_page_has_its_list():
    text = help_pages.written("<!-- settings distillation -->\n<!-- end -->", "RetortTrainDistillation")
    assert "Settings of guidance:" in text
    assert "- **place** (0.5; 0.1 to 0.9): Where on the schedule it is learnt." in text


def test_its_memory_is_estimated():
    model, clip, vae = api.host.embedded("flow")
    (entry,) = api.host.encode_text(clip, "a red two")
    config = plan_report.settings("guidance", 2, 1, "adamw")
    dataset = plan_report.sample("guidance", tuple(entry), (16, 8, 8))
    text = plan_report.report(api.host, model, config, dataset, [1])
    assert text.startswith("guidance, rank 2, batch 1, adamw: base ") and "1 GB: the base stays on the card" in text


def test_a_job_keeps_it(tmp_path):
    config = read_config({"method": "guidance", "objective": {"cfg": 2.0}})
    job = Job("mine", config, read_base({"kind": "embedded", "variant": "flow"}))
    assert Job.from_json(job.to_json()) == job and job.config.objective == GuidanceConfig(cfg=2.0)
    assert job.to_json()["objective"] == {"cfg": 2.0, "place": 0.5}
    with pytest.raises(ValueError, match="place must be between 0.1 and 0.9, got 1.0"):
        read_config({"method": "guidance", "objective": {"place": 1.0}})


def test_a_node_trains_by_it():
    model, clip, vae = api.host.embedded("flow")
    given = {"model": model, "clip": clip, "vae": vae, "prompts": "a red two\na bold six", "steps": 3, "rank": 2}
    given |= {"latents": {"samples": torch.zeros(1, 16, 8, 8)}, "method": {"method": "guidance"}, "preview_every": 3}
    given |= {"learning_rate": 0.01, "warmup": 0, "name": "mine", "batch_size": 2}
    out = RetortTrainDistillation.execute(**{name: [value] for name, value in given.items()})
    lora, loss, file, run = out.args
    assert lora and len(loss["loss"]) == 3 and (file, run) == ("mine.safetensors", "mine")


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(ValueError, match="there is a method called 'guidance' already"):
        register(Method("guidance", GuidanceConfig, Guidance, "distillation"))
