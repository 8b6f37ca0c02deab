"""Pieces of attention by PyTorch's flash kernel for CPUs: fp64, fp32, bf16 and fp16, fewer key heads than query heads."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .pieces import Piece


def forward(q: Tensor, k: Tensor, v: Tensor, pieces: Iterable[Piece]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """See `op.Backend`."""
    for queries, keys, causal in pieces:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads(q[queries]), _heads(k[keys]), _heads(v[keys]), is_causal=causal
        )
        yield queries, _tokens(out), lse[0]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Iterable[Piece]
) -> Iterator[tuple[Piece, Tensor, Tensor, Tensor]]:
    """See `op.Backend`."""
    for piece in pieces:
        queries, keys, causal = piece
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads(t) for t in (dout[queries], q[queries], k[keys], v[keys], out[queries])), lse[None, :, queries], 0.0, causal
        )
        dq, dk, dv = (_tokens(grad) for grad in grads)
        yield piece, dq, dk, dv


def _heads(x: Tensor) -> Tensor:
    """[t, h, e] -> [1, h, t, e]."""
    return x.transpose(0, 1)[None]


def _tokens(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)
