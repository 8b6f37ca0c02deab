"""`baton bench`: measures what the machine gives."""

import os
from pathlib import Path
from typing import Any, NoReturn

import typer

app = typer.Typer(help="Measure what the machine gives.", no_args_is_help=True)
LINKS = Path("runs/links.yaml")


@app.callback()
def _root() -> None:
    pass


@app.command()
def exchange(
    nproc: int | None = typer.Option(
        None, help="Worker processes to start here; without it the GPUs, or 2. Ignored under torchrun."
    ),
    layout: str = typer.Option("contiguous", help="contiguous or zigzag: the segments that a rank holds."),
    links: Path | None = typer.Option(None, help=f"Where the measured constants go, for parallel.links; {LINKS} unless given."),
    quick: bool = typer.Option(False, "--quick", help="Fewer and smaller messages."),
    simulate: bool = typer.Option(False, "--simulate", help="Start no processes: what the cost model says."),
    ranks: int | None = typer.Option(None, help="With --simulate: the ranks, 2 to 1024."),
    latency: float | None = typer.Option(None, help="With --simulate: us a round; without it NCCL's default."),
    bandwidth: float | None = typer.Option(None, help="With --simulate: GB/s that a rank sends; without it NCCL's default."),
    heads: int | None = typer.Option(None, help="With --simulate: heads of the state; 128 unless given."),
    head_dim: int | None = typer.Option(None, help="With --simulate: of the state; 64 unless given."),
    state_dim: int | None = typer.Option(None, help="With --simulate: of the state; 128 unless given."),
    max_ranks: int | None = typer.Option(None, help="With --simulate: the ranks to compare up to; 1024 unless given."),
) -> None:
    """Measure the group's latency and bandwidth and each strategy of the state exchange; write what `strategy: auto` reads.

    Under torchrun this process is one of the workers; without it, the workers are started here.
    """
    from ..errors import user_errors

    simulated = {
        "ranks": ranks,
        "latency": latency,
        "bandwidth": bandwidth,
        "heads": heads,
        "head-dim": head_dim,
        "state-dim": state_dim,
        "max-ranks": max_ranks,
    }
    measured = {"nproc": nproc, "links": links, "quick": quick or None}
    with user_errors():
        _check_options(layout, simulate, measured if simulate else simulated)
        if simulate:
            _simulate(layout, {name: value for name, value in simulated.items() if value is not None})
        else:
            _measure(layout, nproc, links or LINKS, quick)


@app.command()
def kernels(
    json: Path | None = typer.Option(None, help="Where the numbers go, anew after each."),
    op: list[str] = typer.Option([], help="An operation, more than once for several; all unless given."),
    tokens: str = typer.Option("", help="Lengths, 8192,32768,131072,262144 unless given."),
    quick: bool = typer.Option(False, "--quick", help="8192 tokens unless given, and three repetitions."),
    peers: Path | None = typer.Option(None, envvar="BATON_PEERS", help="A folder in which mamba_ssm and fla are looked for too."),
    model: bool = typer.Option(False, "--model", help="No device: launches, bytes and FLOPs by counting."),
) -> None:
    """Time every kernel on the GPU, beside PyTorch, mamba_ssm and flash-linear-attention; or count what they move."""
    from ..errors import user_errors

    with user_errors():
        for name, value in {"json": json, "quick": quick or None}.items():
            if model and value is not None:
                _foreign(name, "measures, which --model does not")
        from ..benchmarks.kernel_cases import CASES
        from ..benchmarks.kernel_counts import print_counts
        from ..benchmarks.kernels import LENGTHS, QUICK_LENGTHS, bench_kernels

        names = [_known("op", name, list(CASES)) for name in op] or list(CASES)
        lengths = _lengths(tokens) or (QUICK_LENGTHS if quick else LENGTHS)
        if model:
            print_counts(names, lengths)
        else:
            bench_kernels(names, lengths, quick, peers, json)


@app.command()
def train(
    peer: str = typer.Option(help="hf: Hugging Face's transformers, the only one."),
    model: list[str] = typer.Option([], help="jamba, mamba2 or bamba, more than once for several; all unless given."),
    tokens: str = typer.Option("", help="Lengths, 2048,8192 unless given."),
    json: Path | None = typer.Option(None, help="Where the numbers go at the end."),
    threads: int = typer.Option(1, help="Threads of PyTorch."),
) -> None:
    """Train the same small models with another project's code and with ours, on the CPU: tokens/s and memory side by side."""
    from ..errors import user_errors

    with user_errors():
        _known("peer", peer, ["hf"])
        _check_threads(threads)
        from ..benchmarks.training import LENGTHS, MODELS, bench_training
        from ..files import check_writable

        names = [_known("model", name, list(MODELS)) for name in model] or list(MODELS)
        lengths = _lengths(tokens, least=2) or LENGTHS
        if json is not None:
            check_writable(json)
        bench_training(names, lengths, threads, json)


