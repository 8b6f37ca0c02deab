"""What a rank sends to others in one micro-step: by axis of the mesh, as `parallel.recorder` counts it.

Of a layer the messages in the order of forward, and of backward, which brings gradients the other way. What is computed again is
sent again, but what ends a part, whose values backward does not need. Experts are taken to be in balance.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..configs.pattern import LayerKinds
from ..parallel.attention import attention_traffic
from ..parallel.halo import halo_messages
from ..parallel.links import sent_by, traffic
from .flops import HEAD
from .memory import EMBEDDING, INDEX, Unit
from .workload import Workload, state_numbers

ATTENTION = {"ulysses": "all_to_all", "usp": "all_to_all", "ring": "ring", "allgather": "all_gather"}
"""The kind of message of each way that attention works over cp."""
EXCHANGE = {"ring": "ring", "doubling": "ring", "allgather": "all_gather", "sliced": "all_to_all"}
"""And of each way that boundary states pass."""
KEYS_AND_VALUES = "keys and values"
"""Of messages that attention computes beside."""


class Message(NamedTuple):
    """One collective, or a batch of messages."""

    axis: str
    """Of `Mesh.axes`, or "states", "neighbours" of tp, "data", "expert_data", "copies", "expert_copies"."""
    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, or ring: to one neighbour."""
    sent: int
    """Bytes to other ranks."""
    of: str
    """What it is of."""
    rounds: int = 1


class Messages(NamedTuple):
    """Of a part."""

    forward: list[Message]
    backward: list[Message]
    again: list[Message]
    """Of a forward that is repeated for its backward."""


def part_sends(kind: str, w: Workload, cp_rank: int = 0) -> Messages:
    """Of a mixer, a feed-forward, the EMBEDDING, or the HEAD with the loss."""
    return SENDS[kind](w, cp_rank)


def layer_sends(kinds: LayerKinds, w: Workload, cp_rank: int = 0) -> Messages:
    """Of a layer: forward, and backward with what is sent again in it as `parallel.recompute` says."""
    parts = {kind: part_sends(kind, w, cp_rank) for kind in kinds if kind is not None}
    mixer, last = parts[kinds.mixer], [*parts.values()][-1]
    forward = [message for part in parts.values() for message in part.forward]
    backward = [message for part in [*parts.values()][::-1] for message in part.backward]
    again = {
        "none": [],
        "mixer": mixer.again,
        "feed_forward": last.again if kinds.feed_forward else [],
        "layer": [*(mixer.forward if kinds.feed_forward else []), *last.again],
    }[w.parallel.recompute]
    return Messages(forward, again + backward, again)


