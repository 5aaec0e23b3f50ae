"""GUIDER of the headless host: classifier-free guidance as in ComfyUI's CFGGuider, and the sampling run around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...sampling.between import told
from ...sampling.levels import Parametrisation
from ...sampling.prior import identity
from ...sampling.schedule import Schedule
from ..methods import Beside, Method, Run, check_lowest, later, reporter, sampled
from ..reflection import check_pair
from . import residents
from .model import Conditioning, Model, Network
from .samplers import Masked
from .work import latents_in, say

# What core nodes of ours never make, and what would silently change the picture if it were left out.
_UNSUPPORTED = ("area", "mask", "control", "gligen", "hooks", "start_percent", "end_percent", "strength", "default")


class Guider:
    """GUIDER: a model and its conditions. cfg 1, or no negative, runs the positive branch alone, cfg 0 the negative.

    lowest: the lowest level that the model is for, see `hosts.contract`.
    """

    def __init__(
        self, model: Model, positive: Conditioning, negative: Conditioning | None = None, cfg: float = 1.0,
        lowest: float = 0.0,
    ):  # fmt: skip
        self.model, self.positive, self.negative, self.cfg, self.lowest = model, positive, negative, cfg, lowest

    def branches(self) -> list[Conditioning]:
        """The conditions that are run; two at once, negative first, as ComfyUI batches them."""
        if self.negative is None or math.isclose(self.cfg, 1.0):
            return [self.positive]
        return [self.negative] if self.cfg == 0 else [self.negative, self.positive]

    def denoiser(self, shape: torch.Size, label_scale: float = 1.0) -> Callable[..., Tensor]:
        """`model(x, sigma, **extra_args) -> x0` for latents of this shape, guidance inside (the Denoiser contract).

        More or fewer latents at once are taken too. label_scale: see `sampling.between.told`.
        """
        branches = self.branches()
        known = {shape[0]: _batched(self.model.network, branches, shape)}
        source, loras, patches = self.model.source, self.model.loras, self.model.patches
        schedule, path, cfg, guided = self.model.schedule, self.model.path, self.cfg, len(branches) == 2
        timestep, parametrisation = schedule.timestep, Parametrisation(self.model.prediction, path)

        def denoise(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
            network, b = source(loras), len(x)
            if label_scale != 1.0:
                x, sigma = told(x, sigma, label_scale, schedule, path)
            if b not in known:
                known[b] = _batched(network, branches, x.shape)
            x_in = parametrisation.shown(x, sigma)
            t = timestep(sigma).float()
            out: list[Any] = [0.0, 0.0]
            for jobs, conditions in known[b]:
                n = len(jobs)
                if n == 1:
                    raw = network(x_in, t, **conditions)
                else:
                    raw = network(torch.cat([x_in] * n), torch.cat([t] * n), **conditions)
                for k, (branch, share) in enumerate(jobs):
                    part = raw if n == 1 else raw[k * b : (k + 1) * b]
                    out[branch] = part if share == 1.0 else out[branch] + part * share
            # x0 is affine in the network's output, so guidance may come first: one subtraction from x, not two.
            raw = out[0] + (out[1] - out[0]) * cfg if guided else out[0]
            return parametrisation.x0(raw, x, sigma)

        if not patches:
            return denoise

        def patched(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
            x0 = denoise(x, sigma, **extra_args)
            for patch in patches:
                x0 = patch(x0, sigma)
            return x0

        return patched

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Method,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Sampled LATENT samples, fp32 on the CPU, from unit noise and a stored latent of its shape.

        sigmas 1-D and descending (empty: nothing to do); denoise_mask 1 where the latent may change; callback gets
        (step, x0, x, steps).
        """
        check_lowest(self.lowest, sigmas, sampler)
        if sigmas.shape[-1] == 0:
            return latent_image
        model = self.model
        device = model.network.device
        if torch.device(device).type != "cpu":
            residents.brought(model.network.module, device)
        noise, latent = (t.to(device, torch.float32) for t in (noise, latent_image))
        if bool(torch.count_nonzero(latent)):  # an empty latent is no picture: the shift must not make it one
            latent = model.latent.process_in(latent)
        if denoise_mask is not None:
            denoise_mask = _mask_for(denoise_mask, noise.shape).to(device)
        with torch.inference_mode():
            x = self._sampled(noise, latent, sampler, sigmas.to(device), denoise_mask, callback, seed)
        return model.latent.process_out(x.float()).cpu()

    def _sampled(
        self,
        noise: Tensor,
        latent: Tensor,
        sampler: Method,
        sigmas: Tensor,
        mask: Tensor | None,
        callback: Callable[[int, Tensor, Tensor, int], None] | None,
        seed: int | None,
    ) -> Tensor:
        """The same in the model's own scale, on its device."""
        model, batch, steps = self.model, len(noise), len(sigmas) - 1
        if sampler.searches:  # all rows are one picture's
            noise, latent, mask = noise[:1], latent[:1], None if mask is None else mask[:1]

        def masked(guider: Guider, label_scale: float = 1.0) -> Callable[..., Tensor]:
            denoiser = guider.denoiser(noise.shape, label_scale)
            return denoiser if mask is None else Masked(denoiser, model.path, latent, noise, mask)

        def keep(x: Tensor, sigma: Tensor) -> Tensor:
            assert mask is not None
            return torch.where(mask > 0, x, model.path.add_noise(latent, sigma, noise))

        def other(sampler: Method, done: int = 0, x: Tensor | None = None) -> Tensor:
            if x is None:
                return self._sampled(noise, latent, sampler, sigmas, mask, callback, seed)
            # As ComfyUI goes on with a latent that still holds noise: without any more, and as the latent image.
            x, rest = run.carried(x, sigmas[done]), later(callback, done, steps)
            return self._sampled(torch.zeros_like(x), x, sampler, sigmas[done:], None, rest, seed)

        def check(guider: Guider, name: str) -> None:
            branches = {"positive": guider.positive, "negative": guider.negative}
            check_pair(
                name,
                [branch for branch, entries in branches.items() if entries is not None and not entries],
                (guider.model.latent, model.latent),
                (guider.model.path, model.path),
            )

        def beside(guiders: Mapping[str, Guider], job: Beside) -> Tensor:
            for name, guider in guiders.items():
                check(guider, name)
                check_lowest(guider.lowest, sigmas, None)
            return job(run.model, {name: masked(guider) for name, guider in guiders.items()})

        def relay(
            guider: Guider, x: Tensor, sigma: Tensor, job: Callable[..., Tensor], label_scale: float = 1.0
        ) -> Tensor:
            check(guider, "second")
            handed = guider.model.latent.process_in(model.latent.process_out(run.carried(x, sigma)))
            return job(masked(guider, label_scale), model.path.add_noise(handed, sigma, torch.zeros_like(handed)))

        run = Run(
            model=masked(self),
            path=model.path,
            sigmas=sigmas,
            shape=tuple(noise.shape[1:]),
            latent=latent,
            top=at_top(sigmas, model.schedule),
            extra_args={"seed": seed},
            batch=batch,
            mixed_levels=True,
            calls_per_eval=sum(map(len, self.branches())),
            identity=identity((self.cfg, *parts(self))) if sampler.searches else "",
            noise=noise,
            mask=mask,
            schedule=model.schedule,
            latents_in=lambda samples: latents_in(model, samples),
            latents_out=lambda x0: model.latent.process_out(x0.float()),
            tell=say,
            keep=None if mask is None else keep,
            other=other,
            beside=beside,
            labelled=partial(masked, self),
            relay=relay,
            again=lambda: None,
            callback=reporter(callback, steps),
        )
        return sampled(sampler, run)


