"""Pieces of attention in plain PyTorch, where no flash kernel has the device and dtype: cut into tiles of bounded memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .pieces import Piece

TILE = 1024
"""Queries and keys of a tile: the largest matrix that is ever there is [h, TILE, TILE]."""


def forward(q: Tensor, k: Tensor, v: Tensor, pieces: Iterable[Piece]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """See `op.Backend`. What it gives is fp32 at least."""
    for queries, keys, causal in tiles(pieces):
        scores = _scores(q[queries], k[keys], causal)
        lse = scores.logsumexp(-1)
        yield queries, _ungrouped((scores - lse[..., None]).exp_() @ _heads(v[keys])[:, None]), lse.flatten(0, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Iterable[Piece]
) -> Iterator[tuple[Piece, Tensor, Tensor, Tensor]]:
    """See `op.Backend`. What it gives is fp32 at least."""
    for piece in tiles(pieces):
        queries, keys, causal = piece
        kv_heads = k.shape[1]
        p = (_scores(q[queries], k[keys], causal) - lse[:, queries].unflatten(0, (kv_heads, -1))[..., None]).exp_()
        do, o = _grouped(dout[queries], kv_heads), _grouped(out[queries], kv_heads)
        ds = do @ _heads(v[keys])[:, None].mT
        ds = ds.sub_((do * o).sum(-1, keepdim=True)).mul_(p).mul_(q.shape[-1] ** -0.5)
        dq = ds @ _heads(k[keys])[:, None]
        dk, dv = (ds.mT @ _grouped(q[queries], kv_heads)).sum(1), (p.mT @ do).sum(1)
        yield piece, _ungrouped(dq), dk.transpose(0, 1), dv.transpose(0, 1)


def tiles(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pairs of query and key in pieces of at most TILE by TILE."""
    for queries, keys, causal in pieces:
        for first in range(queries.start, queries.stop, TILE):
            rows = slice(first, min(first + TILE, queries.stop))
            diagonal = keys.start + first - queries.start if causal else keys.stop
            for second in range(keys.start, diagonal, TILE):
                yield Piece(rows, slice(second, min(second + TILE, diagonal)), causal=False)
            if causal:
                yield Piece(rows, slice(diagonal, diagonal + rows.stop - rows.start), causal=True)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """[hk, h // hk, tq, tk]."""
    scores = (_grouped(q, k.shape[1]) * q.shape[-1] ** -0.5) @ _heads(k)[:, None].mT
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(later, float("-inf"))
    return scores


def _heads(x: Tensor) -> Tensor:
    """[t, h, e] -> [h, t, e], fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[t, h, e] -> [hk, h // hk, t, e]: the query heads that read each key head."""
    return _heads(x).unflatten(0, (kv_heads, -1))


def _ungrouped(x: Tensor) -> Tensor:
    return x.flatten(0, 1).transpose(0, 1)
