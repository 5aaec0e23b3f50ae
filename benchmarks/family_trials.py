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
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .family_networks import Family

OURS = Path(__file__).resolve().parents[1]
SAMPLER, NEAR, LORA = 2e-7, 1e-4, 1e-3  # relative to the largest number, and to the output's deviation
OK, NONE = "ok", ""
LEVELS = (0.5, 0.85)  # of the way up a model's levels, where a LoRA is looked at
# Column -> what it asks of every family.
CELLS = {
    "sampler": "Distilled Sampler on two levels of its own: core's euler, within 2e-7 of the largest number",
    "mask": "the same inpainting: the kept half is the picture's, and all of it core's lcm",
    "reflection": "W2SD switched off (end = 0): core's euler",
    "search": "best of N: its first candidate is core's euler_ancestral; DTS*: batches of mixed levels run",
    "flow": "two steps of flow matching, batch 2, with checkpoints: losses are finite and the student moves",
    "exact": "the same without checkpoints: the same LoRA to the bit",
    "lengths": "prompts of two lengths: the run of `flow` has them, where that is right",
    "gan": "DMD2 with its discriminator",
    "dmd2": "DMD2: the same run, where that is right, else one without a discriminator",
    "tdm": "TDM",
    "dpo": "DPO",
    "lora": "core's loader: no key lost, and x0 as the training network had it, within 1e-3 of its deviation",
}
# And of the families that most people use.
FURTHER = {
    "f_distill": "f-distill, with its discriminator",
    "di_star": "DI*, with a reward",
    "few_shot": "few-shot adaption",
    "smpo": "SmPO",
    "mapo": "MaPO",
    "align_prop": "AlignProp: two steps of its sampler, one with a gradient",
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

    steps: of the trainings by flow matching; others take one. form: what the weights are stored as.
    """

    def __init__(
        self, family: Family, packages: Callable[[str], Any], folder: Path, steps: int = 2, form: str = "fp32"
    ):
        self.family, self._ours, self.folder, self._steps = family, packages, folder, steps
        self._custom: Any = importlib.import_module("comfy_extras.nodes_custom_sampler")
        self._samplers: Any = importlib.import_module("comfy.samplers")
        self._host = packages("hosts.comfyui.host").host
        with torch.inference_mode():
            self.model = family.model(form)
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
        return _flat(self._custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)[0]["samples"])

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
        given = latent["samples"].view_as(found)
        self._near(found[..., half + 1 :], given[..., half + 1 :], 1e-5, "what is kept")
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
            return _flat(best["samples"])

        one = searched("best_of_n", 1.0, 3, 1)
        plain = self._sampled(self._guider(1.0), self._core("euler_ancestral"), sigmas, self.family.empty(), seed=3)
        if self._path.kind != "VP":
            self._near(one, plain[: len(one)], NEAR, "the first candidate")
        for batch in (1, 2):
            if not bool(searched("dts_star", 2.0, 14, batch).isfinite().all()):
                raise Wrong("not finite")
        if self._mixes() and (away := self._mixed()) > LORA:
            raise Wrong(f"latents at two levels in one call: {away:.2g} of the output's deviation away")
        return OK

    def _mixes(self) -> bool:
        """Whether a search would give this model latents of different levels in one call."""
        seen: list[bool] = []
        search = self._ours("hosts.comfyui.search")
        if self._ours("hosts.comfyui.parts").one_at_a_time(self.model.model):
            return False

        class Asking(self._samplers.Sampler):  # type: ignore[name-defined]
            def sample(
                self, wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *rest: Any
            ) -> Tensor:
                seen.append(search.mixed_levels(wrap, extra_args["model_options"]))
                return torch.zeros_like(noise)

        self._through(self.model, Asking(), self._start(4))
        return seen[0]

    def _mixed(self) -> float:
        """How far two latents at two levels in one call are from each alone, of the output's deviation."""
        levels = self._levels()
        together = self._x0(self.model, self._start(4, 2), levels)
        first, second = (self._x0(self.model, one, [level]) for one, level in zip(self._rows(4), levels, strict=True))
        alone = torch.cat([first, second])
        return max(float((together[i] - alone[i]).abs().max()) / float(together[i].std()) for i in range(2))

    def _start(self, seed: int, batch: int = 1) -> Any:
        """Noise as the network is given it: pictures of a video format have a frame."""
        x, work = self.family.start(seed, batch), self._ours("hosts.comfyui.work")
        return x if x.is_nested else x.view(batch, *work.whole(self.model.model.latent_format, x.shape[1:]))

    def _rows(self, seed: int) -> list[Any]:
        """The two latents of `_start(seed, 2)`, each alone."""
        both = self._start(seed, 2)
        if not both.is_nested:
            return [both[:1], both[1:]]
        return [type(both)([part[i : i + 1] for part in both.unbind()]) for i in range(2)]

    # ---- training --------------------------------------------------------------------------------

    def _train(self, name: str, method: str, objective: dict[str, Any], more: int = 0, **training: Any) -> Any:
        """A run's result, after what every run is asked: finite losses, and a student that has moved."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return self._train_in(Path(folder) / name, method, objective, more, **training)

    def _train_in(
        self, folder: Path, method: str, objective: dict[str, Any], more: int = 0, watcher: Any = None, **training: Any
    ) -> Any:
        dataset = self._ours("trainers.dataset").Dataset
        latents = [self.family.stored(seed) for seed in (11, 12)]
        entries = [tuple(self.family.prompt(1)[0]), tuple(self.family.prompt(3, more)[0])]
        needs = self._ours("trainers.methods").METHODS[method].objective
        pairs, looks = {}, {}
        if "comparisons" in needs.needs:
            pairs = {"losers": [self.family.stored(seed) for seed in (13, 14)], "strengths": [1.0, 1.0]}
        if needs.rewards == "differentiable":
            looks = {"reward": Brightness(), "vae": _rough_vae(self.family)}
        prompts = ["a", "b"] if looks else []
        data = dataset(entries, prompts, tuple(self.negative[0]), latents, **pairs)
        settings = {
            "steps": 1, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0,
            "save_every": 0, "gradient_checkpointing": True, "precision": "fp32", "seed": 3, **training,
        }  # fmt: skip
        config = {"method": method, "objective": objective, "training": settings, "lora": {"rank": 2}}
        run = self._ours("hosts.training.run")
        request = run.Request(folder.name, self._ours("trainers.methods").read_config(config), data)
        watcher = watcher or self._ours("trainers.watch").Silent()
        result = run.run(self._host, self.model, request, watcher=watcher, folder=folder, **looks)
        if not all(map(math.isfinite, result.losses)):
            raise Wrong(f"losses {result.losses}")
        ups = [tensor for key, tensor in result.lora.items() if key.endswith(("lora_B.weight", "lora_up.weight"))]
        if not any(bool(up.any()) for up in ups):
            raise Wrong("the student did not move")
        return result

    def _flow(self) -> str:
        self._trained["flow"] = self._train("flow", "flow", {}, more=3, steps=self._steps)
        return OK

    def _exact(self) -> str:
        without = self._train("exact", "flow", {}, more=3, steps=self._steps, gradient_checkpointing=False)
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
        if "flow" not in self._trained:
            self._train("lengths", "flow", {}, more=3)
        return OK

    def _gan(self) -> str:
        self._trained["gan"] = self._train("gan", "dmd2", {"ratio": 1, "gan_weight": 0.01})
        return OK

    def _dmd2(self) -> str:
        if "gan" not in self._trained:
            self._train("dmd2", "dmd2", {"ratio": 1})
        return OK

    def _tdm(self) -> str:
        self._train("tdm", "tdm", {"steps": 2})
        return OK

    def _dpo(self) -> str:
        self._train("dpo", "dpo", {"beta": 500.0})
        return OK

    def _f_distill(self) -> str:
        self._train("f_distill", "f_distill", {"ratio": 1, "gan_on": "fake"})
        return OK

    def _di_star(self) -> str:
        self._train("di_star", "di_star", {"ratio": 1, "alpha_rew": 10.0, "cfg": 2.0})
        return OK

    def _few_shot(self) -> str:
        self._train("few_shot", "few_shot", {"source_steps": 2})
        return OK

    def _smpo(self) -> str:
        self._train("smpo", "smpo", {})
        return OK

    def _mapo(self) -> str:
        self._train("mapo", "mapo", {})
        return OK

    def _align_prop(self) -> str:
        self._train("align_prop", "align_prop", {"steps": 2, "truncation": "fixed", "last": 1, "cfg": 2.0})
        return OK

    # ---- the LoRA in core ------------------------------------------------------------------------

    def _levels(self) -> list[float]:
        sigmas = self.model.get_model_object("model_sampling").sigmas
        return [float(sigmas[int(len(sigmas) * place)]) for place in LEVELS]

    def _through(self, model: Any, sampler: Any, x: Any, grid: Tensor | None = None) -> None:
        guider = self._samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": self.positive})
        nothing = type(x)([torch.zeros_like(part) for part in x.unbind()]) if x.is_nested else torch.zeros_like(x)
        grid = torch.tensor([self._levels()[0], 0.0]) if grid is None else grid
        guider.sample(x, nothing, sampler, grid, disable_pbar=True, seed=0)

    def _x0(self, model: Any, x: Any, levels: list[float]) -> Tensor:
        """x0 (B, C, ...), or packed, in the network's scale as core samples it with cfg 1, each row at its own level.

        x: of such scale, a tensor or nested.
        """
        seen: list[Tensor] = []

        class Once(self._samplers.Sampler):  # type: ignore[name-defined]
            def sample(
                self, wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *rest: Any
            ) -> Tensor:
                seen.append(wrap(noise, torch.tensor(levels), **extra_args).clone().float())
                return noise

        self._through(model, Once(), x, torch.tensor([*sorted(levels, reverse=True), 0.0]))
        return seen[0]

    def _lora(self) -> str:
        if "flow" not in self._trained:
            return NONE
        lora = load_file(self._trained["flow"].path)
        load: Any = importlib.import_module("comfy.sd").load_lora_for_models
        with _warnings() as warned:
            patched = load(self.model, None, lora, 1.0, 0.0)[0]
        if warned or not patched.patches:
            raise Wrong(f"core reads not all of the LoRA: {warned[:1]}")
        for level in self._levels():
            own = self._own(lora, level)
            for model, who, mine in zip((self.model, patched), ("base", "student"), own, strict=True):
                core = self._cores(model, level)
                away = float((core - mine).abs().max()) / float(core.std())
                if not away <= LORA:
                    raise Wrong(f"{who}: {away:.2g} of the output's deviation away from core's")
        return OK

    def _cores(self, model: Any, level: float) -> Tensor:
        """x0 of a noise at a level in core."""
        # HiDream-O1 keeps a prompt's keys and values from call to call, whatever LoRA they were made with.
        self._ours("hosts.comfyui.kinds").forget_earlier_calls(model.model.diffusion_model)
        return self._x0(model, self._start(4), [level])

    def _own(self, lora: dict[str, Tensor], level: float) -> tuple[Tensor, Tensor]:
        """The same of the training network: without a LoRA and with one."""
        parts, config = self._ours("sampling.parts"), self._ours("trainers.adapters").LoraConfig(rank=2)
        rows, found = tuple(parts.parts_of(self._start(4))), []
        with self._host.training_session(), torch.no_grad():
            denoiser = self._host.trainable(self.model)
            denoiser.adapters.add("student", config, 0)
            denoiser.adapters.load_lora("student", denoiser.from_file(dict(lora)))
            made = parts.Parts.of(rows)
            made = parts.Parts(made.shapes, (), denoiser.gains if made.shapes else ())
            x = made.pack(rows)
            cond = denoiser.join([denoiser.encode(self.positive, x.shape, parts=made)])
            for adapter in (None, "student"):
                with denoiser.adapter(adapter):
                    found.append(denoiser.predict_x0(x, torch.tensor([level]), cond))
            denoiser.release()
        return found[0], found[1]


def _flat(samples: Any) -> Tensor:
    """A LATENT's samples, those of several parts in one row."""
    return torch.cat([part.flatten() for part in samples.unbind()]) if samples.is_nested else samples


class _Rough:
    """A VAE that shows a latent's first three channels; of sound, a picture of its numbers."""

    def decode(self, samples: Tensor) -> Tensor:
        if samples.ndim == 3:
            samples = samples[:, None].expand(-1, 3, -1, -1)
        return samples[:, :3].movedim(1, -1).clamp(0, 1)


class Brightness:
    """A reward with a gradient: how bright a picture is."""

    name, differentiable, range = "brightness", True, (0.0, 1.0)

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))


