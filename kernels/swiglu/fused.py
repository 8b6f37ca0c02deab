"""SwiGLU's gate in Triton. A program takes a few rows and goes along them, so that a row's dot product needs no second pass."""

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)

TILE = 2048
"""Elements that a program holds at once of each tensor."""


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """Arguments as `op.swiglu`."""
    hidden = gate.shape[-1]
    y = gate.new_empty(gate.shape)
    gate, up = (_rows(t) for t in (gate, up))
    weights = None if weights is None else weights.contiguous()
    rows, columns = _tile(hidden)
    forward_kernel[(triton.cdiv(len(gate), rows),)](
        gate, up, weights, y, len(gate), hidden, gate.stride(0), up.stride(0), weights is not None, rows, columns, num_warps=4
    )
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dgate and dup, of gate's shape, and dweights, which is empty where there are no weights."""
    hidden = gate.shape[-1]
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    dweights = gate.new_empty((0,) if weights is None else weights.shape)
    dy, gate, up = (_rows(t) for t in (dy, gate, up))
    weights = None if weights is None else weights.contiguous()
    rows, columns = _tile(hidden)
    backward_kernel[(triton.cdiv(len(gate), rows),)](
        dy,
        gate,
        up,
        weights,
        dgate,
        dup,
        None if weights is None else dweights,
        len(gate),
        hidden,
        dy.stride(0),
        gate.stride(0),
        up.stride(0),
        weights is not None,
        rows,
        columns,
        num_warps=4,
    )
    return dgate, dup, dweights


def _rows(t: Tensor) -> Tensor:
    """[..., hidden] -> [rows, hidden] with neighbours in a row next to each other."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _tile(hidden: int) -> tuple[int, int]:
    """Rows and columns."""
    columns = min(TILE, triton.next_power_of_2(hidden))
    return TILE // columns, columns


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    weights_ptr,
    y_ptr,
    rows,
    hidden,
    gate_stride,
    up_stride,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row, mask=here, other=0.0).to(tl.float32)
    for first in range(0, hidden, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = here[:, None] & (column < hidden)[None, :]
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row[:, None] * up_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        y = gate * _sigmoid(gate) * up
        if HAS_WEIGHTS:
            y *= weight[:, None]
        tl.store(y_ptr + row[:, None] * hidden + column[None, :], y, mask=mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    weights_ptr,
    dgate_ptr,
    dup_ptr,
    dweights_ptr,
    rows,
    hidden,
    dy_stride,
    gate_stride,
    up_stride,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """With s = sigmoid(gate): silu = gate s and silu' = s + silu (1 - s); dweights is each row's dy · silu up."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row, mask=here, other=0.0).to(tl.float32)
        dweight = tl.zeros([ROWS], tl.float32)
    for first in range(0, hidden, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = here[:, None] & (column < hidden)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row[:, None] * up_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        s = _sigmoid(gate)
        silu = gate * s
        if HAS_WEIGHTS:
            dweight += tl.sum(dy * silu * up, 1)
            dy *= weight[:, None]
        at = row[:, None] * hidden + column[None, :]
        tl.store(dgate_ptr + at, dy * up * (s + silu * (1.0 - s)), mask=mask)
        tl.store(dup_ptr + at, dy * silu, mask=mask)
    if HAS_WEIGHTS:
        tl.store(dweights_ptr + row, dweight, mask=here)
