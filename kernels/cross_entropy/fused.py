"""Triton kernels for the softmax of a chunk of logits: one pass for the rows' statistics, one that leaves the gradient in place.

Between the two lies the message between ranks that share the vocabulary. A program takes a row, whose columns it goes through
in blocks; all arithmetic is in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def statistics_kernel(
    logits_ptr, labels_ptr, statistics_ptr, logits_stride, statistics_stride, columns, first_row, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    highest = float("-inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits, 0))
        # As long as all were -inf, -inf less -inf would be nan.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((highest - shift) * LOG2E) + tl.sum(tl.exp2((logits - shift) * LOG2E), 0)
        highest = higher
    label = tl.load(labels_ptr + row) - first_row
    here = (label >= 0) & (label < columns)
    own = tl.load(logits_ptr + label, mask=here, other=float("-inf")).to(tl.float32)
    statistics_ptr += row
    tl.store(statistics_ptr, highest)
    tl.store(statistics_ptr + statistics_stride, total)
    tl.store(statistics_ptr + 2 * statistics_stride, own)


@triton.jit
def gradient_kernel(
    logits_inout_ptr,
    labels_ptr,
    highest_ptr,
    scale_ptr,
    logits_stride,
    columns,
    first_row,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_inout_ptr += row * logits_stride
    label = tl.load(labels_ptr + row)
    highest = tl.load(highest_ptr + row)
    scale = tl.load(scale_ptr + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        logits = tl.load(logits_inout_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        # A rank whose part of the vocabulary is all -inf has no share, and no highest logit to speak of.
        share = tl.where(scale == 0.0, 0.0, tl.exp2((logits - highest) * LOG2E) * scale)
        gradient = share - tl.where(column == label - first_row, 1.0, 0.0)
        gradient = tl.where(label == IGNORED, 0.0, gradient)
        tl.store(logits_inout_ptr + column, gradient.to(logits_inout_ptr.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, labels: Tensor, first_row: int) -> Tensor:
    """The rows' highest logit, sum of exp(logits - highest) and label's logit, as `reference.exponentiate_` has them.

    logits [t, v] in bf16, fp16 or fp32, each row's columns side by side; labels [t] integers, side by side. Returns fp32 [3, t].
    """
    rows, columns = logits.shape
    found = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        sizes = block_sizes(columns)
        statistics_kernel[(rows,)](logits, labels, found, logits.stride(0), found.stride(0), columns, first_row, **sizes)
    return found


def gradient_(logits: Tensor, labels: Tensor, highest: Tensor, scale: Tensor, first_row: int, ignored: int) -> None:
    """Replaces logits [t, v], as `statistics` takes them, by exp(logits - highest) · scale - (1 at the label).

    highest and scale [t] in fp32, side by side. Rows whose label is `ignored` become zero.
    """
    rows, columns = logits.shape
    if rows:
        sizes = block_sizes(columns)
        gradient_kernel[(rows,)](logits, labels, highest, scale, logits.stride(0), columns, first_row, ignored, **sizes)


def block_sizes(columns: int) -> dict[str, int]:
    """Columns of a block and warps of a program: at most 16 columns a thread, so that many programs share a multiprocessor."""
    block = min(max(triton.next_power_of_2(columns), 128), 4096)
    return {"BLOCK": block, "num_warps": max(1, block // 512)}
