"""What the cost model says about the exchange on any number of ranks, without any."""

from dataclasses import dataclass

from ...parallel.layout import Layout
from ...parallel.links import DECAY, STRATEGIES, Link, choose, largest_sent, seconds, traffic
from .report import Cell, console, link, milliseconds, ranges, size, strategies_table

SIZES = [2**k for k in range(12, 27)]
"""States from 4 KiB to 64 MiB, among which the fastest strategy changes."""


@dataclass(frozen=True)
class Heads:
    """A Mamba-2 layer's state, fp32."""

    heads: int
    head_dim: int
    state_dim: int

    @property
    def state_bytes(self) -> int:
        """Of one sequence."""
        return self.heads * self.head_dim * self.state_dim * 4

    def decay_bytes(self, state_bytes: int) -> int:
        """Of so many heads of this kind as have a state of that size, at least one."""
        return max(state_bytes // (self.head_dim * self.state_dim * 4), 1) * DECAY


def simulate(layout: Layout, constants: Link, heads: Heads, max_ranks: int) -> None:
    """Prints each strategy's time by state size, and which is fastest by state size and by ranks."""
    sizes = sorted({2**k for k in range(16, 25, 2)} | {heads.state_bytes})
    rows = [(state_bytes, _cells(layout, constants, state_bytes, heads.decay_bytes(state_bytes))) for state_bytes in sizes]
    console.print(f"Simulated: {layout.ranks} ranks, {layout.kind}, {link(constants)}")
    console.print("Time, and the bytes that a rank sends in how many rounds, in one direction")
    console.print(strategies_table(rows))
    by_size = [(size(s), choose(layout, s, heads.decay_bytes(s), constants)) for s in SIZES]
    console.print(f"By state size, {layout.ranks} ranks: {ranges(by_size)}.")
    degrees = sorted({2**k for k in range(1, max_ranks.bit_length())} | {layout.ranks, max_ranks})
    given = heads.state_bytes, heads.decay_bytes(heads.state_bytes), constants
    by_ranks = [(str(R), choose(Layout(layout.kind, R), *given)) for R in degrees]
    what = f"{heads.heads} heads of {heads.head_dim} x {heads.state_dim} ({size(heads.state_bytes)})"
    console.print(f"By ranks, {what}: {ranges(by_ranks)}.")


def _cells(layout: Layout, constants: Link, state_bytes: int, decay_bytes: int) -> list[Cell | str]:
    fastest = choose(layout, state_bytes, decay_bytes, constants)
    cells: list[Cell | str] = []
    for strategy in STRATEGIES:
        given = strategy, layout, state_bytes, decay_bytes
        marks = ["fastest"] if strategy == fastest else []
        time = f"{milliseconds(seconds(*given, constants))} ms"
        cells.append(Cell(time, largest_sent(*given), len(traffic(*given)), marks))
    return cells
