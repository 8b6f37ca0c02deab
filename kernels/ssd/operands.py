"""What every function of the SSD scan is given, in PyTorch and on Triton kernels alike, and how many maps it makes of it."""

import math
from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """As `op.ssd` has them; the b sequences of l tokens are made of `runs` equal runs of neighbouring tokens each."""

    x: Tensor  # [b, l, h, p]
    dt: Tensor  # [b, l, h], before softplus
    A: Tensor  # [h]
    B: Tensor  # [b, l, g, n]
    C: Tensor  # [b, l, g, n]
    D: Tensor | None  # [h]
    dt_bias: Tensor | None  # [h]
    resets: Tensor | None  # [b, l] bool
    low: float  # least and
    high: float  # largest positive dt
    runs: int
    chunk: int  # tokens worked on together


class Prepared(NamedTuple):
    """What the functions share; its contents are the implementation's own."""

    steps: Tensor
    scores: Tensor


class Grads(NamedTuple):
    """In the shapes of the operands; dA, dD and ddt_bias [h] in fp32 or wider, zeros where there is no such operand."""

    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor
    ddt_bias: Tensor


R = 4
"""Chunks of a block of the kernels: between blocks states are in memory while gradients are computed."""
# Enough for every processor of a GPU to have a few, so that short sequences are cut finer.
PROGRAMS = 640
LONGEST_SEGMENT = 4096


def kernel_chunk(itemsize: int) -> int:
    """Tokens that the kernels work on together, for operands of so many bytes a number."""
    return 16 if itemsize == 4 else 64


def segment_length(chunk: int, tokens: int, heads: int) -> int:
    """Tokens that the kernels fold into one map, of `tokens` in all runs of all sequences."""
    length = chunk * R
    while length < LONGEST_SEGMENT and 2 * length * PROGRAMS <= tokens * heads:
        length *= 2
    return length


def count_maps(b: int, l: int, heads: int, runs: int, chunk_size: int, itemsize: int, fused: bool) -> int:
    """Maps of each of b sequences of l tokens, whose states a call keeps for backward; arguments as of `op.ssd`."""
    run = l // runs
    length = segment_length(kernel_chunk(itemsize), b * l, heads) if fused else chunk_size
    return runs * math.ceil(run / length)
