"""Pieces of attention by PyTorch's flash kernel for CUDA: bf16 and fp16, many pieces in one launch. Not run on a GPU yet."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .pieces import Piece


def usable(q: Tensor) -> bool:
    """Whether the kernel has q's dtype and head dim."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def forward(q: Tensor, k: Tensor, v: Tensor, pieces: Iterable[Piece]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """See `op.Backend`."""
    for launch in _launches(pieces):
        runs = _joined(launch)
        queries, keys = [run.queries for run in runs], [run.keys for run in runs]
        out, lse = _flash(_pack(q, queries), _pack(k, keys), _pack(v, keys), *_sizes(launch, q.device))
        lengths = [_length(s) for s in queries]
        yield from zip(queries, out.split(lengths), lse.split(lengths, 1), strict=True)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Iterable[Piece]
) -> Iterator[tuple[Piece, Tensor, Tensor, Tensor]]:
    """See `op.Backend`."""
    for launch in _launches(pieces):
        runs = _joined(launch)
        queries, keys = [run.queries for run in runs], [run.keys for run in runs]
        packed = (_pack(dout, queries), _pack(q, queries), _pack(k, keys), _pack(v, keys), _pack(out, queries))
        dq, dk, dv = _flash_backward(*packed, _pack(lse.mT, queries).mT.contiguous(), *_sizes(launch, q.device))
        own, read = [_length(s) for s in queries], [_length(s) for s in keys]
        yield from zip(runs, dq.split(own), dk.split(read), dv.split(read), strict=True)


def _launches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """One launch takes pieces that are all causal or all not; they may share queries and keys, of which it gets copies."""
    pieces = list(pieces)
    for causal in (False, True):
        if alike := [piece for piece in pieces if piece.causal == causal]:
            yield alike


def _joined(launch: Sequence[Piece]) -> Sequence[Piece]:
    """One run where queries and keys follow each other without gaps, which saves copies; else the pieces."""
    if all(a.queries.stop == b.queries.start and a.keys.stop == b.keys.start for a, b in pairwise(launch)):
        first, last = launch[0], launch[-1]
        return [Piece(slice(first.queries.start, last.queries.stop), slice(first.keys.start, last.keys.stop), first.causal)]
    return launch


def _pack(x: Tensor, runs: Sequence[slice]) -> Tensor:
    return x[runs[0]] if len(runs) == 1 else torch.cat([x[run] for run in runs])


def _length(run: slice) -> int:
    return run.stop - run.start


def _sizes(launch: Sequence[Piece], device: torch.device) -> tuple[Tensor, Tensor, int, int, bool]:
    """A launch's boundaries of queries and keys, its longest runs, and whether it is causal."""
    queries, keys = tuple(_length(p.queries) for p in launch), tuple(_length(p.keys) for p in launch)
    return _boundaries(queries, device), _boundaries(keys, device), max(queries), max(keys), launch[0].causal


@functools.lru_cache(maxsize=64)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, since the layers of a model ask for the same ones and each copy to the device waits for it."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """out [t, h, e] and lse [h, t] fp32."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_bounds, k_bounds, longest_q, longest_k, 0.0, causal, return_debug_mask=False
    )
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, q_bounds, k_bounds, longest_q, longest_k, 0.0, causal, no_dropout, no_dropout.new_empty(0)
    )
