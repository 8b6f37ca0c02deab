"""Routing and the rows' way into the experts' order and back, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 128
"""Copies of tokens that a program of the counting sort takes; it compares each with each."""
TILE = 4096
"""Elements of tokens that a program moves."""


def route(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, rows and counts of `op.Routing`: a counting sort, stable, so that tokens of an expert stay in their order."""
    chosen = chosen.contiguous()
    pairs = chosen.numel()
    blocks = triton.cdiv(pairs, PAIRS)
    hits = chosen.new_empty(experts, blocks, dtype=torch.int32)
    count_kernel[(blocks,)](chosen, hits, pairs, experts, PAIRS, 32, num_warps=4)
    ends = hits.flatten().cumsum(0)
    order, rows = chosen.new_empty(pairs), chosen.new_empty(chosen.shape)
    place_kernel[(blocks,)](chosen, hits, ends, order, rows, pairs, PAIRS, num_warps=8)
    return order, rows, hits.sum(1)


def permute(x: Tensor, rows: Tensor) -> Tensor:
    """x [t, d], rows [t, k] -> y [t k, d] with y[rows[t, j]] = x[t]."""
    x, rows = _contiguous_rows(x), rows.contiguous()
    (t, k), d = rows.shape, x.shape[1]
    y = x.new_empty(t * k, d)
    tokens, channels = _tile(d)
    grid = triton.cdiv(t, tokens), triton.cdiv(d, channels)
    spread_kernel[grid](x, rows, y, t, k, d, x.stride(0), tokens, channels, num_warps=4)
    return y


def unpermute(y: Tensor, rows: Tensor) -> Tensor:
    """y [t k, d], rows [t, k] -> x [t, d] with x[t] = Σ_j y[rows[t, j]]."""
    y, rows = _contiguous_rows(y), rows.contiguous()
    (t, k), d = rows.shape, y.shape[1]
    x = y.new_empty(t, d)
    tokens, channels = _tile(d)
    grid = triton.cdiv(t, tokens), triton.cdiv(d, channels)
    gather_kernel[grid](y, rows, x, t, k, d, y.stride(0), tokens, channels, num_warps=4)
    return x


def _contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _tile(d: int) -> tuple[int, int]:
    """Tokens and channels."""
    channels = min(1024, triton.next_power_of_2(d))
    return TILE // channels, channels


@triton.jit
def count_kernel(chosen_ptr, hits_ptr, pairs, experts, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """hits [E, blocks]: how often a block of pairs chose an expert."""
    block, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    chosen = tl.load(chosen_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    for first in range(0, experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        hits = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
        tl.store(hits_ptr + expert.to(tl.int64) * blocks + block, hits, mask=expert < experts)


@triton.jit
def place_kernel(chosen_ptr, hits_ptr, ends_ptr, order_ptr, rows_ptr, pairs, PAIRS: tl.constexpr):
    """A pair's row: where the hits of its expert and block begin, and how many of these are before it."""
    block, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lane = tl.arange(0, PAIRS)
    pair = block * PAIRS + lane
    here = pair < pairs
    chosen = tl.load(chosen_ptr + pair, mask=here, other=-1).to(tl.int32)
    before = (chosen[:, None] == chosen[None, :]) & (lane[None, :] < lane[:, None])
    at = chosen.to(tl.int64) * blocks + block
    start = tl.load(ends_ptr + at, mask=here, other=0) - tl.load(hits_ptr + at, mask=here, other=0)
    row = start + tl.sum(before.to(tl.int32), 1)
    tl.store(rows_ptr + pair, row, mask=here)
    tl.store(order_ptr + row, pair, mask=here)


@triton.jit
def spread_kernel(x_ptr, rows_ptr, y_ptr, t, k, d, x_stride, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (token < t)[:, None] & (channel < d)[None, :]
    x = tl.load(x_ptr + token[:, None] * x_stride + channel[None, :], mask=mask, other=0.0)
    for choice in range(k):
        row = tl.load(rows_ptr + token * k + choice, mask=token < t, other=0)
        tl.store(y_ptr + row[:, None] * d + channel[None, :], x, mask=mask)


@triton.jit
def gather_kernel(y_ptr, rows_ptr, x_ptr, t, k, d, y_stride, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (token < t)[:, None] & (channel < d)[None, :]
    x = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for choice in range(k):
        row = tl.load(rows_ptr + token * k + choice, mask=token < t, other=0)
        x += tl.load(y_ptr + row[:, None] * y_stride + channel[None, :], mask=mask, other=0.0)
    tl.store(x_ptr + token[:, None] * d + channel[None, :], x, mask=mask)
