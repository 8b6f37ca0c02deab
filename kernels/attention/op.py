"""Attention of queries over keys that come in pieces, with its exact backward, and causal attention on one device.

Softmaxes over different keys merge by their log-sum-exps: lse = log(exp(lse1) + exp(lse2)), out = out1 exp(lse1 - lse) + out2
exp(lse2 - lse) (Milakov and Gimelshein, arXiv 1805.02867). Given the merged out and lse, the gradients of each piece follow from
it alone (FlashAttention, arXiv 2205.14135), so backward visits the pieces once more, in any order.

Tensors are [t, h, e]: the rows of a batch lie one after another. Query head i reads key head i // (h // hk).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..documents import Documents
from . import flash_cpu, flash_cuda, reference
from .pieces import Piece, cut


class Backend(Protocol):
    """How pieces are computed. q, dout and out are [tq, h, e], k and v [tk, hk, e], lse [h, tq] in fp32 at least (natural log)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pieces: Iterable[Piece]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Runs of queries, their outputs and log-sum-exps over some of their keys."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Iterable[Piece]
    ) -> Iterator[tuple[Piece, Tensor, Tensor, Tensor]]:
        """Runs of queries and keys, and summands of their gradients dq, dk, dv; out and lse are over all keys of the queries."""


def backend(q: Tensor) -> Backend:
    """The flash kernel of q's device and dtype, else plain PyTorch."""
    if q.device.type == "cpu":
        return flash_cpu
    return flash_cuda if q.is_cuda and flash_cuda.usable(q) else reference


class RunningAttention:
    """Attention of q [tq, h, e] over keys that come one lot after another."""

    def __init__(self, q: Tensor) -> None:
        self.q = q
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, k: Tensor, v: Tensor, pieces: Sequence[Piece]) -> None:
        """Takes in k and v [tk, hk, e]; merges in fp32, for fp64 in fp64."""
        for queries, out, lse in backend(self.q).forward(self.q, k, v, pieces):
            self._merge(queries, out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out [tq, h, e] in q's dtype, and lse [h, tq]. Each query must have seen a key."""
        assert self.out is not None
        assert self.lse is not None
        return self.out.to(self.q.dtype), self.lse

    def _merge(self, queries: slice, out: Tensor, lse: Tensor) -> None:
        if self.out is None or self.lse is None:
            if out.shape == self.q.shape:
                self.out, self.lse = out, lse
                return
            self.out = torch.zeros_like(self.q, dtype=lse.dtype)
            self.lse = lse.new_full((lse.shape[0], self.q.shape[0]), float("-inf"))
        self.out = self.out.to(lse.dtype)
        before, total = self.out[queries], torch.logaddexp(self.lse[:, queries], lse)
        old, new = ((part - total).exp().mT[..., None] for part in (self.lse[:, queries], lse))
        before.mul_(old).add_(out * new)
        self.lse[:, queries] = total


def attention_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Sequence[Piece]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the pieces add to the gradients of q, k and v, in fp32 at least where several are summed; None: nothing.

    out and lse are the result over all keys of the queries, whether in these pieces or not.
    """
    dq = dk = dv = None
    for piece, *parts in backend(q).backward(dout.contiguous(), q, k, v, out, lse, pieces):
        dq = _add(dq, piece.queries, parts[0], q)
        dk, dv = _add(dk, piece.keys, parts[1], k), _add(dv, piece.keys, parts[2], v)
    return dq, dk, dv


def _add(total: Tensor | None, where: slice, part: Tensor, like: Tensor) -> Tensor:
    """total[where] + part, in place if it can; a first part that is the whole becomes the total without a copy."""
    if total is None:
        if part.shape == like.shape:
            return part
        total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    total[where] += part
    return total


def attend(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """q [tq, h, e], k and v [tk, hk, e] -> [tq, h, e]; the pieces must show each query at least one key."""
    return _Attend.apply(q, k, v, pieces)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece]) -> Tensor:
        running = RunningAttention(q)
        running.add(k, v, pieces)
        out, lse = running.result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces = pieces
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *(None if g is None else g.to(q.dtype) for g in attention_gradients(dout, q, k, v, out, lse, ctx.pieces)), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(e)) v, where a token sees itself and the tokens before it, of its own document only.

    q [b, l, h, e]; k, v [b, l, hk, e]; any floating dtype. Returns [b, l, h, e]. Raises ValueError, naming the argument.
    """
    check_operands(q, k, v)
    rows = document_rows(documents, q.shape[0], q.shape[1])
    whole = [(0, q.shape[1])]
    return attend(flat(q), flat(k), flat(v), cut(whole, whole, rows)).view(q.shape)


def continued_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`causal_attention` of the last l tokens of t, q [b, l, h, e] -> [b, l, h, e]; k and v [b, t, hk, e] are of all."""
    total = k.shape[1]
    pieces = cut([(total - q.shape[1], total)], [(0, total)], [(0, total)] * len(q))
    return attend(flat(q), flat(k), flat(v), pieces).view(q.shape)


def flat(x: Tensor) -> Tensor:
    """[b, l, h, e] -> [b l, h, e], numbers of a head side by side: the kernels are silently wrong where they are not."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for shapes that are not those of grouped-query attention of a sequence over itself."""
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"attention: {shapes}; allowed: one batch, length and head dim, and as many heads of k as of v")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: k has {k.shape[2]} heads, allowed: a divisor of q's {q.shape[2]}")


def document_rows(documents: Documents | None, b: int, length: int) -> Sequence[Sequence[int]]:
    """The boundaries of each row's documents; of one each for None. Raises ValueError where they are not of b rows of length."""
    if documents is None:
        return [(0, length)] * b
    ends = [row[-1] for row in documents.cu_seqlens]
    if ends != [length] * b:
        raise ValueError(f"attention: documents end at {ends}, allowed: {length} for each of {b} sequences")
    return documents.cu_seqlens
