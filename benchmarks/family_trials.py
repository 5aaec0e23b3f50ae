"""What Retort does on one tiny model of a family inside ComfyUI, cell by cell; `benchmarks.families` starts it.

Each cell is a question with an exact answer: core's own sampler, the same LoRA to the bit, or core's loader. What is
refused is told apart from what fails: a refusal is a sentence of ours, a failure one of torch's or Python's, or a wrong
number that nobody would have noticed.
"""

from __future__ import annotations

import importlib
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .family_networks import Family

OURS = Path(__file__).resolve().parents[1]
SAMPLER, NEAR, LORA = 2e-7, 1e-4, 1e-3  # relative to the largest number, and to the output's deviation
OK, NONE = "ok", ""
LEVELS = (0.5, 0.85)  # of the way up a model's levels, where a LoRA is looked at
# Column -> what it asks.
CELLS = {
    "sampler": "Distilled Sampler on two levels of its own: core's euler, within 2e-7 of the largest number",
    "mask": "the same inpainting: the kept half is the picture's, and all of it core's lcm",
    "reflection": "W2SD switched off (end = 0): core's euler",
    "search": "best of N: its first candidate is core's euler_ancestral; DTS*: batches of mixed levels run",
    "flow": "flow matching, batch 2, with checkpoints: losses are finite and the student moves",
    "exact": "the same without checkpoints: the same LoRA to the bit",
    "lengths": "prompts of two lengths",
    "dmd2": "DMD2",
    "tdm": "TDM",
    "gan": "DMD2 with its discriminator",
    "dpo": "DPO",
    "lora": "core's loader: no key lost, and x0 as the training network had it, within 1e-3 of its deviation",
}


class Wrong(Exception):
    """It ran, and the result is wrong."""


