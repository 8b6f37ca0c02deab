"""`baton generate`: continues prompts with a checkpoint's model."""

from pathlib import Path

import typer


def generate(
    checkpoint: Path = typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's folder: its newest."),
    prompt: list[str] = typer.Option([], help="Text to go on with. May be given again: all go on together."),
    file: list[Path] = typer.Option([], help="A file of text to go on with. May be given again."),
    ids: list[Path] = typer.Option([], help="A file of token ids, separated by blanks. May be given again."),
    max_new: int = typer.Option(100, min=1, max=2**31, help="Tokens of each continuation, at most; a document's end ends it too."),
    temperature: float = typer.Option(0.0, min=0.0, help="0: always the most likely token; else logits are divided by it."),
    top_p: float = typer.Option(1.0, help="With a temperature: of the most likely tokens that are together so likely, up to 1."),
    seed: int = typer.Option(0, min=0, max=2**63 - 1, help="Of what a temperature draws."),
    chunk: int = typer.Option(
        8192, min=1, max=2**31, help="Tokens of a prompt that one process has in work at a time; the result is the same."
    ),
    save_state: Path | None = typer.Option(None, help="Write what the model knows of the prompts to this file."),
    state: Path | None = typer.Option(None, help="Go on from a file of --save-state: the prompt, if any, follows what was read."),
    tp: int = typer.Option(1, min=1, help="As parallel.tp: processes that share the model out."),
    cp: int = typer.Option(1, min=1, help="As parallel.cp: processes that share a prompt out; one of them goes on alone."),
) -> None:
    """Continue prompts, with recurrent state: Mamba layers take the same time for a token after any prompt.

    Prints the continuation as it grows, of several prompts each at the end. Under torchrun this process is one of tp x cp workers;
    without it, they are started here.
    """
    from ..errors import under_torchrun, user_errors

    with user_errors():
        from ..checkpoints.manifest import find_checkpoint
        from ..generation.request import Request

        asked = Request(
            find_checkpoint(checkpoint), prompt, file, ids, max_new, temperature, top_p, seed, chunk, state, save_state, tp, cp
        )
        asked.check()
        from ..environment import launch, process_group

        if not under_torchrun() and tp * cp > 1:
            launch(asked.arguments(), tp * cp)
            return
        with process_group() as environment:
            from ..generation.run import run_generation

            run_generation(asked, environment)
