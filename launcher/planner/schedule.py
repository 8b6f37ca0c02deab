"""A pipeline's schedule as torch runs it: the order of a rank's actions, when each begins and ends, and how long ranks idle."""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Action(NamedTuple):
    """One stage works on one micro-step."""

    stage: int
    micro_step: int
    backward: bool


def actions(rank: int, ranks: int, stages_per_rank: int, micro_steps: int) -> list[Action]:
    """Those of a rank, in order: 1F1B (Narayanan et al., arXiv 2104.04473) with one stage a rank, else interleaved.

    As torch's Schedule1F1B and ScheduleInterleaved1F1B run them (`tests/launcher/test_planner.py` compares).
    """
    if stages_per_rank == 1:
        warm_up = min(micro_steps, ranks - rank)
        forwards = [Action(rank, i, False) for i in range(micro_steps)]
        backwards = [Action(rank, i, True) for i in range(micro_steps)]
        found = forwards[:warm_up]
        for i in range(micro_steps):
            found += [backwards[i], *forwards[warm_up + i : warm_up + i + 1]]
        return found
    return _interleaved(rank, ranks, stages_per_rank, micro_steps)


def _interleaved(rank: int, ranks: int, stages_per_rank: int, micro_steps: int) -> list[Action]:
    each = micro_steps // max(1, micro_steps // ranks)
    """Micro-steps that a stage works on before the rank's next stage does."""
    total = stages_per_rank * micro_steps
    warm_up = min((stages_per_rank - 1) * each + 2 * (ranks - 1 - rank), total)
    seen: Counter[tuple[int, bool]] = Counter()

    def action(step: int, backward: bool) -> Action:
        place = step // each % stages_per_rank
        stage = (stages_per_rank - 1 - place if backward else place) * ranks + rank
        seen[stage, backward] += 1
        return Action(stage, seen[stage, backward] - 1, backward)

    found = [action(step, False) for step in range(warm_up)]
    for step in range(total):
        if warm_up + step < total:
            found.append(action(warm_up + step, False))
        found.append(action(step, True))
    return found


class Run(NamedTuple):
    """One step of a pipeline."""

    seconds: float
    bubble: float
    """Of the time of all ranks together, the part in which none of their stages works."""


def simulate(
    ranks: int, stages_per_rank: int, micro_steps: int, forward: Sequence[float], backward: Sequence[float], hop: float = 0.0
) -> Run:
    """Runs the schedule. forward, backward: seconds of each stage for a micro-step; hop: from a stage to the next, beside work."""
    stages = ranks * stages_per_rank
    waiting = [[*reversed(actions(rank, ranks, stages_per_rank, micro_steps))] for rank in range(ranks)]
    ended: dict[Action, float] = {}
    free = [0.0] * ranks
    while any(waiting):
        moved = False
        for rank in range(ranks):
            while waiting[rank]:
                action = waiting[rank][-1]
                needed = _needed(action, stages)
                if needed is not None and needed not in ended:
                    break
                arrived = 0.0 if needed is None else ended[needed] + (hop if needed.stage != action.stage else 0.0)
                lasts = (backward if action.backward else forward)[action.stage]
                free[rank] = ended[action] = max(free[rank], arrived) + lasts
                waiting[rank].pop()
                moved = True
        assert moved, "the schedule waits for itself"
    seconds = max(free)
    busy = micro_steps * (sum(forward) + sum(backward))
    return Run(seconds, 1 - busy / (ranks * seconds) if seconds else 0.0)


def _needed(action: Action, stages: int) -> Action | None:
    """What has to end before, on another stage or the last stage's own forward."""
    stage, micro_step, backward = action
    if not backward:
        return Action(stage - 1, micro_step, False) if stage else None
    return Action(stage + 1, micro_step, True) if stage < stages - 1 else Action(stage, micro_step, False)


@functools.lru_cache(4096)
def in_flight(rank: int, ranks: int, stages_per_rank: int, micro_steps: int) -> dict[int, int]:
    """By stage of a rank: of how many micro-steps it keeps activations when the rank keeps most."""
    held: Counter[int] = Counter()
    most: dict[int, int] = {}
    for stage, _, backward in actions(rank, ranks, stages_per_rank, micro_steps):
        held[stage] += -1 if backward else 1
        if held.total() > sum(most.values()):
            most = dict(held)
    return most


@functools.lru_cache(4096)
def gathers(rank: int, ranks: int, stages_per_rank: int, micro_steps: int, zero: int) -> dict[int, int]:
    """By stage of a rank: how often a step gathers its parameters. torch's schedules leave them whole after a backward."""
    if ranks == 1:
        return {0: micro_steps * (2 if zero == 3 else 1)}
    whole: dict[int, bool] = {}
    counted: Counter[int] = Counter()
    for stage, _, backward in actions(rank, ranks, stages_per_rank, micro_steps):
        counted[stage] += not whole.get(stage, False)
        whole[stage] = backward or zero == 2
    return dict(counted)
