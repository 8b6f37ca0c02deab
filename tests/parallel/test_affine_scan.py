"""State passing over ranks is the scan of one process: every strategy, every kind of transition, any layout, every gradient."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as draws

from baton.kernels.scan import Decay, Dense, affine_scan
from baton.parallel.affine_scan import STRATEGIES, SequenceScan
from helpers import relative_error

B, HEADS, STATE = 2, 3, (2, 5)
"""Sequences, heads, and the state of a head, whose 10 numbers no number of ranks above 2 but 5 divides."""
KINDS = ("scalar", "diagonal", "rated", "dense")


def operands(kind, maps, seed):
    """T, U, initial and rate (or None) of a whole sequence of maps, and weights for S_in and the final state."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    U, initial, rate = normal(B, maps, HEADS, *STATE), normal(B, HEADS, *STATE), None
    # From 1 (nothing is forgotten) over a denormal and one that underflows to exactly 0.
    choices = torch.tensor([0.0, -1e-3, -0.5, -3.0, -740.0, -1000.0, -float("inf")], dtype=torch.float64)
    log = lambda *shape: choices[torch.randint(len(choices), shape, generator=generator)]  # noqa: E731
    if kind == "scalar":
        T = log(B, maps, HEADS)
    elif kind == "diagonal":
        T = log(B, maps, HEADS, *STATE)
    elif kind == "rated":
        T, rate = -log(B, maps, HEADS, STATE[0]), -normal(HEADS, *STATE).abs() - 0.1
    else:
        T = normal(B, maps, HEADS, STATE[1], STATE[1]) / 3
        T[:, seed % maps] = 0.0
    return T, U, initial, rate, normal(*U.shape), normal(*initial.shape)


def transition_of(kind, rate):
    return Dense() if kind == "dense" else Decay(rate)


def by_definition(kind, T, U, initial, rate):
    """Map after map."""
    state, entering = initial, []
    for i in range(U.shape[1]):
        entering.append(state)
        if kind == "dense":
            state = torch.einsum("bhvk,bhkj->bhvj", state, T[:, i]) + U[:, i]
        else:
            # An infinite decay is taken out first: its own gradient would be 0 * inf.
            reset = T[:, i].isinf()
            log = torch.where(reset, 0.0, T[:, i])
            log, reset = (log, reset) if rate is None else (log[..., None] * rate, reset[..., None])
            factor = torch.where(reset, 0.0, log.exp())
            state = factor.reshape(*factor.shape, *[1] * (U.dim() - 1 - factor.dim())) * state + U[:, i]
    return torch.stack(entering, 1), state


def reference(kind, maps, seed):
    T, U, initial, rate, *weights = operands(kind, maps, seed)
    leaves = [t.requires_grad_() for t in (T, U, initial, rate) if t is not None]
    outputs = by_definition(kind, *leaves, *[None] * (4 - len(leaves)))
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [t.detach() for t in outputs], gradients


