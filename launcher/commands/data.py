"""`baton data`: the corpus."""

import typer

from .train import CONFIG, INPUT, OVERRIDES, with_input

app = typer.Typer(help="Prepare the corpus.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command()
def prepare(config: str = CONFIG, overrides: list[str] = OVERRIDES, input: list[str] = INPUT) -> None:
    """Turn text into token files (megatron-core's .bin/.idx) and a tokenizer, in the config's data.folder."""
    from ..errors import user_errors

    with user_errors():
        from ...configs.loading import load_config
        from ..training.token_files import prepare as prepare_tokens

        prepare_tokens(load_config(config, with_input(overrides, input)))
