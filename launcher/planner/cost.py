"""Seconds that a part of the model takes on a rank for one micro-step: computing, and waiting for what others send."""

import math
from typing import NamedTuple

from ...configs.pattern import RECURRENT
from ...kernels.cross_entropy.op import chunk_size
from ...models.flops import FLOPS, HEAD, TRAINING, Work
from ...models.memory import EMBEDDING, Unit
from ...models.traffic import KEYS_AND_VALUES, Message, part_sends, state_sizes, unit_copies, unit_gathers, unit_scatters
from ...models.workload import Workload
from ...parallel.attention import BACKWARD_PRODUCTS, attention_seconds
from ...parallel.links import Link, seconds
from .machine import MEMORY, Machine

Times = dict[str, float]
"""Seconds by cause: a kind of part for what it computes, an axis for what is waited for."""

FORWARD = dict.fromkeys(Work, 1 / TRAINING) | {
    Work.ATTENTION: 1 / (1 + BACKWARD_PRODUCTS),
    Work.SCAN: 1 / 4,
    Work.SELECTIVE_SCAN: 1 / 4,
}
"""Of the time of a forward with its backward, the forward's part: attention's and the scans' backward compute some of it again."""


class PartCost(NamedTuple):
    """Of a mixer or a feed-forward with its norm, of the EMBEDDING or the HEAD."""

    forward: Times
    backward: Times
    again: Times
    """Of its forward within backward, where nothing follows on it there: what ends it is not sent."""


def part_cost(kind: str, w: Workload, machine: Machine) -> PartCost:
    """A part's cost; what FSDP sends is not in it."""
    middle = w.cp // 2
    messages = part_sends(kind, w, middle)
    computed = [_computing(kind, w, machine, backward) for backward in (False, True)]
    waited = [
        _waiting(kind, w, machine, sent, i == 1) for i, sent in enumerate((messages.forward, messages.backward, messages.again))
    ]
    forward, backward = ({kind: time} for time in computed)
    again = {} if kind in (EMBEDDING, HEAD) else _sum(forward, waited[2])
    return PartCost(_sum(forward, waited[0]), _sum(backward, waited[1]), again)


def add(total: Times, more: Times, factor: float = 1.0) -> None:
    """total += factor * more."""
    for cause, time in more.items():
        total[cause] = total.get(cause, 0.0) + factor * time


def _sum(*times: Times) -> Times:
    total: Times = {}
    for each in times:
        add(total, each)
    return total


def _computing(kind: str, w: Workload, machine: Machine, backward: bool) -> float:
    time = _passes(kind, w, backward) / machine.rates[MEMORY]
    for work, flops in FLOPS.get(kind, lambda *_: {})(w.model, w.context).items():
        if work is Work.ATTENTION:
            time += _attending(w, machine, backward)
        elif machine.rates[work]:
            whole = TRAINING * flops * w.b / (w.parallel.tp * w.cp) / machine.rates[work]
            # The loss turns logits into their gradient in forward, and multiplies that too.
            share = 1.0 if kind == HEAD else FORWARD[work]
            time += whole * (1 - share if backward else share)
    return time