def _all_reduce(axis: str, ranks: int, size: int, of: str) -> list[Message]:
    return [Message(axis, "all_reduce", 2 * (ranks - 1) * size // ranks, of)] if ranks > 1 else []


def _all_gather(axis: str, ranks: int, own: int, of: str) -> list[Message]:
    return [Message(axis, "all_gather", (ranks - 1) * own, of)] if ranks > 1 else []


def _reduce_scatter(axis: str, ranks: int, whole: int, of: str) -> list[Message]:
    return [Message(axis, "reduce_scatter", (ranks - 1) * whole // ranks, of)] if ranks > 1 else []


def _all_to_all(axis: str, ranks: int, whole: int, of: str) -> list[Message]:
    return [Message(axis, "all_to_all", (ranks - 1) * whole // ranks, of)] if ranks > 1 else []


class _Region(NamedTuple):
    """The messages at the two ends of what is split over tp."""

    enter: list[Message]
    leave: list[Message]
    enter_backward: list[Message]
    leave_backward: list[Message]


def _region(w: Workload, of: str, token_sizes: tuple[int, ...], integers: int = 0) -> _Region:
    """token_sizes: bytes a token of what enters, the first as much as what leaves; integers: of what has no gradient."""
    tp, tokens = w.parallel.tp, w.tokens
    out = tokens * token_sizes[0]
    if not w.parallel.sequence_parallel:
        backward = [m for size in token_sizes for m in _all_reduce("tp", tp, tokens * size, f"gradients of {of}'s input")]
        return _Region([], _all_reduce("tp", tp, out, f"{of}'s output"), backward, [])
    entering = [*token_sizes, *([integers] if integers else [])]
    return _Region(
        [m for size in entering for m in _all_gather("tp", tp, w.own_tokens * size, f"{of}'s input")],
        _reduce_scatter("tp", tp, out, f"{of}'s output"),
        [m for size in token_sizes for m in _reduce_scatter("tp", tp, tokens * size, f"gradients of {of}'s input")],
        _all_gather("tp", tp, w.own_tokens * token_sizes[0], f"gradients of {of}'s output"),
    )


def _mixer(w: Workload, of: str, forward: list[Message], backward: list[Message]) -> Messages:
    region = _region(w, of, (w.model.d_model * w.size,))
    inside = [*region.enter, *forward]
    return Messages([*inside, *region.leave], [*region.leave_backward, *backward, *region.enter_backward], inside)


def _mamba2(w: Workload, cp_rank: int) -> Messages:
    tp, sizes = w.parallel.tp, w.model.mamba2
    sums = []
    if sizes.groups % tp:
        axis = "tp" if sizes.groups == 1 else "neighbours"
        sums = _all_reduce(axis, tp // sizes.groups, w.tokens * w.wide, "sums of the gated norm")
    if w.cp == 1:
        return _mixer(w, "mamba2", sums, sums)
    halos, exchanges = _passed_on(w, "mamba2", cp_rank, (sizes.conv_width - 1) * (w.inner + w.shared))
    return _mixer(w, "mamba2", [halos[0], exchanges[0], *sums], [*sums, exchanges[1], halos[1]])


def _mamba(w: Workload, cp_rank: int) -> Messages:
    sizes = w.model.mamba
    sums = _all_reduce("tp", w.parallel.tp, w.tokens * (w.model.dt_rank + 2 * sizes.state_dim) * w.size, "dt, B and C")
    if w.cp == 1:
        return _mixer(w, "mamba", sums, sums)
    halos, exchanges = _passed_on(w, "mamba", cp_rank, (sizes.conv_width - 1) * w.mamba_inner)
    return _mixer(w, "mamba", [halos[0], *sums, exchanges[0]], [exchanges[1], *sums, halos[1]])


def _passed_on(w: Workload, mixer: str, cp_rank: int, tail: int) -> tuple[list[Message], list[Message]]:
    """What goes from segment to segment, forward and backward: the last tokens, `tail` numbers of each sequence, and the states."""
    strategy, states = str(w.parallel.strategy), state_sizes(w, mixer)
    rounds = len(traffic(strategy, w.layout, *states))
    halos, exchanges = [], []
    for reverse in (False, True):
        messages = halo_messages(w.layout, cp_rank, reverse)
        halos.append(Message("cp", "ring", messages * w.b * tail * w.size, "tokens before a segment"))
        sent = sent_by(cp_rank, strategy, w.layout, *states, reverse=reverse)
        exchanges.append(Message("states", EXCHANGE[strategy], sent, "boundary states", rounds))
    return halos, exchanges


def state_sizes(w: Workload, mixer: str) -> tuple[int, int, int]:
    """Of one segment's map: bytes of the states as they travel, and of the decays; bytes of a state's number."""
    each = 2 if w.parallel.transport == "bf16" else w.wide
    states, decays = (w.b * numbers // w.parallel.tp for numbers in state_numbers(w.model, mixer))
    return states * each, decays * w.wide, each


def _attention(w: Workload, cp_rank: int) -> Messages:
    if w.cp == 1:
        return _mixer(w, "attention", [], [])
    ways = []
    for backward in (False, True):
        sizes = w.b, w.tokens // w.b, w.heads, w.kv_heads, w.model.attention.head_dim, w.size
        rounds, sent = attention_traffic(w.parallel.attention, w.layout, *sizes, backward=backward)  # type: ignore[arg-type]
        ways.append([Message("cp", ATTENTION[w.parallel.attention], sent, KEYS_AND_VALUES, rounds)])
    return _mixer(w, "attention", *ways)


def _mlp(w: Workload, cp_rank: int) -> Messages:
    return _mixer(w, "mlp", [], [])


def _moe(w: Workload, cp_rank: int) -> Messages:
    sizes, ep, d = w.model.moe, w.parallel.ep, w.model.d_model
    region = _region(w, "moe", (d * w.size, sizes.top_k * w.size), sizes.top_k * INDEX)
    rows = [m for each in (d, 1) for m in _all_to_all("ep", ep, w.rows * each * w.size, "rows to their experts")]
    back = _all_to_all("ep", ep, w.rows * d * w.size, "rows from their experts")
    counts = _all_to_all("ep", ep, sizes.experts * INDEX, "counts of rows")
    limits = []
    if sizes.capacity is not None:
        limits = _all_gather("dp_cp", w.dp * w.cp, w.b * w.layout.segments_per_rank * sizes.experts * 4, "choices of experts")
    axis, ranks = ("dp_cp_tp", w.parallel.tp) if w.parallel.sequence_parallel else ("dp_cp", 1)
    statistics = _all_reduce(axis, w.dp * w.cp * ranks, (2 * sizes.experts + 2) * w.wide, "statistics of the router")
    forward = [*region.enter, *limits, *counts, *rows, *back, *region.leave, *statistics]
    return Messages(forward, [*region.leave_backward, *back, *rows, *region.enter_backward], forward)


def _embedding(w: Workload, cp_rank: int) -> Messages:
    region = _region(w, "embedding", (w.model.d_model * w.size,))
    return Messages(region.leave, region.leave_backward, [])


def _head(w: Workload, cp_rank: int) -> Messages:
    region = _region(w, "head", (w.model.d_model * w.size,))
    sums = _all_gather("tp", w.parallel.tp, 3 * w.tokens * w.wide, "statistics of the logits")
    return Messages([*region.enter, *sums], region.enter_backward, [])


SENDS: dict[str, Callable[[Workload, int], Messages]] = {
    "mamba2": _mamba2,
    "mamba": _mamba,
    "attention": _attention,
    "mlp": _mlp,
    "moe": _moe,
    EMBEDDING: _embedding,
    HEAD: _head,
}


def unit_gathers(unit: Unit, w: Workload) -> list[Message]:
    """To have an FSDP unit's parameters whole."""
    size = w.wide if unit.name == "fp32" else w.size
    return _all_gather(_data_axis(unit), unit.ranks, unit.own * size, "parameters")


def unit_scatters(unit: Unit, w: Workload) -> list[Message]:
    """To add an FSDP unit's gradients up."""
    return _reduce_scatter(_data_axis(unit), unit.ranks, unit.own * unit.ranks * w.wide, "gradients")


def unit_copies(unit: Unit, w: Workload) -> list[Message]:
    """To add the gradients of copies of the parameters up (HSDP)."""
    axis = "expert_copies" if unit.name == "experts" else "copies"
    return _all_reduce(axis, w.parallel.replicate, unit.own * w.wide, "gradients of the copies")


def _data_axis(unit: Unit) -> str:
    return "expert_data" if unit.name == "experts" else "data"


def boundary_sends(w: Workload) -> int:
    """Bytes of what one stage hands to the next of a micro-step; as many come back."""
    from .moe import auxiliary_size

    return w.own_tokens * w.model.d_model * w.size + auxiliary_size(w.model.moe) * w.wide
