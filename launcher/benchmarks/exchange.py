"""Measures what joins the ranks of a group, and each strategy of the state exchange on it."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from ...parallel.affine_scan import SequenceScan
from ...parallel.collectives import point_to_point
from ...parallel.layout import Layout
from ...parallel.links import DECAY, STRATEGIES, Link, Links, Place, choose, seconds
from ...parallel.recorder import record
from ..environment import Environment
from .report import Cell, console, link, milliseconds, strategies_table

HEAD_DIM, STATE_DIM = 64, 128
HEADS = [2, 8, 32, 128, 512]
"""States of 64 KiB to 16 MiB, those of QUICK_HEADS alone with --quick."""
QUICK_HEADS = [2, 32]
MESSAGES = [2**k for k in range(10, 25, 2)]
"""Bytes that a rank sends when the link is measured, 1 KiB to 16 MiB; without those above QUICK_MESSAGES with --quick."""
QUICK_MESSAGES = 2**20
LARGEST = 2**32
"""Bytes of all segments' states, above which `allgather` is not run."""


def bench_exchange(environment: Environment, kind: Literal["contiguous", "zigzag"], file: Path, quick: bool) -> None:
    """Prints a table of strategies by state size, and adds the link to the file. Every rank calls it. Raises UserError."""
    group, device = dist.group.WORLD, environment.device
    assert group is not None
    known = Links.read(file) if file.exists() else Links({})
    layout, place = Layout(kind, environment.world), Place.of(group, device)
    measured = measure_link(group, device, quick)
    rows = []
    for heads in QUICK_HEADS if quick else HEADS:
        rows.append((heads * HEAD_DIM * STATE_DIM * 4, _measure_strategies(layout, group, device, heads, measured)))
    if not environment.leads:
        return
    Links(known.measured | {place: measured}).write(file)
    where = f"{place.backend} on {place.device}, {place.nodes} node{'s' * (place.nodes > 1)}"
    console.print(f"{place.ranks} ranks, {kind}, {where}: {link(measured)}", soft_wrap=True)
    console.print(
        "Measured (predicted) time, and the bytes that a rank sends in how many rounds; auto is what the prediction chooses",
        soft_wrap=True,
    )
    console.print(strategies_table(rows))
    console.print(f"Wrote {file}; parallel.links={file} makes `auto` read it.", soft_wrap=True)


def measure_link(group: dist.ProcessGroup, device: torch.device, quick: bool) -> Link:
    """Fits latency + bytes / bandwidth to rounds of two kinds: a message to the next rank, and all-to-all."""
    points = []
    for message in MESSAGES:
        if quick and message > QUICK_MESSAGES:
            break
        for function in (_shift, _all_to_all):
            sent = function(group, device, message)
            points.append((message, _median(sent, group, device, calls=max(1, min(10, 2**20 // message)))))
    return fit(points)


def fit(points: list[tuple[int, float]]) -> Link:
    """(bytes, seconds) -> the link whose predictions have the least relative errors, in the mean square."""
    times = torch.tensor([time for _, time in points], dtype=torch.float64)
    scaled = torch.tensor([[1.0, float(sent)] for sent, _ in points], dtype=torch.float64) / times[:, None]
    latency, per_byte = torch.linalg.lstsq(scaled, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0].tolist()
    # Noise can make a line through the points meet zero; the smallest and the largest message then say what they say.
    (_, shortest), (most, longest) = min(points), max(points)
    return Link(latency if latency > 0 else shortest, 1 / per_byte if per_byte > 0 else most / longest)


def _shift(group: dist.ProcessGroup, device: torch.device, message: int) -> Callable[[], None]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sent, received = (torch.zeros(message, dtype=torch.uint8, device=device) for _ in range(2))

    def exchange() -> None:
        send = dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % ranks)
        receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % ranks)
        for work in point_to_point([send, receive], group):
            work.wait()

    return exchange


def _all_to_all(group: dist.ProcessGroup, device: torch.device, message: int) -> Callable[[], None]:
    ranks = dist.get_world_size(group)
    each = -(-message // (ranks - 1))
    sent, received = (torch.zeros(each * ranks, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: dist.all_to_all_single(received, sent, group=group)


def _measure_strategies(
    layout: Layout, group: dist.ProcessGroup, device: torch.device, heads: int, constants: Link
) -> list[Cell | str]:
    """A cell for each strategy, at a state of so many heads."""
    m = layout.segments_per_rank
    log_T = torch.full((1, m, heads), -0.1, device=device)
    U = torch.ones(1, m, heads, HEAD_DIM, STATE_DIM, device=device)
    given = U[0, 0].nbytes, heads * DECAY
    chosen = choose(layout, *given, constants)
    times, counted = {}, {}
    for strategy in STRATEGIES:
        if strategy == "allgather" and len(layout.owners) * given[0] > LARGEST:
            continue
        scan = SequenceScan(layout, group, strategy)
        run = partial(_scan, scan, log_T, U)
        with record() as traffic:
            run()
        counted[strategy] = _slowest([traffic.sent, traffic.rounds], group, device)
        times[strategy] = _median(run, group, device, calls=1)
    fastest = min(times, key=lambda strategy: times[strategy])
    cells: list[Cell | str] = []
    for strategy in STRATEGIES:
        if strategy not in times:
            cells.append("too large")
            continue
        predicted = seconds(strategy, layout, *given, constants)
        time = f"{milliseconds(times[strategy])} ({milliseconds(predicted)}) ms"
        marks = [mark for mark, which in (("fastest", fastest), ("auto", chosen)) if which == strategy]
        sent, rounds = (int(count) for count in counted[strategy])
        cells.append(Cell(time, sent, rounds, marks))
    return cells


def _scan(scan: SequenceScan, log_T: torch.Tensor, U: torch.Tensor) -> None:
    scan.start(log_T, U, None).wait()


def _median(function: Callable[[], None], group: dist.ProcessGroup, device: torch.device, calls: int) -> float:
    """Seconds that a call takes on the slowest rank: the median of some repetitions, after one for warming up."""
    function()
    times = []
    for _ in range(REPETITIONS):
        _finish(device)
        dist.barrier(group)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        _finish(device)
        times.append((time.perf_counter() - start) / calls)
    return sorted(_slowest(times, group, device))[REPETITIONS // 2]


REPETITIONS = 7


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(values: list[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """The largest over the ranks of each value."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.tolist()