def _attending(w: Workload, machine: Machine, backward: bool) -> float:
    """Attention over cp, with what its rounds cannot hide; the rank that has most waits for nobody."""
    rate = machine.rates[Work.ATTENTION] / (TRAINING * FORWARD[Work.ATTENTION])
    strategy = w.parallel.attention if w.cp > 1 else "ring"
    tp, u = w.parallel.tp, w.ulysses
    blocks = machine.link(tp * u, w.cp // u, "all_gather" if strategy == "allgather" else "ring")
    sizes = w.heads, w.kv_heads, w.model.attention.head_dim, w.size
    deal = machine.link(tp, u, "all_to_all")
    return attention_seconds(strategy, w.layout, w.b, w.tokens // w.b, *sizes, blocks, rate, backward, deal)  # type: ignore[arg-type]


def _passes(kind: str, w: Workload, backward: bool) -> int:
    """Bytes that element-wise work reads and writes, in the kernels' number of passes; backward has twice as many."""
    if kind == HEAD:
        return _loss_passes(w, backward)
    return _forward_passes(kind, w) * (2 if backward else 1)


def _loss_passes(w: Workload, backward: bool) -> int:
    """Forward turns a chunk's logits into their gradient, and adds to that of the weight; backward scales what came of it."""
    rows, d = w.model.vocab_size // w.parallel.tp, w.model.d_model
    weight, hidden = rows * d * w.wide, w.tokens * d * w.size
    if backward:
        return 2 * (weight + hidden) + 4 * w.own_tokens * d * w.size
    chunks = math.ceil(w.tokens / chunk_size(w.tokens, rows * w.size, "cuda" if w.fused else "cpu"))
    return 2 * w.own_tokens * d * w.size + 4 * w.tokens * rows * w.size + 2 * chunks * weight


def _forward_passes(kind: str, w: Workload) -> int:
    model, s, t = w.model, w.size, w.tokens
    channel = w.own_tokens * model.d_model * s
    norm, add = 2 * channel, 3 * channel
    if kind == "mamba2":
        return norm + add + t * s * (2 * (w.inner + w.shared) + 3 * w.inner)
    if kind == "mamba":
        return norm + add + t * s * 5 * w.mamba_inner
    if kind == "attention":
        return norm + add
    if kind == "mlp":
        return 4 * channel + add + _gate_passes(model.mlp.activation) * t * s * (model.mlp.hidden // w.parallel.tp)
    if kind == "moe":
        moved = 2 * (t + w.rows) * model.d_model * s
        return 4 * channel + add + moved + _gate_passes(model.moe.activation) * w.rows * s * (model.moe.hidden // w.parallel.tp)
    return 2 * channel


def _gate_passes(activation: str) -> int:
    """Tensors of hidden units that an activation reads and writes."""
    return 3 if activation == "swiglu" else 2


def _waiting(kind: str, w: Workload, machine: Machine, messages: list[Message], backward: bool) -> Times:
    """By axis, what messages take beyond what is computed meanwhile. Attention's are in its own time."""
    times: Times = {}
    for message in messages:
        if message.of != KEYS_AND_VALUES:
            add(times, {"cp" if message.axis == "states" else message.axis: _message_seconds(kind, message, w, machine)})
    hidden = _hidden_behind(kind, w, machine) * (2 if backward else 1)
    for axis, window in (("cp", hidden if kind in RECURRENT else 0.0), ("ep", hidden if kind == "moe" else 0.0)):
        if axis in times:
            times[axis] = max(0.0, times[axis] - window)
    return times


def _hidden_behind(kind: str, w: Workload, machine: Machine) -> float:
    """Seconds of forward's work while messages travel: the projection of the gate, the expert that all tokens share."""
    shared = w.model.moe.shared_hidden // w.parallel.tp
    matrices = 3 if w.model.moe.activation == "swiglu" else 2
    channels = {"mamba2": w.inner, "mamba": w.mamba_inner, "moe": matrices * shared}.get(kind, 0)
    return 2 * w.tokens * w.model.d_model * channels / machine.rates[Work.MATMUL]


def _message_seconds(kind: str, message: Message, w: Workload, machine: Machine) -> float:
    if message.axis == "states":
        link = machine.link(w.parallel.tp, w.cp, message.kind)
        states, decays, size = state_sizes(w, kind)
        return seconds(str(w.parallel.strategy), w.layout, states, decays, link, size)
    return transfer_seconds(message, axis_link(message.axis, message.kind, w, machine))


def transfer_seconds(message: Message, link: Link) -> float:
    """Of one message by itself."""
    return message.rounds * link.latency + message.sent / link.bandwidth


def axis_link(axis: str, kind: str, w: Workload, machine: Machine) -> Link:
    """What joins an axis' ranks: tp innermost, then cp, dp and pp."""
    parallel, tokens = w.parallel, w.dp * w.cp
    data = tokens // parallel.replicate
    stride, ranks = {
        "tp": (1, parallel.tp),
        "neighbours": (1, parallel.tp),
        "cp": (parallel.tp, w.cp),
        "dp_cp": (parallel.tp, tokens),
        "dp_cp_tp": (1, tokens * parallel.tp),
        "ep": (parallel.tp, parallel.ep),
        "data": (parallel.tp, data),
        "expert_data": (parallel.tp * parallel.ep, data // parallel.ep),
        "copies": (parallel.tp * data, parallel.replicate),
        "expert_copies": (parallel.tp * data, parallel.replicate),
        "pp": (parallel.tp * tokens, parallel.pp),
    }[axis]
    return machine.link(stride, ranks, kind)


class UnitCost(NamedTuple):
    """Seconds of what FSDP sends for a part."""

    gather: float
    scatter: float
    copies: float


def units_cost(units: list[Unit], w: Workload, machine: Machine) -> UnitCost:
    """Of all units of a part."""

    def total(messages: list[Message]) -> float:
        return sum(transfer_seconds(message, axis_link(message.axis, message.kind, w, machine)) for message in messages)

    return UnitCost(*(sum(total(of(unit, w)) for unit in units) for of in (unit_gathers, unit_scatters, unit_copies)))
