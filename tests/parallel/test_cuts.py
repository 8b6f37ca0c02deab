"""A pipeline's cuts: against every way to cut, tried one by one."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as draws

from baton.parallel.cuts import balanced_cuts, given_cuts

COST = draws.integers(0, 20)


def stage_costs(ranges, costs, first, last):
    sums = [sum(costs[layer] for layer in layers) for layers in ranges]
    sums[0] += first
    sums[-1] += last
    return sums


def unevenness(sums):
    return max(sums), sum(cost**2 for cost in sums)


@given(costs=draws.lists(COST, min_size=1, max_size=8), first=COST, last=COST, data=draws.data())
def test_no_other_cuts_are_better(costs, first, last, data):
    stages = data.draw(draws.integers(1, len(costs)))
    found = balanced_cuts(costs, stages, first, last)
    assert [layer for layers in found for layer in layers] == list(range(len(costs)))
    assert len(found) == stages
    assert all(found)
    every = (given_cuts(cuts, len(costs)) for cuts in itertools.combinations(range(1, len(costs)), stages - 1))
    least = min(unevenness(stage_costs(ranges, costs, first, last)) for ranges in every)
    assert unevenness(stage_costs(found, costs, first, last)) == least


def test_the_largest_counts_first_and_then_evenness():
    assert balanced_cuts([1] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    # 1 | 5 | 5, though the squares of 6 | 2 | 3 are less; and that where a fourth stage of 6 makes 6 the largest anyway.
    assert balanced_cuts([1, 5, 2, 3], 3) == [range(0, 1), range(1, 2), range(2, 4)]
    assert balanced_cuts([1, 5, 2, 3, 6], 4) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]


def test_what_the_ends_hold_moves_the_cuts():
    assert balanced_cuts([1] * 6, 2) == [range(0, 3), range(3, 6)]
    assert balanced_cuts([1] * 6, 2, first=2) == [range(0, 2), range(2, 6)]
    assert balanced_cuts([1] * 6, 2, last=4) == [range(0, 5), range(5, 6)]
    assert balanced_cuts([1] * 6, 2, first=100) == [range(0, 1), range(1, 6)]


def test_equals_are_cut_alike_every_time():
    assert balanced_cuts([0, 1, 0, 1], 2) == [range(0, 2), range(2, 4)]
    assert balanced_cuts([0.0] * 4, 3) == [range(0, 1), range(1, 2), range(2, 4)]


@pytest.mark.parametrize(("layers", "stages"), [(2, 3), (0, 1), (2, 0)])
def test_each_stage_needs_a_layer(layers, stages):
    with pytest.raises(ValueError, match=f"{layers} layers cannot make {stages} stages; allowed: "):
        balanced_cuts([1] * layers, stages)


def test_given_cuts():
    assert given_cuts([1, 3], 4) == [range(0, 1), range(1, 3), range(3, 4)]
    assert given_cuts([], 4) == [range(0, 4)]
