"""Kernels with nothing wrong: what the tools of kernels' tests are tested with."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.target import input_precision
from huge import huge_tensor


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, rows, stride_row, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    column = tl.arange(0, SIZE)
    place = row[:, None] * stride_row + column[None, :]
    mask = row[:, None] < rows
    a = tl.load(a_ptr + place, mask=mask, other=0.0)
    b = tl.load(b_ptr + column[:, None] * SIZE + column[None, :])
    out = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [rows, size] of any row stride, b [size, size] contiguous -> a b with the strides of a."""
    rows, size = a.shape
    out = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
    product_kernel[(triton.cdiv(rows, size),)](a, b, out, rows, a.stride(0), size, input_precision(a.dtype), num_warps=4)
    return out


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.empty(rows, 64, dtype=dtype, device="meta") for rows in (4096, 64))
        yield str(dtype).removeprefix("torch."), lambda a=a, b=b: product(a, b)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    a = huge_tensor((262144, 64), torch.bfloat16, (16384, 1))
    yield "rows far apart", lambda: product(a, torch.zeros(64, 64, dtype=torch.bfloat16))
