"""`baton convert`: models of Hugging Face's and of Megatron-LM's in and out."""

from pathlib import Path

import typer

from .train import OVERRIDES

app = typer.Typer(
    help="Models in and out: Hugging Face's Jamba, Mamba2, Bamba, GraniteMoeHybrid, NemotronH; Megatron-LM's hybrids.",
    no_args_is_help=True,
)
HF_DIR = typer.Argument(metavar="HF_DIR", help="A folder with config.json and safetensors.")
CHECKPOINT = typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's folder: its newest.")
DTYPE = typer.Option(None, help="bf16 or fp32, but for A_log, D, dt_bias; unless given, as it is.")


@app.callback()
def _root() -> None:
    pass


@app.command("from-hf")
def from_hf(
    folder: Path = HF_DIR,
    out: Path = typer.Argument(metavar="OUT", help="The checkpoint to write; it must not be there."),
) -> None:
    """Write a checkpoint that any mesh can start from, and a config for it; memory: the largest tensor and 256 MiB."""
    from ..errors import user_errors

    with user_errors():
        from ..conversion.from_hf import convert_from_hf
        from ..conversion.report import print_imported

        print_imported(convert_from_hf(folder, out), out)


@app.command("to-hf")
def to_hf(
    checkpoint: Path = CHECKPOINT,
    out: Path = typer.Argument(metavar="OUT", help="The folder to write; it must not be there."),
    model_type: str | None = typer.Option(
        None, "--type", help="jamba, mamba2, bamba, granitemoehybrid or nemotron_h; unless given, the first that computes the same."
    ),
    dtype: str | None = DTYPE,
) -> None:
    """Write a folder that transformers reads; memory: the largest tensor."""
    from ..errors import user_errors

    with user_errors():
        from ..conversion.report import print_exported
        from ..conversion.to_hf import convert_to_hf, parse_dtype, parse_type

        print_exported(convert_to_hf(checkpoint, out, parse_type(model_type), parse_dtype(dtype)), out)


@app.command("from-megatron")
def from_megatron(
    folder: Path = typer.Argument(metavar="DIR", help="A checkpoint of --ckpt-format torch_dist, or a run's folder: its newest."),
    out: Path = typer.Argument(metavar="OUT", help="The checkpoint to write; it must not be there."),
    overrides: list[str] = OVERRIDES,
    config: str = typer.Option(help="A YAML file, or the name of a preset, whose model is that of the checkpoint."),
) -> None:
    """Write a checkpoint that any mesh can start from, and a config for it; memory: the largest tensor and 256 MiB."""
    from ..errors import user_errors

    with user_errors():
        from ..conversion.from_megatron import convert_from_megatron
        from ..conversion.report import print_beginning

        source = convert_from_megatron(folder, config, overrides, out)
        print_beginning("a model of Megatron-LM's", source, out)


@app.command("to-megatron")
def to_megatron(
    checkpoint: Path = CHECKPOINT,
    out: Path = typer.Argument(metavar="OUT", help="The folder to write, for --load; it must not be there."),
    dtype: str | None = DTYPE,
) -> None:
    """Write a checkpoint that Megatron-LM starts from, and print the options that its script needs for the model."""
    from ..errors import user_errors

    with user_errors():
        from ..conversion.report import print_for_megatron
        from ..conversion.to_hf import parse_dtype
        from ..conversion.to_megatron import convert_to_megatron

        print_for_megatron(convert_to_megatron(checkpoint, out, parse_dtype(dtype)), out)


@app.command()
def check(
    folder: Path = HF_DIR,
    checkpoint: Path = CHECKPOINT,
    tokens: Path | None = typer.Option(None, help="A file of token ids, separated by blanks; unless given, 64 at random."),
    reference: Path | None = typer.Option(
        None, help="A safetensors file that --write-reference has written: transformers is then not needed."
    ),
    write_reference: Path | None = typer.Option(None, help="Where to write what transformers computed."),
    tolerance: float = typer.Option(1e-4, min=0.0, help="Largest difference over the largest value that is allowed."),
    json: Path | None = typer.Option(None, help="Where to write the errors that the table has."),
) -> None:
    """Compare logits, loss, auxiliary loss and every gradient with transformers, in fp32."""
    from ..errors import user_errors

    with user_errors():
        from ..conversion.check import check_conversion

        check_conversion(folder, checkpoint, tokens, reference, write_reference, tolerance, json)
