"""Bytes that a rank holds: of parameters, their gradients and AdamW's state, and of what a layer keeps for backward.

`kept` counts the tensors that autograd saves, each storage once, as saved-tensor hooks see them (`tests/models/test_memory.py`):
in balance of the experts, without documents, and without what is smaller than a number a token. A part is a mixer or a feed-forward
with the norm before it; what it is given, the hidden states, counts as the part's.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..configs.pattern import LayerKinds
from ..configs.schema import Activation, ModelConfig, ParallelConfig, Recompute
from ..kernels.selective_scan import count_maps as count_selective_maps
from ..kernels.ssd import count_maps
from .flops import HEAD
from .hybrid import Head, Layer
from .moe import Experts
from .sharding import Split, SplitExperts, SplitGroups
from .vocabulary import Embedding
from .workload import Workload

Terms = dict[str, int]
"""Bytes by what they are of."""

EMBEDDING = "embedding"
"""Beside layers and the HEAD, a part of a model."""
INDEX = 8
"""Bytes of a token id, or the number of an expert or a row."""


class ParameterShape(NamedTuple):
    """One parameter of a part, as one device has it."""

    name: str
    shape: tuple[int, ...]
    split: Split | SplitGroups | SplitExperts | None
    """How tp and ep cut it; None: every rank has all of it."""
    unit: str
    """What FSDP gathers together: "experts" where they are spread over ep, "fp32" what bf16 does not touch, "" the rest."""


def parameter_shapes(model: ModelConfig, part: LayerKinds | str) -> list[ParameterShape]:
    """Of a layer by its kinds, of EMBEDDING or HEAD, as the modules themselves have them."""
    return [*_shapes(_on_meta(model, part))]


def _on_meta(model: ModelConfig, part: LayerKinds | str) -> nn.Module:
    with torch.device("meta"):
        if isinstance(part, LayerKinds):
            return Layer(model, part)
        return Embedding(model) if part == EMBEDDING else Head(model)


def _shapes(part: nn.Module) -> Iterator[ParameterShape]:
    modules = dict(part.named_modules())
    splits = {
        f"{name}.{key}" if name else key: split
        for name, module in modules.items()
        for key, split in getattr(module, "sharding", {}).items()
    }
    exact = [name for name, module in modules.items() if getattr(module, "fp32", False)]
    stacked = [f"{name}.stacked." for name, module in modules.items() if isinstance(module, Experts)]
    for name, parameter in part.named_parameters():
        owner = name.rpartition(".")[0]
        unit = "fp32" if owner in exact else "experts" if name.startswith(tuple(stacked) or "?") else ""
        yield ParameterShape(name, tuple(parameter.shape), splits.get(name), unit)


class Unit(NamedTuple):
    """What FSDP gathers at once on a rank: how many numbers, and how they lie."""

    name: str
    """As `ParameterShape.unit`."""
    ranks: int
    """That share it out."""
    gathered: int
    """Numbers of all of it."""
    own: int
    """Numbers that travel of each rank's share, padding included."""
    held: int
    """Numbers of the largest share, the first rank's."""


