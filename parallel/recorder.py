"""Counts what this process sends through torch.distributed: bytes, rounds and times of every call.

    with record() as traffic:
        step()
    traffic.summary()[("all_to_all", "mesh_cp")].sent

Bytes are those that this rank sends to others, whatever the backend's algorithm makes of them; R is the size of the group:

all_reduce          2 (R-1)/R of the tensor (a reduce-scatter and an all-gather)
all_gather          R-1 times the rank's own tensor
reduce_scatter      what goes to others: (R-1)/R of the input
all_to_all          what goes to others: all but the rank's own part
broadcast           R-1 times the tensor on the source, none elsewhere
send, recv          the tensor, none
batch_isend_irecv   the tensors sent

Each call is one round, a batch of sends and receives too, and also where this rank has nothing to send in it. Calls of a function
under `torch.distributed` and of `ProcessGroup.send` and `recv` are seen, from every thread. Not seen: functions that were taken
from the module before (`f = dist.all_reduce`), functional collectives (those of DTensor) and collectives of Python objects.
"""

import functools
import inspect
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist


@dataclass(slots=True)
class Event:
    """One call. Times in seconds since the epoch; the end of an asynchronous call is that of `wait`, on the host's clock."""

    operation: str
    group: str
    size: int
    """Ranks of the group."""
    sent: int
    """Bytes to other ranks."""
    thread: int
    start: float
    end: float


@dataclass(slots=True)
class Total:
    """Of the calls of one operation on one group: bytes to other ranks, rounds."""

    sent: int = 0
    rounds: int = 0


@dataclass
class Traffic:
    """What one rank did between the begin and the end of `record`, in the order in which the calls returned."""

    rank: int
    events: list[Event] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Bytes to other ranks, over all groups."""
        return sum(event.sent for event in self.events)

    @property
    def rounds(self) -> int:
        """Calls, over all groups."""
        return len(self.events)

    def summary(self) -> dict[tuple[str, str], Total]:
        """By operation and group (its description such as `mesh_cp`, or its name)."""
        totals: dict[tuple[str, str], Total] = defaultdict(Total)
        for event in self.events:
            total = totals[event.operation, event.group]
            total.sent += event.sent
            total.rounds += 1
        return dict(totals)


_lock = threading.Lock()
_recording: list[Traffic] = []
_pending: WeakKeyDictionary[Any, Event] = WeakKeyDictionary()
_inside = threading.local()
"""Whether this thread is in a call that counts: what the library calls within it is not counted again."""


@contextmanager
def record() -> Iterator[Traffic]:
    """Records the calls of this process, of all its threads, until it is left; records may overlap."""
    traffic = Traffic(dist.get_rank() if dist.is_initialized() else 0)
    with _lock:
        if not _recording:
            _patch()
        _recording.append(traffic)
    try:
        yield traffic
    finally:
        with _lock:
            # Not `remove`: it compares, and two records that have seen the same are equal.
            _recording[:] = [other for other in _recording if other is not traffic]
            if not _recording:
                _restore()


def note_round(operation: str, group: dist.ProcessGroup) -> None:
    """Counts a round of others in which this rank neither sends nor receives; nothing when no one records."""
    if _recording:
        now = time.time()
        _add(operation, group, 0, now, now)


def chrome_trace(traffic: Traffic) -> dict[str, Any]:
    """The calls as spans by thread, for chrome://tracing and Perfetto: JSON in the Trace Event Format, times in microseconds."""
    spans = [
        {
            "name": event.operation,
            "cat": event.group,
            "ph": "X",
            "pid": traffic.rank,
            "tid": event.thread,
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "args": {"bytes to other ranks": event.sent, "ranks": event.size},
        }
        for event in traffic.events
    ]
    name = {"name": "process_name", "ph": "M", "pid": traffic.rank, "args": {"name": f"rank {traffic.rank}"}}
    return {"traceEvents": [name, *spans], "displayTimeUnit": "ms"}


Arguments = dict[str, Any]


@dataclass(frozen=True)
class _Counted:
    """A function that is replaced while someone records."""

    owner: Any
    name: str
    operation: str
    sent: Callable[[Arguments, int, int], int]
    """(arguments by name, rank in the group, ranks of the group) -> bytes to other ranks."""
    parameters: tuple[str, ...] = ()
    """Of a function that does not tell them itself."""


def _others(tensors: list[Any], rank: int) -> int:
    return sum(tensor.nbytes for other, tensor in enumerate(tensors) if other != rank)


