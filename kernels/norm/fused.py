"""RMS norms in Triton.

A program holds whole rows, several of them where they are narrow; a group of channels is a row of its own. What backward needs of
forward is its inputs and 1 / rms. The weight's gradient: each of a bounded number of programs sums over its rows, in registers,
and these sums are added up afterwards, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Elements of a program, unless one row has more."""
MAX_WARPS = 16
WEIGHT_PROGRAMS = 512
"""Programs that share a sum over all rows."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, row, column, stride, inside):
    """A tile of rows, in fp32."""
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_again(ptr, row, column, stride, inside):
    """As `_load`; where a row fills the registers it is read twice, the second time from a cache, instead of being kept."""
    at = ptr + row[:, None] * stride + column[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _load_weight(ptr, column, stop):
    return tl.load(ptr + column, mask=column < stop, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    rstd_ptr,
    rows,
    width,
    eps,
    x_stride,
    residual_stride,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    x = _load(x_ptr, row, column, x_stride, inside)
    if HAS_RESIDUAL:
        total = (x + _load(residual_ptr, row, column, residual_stride, inside)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=inside)
        # Of what is stored, and what backward will see.
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    normed = x * rstd[:, None] * _load_weight(weight_ptr, column, width)
    tl.store(normed_ptr + place, normed, mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def norm_backward_kernel(
    dnormed_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    rows,
    width,
    dnormed_stride,
    dtotal_stride,
    x_stride,
    HAS_DTOTAL: tl.constexpr,
    RELOAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        scaled = _load(x_ptr, row, column, x_stride, inside) * rstd
        dnormed = _load(dnormed_ptr, row, column, dnormed_stride, inside)
        dweight += dnormed * scaled
        dscaled = dnormed * _load_weight(weight_ptr, column, width)
        mean = tl.sum(dscaled * scaled, axis=1)[:, None] / width
        if RELOAD:
            scaled = _load_again(x_ptr, row, column, x_stride, inside) * rstd
            dnormed = _load_again(dnormed_ptr, row, column, dnormed_stride, inside)
            dscaled = dnormed * _load_weight(weight_ptr, column, width)
        dx = (dscaled - scaled * mean) * rstd
        if HAS_DTOTAL:
            dx += _load(dtotal_ptr, row, column, dtotal_stride, inside)
        tl.store(dx_ptr + row[:, None] * width + column[None, :], dx, mask=inside)
    partials_ptr += tl.program_id(0).to(tl.int64) * width + column
    tl.store(partials_ptr, tl.sum(dweight, axis=0), mask=column < width)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-z * LOG2E))


@triton.jit
def gated_forward_kernel(
    y_ptr,
    z_ptr,
    weight_ptr,
    squares_ptr,
    normed_ptr,
    rstd_ptr,
    rows,
    width,
    group_size,
    eps,
    y_stride,
    z_stride,
    HAS_SQUARES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    column = group * width + lane
    inside = (row < rows)[:, None] & (lane < width)[None, :]
    z = _load(z_ptr, row, column, z_stride, inside)
    gated = _load(y_ptr, row, column, y_stride, inside) * z * _sigmoid(z)
    if HAS_SQUARES:
        squares = tl.load(squares_ptr + row, mask=row < rows, other=0.0)
    else:
        squares = tl.sum(gated * gated, axis=1)
    rstd = tl.rsqrt(squares / group_size + eps)
    normed = gated * rstd[:, None] * _load_weight(weight_ptr, column, (group + 1) * width)
    tl.store(normed_ptr + row[:, None] * (groups * width) + column[None, :], normed, mask=inside)
    tl.store(rstd_ptr + row * groups + group, rstd, mask=row < rows)


@triton.jit
def gated_sums_kernel(
    y_ptr,
    z_ptr,
    weight_ptr,
    dnormed_ptr,
    sums_ptr,
    rows,
    width,
    y_stride,
    z_stride,
    dnormed_stride,
    HAS_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    z = _load(z_ptr, row, column, z_stride, inside)
    gated = _load(y_ptr, row, column, y_stride, inside) * z * _sigmoid(z)
    other = gated
    if HAS_GRAD:
        other = _load(dnormed_ptr, row, column, dnormed_stride, inside) * _load_weight(weight_ptr, column, width)
    tl.store(sums_ptr + row, tl.sum(gated * other, axis=1), mask=row < rows)


@triton.jit
def gated_backward_kernel(
    dnormed_ptr,
    y_ptr,
    z_ptr,
    weight_ptr,
    rstd_ptr,
    products_ptr,
    dy_ptr,
    dz_ptr,
    partials_ptr,
    rows,
    width,
    group_size,
    dnormed_stride,
    y_stride,
    z_stride,
    HAS_PRODUCTS: tl.constexpr,
    RELOAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, groups = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    column = group * width + lane
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (lane < width)[None, :]
        place = row[:, None] * (groups * width) + column[None, :]
        rstd = tl.load(rstd_ptr + row * groups + group, mask=row < rows, other=0.0)
        weight = _load_weight(weight_ptr, column, (group + 1) * width)
        y = _load(y_ptr, row, column, y_stride, inside)
        z = _load(z_ptr, row, column, z_stride, inside)
        dnormed = _load(dnormed_ptr, row, column, dnormed_stride, inside)
        if HAS_PRODUCTS:
            products = tl.load(products_ptr + row, mask=row < rows, other=0.0)
        else:
            products = tl.sum(dnormed * weight * y * z * _sigmoid(z), axis=1)
            if RELOAD:
                y = _load_again(y_ptr, row, column, y_stride, inside)
                z = _load_again(z_ptr, row, column, z_stride, inside)
                dnormed = _load_again(dnormed_ptr, row, column, dnormed_stride, inside)
        sigmoid = _sigmoid(z)
        scaled = y * z * sigmoid * rstd[:, None]
        dweight += dnormed * scaled
        dgated = (dnormed * weight - scaled * (products * rstd / group_size)[:, None]) * rstd[:, None]
        tl.store(dy_ptr + place, dgated * z * sigmoid, mask=inside)
        tl.store(dz_ptr + place, dgated * y * sigmoid * (1.0 + z * (1.0 - sigmoid)), mask=inside)
    partials_ptr += tl.program_id(0).to(tl.int64) * (groups * width) + column
    tl.store(partials_ptr, tl.sum(dweight, axis=0), mask=lane < width)


def norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [..., d] of one dtype, weight [d] -> norm of their sum and the sum, like x, and 1 / rms, [...] in fp32.

    Without a residual the sum is empty.
    """
    normed, rstd = _empty(x, x.shape), _empty(x, x.shape[:-1], torch.float32)
    total = _empty(x, 0 if residual is None else x.shape)
    added = None if residual is None else _rows(residual)
    x = _rows(x)
    rows, width = x.shape
    tile = row_tile(width)
    norm_forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x,
        added,
        weight.contiguous(),
        normed,
        None if added is None else total,
        rstd,
        rows,
        width,
        eps,
        x.stride(0),
        0 if added is None else added.stride(0),
        HAS_RESIDUAL=added is not None,
        **tile,
    )
    return normed, total, rstd


