"""Attention over ranks against each document alone, softmax written out in fp64, every gradient too; traffic, work and choice."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from baton.kernels.attention import flash_cpu
from baton.parallel.attention import (
    SequenceAttention,
    Strategy,
    attention_seconds,
    attention_traffic,
    choose_attention,
    ulysses_degree,
    work,
)
from baton.parallel.layout import Layout
from baton.parallel.links import Link
from baton.parallel.recorder import record
from helpers import relative_error

E = 4
"""Head dim where nothing is rounded."""


def operands(length, heads, kv_heads, e=E):
    """q, k, v and a gradient of the output of two whole sequences, in fp64."""
    generator = torch.Generator().manual_seed(length + heads)
    shapes = [(2, length, h, e) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def definition(q, k, v, rows):
    """Each document of each row alone."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    out = []
    for b, boundaries in enumerate(rows):
        for start, stop in pairwise(boundaries):
            scores = torch.einsum("ihe,jhe->hij", q[b, start:stop], k[b, start:stop]) / q.shape[-1] ** 0.5
            seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            out.append(torch.einsum("hij,jhe->ihe", scores.masked_fill(~seen, float("-inf")).softmax(-1), v[b, start:stop]))
    return torch.cat(out).view(q.shape)


def outcome(function, q, k, v, dout):
    """The output and the gradients of q, k and v."""
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = function(q, k, v)
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad]


def documents_of(length, run):
    """Two rows: documents of one token, ends exactly on borders of segments and ranks; one document over all ranks."""
    borders = {1, 2, run - 1, run, run + 1, 2 * run, 3 * run + 2, length - run, length - 1}
    return [[0, *sorted(b for b in borders if b < length), length], [0, length]]


def tiny_documents(length):
    """Documents of one, two and three tokens; two long ones around many tiny ones."""
    third = length // 3
    return [[*range(0, length - 1, 2), length], [0, *range(third, 2 * third, 1), *range(2 * third, length - 9, 3), length]]


def attend(rank, layout, cases, dtype=torch.float64, e=E):
    found = []
    for strategy, degree, heads, kv_heads, length, rows in cases:
        documents = layout.documents(rows, rank) if rows else None
        attention = SequenceAttention(layout, dist.group.WORLD, strategy, degree)
        own = [layout.shard(t, rank).to(dtype) for t in operands(length, heads, kv_heads, e)]
        found.append(outcome(lambda q, k, v: attention(q, k, v, documents), *own))  # noqa: B023
    return found


def cases_of(layout, heads, kv_heads, run, rows_of, strategies=get_args(Strategy), degree=None):
    length = run * len(layout.owners)
    rows = rows_of(length) if rows_of else None
    return [(strategy, degree, heads, kv_heads, length, rows) for strategy in strategies]


CASES = {
    # Fewer key heads than ranks; segments of odd lengths; usp as Ulysses in pairs and a ring of pairs (6 heads, 4 ranks: u is 2).
    ("contiguous", 2): [(2, 1, 7, None), (4, 2, 9, lambda n: documents_of(n, 9))],
    ("zigzag", 2): [(4, 1, 5, lambda n: documents_of(n, 5))],
    ("contiguous", 3): [(3, 1, 8, lambda n: documents_of(n, 8)), (6, 2, 5, None)],
    ("zigzag", 3): [(3, 3, 5, None), (6, 2, 4, lambda n: documents_of(n, 4))],
    ("contiguous", 4): [(4, 2, 100, tiny_documents)],
    ("zigzag", 4): [(4, 1, 7, None), (4, 2, 60, tiny_documents), (8, 2, 6, lambda n: documents_of(n, 6))],
    ("zigzag", 8): [(8, 2, 3, lambda n: documents_of(n, 3)), (8, 1, 40, tiny_documents)],
}
"""By layout and world: heads, kv heads, tokens in a segment, boundaries of the documents by length."""

MIXED = {
    ("contiguous", 4): [("usp", None, 6, 3), ("usp", 2, 4, 1)],
    ("zigzag", 4): [("usp", None, 2, 1), ("usp", 2, 4, 4)],
    ("zigzag", 8): [("usp", None, 4, 2), ("usp", 2, 8, 2), ("usp", None, 12, 3)],
}
"""Ulysses in groups smaller than the world: strategy, degree, heads, kv heads."""


