"""Causal attention within documents as a list of rectangles and triangles of the L x L matrix, so that no mask is ever needed."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Span = tuple[int, int]
"""A run of tokens of a sequence: its first place, and the place after its last."""


class Piece(NamedTuple):
    """A run of queries and the run of keys that they see: all; or, if causal, the first 1, 2, ... in two runs of one length."""

    queries: slice
    keys: slice
    causal: bool


def cut(queries: Sequence[Span], keys: Sequence[Span], rows: Iterable[Sequence[int]]) -> list[Piece]:
    """The pieces of one rank's queries and some rank's keys, without those that no query sees.

    queries, keys: the spans of the sequence that each tensor holds, ascending, one after another, alike for all rows of the batch.
    rows: of each row the boundaries [0, ..., L] of its documents. A piece's runs are of tensors whose rows lie one after another.
    """
    pieces: list[Piece] = []
    for row, boundaries in enumerate(rows):
        for query_place, query_span in _places(queries, row):
            for key_place, key_span in _places(keys, row):
                for piece in _cut_spans(query_span, key_span, boundaries):
                    pieces.append(_moved(piece, query_place - query_span[0], key_place - key_span[0]))
    return pieces


def area(pieces: Iterable[Piece]) -> int:
    """The pairs of query and key: what the work is proportional to."""
    total = 0
    for queries, keys, causal in pieces:
        n, m = queries.stop - queries.start, keys.stop - keys.start
        total += n * (n + 1) // 2 if causal else n * m
    return total


def _places(spans: Sequence[Span], row: int) -> Iterator[tuple[int, Span]]:
    """Where in a tensor each span of a row begins."""
    place = row * sum(stop - start for start, stop in spans)
    for start, stop in spans:
        yield place, (start, stop)
        place += stop - start


def _cut_spans(queries: Span, keys: Span, boundaries: Sequence[int]) -> Iterator[Piece]:
    """The pieces of two spans, in places of the sequence."""
    last = min(queries[1], keys[1])
    for i in range(bisect_right(boundaries, max(queries[0], keys[0])) - 1, len(boundaries) - 1):
        start, stop = boundaries[i], boundaries[i + 1]
        if start >= last:
            return
        yield from _cut_document((max(start, queries[0]), min(stop, queries[1])), (max(start, keys[0]), min(stop, keys[1])))


def _cut_document(queries: Span, keys: Span) -> Iterator[Piece]:
    """Two spans of one document: a rectangle with what is before the queries; where the spans overlap a triangle, and the rest."""
    before = keys[0], min(keys[1], queries[0])
    if before[0] < before[1]:
        yield Piece(slice(*queries), slice(*before), causal=False)
    shared = max(keys[0], queries[0]), min(keys[1], queries[1])
    if shared[0] < shared[1]:
        yield Piece(slice(*shared), slice(*shared), causal=True)
        if shared[1] < queries[1]:
            yield Piece(slice(shared[1], queries[1]), slice(*shared), causal=False)


def _moved(piece: Piece, queries: int, keys: int) -> Piece:
    return Piece(
        slice(piece.queries.start + queries, piece.queries.stop + queries),
        slice(piece.keys.start + keys, piece.keys.stop + keys),
        piece.causal,
    )
