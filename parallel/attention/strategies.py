"""The ways in which queries and keys on different ranks meet, what each puts on the wire, and which is the fastest.

allgather   every rank receives all keys and values                                           (Llama 3, arXiv 2407.21783)
ring        keys and values go from rank to rank, the next ones while these are computed     (Ring Attention, arXiv 2310.01889)
ulysses     all-to-all: every rank gets all tokens of some heads, and back                    (DeepSpeed Ulysses, arXiv 2309.14509)
usp         Ulysses within groups of u neighbouring ranks, a ring over the R / u groups      (USP, arXiv 2405.07719)

ulysses is usp with u = R, and ring with u = 1.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args

from ...kernels.attention import Span, area, cut
from ..layout import Layout

Strategy = Literal["allgather", "ring", "ulysses", "usp"]

ATTENTION_FLOPS = {"cpu": 6e10, "cuda": 3e14}
"""FLOP/s that a rank is taken to attain in attention, by device type; it decides whether a ring hides behind the computation.

cpu: measured, one core, fp32, 4 heads of 32. cuda: not measured here; an H100 in bf16 as in arXiv 2407.08608.
"""


BACKWARD_PRODUCTS = 2.5
"""Products of matrices in backward for one in forward: five, of which one computes scores again, for two."""


class LinkCost(Protocol):
    """What joins the ranks: seconds a round, bytes per second that a rank sends."""

    @property
    def latency(self) -> float: ...
    @property
    def bandwidth(self) -> float: ...


def ulysses_degree(strategy: Strategy, ranks: int, heads: int, degree: int | None = None) -> int:
    """u: how many neighbouring ranks share the heads of this tp rank out; the largest that fits for usp, unless `degree` says.

    Raises ValueError where the heads do not divide, with what is allowed.
    """
    if strategy == "usp" and degree is None:
        return math.gcd(heads, ranks)
    u = {"ulysses": ranks, "usp": degree}.get(strategy) or 1
    if heads % u or ranks % u:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        allowed = f"usp, ring, allgather, or cp of {fits}" if strategy == "ulysses" else f"a divisor of {math.gcd(heads, ranks)}"
        raise ValueError(f"{strategy} over {u} of cp {ranks}: {heads} heads (of a tp rank) do not divide; allowed: {allowed}")
    return u


def ring_spans(layout: Layout, u: int, length: int) -> list[tuple[Span, ...]]:
    """For each u neighbouring ranks the tokens of the sequence that they hold together: ascending, adjoining segments as one span.

    Raises ValueError as `Layout.check`.
    """
    run = layout.check(length)
    groups: list[list[list[int]]] = [[] for _ in range(layout.ranks // u)]
    for segment, owner in enumerate(layout.owners):
        spans = groups[owner // u]
        if spans and spans[-1][1] == segment * run:
            spans[-1][1] += run
        else:
            spans.append([segment * run, (segment + 1) * run])
    return [tuple((start, stop) for start, stop in spans) for spans in groups]


def work(
    strategy: Strategy,
    layout: Layout,
    rank: int,
    length: int,
    heads: int,
    rows: Sequence[Sequence[int]] | None = None,
    degree: int | None = None,
) -> int:
    """Pairs of query and key that a rank computes in forward, over its heads and the rows of the batch.

    length: of the whole sequence; rows: the boundaries [0, ..., length] of each row's documents, one row of one document if None.
    """
    u = ulysses_degree(strategy, layout.ranks, heads, degree)
    spans = ring_spans(layout, u, length)
    lots = [((0, length),)] if strategy == "allgather" else spans
    return heads // u * sum(area(cut(spans[rank // u], lot, rows or [(0, length)])) for lot in lots)


def attention_traffic(
    strategy: Strategy,
    layout: Layout,
    b: int,
    l: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bytes_per_element: int,
    degree: int | None = None,
    backward: bool = False,
) -> tuple[int, int]:
    """Rounds of one direction, and the bytes that a rank sends in them. l: tokens on a rank; heads: of a tp rank.

    Backward fetches keys and values once more, and brings their gradients home in fp32 at least. Raises ValueError.
    """
    sent = _traffic(strategy, layout, b, l, heads, kv_heads, head_dim, bytes_per_element, degree)
    rounds = min(sent.blocks, 1) if strategy == "allgather" else sent.blocks
    total = sent.blocks * sent.block + sent.dealt
    if backward and sent.blocks:
        # A ring's gradients go one step more than the blocks, home.
        rounds += 1 if strategy == "allgather" else sent.blocks + 1
        total += (sent.blocks if strategy == "allgather" else sent.blocks + 1) * sent.gradient
    return rounds + (2 if sent.dealt else 0), total


def attention_seconds(
    strategy: Strategy,
    layout: Layout,
    b: int,
    l: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bytes_per_element: int,
    link: LinkCost,
    flops: float,
    backward: bool = False,
    deal: LinkCost | None = None,
) -> float:
    """One direction of one layer on the slowest rank, for single documents: a round costs latency + bytes / bandwidth.

    A ring's rounds hide behind the computation as far as that lasts (`flops`: FLOP/s that a rank attains), except the first,
    in which the ranks come together and which counts in full; no other round hides. Backward computes 2.5 times as much.
    deal: what joins the ranks that exchange heads, where that is another link.
    """
    sent = _traffic(strategy, layout, b, l, heads, kv_heads, head_dim, bytes_per_element, None)
    u = ulysses_degree(strategy, layout.ranks, heads)
    computation = 4 * head_dim * b * (heads // u) * _slowest_pairs(layout, u, l * layout.ranks) / flops
    dealing = deal or link
    exposed = 2 * dealing.latency + sent.dealt / dealing.bandwidth if sent.dealt else 0.0
    block, gradient = (link.latency + size / link.bandwidth for size in (sent.block, sent.gradient))
    if backward:
        computation *= BACKWARD_PRODUCTS
    if not sent.blocks:
        return exposed + computation
    if strategy == "allgather":
        fetched = link.latency + sent.blocks * sent.block / link.bandwidth
        returned = link.latency + sent.blocks * sent.gradient / link.bandwidth if backward else 0.0
        return exposed + fetched + computation + returned
    if backward:
        # Gradients follow one step behind the blocks, the last of them with nothing left to hide behind.
        return exposed + block + max(computation, (sent.blocks - 1) * block + sent.blocks * gradient) + gradient
    return exposed + block + max(computation, (sent.blocks - 1) * block)


def choose_attention(
    layout: Layout,
    b: int,
    l: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bytes_per_element: int,
    link: LinkCost,
    flops: float,
) -> Strategy:
    """The strategy with the least `attention_seconds` among those that fit; memory is not counted."""
    seconds: dict[Strategy, float] = {}
    for strategy in get_args(Strategy):
        if strategy != "ulysses" or heads % layout.ranks == 0:
            seconds[strategy] = attention_seconds(strategy, layout, b, l, heads, kv_heads, head_dim, bytes_per_element, link, flops)
    return min(seconds, key=seconds.__getitem__)


class _Sent(NamedTuple):
    """What a rank sends in one direction."""

    blocks: int
    """Of keys and values, to others."""
    block: int
    """Bytes of one."""
    gradient: int
    """Bytes of its gradient."""
    dealt: int
    """Bytes of the two all-to-alls."""


def _traffic(
    strategy: Strategy, layout: Layout, b: int, l: int, heads: int, kv_heads: int, head_dim: int, size: int, degree: int | None
) -> _Sent:
    u = ulysses_degree(strategy, layout.ranks, heads, degree)
    held = math.lcm(kv_heads, u) // u
    """Key heads on a rank after the all-to-all."""
    token = b * l * head_dim
    numbers = u * token * 2 * held
    dealt = (u - 1) * token * size * (2 * (heads // u) + 2 * held)
    return _Sent(layout.ranks // u - 1, numbers * size, numbers * max(4, size), dealt)


@functools.lru_cache(256)
def _slowest_pairs(layout: Layout, u: int, length: int) -> int:
    """Pairs of query and key on the rank that has most: a query at place p sees p + 1 keys."""
    spans = ring_spans(layout, u, length)
    return max(sum((stop * (stop + 1) - start * (start + 1)) // 2 for start, stop in own) for own in spans)