def at_top(sigmas: Tensor, schedule: Schedule) -> bool:
    """Whether the first level is the model's highest, by ComfyUI's tolerance."""
    first, top = float(sigmas[0]), float(schedule.sigma_max)
    return first > top or math.isclose(top, first, rel_tol=1e-5)


def parts(guider: Guider) -> Iterator[Any]:
    """What names a guider's model and conditions, cfg apart."""
    yield type(guider.model.network).__name__, guider.model.prediction
    yield [(lora.name, lora.strength) for lora in guider.model.loras]
    for conditioning in (guider.positive, guider.negative or []):
        yield len(conditioning)
        for tokens, extra in conditioning:
            yield tokens
            yield from (extra[name] for name in ("pooled_output",) if isinstance(extra.get(name), Tensor))


def cfgs(guiders: Sequence[Guider]) -> tuple[float, ...] | None:
    """See `hosts.contract`."""
    first = guiders[0]
    for guider in guiders:
        if guider.model.source is not first.model.source or identity(parts(guider)) != identity(parts(first)):
            return None
    return tuple(float(guider.cfg) for guider in guiders)


def _batched(network: Network, branches: list[Conditioning], shape: torch.Size) -> list[tuple[list, dict[str, Tensor]]]:
    """([(branch, share of its average), ...], keyword tensors) for each call that a step needs; usually one."""
    entries = []
    for branch, conditioning in enumerate(branches):
        if not conditioning:
            raise UsageError("the CONDITIONING is empty; connect a CLIPTextEncode node")
        for tokens, extra in conditioning:
            bad = [key for key in _UNSUPPORTED if key in extra]
            if bad:
                raise UsageError(f"conditioning with {bad[0]!r} needs ComfyUI: remove that node, or run it there")
            made = network.conditions(tokens, extra, shape)
            # Prompts of a data set lie in host memory, and so do numbers that a network is told besides.
            here = {key: value.to(network.device) for key, value in made.items()}
            entries.append((branch, 1.0 / len(conditioning), here))
    calls: list[tuple[list, list[dict[str, Tensor]]]] = []
    for branch, share, made in entries:
        made = {key: _repeated(value, shape[0]) for key, value in made.items()}
        for jobs, others in calls:
            joined = _joinable(others[0], made, network.repeats_context)
            if joined:
                jobs.append((branch, share))
                others.append(made)
                break
        else:
            calls.append(([(branch, share)], [made]))
    return [(jobs, _joined(made)) for jobs, made in calls]