def _all_to_all_single(arguments: Arguments, rank: int, size: int) -> int:
    tensor, splits = arguments["input"], arguments.get("input_split_sizes")
    own = splits[rank] * tensor[:1].nbytes if splits else tensor.nbytes // size
    return tensor.nbytes - own


def _broadcast(arguments: Arguments, rank: int, size: int) -> int:
    source = arguments.get("group_src")
    if source is None:
        source = dist.get_group_rank(_group(arguments), arguments["src"])
    return (size - 1) * arguments["tensor"].nbytes if source == rank else 0


def _send(arguments: Arguments, rank: int, size: int) -> int:
    return _others(arguments["tensors"], -1) if arguments["dstRank"] != rank else 0


def _nothing(arguments: Arguments, rank: int, size: int) -> int:
    return 0


def _batch(arguments: Arguments, rank: int, size: int) -> int:
    sends = [p for p in arguments["p2p_op_list"] if p.op is dist.isend and p.group_peer != rank]
    return sum(p.tensor.nbytes for p in sends)


_COUNTED = [
    _Counted(dist, "all_reduce", "all_reduce", lambda a, rank, size: 2 * (size - 1) * a["tensor"].nbytes // size),
    _Counted(dist, "all_gather", "all_gather", lambda a, rank, size: (size - 1) * a["tensor"].nbytes),
    _Counted(dist, "reduce_scatter", "reduce_scatter", lambda a, rank, size: _others(a["input_list"], rank)),
    _Counted(dist, "all_to_all", "all_to_all", lambda a, rank, size: _others(a["input_tensor_list"], rank)),
    _Counted(dist, "all_to_all_single", "all_to_all", _all_to_all_single),
    _Counted(dist, "broadcast", "broadcast", _broadcast),
    _Counted(dist, "batch_isend_irecv", "batch_isend_irecv", _batch),
    # The functions isend, irecv, send and recv end here. They stay as they are: P2POp compares with them.
    _Counted(dist.ProcessGroup, "send", "send", _send, ("self", "tensors", "dstRank", "tag")),
    _Counted(dist.ProcessGroup, "recv", "recv", _nothing, ("self", "tensors", "srcRank", "tag")),
    _Counted(dist.ProcessGroup, "recv_anysource", "recv", _nothing, ("self", "tensors", "tag")),
]
# One function each, under the names of this and of earlier versions of torch.
_COUNTED += [
    _Counted(dist, name, "all_gather", lambda a, rank, size: (size - 1) * a["input_tensor"].nbytes)
    for name in ("all_gather_single", "all_gather_into_tensor", "_all_gather_base")
]
_COUNTED += [
    _Counted(dist, name, "reduce_scatter", lambda a, rank, size: (size - 1) * a["input"].nbytes // size)
    for name in ("reduce_scatter_single", "reduce_scatter_tensor", "_reduce_scatter_base")
]

_originals: list[tuple[Any, str, Any]] = []


def _patch() -> None:
    for counted in _COUNTED:
        if hasattr(counted.owner, counted.name):
            _replace(counted.owner, counted.name, functools.partial(_counting, counted))
    _replace(dist.Work, "wait", _waiting)


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    original = vars(owner)[name]
    _originals.append((owner, name, original))
    setattr(owner, name, wrap(original))


def _restore() -> None:
    while _originals:
        setattr(*_originals.pop())


def _counting(counted: _Counted, function: Callable[..., Any]) -> Callable[..., Any]:
    signature = _signature(counted.parameters) if counted.parameters else inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "call", False):
            return function(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        group = _group(arguments)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            return function(*args, **kwargs)
        _inside.call, start = True, time.time()
        try:
            works = function(*args, **kwargs)
        finally:
            _inside.call = False
        event = _add(counted.operation, group, counted.sent(arguments, rank, size), start, time.time())
        for work in works if isinstance(works, list) else [works] if works is not None else []:
            _pending[work] = event
        return works

    return call


def _waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(work, *args, **kwargs)
        event = _pending.pop(work, None)
        if event:
            event.end = time.time()
        return result

    return wait


def _signature(names: tuple[str, ...]) -> inspect.Signature:
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])


def _group(arguments: Arguments) -> Any:
    if "p2p_op_list" in arguments:
        return arguments["p2p_op_list"][0].group
    return arguments.get("self") or arguments.get("group") or dist.group.WORLD


def _add(operation: str, group: dist.ProcessGroup, sent: int, start: float, end: float) -> Event:
    described = group.group_desc not in ("", "undefined")
    name = group.group_desc if described else group.group_name
    event = Event(operation, name, dist.get_world_size(group), sent, threading.get_native_id(), start, end)
    with _lock:
        for traffic in _recording:
            traffic.events.append(event)
    return event
