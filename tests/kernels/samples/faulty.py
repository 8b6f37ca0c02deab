"""Kernels with one fault each, and what the tools of kernels' tests must say of it."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from baton.kernels.target import generation, input_precision
from huge import huge_tensor


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + m * K + tl.arange(0, K)[None, :])
    b = tl.load(b_ptr + tl.arange(0, K)[:, None] * N + n)
    tl.store(out_ptr + m * N + n, tl.dot(a, b, input_precision="ieee"))


@triton.jit
def undefined_kernel(out_ptr):
    tl.store(out_ptr, nothing)  # noqa: F821


@triton.jit
def narrow_kernel(x_ptr, stride, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    tl.store(x_ptr + row * stride, 1.0)


def _product(m: int, n: int, k: int, warps: int) -> None:
    a, b, out = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((m, k), (k, n), (m, n)))
    product_kernel[(1,)](a, b, out, m, n, k, num_warps=warps)


def _refuse() -> None:
    raise ValueError(f"the host's own, {input_precision(torch.float32)} on generation {generation(torch.device('meta'))}")


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "spills", lambda: _product(256, 256, 64, 4)
    yield "too large", lambda: _product(128, 128, 1024, 8)
    yield "two warps", lambda: _product(64, 64, 64, 2)
    yield "undefined", lambda: undefined_kernel[(1,)](torch.empty(1, device="meta"))
    yield "refused", _refuse


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    x = huge_tensor((262144,), torch.float32, (16384,))
    yield "wide", lambda: narrow_kernel[(262144,)](x, x.stride(0), True)
    yield "narrow", lambda: narrow_kernel[(262144,)](x, x.stride(0), False)
    yield "near", lambda: narrow_kernel[(2,)](x, x.stride(0), True)
    yield "outside", lambda: narrow_kernel[(2,)](x, -(2**45), True)