class _Mixer(torch.nn.Module):
    """A decoder: pictures of a latent's channels mixed to three."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.linspace(-1, 1, 3 * channels).view(3, channels), requires_grad=False)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, ...), about -1 to 1."""
        return torch.einsum("bc...,dc->bd...", latents, self.mix.to(latents.device)) / self.mix.shape[1] ** 0.5


def _mixing(channels: int, disable_dynamic: bool = False) -> Any:
    patchers: Any = importlib.import_module("comfy.model_patcher")
    cpu = torch.device("cpu")
    patcher = patchers.ModelPatcher(_Mixer(channels), load_device=cpu, offload_device=cpu)
    patcher.cached_patcher_init = (_mixing, (channels,))
    return patcher


def _rough_vae(family: Family) -> Any:
    """A VAE whose decoder is a `_Mixer`, with what a host asks of ComfyUI's."""
    patcher = _mixing((family.encoded or family.latent)[0])
    network = patcher.model

    def pictures(made: Tensor) -> Tensor:
        return (made + 1) / 2

    return SimpleNamespace(
        patcher=patcher, first_stage_model=network, device=patcher.load_device, vae_dtype=torch.float32,
        process_output=pictures, decode=lambda latents: pictures(network.decode(latents)).movedim(1, -1),
    )  # fmt: skip


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
