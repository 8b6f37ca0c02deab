"""How measurements look: numbers with units, and a table of strategies by state size."""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from ...parallel.links import STRATEGIES, Link

console = Console(highlight=False)


class Cell(NamedTuple):
    """One strategy at one state size."""

    time: str
    sent: int
    """Bytes, of the rank that sends most."""
    rounds: int
    marks: list[str]
    """Such as `fastest`."""

    def __str__(self) -> str:
        lines = [self.time, f"{size(self.sent)} in {self.rounds}", ", ".join(self.marks)]
        return "\n".join([f"[bold green]{line}[/]" for line in lines] if self.marks else lines)


def strategies_table(rows: Iterable[tuple[int, list[Cell | str]]]) -> Table:
    """Rows of a state's bytes and a cell for each strategy."""
    table = Table("state", *STRATEGIES, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for state_bytes, cells in rows:
        table.add_row(size(state_bytes), *map(str, cells))
    return table


def ranges(winners: Iterable[tuple[str, str]]) -> str:
    """(place, winner) in order -> `ring at 2, sliced from 4 to 64`."""
    runs = [(winner, [place for place, _ in run]) for winner, run in groupby(winners, key=lambda pair: pair[1])]
    return ", ".join(
        f"{winner} at {places[0]}" if len(places) == 1 else f"{winner} from {places[0]} to {places[-1]}" for winner, places in runs
    )


def size(number: float) -> str:
    """Bytes: 1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{_digits(number)} {unit}"
        number /= 1024
    return f"{_digits(number)} GiB"


def link(constants: Link) -> str:
    """`15 us a round, 50 GB/s`."""
    return f"{_digits(constants.latency * 1e6)} us a round, {_digits(constants.bandwidth / 1e9)} GB/s"


def milliseconds(time: float) -> str:
    """Of seconds, without the unit."""
    return _digits(time * 1e3)


def _digits(number: float) -> str:
    """Three of them, or all before the point; never an exponent for what is large."""
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
