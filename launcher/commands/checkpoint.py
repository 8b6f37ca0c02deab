"""`baton checkpoint`: what a checkpoint holds."""

from pathlib import Path

import typer

app = typer.Typer(help="Look into checkpoints.", no_args_is_help=True)
FOLDER = typer.Argument(metavar="DIR", help="A checkpoint, or a run's folder: its newest.")


@app.callback()
def _root() -> None:
    pass


@app.command()
def inspect(
    folder: Path = FOLDER,
    each: bool = typer.Option(False, "--all", help="A line for each tensor, instead of one for each part of the model."),
) -> None:
    """Print how far a run was, where it ran, and what the checkpoint holds; no tensor is read."""
    from ..errors import user_errors

    with user_errors():
        from ..checkpoints.contents import read_contents
        from ..checkpoints.manifest import find_checkpoint
        from ..checkpoints.report import print_contents

        print_contents(read_contents(find_checkpoint(folder)), each)


@app.command()
def merge(
    folder: Path = FOLDER,
    file: Path = typer.Argument(metavar="OUT.safetensors", help="The file to write; it must not be there."),
) -> None:
    """Write the model, without the optimizer, as one safetensors file; one tensor is in memory at a time."""
    from ..errors import user_errors

    with user_errors():
        from ..checkpoints.contents import read_contents
        from ..checkpoints.manifest import find_checkpoint
        from ..checkpoints.merge import merge as merge_into

        merge_into(read_contents(find_checkpoint(folder)), file)
