"""`baton plan`: the mesh, the memory and the time of a run before it is submitted."""

from pathlib import Path

import typer

from .train import CONFIG

OVERRIDES = typer.Argument(
    [],
    help="Values in place of the file's: dotted.key=value. Those of parallel, and batch.micro_steps, are kept; others are chosen.",
)


def plan(
    config: str = CONFIG,
    overrides: list[str] = OVERRIDES,
    gpus: int = typer.Option(8, min=1, help="GPUs of the job."),
    gpu: str = typer.Option("h200", help="a100, h100, h200, b200, mi300x; or cpu, once it is measured."),
    nodes: int | None = typer.Option(None, min=1, help="Nodes that the GPUs are on; as many as they fill unless given."),
    link: str = typer.Option(
        "ib_ndr", help="Between nodes, a port for each GPU: ib_hdr, ib_ndr, ib_xdr, roce_200, roce_400, ethernet_100."
    ),
    context: int | None = typer.Option(None, min=1, help="Tokens of a sequence; a step has about as many tokens as the file's."),
    explain: int | None = typer.Option(None, min=1, help="Show the arithmetic of the plan of this number."),
    write: Path | None = typer.Option(None, help="Where the best plan's config goes, to train with; a new file."),
    json: Path | None = typer.Option(None, help="Where all numbers go."),
    rates: Path | None = typer.Option(None, help="Measured rates; runs/rates.yaml, where that is, unless given."),
    calibrate: bool = typer.Option(
        False, "--calibrate", help="First measure this machine's rates and links, for this and later plans."
    ),
    draw: Path | None = typer.Option(None, help="Where a picture of time against length goes (.svg or .png)."),
) -> None:
    """Choose the mesh: every one that the config allows is counted through, memory, traffic and time; no GPU is needed.

    What the config's own parallel section says is not kept, but for transport and links; overrides are.
    """
    from ..errors import user_errors

    with user_errors():
        from ..planner.run import Asked, run_plan

        run_plan(Asked(config, overrides, gpus, gpu, nodes, link, context, explain, write, json, rates, calibrate, draw))
