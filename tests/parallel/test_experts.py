"""Rows that travel to experts on other ranks give what one process with them all gives; a capacity keeps the same on any mesh."""

import functools
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from baton.parallel import failures
from baton.parallel.experts import ExpertCapacity, ExpertExchange
from baton.parallel.layout import Layout
from baton.parallel.recorder import record
from helpers import relative_error

D, OUT = 5, 3
"""Elements of a row, and of what an expert makes of it."""

SOME, FEW, NONE, ONE_EXPERT = "some", "few", "none", "one expert"
"""How many rows a rank has for the experts: up to 6 each, one each for about a third, no rows at all, all for the last expert."""

DELAY = 0.3
"""Seconds that a rank is late with each of its messages."""


def counts_of(kind, experts, generator):
    if kind == SOME:
        return torch.randint(7, (experts,), generator=generator)
    if kind == FEW:
        return (torch.rand(experts, generator=generator) < 0.3).long()
    counts = torch.zeros(experts, dtype=torch.int64)
    counts[-1] = 9 if kind == ONE_EXPERT else 0
    return counts


def operands(kinds, experts):
    """Each rank's (rows, weights, counts, weights of the result in the loss), and the experts' matrices [E, OUT, D]."""
    generator = torch.Generator().manual_seed(len(kinds) * experts)
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    ranks = []
    for kind in kinds:
        counts = counts_of(kind, experts, generator)
        r = int(counts.sum())
        ranks.append((normal(r, D), normal(r), counts, normal(r, OUT)))
    return ranks, normal(experts, OUT, D)


def experts_of(rows, weights, counts, matrices):
    """weight * tanh(matrix of the row's expert row), [r, OUT]."""
    chosen = torch.arange(len(matrices)).repeat_interleave(counts)
    return weights[:, None] * torch.einsum("rod,rd->ro", matrices[chosen], rows).tanh()


def subgroup(rank, size):
    """This rank's group of `size` when every (world / size)-th rank is in one, and its number among the groups."""
    stride = dist.get_world_size() // size
    group, _ = dist.new_subgroups_by_enumeration([list(range(i, stride * size, stride)) for i in range(stride)])
    return group, rank % stride


def exchanged(rank, size, cases):
    """For each case (kinds of the world's ranks, experts): the output, and the gradients of rows, weights and local matrices."""
    group, number = subgroup(rank, size)
    place, stride = dist.get_rank(group), dist.get_world_size() // size
    found = []
    for kinds, experts in cases:
        ranks, matrices = operands(kinds[number::stride], experts)
        rows, weights, counts, factor = ranks[place]
        own = matrices.chunk(size)[place].clone().requires_grad_()
        rows.requires_grad_()
        weights.requires_grad_()
        dispatch = ExpertExchange(group, experts).start(rows, weights, counts)
        y = dispatch.send_back(experts_of(*dispatch.wait(), own)).wait()
        (y * factor).sum().backward()
        found.append((y.detach(), rows.grad, weights.grad, own.grad))
    return found


def in_one_process(kinds, experts):
    """The same of all ranks of one group, with the matrices' gradient of all experts."""
    ranks, matrices = operands(kinds, experts)
    matrices.requires_grad_()
    found = []
    for rows, weights, counts, factor in ranks:
        rows.requires_grad_()
        weights.requires_grad_()
        y = experts_of(rows, weights, counts, matrices)
        (y * factor).sum().backward()
        found.append((y.detach(), rows.grad, weights.grad))
    return found, matrices.grad


def same(found, reference):
    """Equal in fp64; what has no elements, or is zero because no row came, exactly."""
    if not reference.any():
        return found.shape == reference.shape and not found.any()
    return relative_error(found, reference) <= 1e-12


CASES = {
    (1, 1): [([SOME], 3)],
    (2, 2): [([SOME, SOME], 2), ([SOME, SOME], 6), ([SOME, FEW], 8), ([NONE, ONE_EXPERT], 4), ([NONE, NONE], 2)],
    (4, 4): [
        ([SOME, SOME, SOME, SOME], 8),
        ([FEW, NONE, SOME, FEW], 4),
        ([ONE_EXPERT, FEW, NONE, ONE_EXPERT], 12),
        ([NONE, NONE, SOME, NONE], 8),
    ],
    (8, 4): [([SOME, NONE, FEW, SOME, SOME, ONE_EXPERT, NONE, SOME], 8), ([SOME] * 8, 4)],
    (8, 8): [([SOME, FEW] * 4, 8), ([FEW] * 8, 16)],
}
"""(world, ranks of a group): the kinds of the world's ranks, and the experts."""


@pytest.mark.parametrize(("world", "size"), CASES)
def test_outputs_and_gradients(pool, world, size):
    cases, stride = CASES[world, size], world // size
    results = pool.run(world, exchanged, size, cases)
    for i, (kinds, experts) in enumerate(cases):
        for number in range(stride):
            reference, d_matrices = in_one_process(kinds[number::stride], experts)
            found = [result[i] for result in results[number::stride]]
            for rank, expected in zip(found, reference, strict=True):
                assert all(same(*pair) for pair in zip(rank[:3], expected, strict=True))
            assert same(torch.cat([rank[3] for rank in found]), d_matrices)