def layout_of(owners):
    """Any order of owners, each with as many segments."""
    return SimpleNamespace(owners=owners, segments_per_rank=len(owners) // (max(owners) + 1))


def own_maps(whole, owners, rank):
    """The maps of a rank's segments, along dim 1."""
    return torch.cat([part for part, owner in zip(whole.chunk(len(owners), 1), owners, strict=True) if owner == rank], 1)


def sharded(rank, kind, owners, maps, seed):
    """For every strategy what affine_scan gives, and its gradients: of this rank's maps, of the initial state and the rate."""
    T, U, initial, rate, dS_in, dfinal = operands(kind, maps, seed)
    results = {}
    for strategy in STRATEGIES:
        scan = SequenceScan(layout_of(owners), dist.group.WORLD, strategy)
        here = [own_maps(t, owners, rank).requires_grad_() for t in (T, U)]
        shared = [t.clone().requires_grad_() for t in (initial, rate) if t is not None]
        S_in, final = affine_scan(*here, shared[0], scan, transition_of(kind, shared[1] if rate is not None else None))
        loss = (S_in * own_maps(dS_in, owners, rank)).sum()
        assert (final is not None) == (owners[-1] == rank)
        (loss if final is None else loss + (final * dfinal).sum()).backward()
        assert (shared[0].grad is not None) == (owners[0] == rank)
        results[strategy] = (
            S_in.detach(),
            None if final is None else final.detach(),
            [t.grad for t in here],
            [t.grad for t in shared],
        )
    return results


def assert_same(kind, owners, maps, seed, found):
    (S_in, final), (dT, dU, dinitial, *drate) = reference(kind, maps, seed)
    world = max(owners) + 1
    for strategy in STRATEGIES:
        results = [one[strategy] for one in found]
        for rank, (own_S, own_final, gradients, (own_dinitial, *_)) in enumerate(results):
            for one, whole in ((own_S, S_in), (gradients[0], dT), (gradients[1], dU)):
                assert close(one, own_maps(whole, owners, rank), whole), (strategy, rank)
            assert own_final is None or close(own_final, final, final), strategy
            assert own_dinitial is None or close(own_dinitial, dinitial, dinitial), strategy
        if drate:
            total = sum(results[rank][3][1] for rank in range(world))
            assert close(total, drate[0], drate[0]), strategy


def close(found, expected, whole):
    """To 1e-12 of the whole's largest value; a gradient that is zero must be."""
    return ((found - expected).abs().max() <= 1e-12 * whole.abs().max()).item()


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    kind=draws.sampled_from(KINDS),
    world=draws.integers(1, 8),
    segments=draws.integers(1, 3),
    per_segment=draws.integers(1, 3),
    shuffle=draws.randoms(use_true_random=False),
    seed=draws.integers(0, 10**6),
)
def test_any_layout_any_transition(pool, kind, world, segments, per_segment, shuffle, seed):
    owners = list(range(world)) * segments
    shuffle.shuffle(owners)
    maps = len(owners) * per_segment
    assert_same(kind, owners, maps, seed, pool.run(world, sharded, kind, owners, maps, seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("owners", [[0, 1, 2], [0, 1, 2, 3, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6]])
def test_the_layouts_in_use(pool, kind, owners):
    assert_same(kind, owners, 2 * len(owners), 7, pool.run(max(owners) + 1, sharded, kind, owners, 2 * len(owners), 7))


def test_one_device_is_the_definition():
    """And so are the gradients, where nothing is infinite, by finite differences."""
    for kind in KINDS:
        T, U, initial, rate, *_ = operands(kind, 4, 3)
        T = T.clamp(-2.0, 2.0)
        leaves = [t.requires_grad_() for t in (T, U, initial, rate) if t is not None]
        scan = lambda *t, kind=kind: affine_scan(*t[:3], None, transition_of(kind, t[3] if len(t) > 3 else None))  # noqa: E731
        assert torch.autograd.gradcheck(scan, leaves)
        for one, other in zip(scan(*leaves), by_definition(kind, *leaves, *[None] * (4 - len(leaves))), strict=True):
            assert relative_error(one.detach(), other.detach()) <= 1e-12


def small_state(rank):
    """Fewer numbers in a state than ranks: some slices are empty."""
    T, U = torch.full((1, 4, 1), -0.5, dtype=torch.float64), torch.arange(12.0, dtype=torch.float64).view(1, 4, 1, 3)
    own = [own_maps(t, [0, 1, 2, 3], rank) for t in (T, U)]
    scans = [SequenceScan(layout_of([0, 1, 2, 3]), dist.group.WORLD, strategy) for strategy in STRATEGIES]
    return [affine_scan(*own, None, scan)[0] for scan in scans], own_maps(affine_scan(T, U)[0], [0, 1, 2, 3], rank)


def test_states_smaller_than_the_number_of_ranks(pool):
    for found, expected in pool.run(4, small_state):
        assert all(torch.allclose(one, expected, rtol=1e-12, atol=0) for one in found)


def transported(rank, strategy):
    """fp32 states that travel as bf16, and as they are."""
    T, U, *_ = (t.float() if t is not None else None for t in operands("scalar", 8, 5))
    owners = [0, 1, 2, 3, 3, 2, 1, 0]
    own = [own_maps(t, owners, rank) for t in (T.clamp(min=-0.5), U)]
    return [
        SequenceScan(layout_of(owners), dist.group.WORLD, strategy, transport).start(*own, None).wait()[0]
        for transport in (torch.bfloat16, None)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_transport_rounds_states_only(pool, strategy):
    """Each hop rounds to 8 bits: off by more than fp32 and by less than n roundings."""
    errors = [relative_error(*pair) for pair in pool.run(4, transported, strategy) if pair[1].abs().max() > 0]
    assert 1e-4 < max(errors) < 8 * 2**-8
