"""The entry of a job's process, started by its path: `python hosts/job.py FOLDER/job.json [--comfyui DIR]`.

`accelerate launch hosts/job.py FOLDER/job.json` shares the work among processes. ComfyUI imports packs by path, so in a
process of its own `import retort` would fail: the root is registered under that name. What follows `--` are ComfyUI's
own arguments. Exit codes: 0 finished, 3 stopped, 2 a mistake that the message tells how to mend, 1 anything else.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FINISHED, FAILED, USAGE, STOPPED = 0, 1, 2, 3


def register() -> None:
    """Make this folder the package `retort`, whatever is installed under that name."""
    if "retort" in sys.modules:
        return
    # Python puts a script's folder first; ours holds names such as `training` that others use too.
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT / "hosts"]
    spec = importlib.util.spec_from_file_location(
        "retort", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["retort"] = module
    spec.loader.exec_module(module)


def enter_comfyui(folder: Path, output: Path | None, models: list[str], arguments: list[str]) -> None:
    """Import ComfyUI without its server, with the folders and settings that its own command line would give it.

    models: further folders as KIND=DIR, before those that ComfyUI knows.
    """
    folder = folder.resolve()
    if not (folder / "comfy" / "sd.py").is_file():
        raise ValueError(f"--comfyui {folder} is no ComfyUI: it has no comfy/sd.py")
    sys.path.insert(0, str(folder))
    sys.argv = [str(folder / "main.py"), *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_api.latest  # noqa: F401 (by it `hosts.api` knows that it is ComfyUI that runs)
    import folder_paths
    from comfy.cli_args import args
    from utils.extra_config import load_extra_path_config

    configs = [str(p) for p in [folder / "extra_model_paths.yaml"] if p.is_file()]
    for config in [*configs, *itertools.chain(*(args.extra_model_paths_config or []))]:
        load_extra_path_config(config)
    if output is not None or args.output_directory:
        folder_paths.set_output_directory(str(Path(output or args.output_directory).resolve()))
    for kind in ("checkpoints", "clip", "vae", "diffusion_models", "loras"):
        folder_paths.add_model_folder_path(kind, str(Path(folder_paths.get_output_directory()) / kind))
    for kind, sign, root in reversed([entry.partition("=") for entry in models]):
        if not sign:
            raise ValueError(f"--models {kind}: with ComfyUI say of what kind, as in --models checkpoints=DIR")
        folder_paths.add_model_folder_path(kind, root, is_default=True)


def main(argv: list[str]) -> int:
    """Do the job of a command line and return the exit code."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, theirs = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(prog="job.py", description="Do a training job.")
    parser.add_argument("job", type=Path, help="job.json, or its folder")
    parser.add_argument("--comfyui", type=Path, help="folder of ComfyUI, which then loads the base model")
    parser.add_argument("--models", action="append", default=[], help="folder of models; with ComfyUI: KIND=DIR")
    parser.add_argument(
        "--extra-model-paths-config", type=Path, action="append", default=[], dest="configs",
        help="a file as ComfyUI's extra_model_paths.yaml; with ComfyUI it is one of its own arguments, after --",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="where results go when no --models folder is given")
    given = parser.parse_args(own)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    register()
    try:
        if given.comfyui is not None:
            enter_comfyui(given.comfyui, given.output, given.models, theirs)
        from retort.hosts.jobs.process import run_job

        if given.comfyui is not None:
            from retort.hosts.comfyui.host import host

            host.add_model_folders()
            status = run_job(host, given.job)
        else:
            from retort.hosts.headless.folders import Folders, use
            from retort.hosts.headless.host import host as headless

            environment = Folders.from_environment()
            output = given.output or environment.output
            models = (*map(Path, given.models), *environment.models)
            with use(Folders(models=models, output=output, configs=tuple(given.configs))):
                status = run_job(headless, given.job)
    except (ValueError, OSError, ImportError) as error:
        logging.error("%s", error, exc_info=not isinstance(error, ValueError))
        return USAGE
    logging.info("%s", status)
    # A launcher would take any other code of one process for the failure of all.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return STOPPED if status.state == "stopped" and alone else FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