def said(error: BaseException) -> str:
    """How a cell is written that ended in an error: a refusal is raised by our own code, in a sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())[:400]
    if isinstance(error, Wrong):
        return f"WRONG: {text}"
    ours = Path(frames[-1].filename).is_relative_to(OURS) and not Path(frames[-1].filename).is_relative_to(
        OURS / "benchmarks"
    )
    plain = isinstance(error, ValueError) or type(error).__name__ == "TrainingFailed"
    if ours and plain:
        return f"refused: {text}"
    where = next((f for f in reversed(frames) if Path(f.filename).is_relative_to(OURS)), frames[-1])
    at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, from {Path(where.filename).name}:{where.lineno}"
    return f"FAILS: {type(error).__name__}: {text} ({at})"


class Trial:
    """All cells of one family. packages: imports a module of Retort by its name, as ComfyUI or Python loaded it.

    steps: of each training.
    """

    def __init__(self, family: Family, packages: Callable[[str], Any], folder: Path, steps: int = 2):
        self.family, self._ours, self.folder, self._steps = family, packages, folder, steps
        self._custom: Any = importlib.import_module("comfy_extras.nodes_custom_sampler")
        self._samplers: Any = importlib.import_module("comfy.samplers")
        self._host = packages("hosts.comfyui.host").host
        with torch.inference_mode():
            self.model = family.model()
            self.positive, self.negative = family.prompt(1), family.prompt(2)
        self._trained: dict[str, Any] = {}

    def run(self, cells: tuple[str, ...] = tuple(CELLS)) -> Iterator[tuple[str, str]]:
        """(cell, what came of it) one after another: "ok", "refused: ...", "FAILS: ...", "WRONG: ..." or nothing."""
        for cell in cells:
            try:
                with torch.inference_mode():
                    found = getattr(self, f"_{cell}")()
            except Exception as error:
                found = said(error)
            yield cell, found

    # ---- sampling --------------------------------------------------------------------------------

    def _guider(self, cfg: float) -> Any:
        return self._custom.CFGGuider.execute(self.model, self.positive, self.negative, cfg)[0]

    def _sampled(self, guider: Any, sampler: Any, sigmas: Tensor, latent: dict[str, Any], seed: int = 7) -> Tensor:
        noise = self._custom.Noise_RandomNoise(seed)
        samples = self._custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)[0]["samples"]
        return torch.cat([part.flatten() for part in samples.unbind()]) if samples.is_nested else samples

    def _core(self, name: str) -> Any:
        return self._samplers.sampler_object(name)

    def _simple(self, steps: int) -> Tensor:
        return self._custom.BasicScheduler.execute(self.model, "simple", steps, 1.0)[0]

    @property
    def _path(self) -> Any:
        return self._ours("hosts.comfyui.coordinates").path_of(self.model.get_model_object("model_sampling"))

    def _near(self, found: Tensor, expected: Tensor, limit: float, what: str) -> None:
        if not bool(found.isfinite().all()):
            raise Wrong(f"{what}: not finite")
        away = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not away <= limit:
            raise Wrong(f"{what}: {away:.2g} away")

    def _two_levels(self) -> Tensor:
        levels = self._ours("sampling.levels").Levels(self.model.get_model_object("model_sampling"), self._path)
        high, low = (float(levels.level(torch.tensor([time]))) for time in (990.0, 490.0))
        return torch.tensor([high, low, 0.0])

    def _sampler(self) -> str:
        distilled, euler = self._ours("nodes.distilled").RetortDistilledSampler, self._core("euler")
        guider, sigmas, empty = self._guider(2.0), self._two_levels(), self.family.empty
        ours = {
            mode: self._sampled(guider, distilled.execute("custom", mode, "noised latent")[0], sigmas, empty())
            for mode in ("deterministic", "re-noise")
        }
        if self._path.kind == "VP":
            # Core integrates in coordinates of its own there; Retort in those that the network was trained in.
            if not all(bool(samples.isfinite().all()) for samples in ours.values()):
                raise Wrong("not finite")
            return OK
        self._near(ours["deterministic"], self._sampled(guider, euler, sigmas, self.family.empty()), SAMPLER, "euler")
        lcm = self._sampled(guider, self._core("lcm"), sigmas, self.family.empty())
        self._near(ours["re-noise"], lcm, SAMPLER, "lcm")
        return OK

    def _mask(self) -> str:
        if self.family.sound:
            return NONE
        latent = {"samples": self.family.noise(5, 2 if self.family.frames else 1) * 0.5}
        shape = latent["samples"].shape
        mask = torch.zeros(1, 1, *(shape[-2:] if len(shape) > 3 else shape[-1:]))
        half = shape[-1] // 2
        mask[..., :half] = 1
        latent["noise_mask"] = mask
        sigmas, guider = self._two_levels(), self._guider(2.0)
        try:
            core = self._sampled(guider, self._core("lcm"), sigmas, dict(latent))
        except (RuntimeError, ValueError):
            return NONE  # core takes no mask there
        sampler = self._ours("nodes.distilled").RetortDistilledSampler.execute("custom", "re-noise", "noised latent")[0]
        found = self._sampled(guider, sampler, sigmas, dict(latent))
        self._near(found[..., half + 1 :], latent["samples"][..., half + 1 :], 1e-5, "what is kept")
        if self._path.kind != "VP":
            self._near(found, core, 1e-5, "lcm")
        return OK

    def _reflection(self) -> str:
        setup, sigmas = self._ours("nodes.reflection").RetortReflectionSetup, self._simple(3)
        pair = {"pair": "cfg", "weak_cfg": 0.0}
        for end in (0.0, 1.0):
            guider, sampler, _ = setup.execute(
                self.model, self.positive, self.negative, pair, 3.0, end=end, sigmas=sigmas
            ).args
            found = self._sampled(guider, sampler, sigmas, self.family.empty())
            expected = self._sampled(self._guider(3.0), self._core("euler"), sigmas, self.family.empty())
            if not end and self._path.kind != "VP":
                self._near(found, expected, SAMPLER, "switched off")
            elif not bool(found.isfinite().all()):
                raise Wrong("not finite")
        return OK

    def _search(self) -> str:
        nodes = self._ours("nodes.search")
        reward, sigmas = self._ours("hosts.rewards.kinds").make(self._host, "sharpness", {}), self._simple(3)

        def searched(method: str, cfg: float, calls: int, batch: int) -> Tensor:
            how = {"method": method, **{each.id: each.default for each in nodes.METHODS[method]()}}
            given = {"calls": calls, "prompt": "a", "seed": 3, "batch_size": batch, "keep": 2}
            best = nodes.RetortTreeSearch.execute(
                self._guider(cfg), sigmas, self.family.empty(), _Rough(), reward, how, **given
            ).args[0]
            return best["samples"]

        one = searched("best_of_n", 1.0, 3, 1)
        plain = self._sampled(self._guider(1.0), self._core("euler_ancestral"), sigmas, self.family.empty(), seed=3)
        if self._path.kind != "VP":
            self._near(one, plain[: len(one)], NEAR, "the first candidate")
        for batch in (1, 2):
            if not bool(searched("dts_star", 2.0, 14, batch).isfinite().all()):
                raise Wrong("not finite")
        if (away := self._mixed()) > LORA and self._mixes():
            raise Wrong(f"latents at two levels in one call: {away:.2g} of the output's deviation away")
        return OK

    def _mixes(self) -> bool:
        """Whether a search would give this model latents of different levels in one call."""
        seen: list[bool] = []
        search = self._ours("hosts.comfyui.search")
        outer = self

        class Asking(self._samplers.Sampler):  # type: ignore[name-defined]
            def sample(self, wrap: Any, sigmas: Tensor, extra_args: Any, *rest: Any) -> Tensor:
                seen.append(search.mixed_levels(wrap, extra_args["model_options"]))
                return torch.zeros_like(outer.family.noise(0))

        self._through(self.model, Asking())
        return seen[0]

    def _mixed(self) -> float:
        """How far two latents at two levels in one call are from each alone, of the output's deviation."""
        work, form = self._ours("hosts.comfyui.work"), self.model.model.latent_format
        x, levels = self.family.noise(4, 2), self._levels()
        x = x.view(2, *work.whole(form, x.shape[1:]))
        together = self._x0(self.model, x, levels)
        alone = [self._x0(self.model, x[i : i + 1], levels[i : i + 1])[0] for i in range(2)]
        return max(float((together[i] - alone[i]).abs().max()) / float(together[i].std()) for i in range(2))

    # ---- training --------------------------------------------------------------------------------

    def _train(self, name: str, method: str, objective: dict[str, Any], more: int = 0, **training: Any) -> Any:
        """A run's result, after what every run is asked: finite losses, and a student that has moved."""
        dataset = self._ours("trainers.dataset").Dataset
        latents = [self.family.noise(seed)[0] * 0.5 for seed in (11, 12)]
        entries = [tuple(self.family.prompt(1)[0]), tuple(self.family.prompt(3, more)[0])]
        pairs = {}
        if method == "dpo":
            losers = [self.family.noise(seed)[0] * 0.5 for seed in (13, 14)]
            pairs = {"losers": losers, "strengths": [1.0, 1.0]}
        data = dataset(entries, [], tuple(self.negative[0]), latents, **pairs)
        settings = {
            "steps": self._steps, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0,
            "save_every": 0, "gradient_checkpointing": True, "precision": "fp32", "seed": 3, **training,
        }  # fmt: skip
        config = {"method": method, "objective": objective, "training": settings, "lora": {"rank": 2}}
        run = self._ours("hosts.training.run")
        request = run.Request(name, self._ours("trainers.methods").read_config(config), data)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            silent = self._ours("trainers.watch").Silent()
            result = run.run(self._host, self.model, request, watcher=silent, folder=Path(folder) / name)
        if not all(map(math.isfinite, result.losses)):
            raise Wrong(f"losses {result.losses}")
        ups = [tensor for key, tensor in result.lora.items() if key.endswith(("lora_B.weight", "lora_up.weight"))]
        if not any(bool(up.any()) for up in ups):
            raise Wrong("the student did not move")
        return result

    def _flow(self) -> str:
        self._trained["flow"] = self._train("flow", "flow", {})
        return OK

    def _exact(self) -> str:
        without = self._train("exact", "flow", {}, gradient_checkpointing=False)
        if "flow" not in self._trained:
            return OK
        lora = self._trained["flow"].lora
        other = [key for key, tensor in without.lora.items() if not torch.equal(tensor, lora[key])]
        if lora.keys() != without.lora.keys() or other:
            raise Wrong(f"{len(other)} of {len(lora)} tensors of the LoRA differ, such as {other[:1]}")
        return OK

    def _lengths(self) -> str:
        if self.family.one_length:
            return NONE
        self._train("lengths", "flow", {}, more=3)
        return OK

    def _dmd2(self) -> str:
        self._train("dmd2", "dmd2", {"ratio": 1})
        return OK

    def _tdm(self) -> str:
        self._train("tdm", "tdm", {"steps": 2})
        return OK

    def _gan(self) -> str:
        self._train("gan", "dmd2", {"ratio": 1, "gan_weight": 0.01})
        return OK

    def _dpo(self) -> str:
        self._train("dpo", "dpo", {"beta": 500.0})
        return OK

    # ---- the LoRA in core ------------------------------------------------------------------------

    def _levels(self) -> list[float]:
        sigmas = self.model.get_model_object("model_sampling").sigmas
        return [float(sigmas[int(len(sigmas) * place)]) for place in LEVELS]

    def _through(self, model: Any, sampler: Any, x: Tensor | None = None, grid: Tensor | None = None) -> Tensor:
        guider = self._samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": self.positive})
        x = self.family.noise(4) if x is None else x
        grid = torch.tensor([self._levels()[0], 0.0]) if grid is None else grid
        return guider.sample(x, torch.zeros_like(x), sampler, grid, disable_pbar=True, seed=0)

    def _x0(self, model: Any, x: Tensor, levels: list[float]) -> Tensor:
        """x0 (B, C, ...) in the network's scale as core samples it with cfg 1, each row at a level of its own."""

        class Once(self._samplers.Sampler):  # type: ignore[name-defined]
            def sample(self, wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *rest: Any):
                return wrap(noise, torch.tensor(levels), **extra_args)

        grid = torch.tensor([*sorted(levels, reverse=True), 0.0])
        out = self._through(model, Once(), x, grid)
        return model.model.process_latent_in(out).clone().float()

    def _lora(self) -> str:
        if "flow" not in self._trained:
            return NONE
        path = self._trained["flow"].path
        load: Any = importlib.import_module("comfy.sd").load_lora_for_models
        with _warnings() as warned:
            patched = load(self.model, None, load_file(path), 1.0, 0.0)[0]
        if warned or not patched.patches:
            raise Wrong(f"core reads not all of the LoRA: {warned[:1]}")
        x, config = self.family.noise(4), self._ours("trainers.adapters").LoraConfig(rank=2)
        forget = self._ours("hosts.comfyui.kinds").forget_earlier_calls
        with self._host.training_session(), torch.no_grad():
            denoiser = self._host.trainable(self.model)
            denoiser.adapters.add("student", config, 0)
            denoiser.adapters.load_lora("student", denoiser.from_file(load_file(path)))
            own = x.view(1, *denoiser.whole(x.shape[1:]))
            cond = denoiser.join([denoiser.encode(self.positive, own.shape)])
            for level in self._levels():
                for model, adapter in ((self.model, None), (patched, "student")):
                    with denoiser.adapter(adapter):
                        mine = denoiser.predict_x0(own, torch.tensor([level]), cond)
                    # HiDream-O1 keeps a prompt's keys and values from call to call, whatever LoRA they were made with.
                    forget(model.model.diffusion_model)
                    core = self._x0(model, own, [level])
                    away = float((core - mine).abs().max()) / float(core.std())
                    if not away <= LORA:
                        raise Wrong(f"{adapter or 'base'}: {away:.2g} of the output's deviation away from core's")
            denoiser.release()
        return OK


class _Rough:
    """A VAE that shows a latent's first three channels; of sound, a picture of its numbers."""

    def decode(self, samples: Tensor) -> Tensor:
        if samples.ndim == 3:
            samples = samples[:, None].expand(-1, 3, -1, -1)
        return samples[:, :3].movedim(1, -1).clamp(0, 1)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What core warns of meanwhile about keys of a LoRA."""
    import logging

    found: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "not loaded" in text.lower():
                found.append(text)

    handler, root = Keeping(), logging.getLogger()
    root.addHandler(handler)
    try:
        yield found
    finally:
        root.removeHandler(handler)
