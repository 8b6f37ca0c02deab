"""`baton train`: trains the model that a config file describes."""

import json
from pathlib import Path

import typer

CONFIG = typer.Argument(help="A YAML file, or the name of a preset such as quickstart.")
OVERRIDES = typer.Argument([], help="Values in place of the file's: dotted.key=value, for example parallel.cp=4.")
INPUT = typer.Option([], "--input", help="Text to train on: a file (.txt .jsonl, also .gz) or a folder. May be given again.")


def with_input(overrides: list[str], input: list[str]) -> list[str]:
    """Overrides, and what --input names as one more."""
    return [*overrides, f"data.input={json.dumps(input)}"] if input else overrides


def train(
    config: str = CONFIG,
    overrides: list[str] = OVERRIDES,
    nproc: str = typer.Option(
        "auto", help="Worker processes to start here; auto: the GPUs, or 2 without any. Ignored under torchrun."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest checkpoint in the run's folder, if there is one."),
    stop_at: int | None = typer.Option(None, min=1, help="Stop after this step with a checkpoint; the schedule stays as it is."),
    input: list[str] = INPUT,
    profile: Path | None = typer.Option(
        None, metavar="FOLDER", help="Write the trace of one step, and what it sent, into this folder."
    ),
) -> None:
    """Train a model; the corpus is prepared first if its token files are not there.

    Under torchrun this process is one of the workers; without it, the workers are started here.
    """
    from ..errors import under_torchrun, user_errors

    with user_errors():
        from ...configs.loading import load_config

        values = with_input(overrides, input)
        asked = load_config(config, values)
        from ..environment import choose_processes, launch, process_group

        if not under_torchrun():
            processes = choose_processes(nproc, asked)
            checked = load_config(config, values, processes)
            from ..checkpoints.model import check_start
            from ..training.run_folder import check_run_folder
            from ..training.token_files import prepare

            check_run_folder(checked.run, resume)
            check_start(checked, resume)
            prepare(checked)
            if processes > 1:
                options = ["--resume"] * resume + (["--stop-at", str(stop_at)] if stop_at else [])
                options += ["--profile", str(profile)] if profile else []
                launch(["train", config, *values, *options], processes)
                return
        with process_group() as environment:
            from ..training.loop import run_training

            run_training(load_config(config, values, environment.world), environment, resume, stop_at, profile)
