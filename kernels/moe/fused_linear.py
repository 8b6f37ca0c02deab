"""Products with the experts' matrices in Triton: rows sorted by expert, how many each has read on the device.

The grid is an upper bound: E experts' rows fill at most (r + E (M - 1)) / M tiles of M rows. A program finds its tile's expert by
summing up the experts' tiles; those past the last one end at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..target import input_precision


class Tile(NamedTuple):
    """Of a product [M, N] over a depth K."""

    M: int
    N: int
    K: int
    warps: int
    stages: int


WIDE = Tile(128, 128, 64, warps=8, stages=3)
"""16-bit operands."""
LOW = Tile(64, 128, 64, warps=8, stages=3)
"""16-bit operands with few rows an expert, where a wider tile would be half empty."""
SINGLE = Tile(64, 128, 16, warps=8, stages=3)
"""fp32, whose operands are held in two parts: a deeper tile takes all registers of sm80."""

NEIGHBOURS = 8
"""Tiles of rows whose programs run together along the columns, so that both operands are found in L2."""


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Arguments as `op.grouped_linear`; strides are free."""
    (r, depth), (experts, columns, _), counts = x.shape, weight.shape, counts.contiguous()
    y = x.new_empty(r, columns)
    tile = _tile(x.dtype, r // experts)
    row_tiles = (r + min(r, experts) * (tile.M - 1)) // tile.M
    linear_kernel[(row_tiles * triton.cdiv(columns, tile.N),)](
        x,
        weight,
        counts,
        y,
        row_tiles,
        columns,
        depth,
        experts,
        *x.stride(),
        *weight.stride(),
        EXPERTS=triton.next_power_of_2(experts),
        PRECISION=input_precision(x.dtype),
        NEIGHBOURS=NEIGHBOURS,
        M=tile.M,
        N=tile.N,
        K=tile.K,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def weight_gradient(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """dy [r, o] and x [r, i], rows as in `grouped_linear` -> Σ dyᵀ x over each expert's rows, [E, o, i], 0 for one without rows."""
    (_, outputs), (_, inputs), (experts,), counts = dy.shape, x.shape, counts.shape, counts.contiguous()
    dweight = x.new_empty(experts, outputs, inputs)
    tile = SINGLE if x.dtype == torch.float32 else WIDE
    grid = triton.cdiv(outputs, tile.M) * triton.cdiv(inputs, tile.N), experts
    weight_gradient_kernel[grid](
        dy,
        x,
        counts,
        dweight,
        outputs,
        inputs,
        experts,
        *dy.stride(),
        *x.stride(),
        EXPERTS=triton.next_power_of_2(experts),
        PRECISION=input_precision(x.dtype),
        NEIGHBOURS=NEIGHBOURS,
        M=tile.M,
        N=tile.N,
        K=tile.K,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dweight


def _tile(dtype: torch.dtype, rows: int) -> Tile:
    """By the rows that an expert has on average."""
    if dtype == torch.float32:
        return SINGLE
    return WIDE if rows >= WIDE.M else LOW


@triton.jit
def _place(number, rows, columns, NEIGHBOURS: tl.constexpr):
    """Row and column of tile `number`: NEIGHBOURS rows at a time, down before across."""
    band = number // (NEIGHBOURS * columns)
    height = tl.minimum(rows - band * NEIGHBOURS, NEIGHBOURS)
    inside = number % (NEIGHBOURS * columns)
    return band * NEIGHBOURS + inside % height, inside // height


@triton.jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    counts_ptr,
    y_ptr,
    row_tiles,
    columns,
    depth,
    experts,
    x_row,
    x_column,
    weight_expert,
    weight_row,
    weight_column,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """y [r, columns] = x [r, depth] weight_eᵀ, a tile [M, N] of one expert's rows a program."""
    row_tile, column_tile = _place(tl.program_id(0), row_tiles, tl.cdiv(columns, N), NEIGHBOURS)
    each = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + each, mask=each < experts, other=0).to(tl.int32)
    tiles = tl.cdiv(counts, M)
    if row_tile < tl.sum(tiles, 0):
        expert = tl.sum((tl.cumsum(tiles, 0) <= row_tile).to(tl.int32), 0)
        first = (row_tile - tl.sum(tl.where(each < expert, tiles, 0), 0)) * M
        count = tl.sum(tl.where(each == expert, counts, 0), 0)
        lane = first + tl.arange(0, M)
        here = lane < count
        row = (tl.sum(tl.where(each < expert, counts, 0), 0) + lane).to(tl.int64)
        column = column_tile * N + tl.arange(0, N)
        inner = tl.arange(0, K)
        x_at = x_ptr + row[:, None] * x_row + inner[None, :] * x_column
        weight_at = (
            weight_ptr
            + expert.to(tl.int64) * weight_expert
            + column[None, :].to(tl.int64) * weight_row
            + inner[:, None] * weight_column
        )
        y = tl.zeros([M, N], tl.float32)
        for start in range(0, depth, K):
            inside = inner < depth - start
            x = tl.load(x_at, mask=here[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_at, mask=inside[:, None] & (column < columns)[None, :], other=0.0)
            y = tl.dot(x, weight, y, input_precision=PRECISION)
            x_at += K * x_column
            weight_at += K * weight_column
        tl.store(y_ptr + row[:, None] * columns + column[None, :], y, mask=here[:, None] & (column < columns)[None, :])


@triton.jit
def weight_gradient_kernel(
    dy_ptr,
    x_ptr,
    counts_ptr,
    dweight_ptr,
    outputs,
    inputs,
    experts,
    dy_row,
    dy_column,
    x_row,
    x_column,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """dweight [E, outputs, inputs], a tile [M, N] of one expert a program, which goes along the expert's rows."""
    expert = tl.program_id(1)
    output_tile, input_tile = _place(tl.program_id(0), tl.cdiv(outputs, M), tl.cdiv(inputs, N), NEIGHBOURS)
    each = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + each, mask=each < experts, other=0).to(tl.int32)
    count = tl.sum(tl.where(each == expert, counts, 0), 0)
    lane = tl.arange(0, K)
    row = (tl.sum(tl.where(each < expert, counts, 0), 0) + lane).to(tl.int64)
    output = (output_tile * M + tl.arange(0, M)).to(tl.int64)
    input = (input_tile * N + tl.arange(0, N)).to(tl.int64)
    dy_at = dy_ptr + row[None, :] * dy_row + output[:, None] * dy_column
    x_at = x_ptr + row[:, None] * x_row + input[None, :] * x_column
    dweight = tl.zeros([M, N], tl.float32)
    for start in range(0, count, K):
        here = lane < count - start
        dy = tl.load(dy_at, mask=here[None, :] & (output < outputs)[:, None], other=0.0)
        x = tl.load(x_at, mask=here[:, None] & (input < inputs)[None, :], other=0.0)
        dweight = tl.dot(dy, x, dweight, input_precision=PRECISION)
        dy_at += K * dy_row
        x_at += K * x_row
    at = (expert.to(tl.int64) * outputs + output[:, None]) * inputs + input[None, :]
    tl.store(dweight_ptr + at, dweight, mask=(output < outputs)[:, None] & (input < inputs)[None, :])