def labelled(rank, counts, dtype):
    """Rows (expert, rank they come from, place there), what arrives, and what returns."""
    chosen = torch.arange(counts.shape[1]).repeat_interleave(counts[rank])
    label = torch.stack([chosen, torch.full_like(chosen, rank), torch.arange(len(chosen))], 1).to(dtype)
    dispatch = ExpertExchange(dist.group.WORLD, counts.shape[1]).start(label, label[:, 2] / 2, counts[rank])
    rows, weights, received = dispatch.wait()
    return label, rows, weights, received, dispatch.send_back(rows).wait()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_order_in_which_rows_come(pool, dtype):
    """By expert, then by source rank, then as there; and back in the order in which they set out: bit by bit."""
    counts = torch.tensor([[2, 0, 3, 1], [1, 5, 0, 2]])
    results = pool.run(2, labelled, counts, dtype)
    everyone = torch.cat([label for label, *_ in results])
    for rank, (label, rows, weights, received, returned) in enumerate(results):
        here = everyone[(everyone[:, 0] // 2) == rank]
        assert rows.dtype == weights.dtype == returned.dtype == dtype
        assert rows.tolist() == sorted(here.tolist())
        assert torch.equal(weights, rows[:, 2] / 2)
        assert torch.equal(received, counts.sum(0)[2 * rank : 2 * rank + 2])
        assert torch.equal(returned, label)


def strided(rank, experts):
    """Found and expected gradients, where neither operands nor results nor incoming gradients are contiguous."""
    counts = torch.arange(experts)
    r = int(counts.sum())
    rows = torch.randn(D, r, dtype=torch.float64).t().requires_grad_()
    weights = torch.randn(r, 2, dtype=torch.float64)[:, 0].requires_grad_()
    exchange = ExpertExchange(dist.group.WORLD, experts)
    x, w, _ = exchange.start(rows, weights, counts).wait()
    # The gradients of sums are one number, expanded.
    d_rows, d_weights = torch.autograd.grad(x.sum() + w.sum(), (rows, weights))
    dispatch = exchange.start(rows, weights, counts)
    x, w, _ = dispatch.wait()
    y = dispatch.send_back((x * w[:, None]).t().contiguous().t()).wait()
    y.sum().backward()
    expected = torch.ones(r, D), torch.ones(r), rows * weights[:, None], weights[:, None].expand(r, D), rows.sum(1)
    return [part.detach() for pair in zip((d_rows, d_weights, y, rows.grad, weights.grad), expected, strict=True) for part in pair]


@pytest.mark.parametrize("experts", [2, 4])
def test_strided_tensors_and_gradients(pool, experts):
    for parts in pool.run(2, strided, experts):
        for found, expected in zip(parts[::2], parts[1::2], strict=True):
            assert relative_error(found, expected) <= 1e-15


def overlapping(rank):
    """The exchanges of a step, and when the work ran that needs nothing of them: [rows there, rows back] x [forward, backward]."""
    counts = torch.tensor([[2, 1, 4, 3], [5, 2, 1, 2]])[rank]
    rows, weights = torch.ones(10, D, requires_grad=True), torch.ones(10, requires_grad=True)
    shared = torch.ones(10, D, requires_grad=True)
    times = [[0.0, 0.0], [0.0, 0.0]]

    def work(index):
        out = shared * 2
        times[index][0] = time.time()
        out.register_hook(lambda _: times[index].__setitem__(1, time.time()))
        return out

    run = dist.all_to_all_single

    @functools.wraps(run)
    def late(*arguments, **options):
        time.sleep(DELAY if rank == 1 and options.get("async_op") else 0)
        return run(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", late)
        with record() as traffic:
            dispatch = ExpertExchange(dist.group.WORLD, 4).start(rows, weights, counts)
            first = work(0)
            x, w, _ = dispatch.wait()
            way_back = dispatch.send_back(x * w[:, None])
            second = work(1)
            (way_back.wait() + first + second).sum().backward()
    return traffic.events, times


def test_work_goes_on_while_rows_travel(pool):
    """What runs between the start and the wait, and its backward, does not wait for a rank that is late."""
    (events, times), (events_of_1, _) = pool.run(2, overlapping)
    assert {event.operation for event in events} == {"all_to_all"}
    _, there, _, back, gradients_back, gradients_there, _ = events
    for (forward, backward), event, reverse in zip(times, (there, back), (gradients_there, gradients_back), strict=True):
        assert event.start < forward < event.end - DELAY / 2
        assert reverse.start < backward < reverse.end - DELAY / 2
    # 2 counts of 8 bytes; rows, weights, then what the other rank's rows became; and the same in reverse. Rank 0 gives away 7 of
    # its 10 rows and gets 7, rank 1 as well.
    for sent in ([event.sent for event in events], [event.sent for event in events_of_1]):
        assert sent == [16, 7 * 4 * D, 7 * 4, 7 * 4 * D, 7 * 4 * D, 7 * 4 * D, 7 * 4]


def without_gradients(rank):
    counts = torch.tensor([1, 2])
    rows, weights = torch.ones(3, D), torch.ones(3)
    with torch.no_grad():
        dispatch = ExpertExchange(dist.group.WORLD, 2).start(rows, weights, counts)
        x, w, _ = dispatch.wait()
        return dispatch.send_back(x * w[:, None] * (rank + 1)).wait()


def test_without_gradients(pool):
    for y in pool.run(2, without_gradients):
        assert y[:, 0].tolist() == [1.0, 2.0, 2.0]


def broken(rank, good):
    """What is said when the connection breaks after some calls."""
    run, calls = dist.all_to_all_single, []

    def fail():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer. Further text")

    def all_to_all_single(*arguments, **options):
        calls.append(options)
        if len(calls) <= good:
            return run(*arguments, **options)
        return SimpleNamespace(wait=fail) if options.get("async_op") else fail()

    missing = failures.RankGone([1], "rank 1 is gone (of 2)")
    exchange = ExpertExchange(dist.group.WORLD, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", all_to_all_single)
        patch.setattr(failures, "_heartbeat", SimpleNamespace(missing=lambda: missing))
        with pytest.raises(failures.RankGone) as raised:
            exchange.start(torch.ones(2, D), torch.ones(2), torch.tensor([1, 1])).wait()
    return str(raised.value)


@pytest.mark.parametrize("good", [0, 1])
def test_a_rank_that_is_gone_is_named(pool, good):
    """Both where the counts are read and where the rows are waited for."""
    assert pool.run(2, broken, good) == ["expert exchange: rank 1 is gone (of 2); Connection closed by peer"] * 2


def indivisible(rank):
    with pytest.raises(ValueError, match="^3 experts do not divide over 2 ranks$"):
        ExpertExchange(dist.group.WORLD, 3)


def test_experts_that_do_not_divide(pool):
    pool.run(2, indivisible)


SEQUENCES, LENGTH, EXPERTS, TOP_K = 4, 16, 5, 2


def choices():
    """[SEQUENCES, LENGTH, TOP_K], each token's different experts, the first ones far more often."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(SEQUENCES, LENGTH, EXPERTS, generator=generator)
    return (noise - 0.2 * torch.arange(EXPERTS)).topk(TOP_K, -1).indices


def first_of_each(chosen, limit):
    """By definition: token after token."""
    taken, keep = [0] * EXPERTS, torch.zeros_like(chosen, dtype=torch.bool)
    for sequence, tokens in enumerate(chosen.tolist()):
        for place, experts in enumerate(tokens):
            for choice, expert in enumerate(experts):
                keep[sequence, place, choice] = taken[expert] < limit
                taken[expert] += 1
    return keep


def kept(rank, layout, limits, chosen):
    """For each limit, what this rank's tokens keep [b, l, k], where every (world / 4)-th rank is in a group, dp major."""
    group, _ = subgroup(rank, 4)
    dp_rank, cp_rank = divmod(dist.get_rank(group), layout.ranks)
    own = layout.shard(chosen.chunk(4 // layout.ranks)[dp_rank], cp_rank)
    capacity = ExpertCapacity(layout, group)
    keep = [capacity.keep(own.flatten(0, 1), len(own), limit, EXPERTS) for limit in limits]
    return [part.view_as(own) for part in keep]


LIMITS = [1, 7, 20, 30, 64]
"""From one token to all: the most popular expert is chosen by 52 of the 64."""


@pytest.mark.parametrize(
    ("world", "layout"),
    [(4, Layout("contiguous", 1)), (8, Layout("contiguous", 2)), (8, Layout("zigzag", 2)), (4, Layout("zigzag", 4))],
    ids=["dp4", "dp2 cp2", "dp2 cp2 zigzag", "cp4 zigzag"],
)
def test_capacity_on_meshes(pool, world, layout):
    chosen = choices()
    results = pool.run(world, kept, layout, LIMITS, chosen)
    for number in range(world // 4):
        by_rank = results[number :: world // 4]
        for i, limit in enumerate(LIMITS):
            expected = first_of_each(chosen, limit)
            for rank, found in enumerate(by_rank):
                dp_rank, cp_rank = divmod(rank, layout.ranks)
                part = expected.chunk(4 // layout.ranks)[dp_rank]
                assert torch.equal(found[i], layout.shard(part, cp_rank))


@pytest.mark.parametrize("limit", LIMITS)
def test_capacity_of_one_rank(limit):
    chosen, capacity = choices(), ExpertCapacity(Layout("zigzag", 1))
    keep = capacity.keep(chosen.flatten(0, 1), SEQUENCES, limit, EXPERTS)
    assert torch.equal(keep.view_as(chosen), first_of_each(chosen, limit))
    assert chosen.flatten().bincount(minlength=EXPERTS).max() == 52
