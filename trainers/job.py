"""A training as a folder that any process can take up: what to train in job.json, on what in data.safetensors.

The folder is the run's own, so state, metrics, previews and checkpoints lie beside the job. A job may come from a
stranger: it names files inside the model folders of whoever runs it, and can choose neither code nor places to write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..files.atomic import checked_name, write_json
from ..files.folder import Inside, inside
from ..files.strangers import read_json
from .config import RunConfig, read
from .dataset import Dataset
from .methods import METHODS, read_config
from .sources import Base, Vae, checked_path, read_base

FORMAT = 1
JOB, DATA, LOG, LOCK = "job.json", "data.safetensors", "job.log", "job.lock"

Starter = Literal["comfyui", "headless"]


@dataclass(frozen=True)
class Job:
    """A job file. name: of the LoRA. start: a LoRA in the loras folder that the student begins as ("" = none).

    other_expert: of two networks the one that is not trained, which samples its levels of the previews.
    """

    name: str
    config: RunConfig
    base: Base
    vae: Vae | None = None
    start: str = ""
    started_by: Starter = "headless"
    other_expert: Base | None = None

    def __post_init__(self) -> None:
        checked_name(self.name)
        if self.start:
            checked_path(self.start, "start")
        if self.started_by not in get_args(Starter):
            raise ValueError(f"started_by must be one of {', '.join(get_args(Starter))}, got {self.started_by!r:.80}")
        refuse_reward(self.config)

    def to_json(self) -> dict[str, Any]:
        """What job.json holds."""
        return {
            "format": FORMAT,
            "name": self.name,
            "started_by": self.started_by,
            "base": self.base.to_json(),
            "vae": None if self.vae is None else self.vae.to_json(),
            "start": self.start,
            **({} if self.other_expert is None else {"other_expert": self.other_expert.to_json()}),
            **self.config.to_json(),
        }

    @classmethod
    def from_json(cls, values: Any) -> Job:
        """A job from JSON values. ValueError names the field that is unknown, missing or wrong."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{JOB} must hold an object with names and values")
        known = (
            "format", "name", "started_by", "base", "vae", "start", "other_expert", "method", "objective", "training",
            "lora",
        )  # fmt: skip
        unknown = [str(k)[:80] for k in values if k not in known]
        if unknown:
            raise ValueError(f"{unknown[0]} is not part of a job; it has {', '.join(known)}")
        missing = [k for k in ("format", "name", "base", "method") if k not in values]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        if values["format"] != FORMAT or isinstance(values["format"], bool):
            raise ValueError(f"format is {values['format']!r:.40}, and this version of Retort reads {FORMAT}")
        texts = {k: values[k] for k in ("name", "start", "started_by") if k in values}
        for key, value in texts.items():
            if not isinstance(value, str):
                raise ValueError(f"{key} must be a text, got {value!r:.80}")
        vae, other = values.get("vae"), values.get("other_expert")
        return cls(
            **texts,
            config=read_config({k: values[k] for k in ("method", "objective", "training", "lora") if k in values}),
            base=read_base(values["base"]),
            vae=None if vae is None else read(Vae, vae, "vae"),
            other_expert=None if other is None else read_base(other, "other_expert"),
        )

    @classmethod
    def load(cls, folder: Path | Inside) -> Job:
        """The job of a folder. ValueError says what is wrong with its file, and in which field."""
        path = inside(folder) / JOB
        found = read_json(path)
        try:
            return cls.from_json(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: Path | Inside, dataset: Dataset) -> None:
        """Write the data, then the job, so that a folder with a job has its data. OSError names the file."""
        dataset.save(inside(folder) / DATA)
        write_json(inside(folder) / JOB, self.to_json())


def refuse_reward(config: RunConfig) -> None:
    """ValueError for a method that asks for a reward, which no file of a job names."""
    refusal = METHODS[config.method].objective.job_refusal(config.objective)
    if refusal:
        raise ValueError(f"method {config.method}: {refusal}")


def checked_folder(path: Path) -> Path:
    """A job's folder, from its path or that of its job.json; it holds no link, at any depth.

    ValueError names the link: what is written through one, or removed, would be someone else's file.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    inside(folder).refuse_links()
    if not (inside(folder) / JOB).is_file():
        raise ValueError(f"{path} is no job: there is no {JOB}")
    if path.name != JOB and not path.is_dir():
        raise ValueError(f"{path} is no job: its file is called {JOB}")
    return folder