def _joinable(a: dict[str, Tensor], b: dict[str, Tensor], repeats: bool) -> bool:
    if a.keys() != b.keys():
        return False
    for key in a:
        if a[key].shape == b[key].shape:
            continue
        la, lb = a[key].shape[1], b[key].shape[1]
        if not (repeats and key == "context" and math.lcm(la, lb) // min(la, lb) <= 4):
            return False
    return True


def _joined(made: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    out = {}
    for key in made[0]:
        values = [m[key] for m in made]
        if key == "context":
            length = math.lcm(*(v.shape[1] for v in values))
            values = [v.repeat(1, length // v.shape[1], 1) for v in values]
        out[key] = values[0] if len(values) == 1 else torch.cat(values)
    return out


def _repeated(value: Tensor, batch: int) -> Tensor:
    """The first `batch` items of a tensor repeated along its first axis."""
    return value.repeat(math.ceil(batch / value.shape[0]), *(1,) * (value.ndim - 1))[:batch]


def _mask_for(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of any size, resized to the latent's, with its channels and batch."""
    mode, lead = ("bilinear", (-1, 1)) if len(shape) == 4 else ("trilinear", (1, 1, -1))
    mask = mask.float().reshape(*lead, *mask.shape[-2:]) if mask.ndim < len(shape) or len(shape) == 4 else mask.float()
    mask = torch.nn.functional.interpolate(mask, size=shape[2:], mode=mode)
    if mask.shape[1] < shape[1]:
        mask = mask.repeat(1, shape[1], *(1,) * (len(shape) - 2))[:, : shape[1]]
    return _repeated(mask, shape[0])
