"""The `baton` command. Bodies import torch only when they run, so that help answers at once."""

import typer

from .commands import bench, checkpoint, convert, data, generate, plan, train, verify

app = typer.Typer(
    name="baton",
    help="Trains Jamba-style hybrid language models on very long contexts, the sequence sharded over ranks by state passing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("verify")(verify.verify)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(convert.app, name="convert")


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and stop."),
) -> None:
    pass


def main() -> None:
    """Where the installed command begins."""
    app()


if __name__ == "__main__":
    main()