@pytest.mark.parametrize(("kind", "world"), CASES)
def test_every_strategy_is_the_definition(pool, kind, world):
    layout = Layout(kind, world)
    cases = [case for sizes in CASES[kind, world] for case in cases_of(layout, *sizes)]
    for strategy, degree, heads, kv_heads in MIXED.get((kind, world), []):
        cases += cases_of(layout, heads, kv_heads, 5, lambda n: documents_of(n, 5), [strategy], degree)
    ranks = pool.run(world, attend, layout, cases)
    for i, (*_, heads, kv_heads, length, rows) in enumerate(cases):
        whole = operands(length, heads, kv_heads)
        expected = outcome(lambda q, k, v: definition(q, k, v, rows or [[0, length]] * 2), *whole)  # noqa: B023
        for rank, found in enumerate(ranks):
            for one, other in zip(found[i], expected, strict=True):
                assert relative_error(one, layout.shard(other, rank)) <= 1e-12, cases[i][:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_one_device(pool, dtype):
    """On heads of a usual kind: with head dim 4 the largest error of bf16 is one number's luck."""
    layout, length, e = Layout("zigzag", 4), 512, 16
    whole = [t.to(dtype) for t in operands(length, 4, 2, e)]
    cases = cases_of(layout, 4, 2, length // 8, None) + cases_of(layout, 4, 2, length // 8, None, ["usp"], 2)
    exact = outcome(lambda *qkv: definition(*qkv, [[0, length]] * 2), *(t.double() for t in whole))
    alone = outcome(plain_sdpa, *whole)
    ranks = pool.run(4, attend, layout, cases, dtype, e)
    for i, case in enumerate(cases):
        for parts, truth, one in zip(zip(*(found[i] for found in ranks), strict=True), exact, alone, strict=True):
            assert all(part.dtype == dtype for part in parts)
            together = torch.cat(parts, 1)[:, torch.cat([layout.positions(rank, length) for rank in range(4)]).argsort()]
            assert relative_error(together, truth) <= max(2 * relative_error(one, truth), 1e-5), case


def plain_sdpa(*qkv):
    heads = (t.transpose(1, 2) for t in qkv)
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


def count(rank, layout, cases):
    found = []
    for strategy, degree, heads, kv_heads, length, _ in cases:
        own = [layout.shard(t, rank).float() for t in operands(length, heads, kv_heads)[:3]]
        with record() as traffic:
            SequenceAttention(layout, dist.group.WORLD, strategy, degree)(*own)
        found.append((traffic.rounds, traffic.sent))
    return found


@pytest.mark.parametrize(("kind", "world"), [("contiguous", 4), ("zigzag", 8)])
def test_traffic_is_as_stated(pool, kind, world):
    layout = Layout(kind, world)
    cases = cases_of(layout, 8, 2, 3, None) + cases_of(layout, 8, 1, 3, None) + cases_of(layout, 8, 2, 3, None, ["usp"], 2)
    stated = [
        attention_traffic(strategy, layout, 2, length // world, heads, kv_heads, E, 4, degree)
        for strategy, degree, heads, kv_heads, length, _ in cases
    ]
    for found in pool.run(world, count, layout, cases):
        assert found == stated


def test_traffic_by_hand():
    layout = Layout("zigzag", 8)
    token = 2 * 5 * 16 * 2
    assert attention_traffic("ring", layout, 2, 5, 32, 4, 16, 2) == (7, 7 * token * 8)
    assert attention_traffic("allgather", layout, 2, 5, 32, 4, 16, 2) == (1, 7 * token * 8)
    assert attention_traffic("ulysses", layout, 2, 5, 32, 4, 16, 2) == (2, 7 * token * (4 + 2 + 4))
    assert attention_traffic("usp", layout, 2, 5, 32, 4, 16, 2, degree=4) == (3, token * (3 * (8 + 2 + 8) + 4 * 2))


def order(rank, layout):
    """What a rank does under ring, in forward and backward."""
    log = []
    send, compute, gradients = dist.batch_isend_irecv, flash_cpu.forward, flash_cpu.backward

    def logged(name, function):
        return lambda *args: log.append(name) or function(*args)

    dist.batch_isend_irecv = logged("send", send)
    flash_cpu.forward, flash_cpu.backward = logged("forward", compute), logged("backward", gradients)
    try:
        attend(rank, layout, [("ring", None, 2, 1, 24, None)])
    finally:
        dist.batch_isend_irecv, flash_cpu.forward, flash_cpu.backward = send, compute, gradients
    return log


def test_the_next_block_travels_while_one_is_computed(pool):
    """Each block is on its way before the one at hand is worked on; gradients follow one step behind and come home."""
    expected = ["send", "forward"] * 2 + ["forward"] + ["send", "backward", "send"] * 2 + ["backward", "send"]
    assert pool.run(3, order, Layout("zigzag", 3)) == [expected] * 3


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_work_is_even_under_zigzag(strategy):
    zigzag, contiguous = (
        [work(strategy, Layout(kind, 8), rank, 1024, 8) for rank in range(8)] for kind in ("zigzag", "contiguous")
    )
    assert sum(zigzag) == sum(contiguous) == 8 * 1024 * 1025 // 2
    assert max(zigzag) <= 1.05 * sum(zigzag) / 8
    if strategy in ("ring", "allgather"):
        assert max(contiguous) > 1.8 * sum(contiguous) / 8


def test_work_skips_other_documents():
    rows = [[0, 100, 101, 512, 1024], [0, 1024]]
    pairs = sum((stop - start) * (stop - start + 1) // 2 for row in rows for start, stop in pairwise(row))
    for strategy in get_args(Strategy):
        assert sum(work(strategy, Layout("zigzag", 4), rank, 1024, 4, rows) for rank in range(4)) == 4 * pairs


def refuse(rank):
    layout = Layout("zigzag", 2)
    q, k, v, _ = operands(4, 3, 1)
    with pytest.raises(
        ValueError, match="ulysses over 2 of cp 2: 3 heads .* do not divide; allowed: usp, ring, allgather, or cp of 1, 3"
    ):
        SequenceAttention(layout, dist.group.WORLD, "ulysses")(q, k, v)
    with pytest.raises(ValueError, match=r"documents end at \[4, 4\], allowed: 8 for each of 2 sequences"):
        SequenceAttention(layout, dist.group.WORLD, "ring")(q, k, v, layout.documents([[0, 4], [0, 4]], rank))
    with pytest.raises(ValueError, match="6 tokens do not cut into 4 equal segments"):
        SequenceAttention(layout, dist.group.WORLD, "ring")(q[:, 1:], k[:, 1:], v[:, 1:])


def test_what_does_not_fit_is_refused(pool):
    pool.run(2, refuse)
    with pytest.raises(ValueError, match="usp over 3 of cp 4: 6 heads .* allowed: a divisor of 2"):
        ulysses_degree("usp", 4, 6, 3)


def test_choice_is_the_cheapest():
    sizes = {"b": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "bytes_per_element": 2, "flops": 3e14}
    for kind, ranks in (("contiguous", 4), ("zigzag", 64), ("zigzag", 24), ("zigzag", 512)):
        for l in (64, 4096, 65536):
            for link in (Link(15e-6, 50e9), Link(1e-3, 1e9)):
                layout = Layout(kind, ranks)
                fitting = [s for s in get_args(Strategy) if s != "ulysses" or 32 % ranks == 0]
                seconds = {s: attention_seconds(s, layout, l=l, link=link, **sizes) for s in fitting}
                chosen = choose_attention(layout, l=l, link=link, **sizes)
                assert seconds[chosen] == min(seconds.values())


def test_choice_by_heads_ranks_and_length():
    sizes = {"b": 1, "kv_heads": 8, "head_dim": 128, "bytes_per_element": 2, "link": Link(15e-6, 50e9), "flops": 3e14}
    assert choose_attention(Layout("zigzag", 8), l=65536, heads=32, **sizes) == "ring"
    assert choose_attention(Layout("contiguous", 8), l=65536, heads=32, **sizes) == "ulysses"
    assert choose_attention(Layout("contiguous", 8), l=65536, heads=36, **sizes) == "usp"
    assert choose_attention(Layout("zigzag", 8), l=16, heads=32, **sizes) == "allgather"