def norm_backward(dnormed: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the normed x [..., d] and of its weight; dtotal, as x: a further gradient of x, added to its own."""
    dx = _empty(x, x.shape)
    dnormed, x = _rows(dnormed), _rows(x)
    added = None if dtotal is None else _rows(dtotal)
    rows, width = x.shape
    tile = row_tile(width)
    programs = min(WEIGHT_PROGRAMS, triton.cdiv(rows, tile["ROWS"]))
    partials = _empty(x, (programs, width), torch.float32)
    norm_backward_kernel[(programs,)](
        dnormed,
        added,
        x,
        weight.contiguous(),
        rstd,
        dx,
        partials,
        rows,
        width,
        dnormed.stride(0),
        0 if added is None else added.stride(0),
        x.stride(0),
        HAS_DTOTAL=added is not None,
        RELOAD=tile["BLOCK"] > 8192,
        **tile,
    )
    return dx, partials.sum(0).to(weight.dtype)


def gated_forward(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, squares: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and z [..., c], weight [c] -> norm of y silu(z) within each group, like y, and 1 / rms [..., groups] in fp32.

    squares: where the c channels are a part of one group, [..., 1] fp32, the whole group's sum of squares.
    """
    width = group_size if squares is None else y.shape[-1]
    groups = y.shape[-1] // width
    normed, rstd = _empty(y, y.shape), _empty(y, (*y.shape[:-1], groups), torch.float32)
    y, z = _rows(y), _rows(z)
    tile = row_tile(width)
    gated_forward_kernel[(triton.cdiv(y.shape[0], tile["ROWS"]), groups)](
        y,
        z,
        weight.contiguous(),
        None if squares is None else squares.contiguous(),
        normed,
        rstd,
        y.shape[0],
        width,
        group_size,
        eps,
        y.stride(0),
        z.stride(0),
        HAS_SQUARES=squares is not None,
        **tile,
    )
    return normed, rstd


def gated_sums(y: Tensor, z: Tensor, weight: Tensor, dnormed: Tensor | None) -> Tensor:
    """What the parts of one group add up: sums over the channels [..., 1] in fp32 of (y silu(z))², or of y silu(z) weight dnormed.

    The first is forward's, the second, given dnormed, backward's.
    """
    sums = _empty(y, (*y.shape[:-1], 1), torch.float32)
    y, z = _rows(y), _rows(z)
    grad = None if dnormed is None else _rows(dnormed)
    rows, width = y.shape
    tile = row_tile(width)
    gated_sums_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        y,
        z,
        None if grad is None else weight.contiguous(),
        grad,
        sums,
        rows,
        width,
        y.stride(0),
        z.stride(0),
        0 if grad is None else grad.stride(0),
        HAS_GRAD=grad is not None,
        **tile,
    )
    return sums


def gated_backward(
    dnormed: Tensor, y: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, group_size: int, products: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and weight; products: of parts of one group, the whole group's sum of `gated_sums` with dnormed."""
    width = group_size if products is None else y.shape[-1]
    groups = y.shape[-1] // width
    dy, dz = _empty(y, y.shape), _empty(z, z.shape)
    dnormed, y, z = _rows(dnormed), _rows(y), _rows(z)
    rows = y.shape[0]
    tile = row_tile(width)
    programs = min(triton.cdiv(WEIGHT_PROGRAMS, groups), triton.cdiv(rows, tile["ROWS"]))
    partials = _empty(y, (programs, groups * width), torch.float32)
    gated_backward_kernel[(programs, groups)](
        dnormed,
        y,
        z,
        weight.contiguous(),
        rstd,
        None if products is None else products.contiguous(),
        dy,
        dz,
        partials,
        rows,
        width,
        group_size,
        dnormed.stride(0),
        y.stride(0),
        z.stride(0),
        HAS_PRODUCTS=products is not None,
        RELOAD=tile["BLOCK"] > 4096,
        **tile,
    )
    return dy, dz, partials.sum(0).to(weight.dtype)


def row_tile(width: int) -> dict[str, int]:
    """Rows and columns of a program, 16 elements a thread where MAX_WARPS allow it."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(MAX_WARPS, rows * block // 512)}


def _rows(tensor: Tensor) -> Tensor:
    """[..., d] -> [rows, d], neighbouring channels next to one another."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _empty(like: Tensor, shape: int | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
