"""Element-wise work in PyTorch by blocks of rows that stay in a processor's cache."""

from collections.abc import Iterator

BLOCK = 1 << 17
"""Numbers of a block of one tensor."""


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Of rows that have `width` numbers each."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