@app.command()
def generate(
    config: str = typer.Argument("jamba_tiny", help="A YAML file, or the name of a preset: its model, with random weights."),
    overrides: list[str] = typer.Argument([], help="Values in place of the file's: dotted.key=value, such as model.d_model=256."),
    tokens: str = typer.Option("", help="Lengths of prompts, 1024,4096,16384,65536 unless given."),
    max_new: int = typer.Option(32, min=2, help="Tokens after each prompt."),
    chunk: int = typer.Option(8192, min=1, max=2**31, help="Tokens of a prompt that are in work at a time."),
    json: Path | None = typer.Option(None, help="Where the numbers go at the end."),
    plot: Path | None = typer.Option(None, help="Where the plot goes at the end, a .png."),
) -> None:
    """Time the reading of prompts and the tokens after them, and what the state takes, by the prompt's length; on one device."""
    from ..errors import user_errors

    with user_errors():
        from ...configs.errors import UserError
        from ...configs.loading import load_config
        from ..files import check_writable

        lengths = _lengths(tokens) or [1024, 4096, 16384, 65536]
        one_rank = ["parallel={}", "data.documents=single", "batch={}"]
        asked = load_config(config, [*one_rank, *overrides], 1)
        if json is not None:
            check_writable(json)
        if plot is not None:
            check_writable(plot, "--plot")
            if plot.suffix != ".png":
                raise UserError(f"--plot {plot}: allowed: a .png")
        from ..benchmarks.generation import bench_generation
        from ..environment import process_group

        with process_group() as environment:
            bench_generation(asked, lengths, max_new, chunk, environment.device, json, plot)


def _known(option: str, name: str, names: list[str]) -> str:
    from ...configs.errors import UserError

    if name not in names:
        raise UserError(f"--{option} is {name!r}, allowed: {', '.join(names)}")
    return name


def _check_threads(threads: int) -> None:
    from ...configs.errors import UserError

    most = os.cpu_count() or 1
    if not 1 <= threads <= most:
        raise UserError(f"--threads is {threads}, allowed: 1 to {most}")


def _lengths(tokens: str, least: int = 1) -> list[int]:
    from ...configs.errors import UserError

    parts = [part.strip() for part in tokens.split(",")] if tokens else []
    if not all(part.isascii() and part.isdigit() and len(part) < 9 and least <= int(part) <= 2**24 for part in parts):
        raise UserError(
            f"--tokens is {tokens!r}, allowed: numbers from {least} to {2**24} with commas between them, such as 8192,32768"
        )
    return [int(part) for part in parts]


def _foreign(option: str, why: str) -> NoReturn:
    from ...configs.errors import UserError

    raise UserError(f"--{option} {why}")


def _check_options(layout: str, simulate: bool, foreign: dict[str, Any]) -> None:
    from ...configs.errors import UserError

    if layout not in ("contiguous", "zigzag"):
        raise UserError(f"--layout is {layout!r}, allowed: contiguous, zigzag")
    for name, value in foreign.items():
        if value is not None:
            _foreign(name, "measures, which --simulate does not" if simulate else "is of --simulate, which is not given")


def _simulate(layout: str, asked: dict[str, Any]) -> None:
    from ...configs.errors import UserError
    from ...parallel.layout import Layout
    from ...parallel.links import DEFAULTS, Link
    from ..benchmarks.simulation import Heads, simulate

    if "ranks" not in asked:
        raise UserError("--ranks is missing, --simulate needs it; allowed: 2 to 1024")
    for name, value in asked.items():
        least, most = (2, 1024) if name.endswith("ranks") else (0, 1e12)
        if not (least <= value <= most) or value == 0:
            raise UserError(f"--{name} is {value}, allowed: {'2 to 1024' if least else 'more than 0'}")
    default = DEFAULTS["nccl"]
    constants = Link(
        asked["latency"] * 1e-6 if "latency" in asked else default.latency,
        asked["bandwidth"] * 1e9 if "bandwidth" in asked else default.bandwidth,
    )
    state = Heads(asked.get("heads", 128), asked.get("head-dim", 64), asked.get("state-dim", 128))
    simulate(Layout(layout, asked["ranks"]), constants, state, asked.get("max-ranks", 1024))  # type: ignore[arg-type]


def _measure(layout: str, nproc: int | None, links: Path, quick: bool) -> None:
    from ..errors import under_torchrun

    if not under_torchrun():
        _launch(layout, nproc, links, quick)
        return
    from ...configs.errors import UserError
    from ..benchmarks.exchange import bench_exchange
    from ..environment import process_group

    with process_group() as environment:
        if environment.world < 2:
            raise UserError("there is 1 rank, and nothing to exchange; allowed: 2 and more")
        bench_exchange(environment, layout, links, quick)  # type: ignore[arg-type]


def _launch(layout: str, nproc: int | None, links: Path, quick: bool) -> None:
    """Starts the workers, once what can be known before is known."""
    import torch

    from ...configs.errors import UserError
    from ...parallel.links import Links
    from ..environment import launch

    processes = max(torch.cuda.device_count(), 2) if nproc is None else nproc
    if processes < 2:
        raise UserError(f"--nproc is {nproc}, allowed: 2 and more")
    # Also the file as it was: whether it can be written is known before minutes are spent.
    Links(Links.read(links).measured if links.exists() else {}).write(links)
    launch(["bench", "exchange", "--layout", layout, "--links", str(links), *["--quick"] * quick], processes)