def units(shapes: list[ParameterShape], parallel: ParallelConfig, data_ranks: int) -> list[Unit]:
    """FSDP's units of a part; data_ranks: dp x cp / replicate, over which dense parameters are shared out."""
    groups: dict[str, list[ParameterShape]] = {}
    for shape in shapes:
        unit = shape.unit if shape.unit != "experts" or parallel.ep > 1 else ""
        groups.setdefault(unit, []).append(shape)
    found = []
    for name, members in groups.items():
        ranks = data_ranks // parallel.ep if name == "experts" else data_ranks
        gathered = own = held = 0
        for member in members:
            local = local_shape(member, parallel)
            rows, row = _rows(local, member, parallel, ranks)
            each = -(-rows // ranks)
            gathered, own, held = gathered + rows * row, own + each * row, held + min(each, rows) * row
        found.append(Unit(name, ranks, gathered, own, held))
    return found


def local_shape(shape: ParameterShape, parallel: ParallelConfig) -> tuple[int, ...]:
    """What tp and ep leave a rank of a parameter."""
    tp, sizes = parallel.tp, [*shape.shape]
    if isinstance(shape.split, SplitGroups):
        sizes[0] //= tp if shape.split.groups % tp == 0 else 1
    elif shape.split is not None:
        sizes[shape.split.dim] //= tp
    if isinstance(shape.split, SplitExperts):
        sizes[0] //= parallel.ep
    return tuple(sizes)


def _rows(local: tuple[int, ...], shape: ParameterShape, parallel: ParallelConfig, ranks: int) -> tuple[int, int]:
    """Along which FSDP cuts a parameter: how many, and the numbers of each; as `parallelize` places them."""
    dim = 0
    if len(local) == 3:
        taken = shape.split.dim if isinstance(shape.split, SplitExperts) and (parallel.tp > 1 or parallel.ep > 1) else None
        dim = next((d for d in (2, 1) if d != taken and local[d] % ranks == 0), 0)
    return local[dim], math.prod(local) // local[dim]


def kept(kinds: LayerKinds, w: Workload, recompute: Recompute) -> dict[str, Terms]:
    """What a layer keeps of a micro-step from forward to backward, by part."""
    parts = {kind: part_keeps(kind, w) for kind in kinds if kind is not None}
    x = w.own_tokens * w.model.d_model * w.size
    if recompute == "layer":
        return {kinds.mixer: {"hidden states": x}}
    if recompute == "mixer":
        parts[kinds.mixer] = {"hidden states": x}
    if recompute == "feed_forward" and kinds.feed_forward is not None:
        # The residual is the mixer's hidden states, which are counted there.
        parts[kinds.feed_forward] = {"mixer's output": x}
    return parts


def part_keeps(kind: str, w: Workload) -> Terms:
    """What a mixer or a feed-forward and the norm before it keep; or the EMBEDDING, or the HEAD with the loss."""
    return KEEPS[kind](w)


def _norm(w: Workload) -> Terms:
    """hidden states, and what the norm makes of them, which the matrices after it keep."""
    own, d = w.own_tokens, w.model.d_model
    size = w.size if w.fused else w.wide
    terms = {"hidden states": own * d * size, "norm's statistics": own * w.wide}
    return terms if w.fused else terms | {"norm before its weight": own * d * size}


def _normed(w: Workload) -> Terms:
    return {"normed": w.tokens * w.model.d_model * w.size}


def _mamba2(w: Workload) -> Terms:
    t, sizes = w.tokens, w.model.mamba2
    maps = w.b * count_maps(w.b, t // w.b, w.mamba_heads, w.layout.segments_per_rank, sizes.chunk_size, w.size, w.fused)
    terms = _norm(w) | _normed(w)
    before = t * (w.inner + w.shared) * w.size
    terms |= {
        "x, B and C before the conv": before,
        "x, B and C": before,
        "dt": t * w.mamba_heads * w.size,
        "entering states": maps * w.inner * sizes.state_dim * w.wide,
    }
    return terms | {
        "y, z": 2 * t * w.inner * w.size,
        "gated norm's statistics": t * w.groups * w.wide,
        "gated norm": t * w.inner * w.size,
    }


def _mamba(w: Workload) -> Terms:
    t, sizes, inner, rank = w.tokens, w.model.mamba, w.mamba_inner, w.model.dt_rank
    maps = w.b * count_selective_maps(w.b, t // w.b, inner, w.layout.segments_per_rank, w.fused)
    each, dtbc = t * inner * w.size, t * (rank + 2 * sizes.state_dim) * w.size
    terms = _norm(w) | _normed(w) | {"x before the conv": each, "x": each, "dt": each, "dt, B and C": dtbc}
    terms["entering states"] = maps * inner * (sizes.state_dim + 1) * w.wide
    if sizes.norms:
        terms["norms of dt, B and C"] = (1 if w.fused else 2) * dtbc + 3 * t * w.wide
    return terms | _gated(each)


def _attention(w: Workload) -> Terms:
    t, e = w.tokens, w.model.attention.head_dim
    queries, held = t * w.heads * e * w.size, w.kv_heads
    terms = _norm(w) | _normed(w)
    if w.ulysses > 1:
        # As many heads of keys as the exchange needs; what came in one message stays, and the output is kept on both sides.
        held = math.lcm(w.kv_heads, w.ulysses)
        terms |= {"k and v as they came": 2 * t * held * e * w.size, "output by heads": queries}
    keys = 2 * t * held * e * w.size
    return terms | {"q": queries, "k and v": keys, "output": queries, "log-sum-exps": t * w.heads * w.wide}


def _mlp(w: Workload) -> Terms:
    each = w.tokens * (w.model.mlp.hidden // w.parallel.tp) * w.size
    return _norm(w) | _normed(w) | _hidden(w.model.mlp.activation, each)


def _hidden(activation: Activation, each: int) -> Terms:
    return _gated(each) if activation == "swiglu" else {"relu": each, "hidden units": each}


def _gated(each: int) -> Terms:
    return {"gate and up": 2 * each, "hidden units": each}


def _moe(w: Workload) -> Terms:
    t, own, d, sizes = w.tokens, w.own_tokens, w.model.d_model, w.model.moe
    hidden, gathered = sizes.hidden // w.parallel.tp, w.own_tokens < w.tokens
    terms = _norm(w) | {"router's logits and choices": own * sizes.experts * w.wide + own * sizes.top_k * INDEX}
    # The router's copy is what the shared expert takes, unless that is narrower or has more tokens.
    terms["router's input"] = own * d * w.wide
    if sizes.shared_hidden and (w.size < w.wide or gathered):
        terms["shared expert's input"] = t * d * w.size
    each = w.rows * hidden * w.size
    terms |= {"rows' numbers": 2 * w.rows * INDEX, "rows": w.rows * d * w.size, "rows' weights": w.rows * w.size}
    terms |= _hidden(sizes.activation, each)
    if sizes.activation != "swiglu":
        terms["hidden units"] += each
    if sizes.shared_hidden:
        shared = _hidden(sizes.activation, t * (sizes.shared_hidden // w.parallel.tp) * w.size)
        terms["shared expert's hidden units"] = sum(shared.values())
    return terms


def _embedding(w: Workload) -> Terms:
    return {"ids": w.tokens * INDEX}


def _head(w: Workload) -> Terms:
    rows, d = w.model.vocab_size // w.parallel.tp, w.model.d_model
    return _norm(w) | {"gradient of its input": w.tokens * d * w.size, "gradient of its weight": rows * d * w.wide}


KEEPS: dict[str, Callable[[Workload], Terms]] = {
    "mamba2": _mamba2,
    "mamba": _mamba,
    "attention": _attention,
    "mlp": _mlp,
    "moe": _moe,
    EMBEDDING: _embedding,
    HEAD: _head,
}
