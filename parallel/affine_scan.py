"""State passing: the exclusive scan of affine maps over segments of the sequence that lie on different ranks.

Over a segment a recurrence is S_out = T S_in + U. Each rank folds its tokens into one map a segment, the ranks exchange these,
and each segment runs from the state that enters it: exact for any number of ranks and any layout. The adjoint is the same scan
in reverse, with the gradients of S_in for U. Four strategies give the same result; m segments on each of R ranks, n in all,
S bytes of state and t bytes of decay a segment:

    ring        n - 1 rounds                  at most m S sent by a rank
    allgather   1 round                       (R - 1) m (S + t)
    doubling    1 + ⌈log2(n - 1)⌉ rounds      at most m (S + t) a round
    sliced      2 rounds                      about 2 (R - 1) / R m S, and the decays that go with each slice

`parallel.links` has the exact numbers and chooses. Inside a strategy the b sequences and h heads are one dim of blocks:
T [m, B, ...] and U [m, B, E, ...], each of a block's E rows being moved by the block's T alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..kernels.scan import SCALAR, Decay, Dense, Pending, Transition, exclusive_scan, fold
from .background import start
from .collectives import gather_single
from .failures import naming_the_missing
from .layout import Layout
from .segments import Segments


class Maps(NamedTuple):
    """One map for each of some segments, and how to work with them."""

    T: Tensor  # [m, B, ...]
    U: Tensor  # [m, B, E], or [m, B, E, K] where T is dense
    transition: Transition
    transport: torch.dtype | None = None
    """What U travels as; None: as it is. T always travels as it is."""

    @property
    def like(self) -> Tensor:
        """A message with one segment's map."""
        return self.pack(self.T[0], self.U[0])

    def send(self, U: Tensor) -> Tensor:
        """A tensor of states as it travels, flat."""
        return U.flatten() if self.transport is None else U.flatten().to(self.transport)

    def pack(self, T: Tensor, U: Tensor) -> Tensor:
        """Maps as one flat message: states, then decays bit by bit."""
        states = self.send(U)
        return torch.cat([states, T.contiguous().flatten().view(states.dtype)])

    def unpack(self, message: Tensor, T_shape: Sequence[int], U_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The reverse of `pack`."""
        size = torch.Size(U_shape).numel()
        # A copy, since a wider type must begin at a multiple of its size.
        return message[size:].clone().view(self.T.dtype).view(T_shape), message[:size].to(self.U.dtype).view(U_shape)


def ring(maps: Maps, segments: Segments) -> Tensor:
    """The state itself walks from segment to segment."""
    entering = {0: torch.zeros_like(maps.U[0])} if 0 in segments.own else {}
    like = maps.send(maps.U[0])
    for i in range(len(segments.owners) - 1):
        leaving = {}
        if i in entering:
            place = segments.own.index(i)
            leaving[i] = maps.send(maps.transition.step(maps.T[place], entering[i], maps.U[place]))
        for target, state in segments.pass_on(leaving, [i], 1, like).wait().items():
            entering[target] = state.to(maps.U.dtype).view_as(maps.U[0])
    return torch.stack([entering[i] for i in segments.own])


def allgather(maps: Maps, segments: Segments) -> Tensor:
    """Every rank receives every map, padded where a rank has fewer segments, and runs through them up to its own last."""
    most = max(segments.counts)
    own = torch.stack([maps.pack(T, U) for T, U in zip(maps.T, maps.U, strict=True)])
    own = F.pad(own, (0, 0, 0, most - len(own)))
    gathered = own.new_empty(segments.ranks * most, own.shape[1])
    gather_single(gathered, own, segments.group)
    there = [rank * most + place for rank, count in enumerate(segments.counts) for place in range(count)]
    entering, state = [], torch.zeros_like(maps.U[0])
    for i, arrived in enumerate(segments.order[: segments.own[-1] + 1]):
        if i in segments.own:
            entering.append(state)
        T, U = maps.unpack(gathered[there[arrived]], maps.T.shape[1:], maps.U.shape[1:])
        state = maps.transition.step(T, state, U)
    return torch.stack(entering)


def doubling(maps: Maps, segments: Segments) -> Tensor:
    """Hillis and Steele: after round k a segment knows the map of the 2^k segments before it; each segment plays its part."""
    n, like = len(segments.owners), maps.like
    shapes = maps.T.shape[1:], maps.U.shape[1:]
    own = {i: maps.pack(maps.T[place], maps.U[place]) for place, i in enumerate(segments.own)}
    arrived = segments.pass_on(own, range(n - 1), 1, like).wait()
    runs = {i: maps.unpack(message, *shapes) for i, message in arrived.items()}
    step = 1
    while step < n - 1:
        messages = {i: maps.pack(*run) for i, run in runs.items() if i + step < n}
        for i, message in segments.pass_on(messages, range(1, n - step), step, like).wait().items():
            (T, U), (first_T, first_U) = runs[i], maps.unpack(message, *shapes)
            runs[i] = maps.transition.compose(T, first_T), maps.transition.step(T, first_U, U)
        step *= 2
    return torch.stack([runs[i][1] if i else torch.zeros_like(maps.U[0]) for i in segments.own])


def sliced(maps: Maps, segments: Segments) -> Tensor:
    """All-to-all: each rank gets one slice of every segment's state, scans all segments for it, and sends it back."""
    slices = [_Slice.cut(maps, rank, segments.ranks) for rank in range(segments.ranks)]
    own, counts = slices[segments.rank], segments.counts
    m, rows = len(segments.own), maps.U.flatten(1, 2)
    sent = [torch.cat([maps.pack(T, U) for T, U in zip(maps.T[:, s.blocks], rows[:, s.rows], strict=True)]) for s in slices]
    arrived = _all_to_all(sent, [count * (sent[segments.rank].numel() // m) for count in counts], segments.group)
    # Not indexed by a list, which makes the host wait for a GPU.
    by_rank = torch.cat(arrived).view(len(segments.owners), -1)
    messages = [by_rank[place] for place in segments.order]
    shapes = (*maps.T[0, own.blocks].shape,), (*rows[0, own.rows].shape,)
    T, U = (torch.stack(parts) for parts in zip(*(maps.unpack(message, *shapes) for message in messages), strict=True))
    S = own.scan(T, U)
    returned = [maps.send(torch.stack([S[i] for i in segments.of(rank)])) for rank in range(segments.ranks)]
    sizes = [maps.U[:, 0, 0].numel() * (s.rows.stop - s.rows.start) for s in slices]
    back = _all_to_all(returned, sizes, segments.group)
    return torch.cat([part.to(maps.U.dtype).view(m, -1, *maps.U.shape[3:]) for part in back], 1).view_as(maps.U)


STRATEGIES: dict[str, Callable[[Maps, Segments], Tensor]] = {
    "ring": ring,
    "allgather": allgather,
    "doubling": doubling,
    "sliced": sliced,
}
"""Each takes the maps of this rank's segments and gives the states entering these, [m, B, E, ...], from a zero state."""


@dataclass(frozen=True)
class _Slice:
    """One rank's part of a state whose B blocks of E rows are cut into runs as even as they can be."""

    rows: slice  # of B E
    blocks: slice  # those that the rows belong to
    E: int
    transition: Transition

    @classmethod
    def cut(cls, maps: Maps, rank: int, ranks: int) -> "_Slice":
        B, E = maps.U.shape[1:3]
        start, stop = (B * E * r // ranks for r in (rank, rank + 1))
        blocks = slice(start // E, -(-stop // E) if stop > start else start // E)
        transition = maps.transition
        if isinstance(transition, Decay) and transition.rate is not None:
            transition = replace(transition, rate=transition.rate[blocks])
        return cls(slice(start, stop), blocks, E, transition)

    def scan(self, T: Tensor, U: Tensor) -> Tensor:
        """The states entering n maps, T [n, blocks, ...] and U [n, rows, ...]; blocks that are cut are filled with zeros."""
        if self.rows.stop == self.rows.start:
            return U
        before, after = self.rows.start - self.blocks.start * self.E, self.blocks.stop * self.E - self.rows.stop
        whole = F.pad(U, (*[0] * 2 * (U.dim() - 2), before, after)).unflatten(1, (-1, self.E))
        states, _ = exclusive_scan(T[None], whole[None], None, False, self.transition)
        return states[0].flatten(1, 2)[:, before : before + U.shape[1]]


def _all_to_all(sent: list[Tensor], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """sent[r] goes to rank r; what comes from each, of the sizes given."""
    out = sent[0].new_empty(sum(sizes))
    dist.all_to_all_single(out, torch.cat(sent), sizes, [part.numel() for part in sent], group=group)
    return list(out.split(sizes))


class SequenceScan:
    """A `kernels.scan.Scan` over the ranks of a group."""

    def __init__(
        self, layout: Layout, group: dist.ProcessGroup, strategy: str = "allgather", transport: torch.dtype | None = None
    ) -> None:
        """strategy: one of STRATEGIES. transport: what states travel as (bf16 halves the bytes), None: as they are."""
        self.strategy, self.run, self.transport = strategy, STRATEGIES[strategy], transport
        self.segments = layout.segments_per_rank
        self.forwards = Segments(tuple(layout.owners), group)
        self.backwards = Segments(tuple(reversed(layout.owners)), group)

    def start(
        self, T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool = False, transition: Transition = SCALAR
    ) -> "_Arriving":
        """As `kernels.scan.Scan.start`; s is a multiple of the segments here. Returns while the maps are on their way."""
        segments = self.backwards if reverse else self.forwards
        if reverse:
            T = transition.adjoint(T)
        T, U = (t.unflatten(1, (self.segments, -1)).flatten(0, 1) for t in (T, U))
        runs = _Runs(T, U, transition, reverse, self.segments)
        begins = _by_segment(initial, runs) if initial is not None and 0 in segments.own else None
        maps = _blocks(runs, *fold(runs.T, runs.U, begins, reverse, transition), self.transport)
        arriving = start(lambda: self.run(maps, segments), U.device)
        return _Arriving(arriving, runs, begins, len(segments.owners) - 1 in segments.own)


class _Runs(NamedTuple):
    """The maps of each segment here as a sequence of its own, [b m, s / m, ...], to be scanned in one direction."""

    T: Tensor
    U: Tensor
    transition: Transition
    reverse: bool
    m: int

    def in_order(self, states: Tensor) -> Tensor:
        """[b m, ...] -> [m, b, ...] in the order of the scan, or back."""
        by_segment = states.unflatten(0, (-1, self.m)).transpose(0, 1)
        return by_segment.flip(0) if self.reverse else by_segment

    def as_runs(self, by_segment: Tensor) -> Tensor:
        """The reverse of `in_order`."""
        return (by_segment.flip(0) if self.reverse else by_segment).transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class _Arriving:
    """The states that enter this rank's segments, on their way; from them its own maps are scanned."""

    entering: Pending[Tensor]
    runs: _Runs
    begins: Tensor | None
    ends_here: bool

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """As `kernels.scan.Scan.start` promises."""
        T, U, transition, reverse, m = self.runs
        b = U.shape[0] // m
        with naming_the_missing("state exchange"):
            arrived = self.entering.wait()
        entering = self.runs.as_runs(arrived.view(m, b, *U.shape[2:]))
        if self.begins is not None:
            entering = entering + self.begins
        states, last = exclusive_scan(T, U, entering, reverse, transition)
        final = self.runs.in_order(last)[-1] if self.ends_here else None
        return states.view(b, -1, *U.shape[2:]), final


def _by_segment(initial: Tensor, runs: _Runs) -> Tensor:
    """The whole sequence's initial state [b, ...] for its first segment, zeros for the others, [b m, ...]."""
    states = torch.zeros(runs.m, *initial.shape, dtype=runs.U.dtype, device=initial.device)
    states[0] = initial
    return runs.as_runs(states)


def _blocks(runs: _Runs, T: Tensor, U: Tensor, transport: torch.dtype | None) -> Maps:
    """One map a segment, T [b m, ...] and U [b m, ...], in the order of the scan and with b and h as one dim."""
    T, U = runs.in_order(T), runs.in_order(U)
    transition = runs.transition
    if isinstance(transition, Dense):
        return Maps(T.flatten(1, 2), U.flatten(1, 2), transition, transport)
    T = T.flatten(1)
    U = U.reshape(*T.shape, -1)
    if isinstance(transition, Decay) and transition.rate is not None:
        rate = transition.rate.expand(runs.U.shape[0] // runs.m, *transition.rate.shape)
        transition = replace(transition, rate=rate.reshape(*U.shape[1:]))
    return Maps(T, U, transition, transport)
