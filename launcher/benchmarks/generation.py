"""Generation by the prompt's length: how fast prompts are read and tokens follow, and what the state takes."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ...configs.schema import Config
from ...kernels import dispatch
from ...models.generation import generate, greedy, new_state, read
from ...models.hybrid import HybridModel, initialize_part
from ...models.parallelize import build_replica
from ...parallel.mesh import build_mesh
from ..files import whole_file
from ..training.metrics import pyplot
from .machine import cpu_name, write_rows
from .report import console, size

WARM_UP = 64
"""Tokens of a prompt, and after it, that are not measured."""


@dataclass
class Measurement:
    """One length of a prompt; one sequence."""

    tokens: int
    read_tokens_per_second: float
    written_tokens_per_second: float
    """After the first, which reading the prompt gives."""
    state_bytes: int
    """Of Mamba layers."""
    cache_bytes: int
    """Of attention layers' keys and values, at the end."""


def bench_generation(
    config: Config, lengths: list[int], new: int, chunk: int, device: torch.device, file: Path | None, plot: Path | None
) -> None:
    """Prints a table, and writes it as JSON and as a plot. Raises UserError."""
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pattern": config.model.pattern * config.model.repeat,
        "precision": config.precision,
        "chunk": chunk,
    }
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), soft_wrap=True)
    model = _build(config, device)
    model = _build(config, device)
    _measure(model, WARM_UP, WARM_UP, chunk, device)
    measured = []
    for length in lengths:
        measured.append(_measure(model, length, new, chunk, device))
    console.print(table(measured))
    if file is not None:
        write_rows(file, [asdict(each) | machine for each in measured])
    if plot is not None:
        draw(measured, str(machine["pattern"]), plot)


def _build(config: Config, device: torch.device) -> HybridModel:
    """The config's model, filled as it begins."""
    dispatch.choose(config.kernels, config.norms)
    model = build_replica(config, build_mesh(config.parallel, device.type), device)
    for name, part in model.parts().items():
        initialize_part(part, name, config.model, config.seed)
    return model


def _measure(model: HybridModel, length: int, new: int, chunk: int, device: torch.device) -> Measurement:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
    state = new_state(model, length + new)
    begun = perf_counter()
    following = generate(model, read(model, ids, state, chunk), new, greedy)
    # The host looks at each token, as it does where tokens are printed.
    times = [_moment(next(following))]
    times += [_moment(token) for token in following]
    return Measurement(
        length,
        length / (times[0] - begun),
        (new - 1) / (times[-1] - times[0]),
        state.recurrent_bytes,
        state.cache_bytes,
    )


def _moment(token: Tensor) -> float:
    """When it is known on the host."""
    token.tolist()
    return perf_counter()


def table(measured: list[Measurement]) -> Table:
    """A row for each length."""
    shown = Table("prompt", "read tok/s", "written tok/s", "states", "keys, values", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for each in measured:
        speeds = f"{each.read_tokens_per_second:.0f}", f"{each.written_tokens_per_second:.1f}"
        shown.add_row(str(each.tokens), *speeds, size(each.state_bytes), size(each.cache_bytes))
    return shown


def draw(measured: list[Measurement], pattern: str, file: Path) -> None:
    """Draws speeds and bytes over the prompt's length. Raises UserError."""
    plt = pyplot()
    lengths = [each.tokens for each in measured]
    figure, (speeds, sizes) = plt.subplots(1, 2, figsize=(10, 4), dpi=120, layout="constrained")
    _curve(speeds, lengths, [each.read_tokens_per_second for each in measured], "prompt, read")
    _curve(speeds, lengths, [each.written_tokens_per_second for each in measured], "continuation, written")
    _curve(sizes, lengths, [each.state_bytes / 2**20 for each in measured], "states of Mamba layers")
    _curve(sizes, lengths, [each.cache_bytes / 2**20 for each in measured], "keys and values of attention")
    for panel, label in ((speeds, "tokens/s"), (sizes, "MiB")):
        panel.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel=label)
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
        low, high = panel.get_ylim()
        # Whole decades, so that both axes have numbers at their ends.
        panel.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"Generation by {pattern}")
    with whole_file(file, "--plot") as unfinished:
        figure.savefig(unfinished)
    plt.close(figure)


def _curve(panel: Any, lengths: list[int], values: list[float], label: str) -> None:
    """Unless there is nothing of it, which a logarithm does not show."""
    if any(values):
        panel.plot(lengths, values, "o-", label=label)
