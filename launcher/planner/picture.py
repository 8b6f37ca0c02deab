"""Time against length: of each kind of layer, and which way of passing keys and states on is the fastest where."""

from pathlib import Path
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import Config
from ...models.traffic import EXCHANGE as MESSAGES
from ...models.workload import Workload
from ...parallel.layout import Layout
from ...parallel.links import seconds
from ..training.metrics import pyplot
from .cost import part_cost
from .estimate import Estimator
from .machine import Machine

LENGTHS = [2**k for k in range(12, 21)]
"""4K to 1M tokens."""
RANKS = [2**k for k in range(1, 9)]
"""Of cp, 2 to 256."""
STATES = [2**k for k in range(10, 27, 2)]
"""Bytes of a segment's states, 1 KiB to 64 MiB."""
HEAD_STATE = 64 * 128 * 4
"""Bytes of a head's state, to each of which a decay of 4 bytes belongs."""
ATTENTION = {"ulysses": "tab:orange", "usp": "tab:red", "ring": "tab:blue", "allgather": "tab:green"}
EXCHANGE = {"ring": "tab:blue", "allgather": "tab:green", "doubling": "tab:purple", "sliced": "tab:orange"}


def draw(path: Path, config: Config, machine: Machine) -> None:
    """Writes three panels for a config's layers on a machine's GPUs and links, of one sequence a rank of dp."""
    estimator, plt = Estimator(config, machine), pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(16, 4.8), dpi=110, layout="constrained")
    _draw_layers(panels[0], estimator)
    _draw_winners(panels[1], "attention over cp", LENGTHS, "tokens of context", ATTENTION, _attention_times(estimator))
    _draw_winners(panels[2], "boundary states over cp", STATES, "bytes of a segment's states", EXCHANGE, _state_times(machine))
    rates = "measured" if machine.calibrated else "assumed, not measured"
    figure.suptitle(f"layers of d_model {config.model.d_model} on {machine.name}, {machine.per_node} a node; rates {rates}")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    plt.close(figure)


def _workload(estimator: Estimator, context: int, cp: int, **parallel: Any) -> Workload:
    values = {
        "tp": 1,
        "cp": cp,
        "dp": 1,
        "pp": 1,
        "ep": 1,
        "layout": "zigzag",
        "strategy": "sliced",
        "attention": "ring",
    } | parallel
    config = estimator.config
    data = config.data.model_copy(update={"context": context})
    batch = config.batch.model_copy(update={"sequences": 1, "micro_steps": 1})
    mesh = config.parallel.model_copy(update=values)
    return estimator.workload(config.model_copy(update={"data": data, "batch": batch, "parallel": mesh}))


def _seconds(estimator: Estimator, kind: str, w: Workload) -> float:
    cost = part_cost(kind, w, estimator.machine)
    return sum(cost.forward.values()) + sum(cost.backward.values())


def _draw_layers(panel: Any, estimator: Estimator) -> None:
    """Microseconds of a token in a mixer or feed-forward, forward and backward, on one GPU that has the whole sequence."""
    kinds = dict.fromkeys(kind for layer in estimator.config.model.layers for kind in layer if kind is not None)
    for kind in kinds:
        times = [_seconds(estimator, kind, _workload(estimator, length, 1)) / length * 1e6 for length in LENGTHS]
        panel.plot(LENGTHS, times, "o-", label=kind)
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of context",
        ylabel="us a token, forward and backward",
        title="one layer, one GPU",
    )
    panel.set_xticks(LENGTHS[::2], [_short(length) for length in LENGTHS[::2]])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend()


def _attention_times(estimator: Estimator) -> dict[tuple[int, int], dict[str, float]]:
    """Seconds by way, for each length and number of ranks that it cuts into."""
    heads = estimator.config.model.attention.heads
    return {
        (length, ranks): {
            name: _seconds(estimator, "attention", _workload(estimator, length, ranks, attention=name))
            for name in ATTENTION
            if name != "ulysses" or heads % ranks == 0
        }
        for length in LENGTHS
        for ranks in RANKS
    }


def _state_times(machine: Machine) -> dict[tuple[int, int], dict[str, float]]:
    """Seconds of one exchange by way, for each size of a segment's states and number of ranks."""

    def exchange(name: str, size: int, ranks: int) -> float:
        link = machine.link(1, ranks, MESSAGES[name])
        return seconds(name, Layout("zigzag", ranks), size, 4 * max(1, size // HEAD_STATE), link)

    return {(size, ranks): {name: exchange(name, size, ranks) for name in EXCHANGE} for size in STATES for ranks in RANKS}


def _draw_winners(
    panel: Any, title: str, across: list[int], label: str, colors: dict[str, str], times: dict[tuple[int, int], dict[str, float]]
) -> None:
    """A square for each place and number of ranks in the color of the fastest, with how much longer the slowest takes."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = [*colors]
    winners = np.array([[names.index(min(times[x, r], key=times[x, r].__getitem__)) for x in across] for r in RANKS])
    panel.imshow(winners, cmap=ListedColormap([*colors.values()]), vmin=-0.5, vmax=len(names) - 0.5, origin="lower", aspect="auto")
    for row, ranks in enumerate(RANKS):
        for column, x in enumerate(across):
            ratio = max(times[x, ranks].values()) / min(times[x, ranks].values())
            panel.text(column, row, f"{ratio:.{0 if ratio >= 9.95 else 1}f}", ha="center", va="center", fontsize=8, color="white")
    panel.set(xlabel=label, ylabel="ranks of cp", title=f"{title}: the fastest, and slowest / fastest")
    panel.set_xticks(range(0, len(across), 2), [_short(x) for x in across[::2]])
    panel.set_yticks(range(len(RANKS)), RANKS)
    patches = [Patch(color=color, label=name) for name, color in colors.items()]
    panel.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=len(patches), frameon=False)


def _short(number: int) -> str:
    """4096 -> `4K`."""
    for unit in ("", "K", "M"):
        if number < 1024:
            return f"{number}{unit}"
        number //= 1024
    return f"{number}G"
