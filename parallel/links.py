"""What an exchange of boundary states costs: bytes and rounds of each strategy, and the latency and bandwidth of the links.

A round lasts as long as the rank that sends most: latency + bytes / bandwidth. The bytes are those that `affine_scan` sends,
number by number (`tests/parallel/test_links.py` compares them with what is recorded). Not counted: computation, and that a round
of R - 1 messages costs more of a latency than one of one message.
"""

import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..configs.errors import UserError
from .layout import Layout


class Link(NamedTuple):
    """What joins the ranks of a group."""

    latency: float
    """Seconds that a round takes with next to nothing in it."""
    bandwidth: float
    """Bytes per second that a rank sends while the others do too."""


class Place(NamedTuple):
    """Where a link was measured."""

    backend: str
    device: str
    """cpu, or the GPU's name."""
    ranks: int
    nodes: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, device: torch.device) -> Self:
        """The place of a group; nodes as torchrun has laid the ranks out, one where nothing says so."""
        ranks = dist.get_process_group_ranks(group)
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(str(dist.get_backend(group)), name, len(ranks), len({rank // per_node for rank in ranks}))


DEFAULTS = {
    # Not measured here: NVLink or an InfiniBand port of 400 Gb/s, about what vendors give for one.
    "nccl": Link(15e-6, 50e9),
    # `baton bench exchange --nproc 2` over loopback, one rank a core; 4 ranks on the same 2 cores: 1200 us and 1.1 GB/s.
    "gloo": Link(260e-6, 1.6e9),
}
"""By backend, for groups that were not measured."""


class Links:
    """Links by the place where they were measured, as a YAML file holds them."""

    def __init__(self, measured: dict[Place, Link]) -> None:
        self.measured = measured

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of a file. Raises UserError."""
        try:
            entries = _ENTRIES.validate_python(yaml.safe_load(path.read_text()))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `baton bench exchange --links {path}` writes it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'is no text'}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise UserError(f"{where}: no YAML: {getattr(error, 'problem', None) or error}") from None
        except ValidationError as errors:
            raise UserError(f"{path}: {_explain(errors)}") from None
        return cls({entry.place: entry.link for entry in entries})

    def write(self, path: Path) -> None:
        """To a file, which is never seen half written. Raises UserError."""
        entries = [_Entry(**place._asdict(), **link._asdict()).model_dump() for place, link in sorted(self.measured.items())]
        text = "# Written by `baton bench exchange`. latency: seconds a round; bandwidth: bytes/s that a rank sends.\n"
        if path.is_dir():
            raise UserError(f"{path}: cannot be written: is a folder; allowed: a file")
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + yaml.safe_dump(entries, sort_keys=False))
            partial.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.filename}: {error.strerror}") from None

    def find(self, place: Place) -> Link:
        """That of the place; else of the same backend and device, nearest in nodes, then in ranks; else the backend's default."""
        near = [known for known in self.measured if known[:2] == place[:2]]
        if not near:
            return DEFAULTS.get(place.backend, DEFAULTS["gloo"])
        return self.measured[min(near, key=lambda known: (_apart(known.nodes, place.nodes), _apart(known.ranks, place.ranks)))]


def _apart(one: int, other: int) -> float:
    return abs(math.log(one / other))


class _Entry(BaseModel):
    """One link as the file has it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    backend: str
    device: str
    ranks: int = Field(ge=2)
    nodes: int = Field(ge=1)
    latency: float = Field(gt=0)
    bandwidth: float = Field(gt=0)

    @property
    def place(self) -> Place:
        return Place(self.backend, self.device, self.ranks, self.nodes)

    @property
    def link(self) -> Link:
        return Link(self.latency, self.bandwidth)


_ENTRIES = TypeAdapter(list[_Entry])


def _explain(errors: ValidationError) -> str:
    error = errors.errors()[0]
    fields = ", ".join(_Entry.model_fields)
    if not error["loc"]:
        return f"holds no links; allowed: a list of entries with {fields}"
    index, *keys = error["loc"]
    where = ", ".join([f"link {int(index) + 1}", *map(str, keys)])
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "extra_forbidden" or not keys:
        return f"{where} is {error['input']!r}, allowed: {fields}"
    return f"{where} is {error['input']!r}, allowed: {error['msg'].removeprefix('Input should be ')}"


Round = dict[int, int]
"""What each rank that sends anything sends to others, in bytes."""


def traffic(strategy: str, layout: Layout, state_bytes: int, decay_bytes: int, row_bytes: int = 4) -> list[int]:
    """For each round of a strategy, in one direction, the most bytes that any rank sends to others.

    state_bytes and decay_bytes: of one segment's map. row_bytes: the unit in which `sliced` cuts a state, an element of it as
    it travels (of dense transitions a row of K elements); decays are fp32, each for as many rows. Raises KeyError for an
    unknown strategy.
    """
    return [max(sent.values(), default=0) for sent in _rounds(strategy, layout, state_bytes, decay_bytes, row_bytes)]


def largest_sent(strategy: str, layout: Layout, state_bytes: int, decay_bytes: int, row_bytes: int = 4) -> int:
    """The most bytes that any rank sends to others in all rounds together; parameters as of `traffic`."""
    totals: Counter[int] = Counter()
    for sent in _rounds(strategy, layout, state_bytes, decay_bytes, row_bytes):
        totals.update(sent)
    return max(totals.values(), default=0)


def sent_by(
    rank: int, strategy: str, layout: Layout, state_bytes: int, decay_bytes: int, row_bytes: int = 4, reverse: bool = False
) -> int:
    """The bytes that a rank sends to others in all rounds together, in reverse those of backward; parameters as of `traffic`."""
    if reverse and strategy in ("ring", "doubling"):
        # What they send depends on the rank's place alone.
        rank = layout.owners[::-1][layout.owners.index(rank)]
    return sum(sent.get(rank, 0) for sent in _rounds(strategy, layout, state_bytes, decay_bytes, row_bytes))


def seconds(strategy: str, layout: Layout, state_bytes: int, decay_bytes: int, link: Link, row_bytes: int = 4) -> float:
    """What the rounds of a strategy take one after another; parameters as of `traffic`."""
    sent = traffic(strategy, layout, state_bytes, decay_bytes, row_bytes)
    return len(sent) * link.latency + sum(sent) / link.bandwidth


def choose(layout: Layout, state_bytes: int, decay_bytes: int, link: Link, row_bytes: int = 4) -> str:
    """The strategy that takes the least time, of several such the one that sends least; parameters as of `traffic`."""

    def cost(strategy: str) -> tuple[float, int]:
        size = layout, state_bytes, decay_bytes
        return seconds(strategy, *size, link, row_bytes), largest_sent(strategy, *size, row_bytes)

    return min(STRATEGIES, key=cost)


@functools.lru_cache(256)
def _rounds(strategy: str, layout: Layout, state_bytes: int, decay_bytes: int, row_bytes: int) -> list[Round]:
    return STRATEGIES[strategy](layout, state_bytes, decay_bytes, row_bytes)


def _ring(layout: Layout, state_bytes: int, decay_bytes: int, row_bytes: int) -> list[Round]:
    return [{rank: state_bytes} if rank != following else {} for rank, following in itertools.pairwise(layout.owners)]


def _allgather(layout: Layout, state_bytes: int, decay_bytes: int, row_bytes: int) -> list[Round]:
    sent = (layout.ranks - 1) * layout.segments_per_rank * (state_bytes + decay_bytes)
    return [dict.fromkeys(range(layout.ranks), sent)]


def _doubling(layout: Layout, state_bytes: int, decay_bytes: int, row_bytes: int) -> list[Round]:
    each = state_bytes + decay_bytes
    return [{rank: count * each for rank, count in counts.items()} for counts in _doubling_messages(layout)]


@functools.lru_cache(64)
def _doubling_messages(layout: Layout) -> list[Counter[int]]:
    """For each round, how many maps a rank sends to others."""
    owners, n = layout.owners, len(layout.owners)
    steps = [1 << k for k in range(max(n - 2, 0).bit_length())]
    # First every segment hands on its own map, then all but the first what they know of the segments before them.
    pairs = [itertools.pairwise(owners), *(zip(owners[1:], owners[1 + step :], strict=False) for step in steps)]
    return [Counter(giver for giver, taker in pair if giver != taker) for pair in pairs]


def _sliced(layout: Layout, state_bytes: int, decay_bytes: int, row_bytes: int) -> list[Round]:
    R, m = layout.ranks, layout.segments_per_rank
    rows, blocks = state_bytes // row_bytes, max(decay_bytes // DECAY, 1)
    per_block = max(rows // blocks, 1)
    starts = [rows * rank // R for rank in range(R + 1)]
    slices = [(stop - start) * row_bytes for start, stop in itertools.pairwise(starts)]
    decays = [
        (-(-stop // per_block) - start // per_block) * DECAY if stop > start else 0 for start, stop in itertools.pairwise(starts)
    ]
    whole = sum(slices) + sum(decays)
    return [
        {rank: m * (whole - slices[rank] - decays[rank]) for rank in range(R)},
        {rank: (len(layout.owners) - m) * slices[rank] for rank in range(R)},
    ]


DECAY = 4
"""Bytes of a decay, a number in fp32."""

STRATEGIES: dict[str, Callable[[Layout, int, int, int], list[Round]]] = {
    "ring": _ring,
    "allgather": _allgather,
    "doubling": _doubling,
    "sliced": _sliced,
}
"""The names of `affine_scan.STRATEGIES`."""
