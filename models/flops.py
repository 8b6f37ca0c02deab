"""FLOPs of a forward pass over one sequence, by layer, and the pipeline's stages that follow from them.

What is counted are products of matrices and the short convolution, 2 FLOPs for a multiplication with its addition. Element-wise
arithmetic (norms, gates, softmaxes, decays) is left out. Causal attention counts the pairs that see each other, once; experts count
where a token chose them. Backward takes twice as many; what it computes again (`parallel.recompute`) is no use, and not counted.
"""

import math
from collections.abc import Callable
from enum import StrEnum

from ..configs.pattern import LayerKinds, repeats
from ..configs.schema import Activation, ModelConfig
from ..parallel.cuts import balanced_cuts, given_cuts

EMBEDDING_FLOPS = 0
"""Rows are looked up, not multiplied."""


TRAINING = 3
"""Forwards' worth of FLOPs that a forward with its backward takes."""
HEAD = "head"


class Work(StrEnum):
    """What computes: each runs at a rate of its own."""

    MATMUL = "matmul"
    EXPERTS = "experts"
    """Products of rows that are grouped by expert."""
    ATTENTION = "attention"
    SCAN = "scan"
    """Mamba-2's, in products of matrices."""
    SELECTIVE_SCAN = "selective_scan"
    """Mamba's, number by number."""
    CONV = "conv"


def stage_layers(model: ModelConfig, stages: int, context: int) -> list[range]:
    """The layers of each of a pipeline's stages: as the pattern cuts them; else so that the largest stage is the smallest.

    A stage costs the FLOPs of its layers on a sequence of `context` tokens, with those of the embedding or the head.
    Raises ValueError for more stages than layers. A single stage has all layers, whatever the pattern cuts.
    """
    if stages > 1 and model.cuts:
        return given_cuts(model.cuts, len(model.layers))
    costs = [layer_flops(model, kinds, context) for kinds in model.layers]
    return balanced_cuts(costs, stages, EMBEDDING_FLOPS, head_flops(model, context))


def layer_flops(model: ModelConfig, kinds: LayerKinds, context: int) -> int:
    """Of a layer's mixer and feed-forward."""
    return sum(part_flops(kind, model, context) for kind in kinds if kind is not None)


def part_flops(kind: str, model: ModelConfig, context: int) -> int:
    """Of a mixer, a feed-forward or the HEAD."""
    return sum(FLOPS[kind](model, context).values())


def head_flops(model: ModelConfig, context: int) -> int:
    """Of the projection to the vocabulary."""
    return part_flops(HEAD, model, context)


def model_flops(model: ModelConfig, context: int, pairs: int | None = None) -> dict[str, int]:
    """Of the whole model, by kind of part.

    pairs: of a token with itself and each before it that it sees in one layer's attention; None: of a single document.
    """
    kinds = [kind for layer in model.layers for kind in layer if kind is not None]
    flops = {kind: kinds.count(kind) * part_flops(kind, model, context) for kind in dict.fromkeys(kinds)}
    if pairs is not None and "attention" in flops:
        flops["attention"] += kinds.count("attention") * (_attended(model, pairs) - _attended(model, causal_pairs(context)))
    return flops | {HEAD: head_flops(model, context)}


def recomputed_flops(model: ModelConfig, context: int, recompute: str) -> int:
    """Of what backward computes again of a sequence, beside TRAINING times the model's."""
    kinds = [kind for layer in model.layers for kind in layer if kind is not None and repeats(kind, layer, recompute)]
    return sum(part_flops(kind, model, context) for kind in kinds)


def causal_pairs(length: int) -> int:
    """Of a token of one document with itself and each before it."""
    return length * (length + 1) // 2


Flops = dict[Work, int]


def mamba2_flops(model: ModelConfig, context: int) -> Flops:
    """Projections, convolution, and the SSD scan in whole chunks (Dao and Gu, arXiv 2405.21060, section 6): linear in the context.

    Of each chunk: C Bᵀ once for a group, its product with the inputs, the state that leaves, and what the entering state gives.
    """
    sizes, d, inner = model.mamba2, model.d_model, model.inner
    heads, shared = model.mamba2_heads, 2 * sizes.groups * sizes.state_dim
    projections = _product(context, d, 2 * inner + shared + heads) + _product(context, inner, d)
    convolution = _product(context, sizes.conv_width, inner + shared)
    padded = math.ceil(context / sizes.chunk_size) * sizes.chunk_size
    scores = _product(padded, sizes.groups * sizes.state_dim, sizes.chunk_size)
    inside = _product(padded, sizes.chunk_size, inner)
    states = 2 * _product(padded, sizes.state_dim, inner)
    return {Work.MATMUL: projections, Work.CONV: convolution, Work.SCAN: scores + inside + states}


def mamba_flops(model: ModelConfig, context: int) -> Flops:
    """Projections, convolution, and the selective scan: of each channel and state dim the input, the decay and the output."""
    sizes, d, inner, rank = model.mamba, model.d_model, model.mamba_inner, model.dt_rank
    projections = _product(context, d, 3 * inner) + _product(context, inner, 2 * rank + 2 * sizes.state_dim)
    scan = 3 * _product(context, sizes.state_dim, inner)
    return {Work.MATMUL: projections, Work.CONV: _product(context, sizes.conv_width, inner), Work.SELECTIVE_SCAN: scan}


def attention_flops(model: ModelConfig, context: int) -> Flops:
    """Projections; scores and weighted values of a token with itself and each before it: quadratic in the context.

    Of one document: packed ones see fewer tokens.
    """
    sizes = model.attention
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    projections = _product(context, model.d_model, 2 * queries + 2 * keys)
    return {Work.MATMUL: projections, Work.ATTENTION: _attended(model, causal_pairs(context))}


def _attended(model: ModelConfig, pairs: int) -> int:
    return 2 * _product(pairs, model.attention.heads * model.attention.head_dim, 1)


def mlp_flops(model: ModelConfig, context: int) -> Flops:
    """The three matrices of a SwiGLU, or two without a gate."""
    return {Work.MATMUL: _feed(context, model.d_model, model.mlp.hidden, model.mlp.activation)}


def moe_flops(model: ModelConfig, context: int) -> Flops:
    """The router, the top_k experts of each token, none of them dropped, and the expert that all tokens share."""
    sizes, d = model.moe, model.d_model
    everywhere = _product(context, d, sizes.experts) + _feed(context, d, sizes.shared_hidden, sizes.activation)
    return {Work.MATMUL: everywhere, Work.EXPERTS: _feed(context, d, sizes.top_k * sizes.hidden, sizes.activation)}


FLOPS: dict[str, Callable[[ModelConfig, int], Flops]] = {
    "mamba2": mamba2_flops,
    "mamba": mamba_flops,
    "attention": attention_flops,
    "mlp": mlp_flops,
    "moe": moe_flops,
    HEAD: lambda model, context: {Work.MATMUL: _product(context, model.d_model, model.vocab_size)},
}


def _feed(tokens: int, d: int, hidden: int, activation: Activation) -> int:
    return (3 if activation == "swiglu" else 2) * _product(tokens, d, hidden)


def _product(rows: int, inner: int, columns: int) -> int:
    """A matrix [rows, inner] times one [inner, columns]."""
    return 2 * rows * inner * columns
