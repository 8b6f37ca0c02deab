"""Where a pipeline cuts the layers into stages: each stage is a contiguous run of layers."""

import itertools
from collections.abc import Callable, Sequence


def given_cuts(cuts: Sequence[int], layers: int) -> list[range]:
    """Stages of `layers` layers; cuts are the numbers, ascending, of the layers that begin all but the first."""
    return [range(start, stop) for start, stop in itertools.pairwise([0, *cuts, layers])]


def balanced_cuts(costs: Sequence[float], stages: int, first: float = 0, last: float = 0) -> list[range]:
    """Stages whose largest cost is as small as can be and, among all such, whose costs are the most even.

    costs: of each layer; first and last: of what else the first and the last stage hold. The most even have the smallest sum of
    squares; of equals that is taken whose later stages begin first, so that all ranks find the same. Integers are added up exactly.
    Raises ValueError where some stage would be left without a layer.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot make {stages} stages; allowed: 1 to {layers}")
    costs = [*costs]
    costs[0] += first
    costs[-1] += last
    before = [0, *itertools.accumulate(costs)]

    def cost(start: int, stop: int) -> float:
        return before[stop] - before[start]

    def larger(largest: float, start: int, stop: int) -> float:
        return max(largest, cost(start, stop))

    def more_uneven(squares: float, start: int, stop: int) -> float:
        return squares + cost(start, stop) ** 2 if cost(start, stop) <= limit else float("inf")

    # Not one search for both: what is most even so far need not be where a later stage decides what is the largest.
    limit, _ = _search(layers, stages, larger)
    _, cuts = _search(layers, stages, more_uneven)
    return given_cuts(cuts, layers)


def _search(layers: int, stages: int, add: Callable[[float, int, int], float]) -> tuple[float, list[int]]:
    """The smallest value that `stages` stages reach, and their cuts.

    add: the value of some stages, and one more of the layers from start to before stop -> the value of all these. It never falls
    where its first argument rises, so that the best way to a layer in so many stages is best for whatever follows.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0, [])}
    for stage in range(1, stages + 1):
        reached = {}
        for stop in range(stage, layers - stages + stage + 1):
            value, start = min((add(best[start][0], start, stop), start) for start in best if start < stop)
            reached[stop] = value, [*best[start][1], stop]
        best = reached
    value, stops = best[layers]
    return value, stops[:-1]
