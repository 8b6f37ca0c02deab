"""The corrected interpreter computes as a device does."""

import interpreter  # isort: skip  # first: before whatever imports triton

import warnings

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels run on a GPU here")


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, larger_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, x * y - x + tl.full([N], 0.5, tl.bfloat16))
    tl.store(larger_ptr + at, tl.where(x > y, x, y))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.arange(0, N)[:, None]
    column = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + row * N + column)
    b = tl.load(b_ptr + row * N + column)
    tl.store(out_ptr + row * N + column, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def sums_kernel(x_ptr, sum_ptr, cumsum_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(sum_ptr, tl.reduce(x, 0, tl.standard._sum_combine))
    tl.store(cumsum_ptr + at, tl.associative_scan(x, 0, tl.standard._sum_combine))


@triton.jit
def queue_kernel(count_ptr, queue_ptr):
    """Each program notes its number behind those that ran before it."""
    count = tl.load(count_ptr)
    number = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(queue_ptr + count, number)
    tl.store(count_ptr, count + 1)


@triton.jit
def loop_kernel(length_ptr, out_ptr):
    total = 0.0
    for i in range(tl.load(length_ptr)):
        total += i
    tl.store(out_ptr, tl.exp2(total * 100.0))


@triton.jit
def stride_kernel(x_ptr, stride):
    tl.store(x_ptr, (tl.program_id(0) * stride).to(tl.float32))


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def bf16(values):
    return values.to(torch.bfloat16).float()


def test_bf16_arithmetic():
    x, y = randn(2, 64, dtype=torch.bfloat16)
    out, larger = torch.empty_like(x), torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, out, larger, 64)
    assert torch.equal(out.float(), bf16(bf16(bf16(x.float() * y.float()) - x.float()) + 0.5))
    assert torch.equal(larger, torch.maximum(x, y))


def test_bf16_dot():
    a, b = randn(2, 16, 16, dtype=torch.bfloat16)
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, 16, "ieee")
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_rounding_to_bf16(dtype):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-10])
    values = {torch.float32: [*ties, float("nan"), float("inf"), 3.4e38, 1e-40], torch.float16: [*ties, 65504.0, 1e-7, -0.0, 3.0]}
    x = torch.tensor(values.get(dtype, [257, 259, -257, 1025, 65535, 0, 3, 2**30 + 1])).to(dtype)
    out = torch.empty(8, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, 8)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_from_bf16(dtype):
    x = torch.tensor([1.5, -3.0, 100.0, 0.0], dtype=torch.bfloat16)
    out = torch.empty(4, dtype=dtype)
    cast_kernel[(1,)](x, out, 4)
    assert torch.equal(out, x.to(dtype))


def test_bf16_sums():
    x = randn(32, dtype=torch.bfloat16)
    total, cumsum = x.new_empty(1), torch.empty_like(x)
    sums_kernel[(1,)](x, total, cumsum, 32)
    torch.testing.assert_close(total[0], x.float().sum().bfloat16())
    torch.testing.assert_close(cumsum, x.float().cumsum(0).bfloat16())


def test_tf32():
    a, b = randn(2, 32, 32)
    exact, rounded = torch.empty(2, 32, 32)
    for precision in ("tf32", "tf32x3", "ieee"):
        dot_kernel[(1,)](a, b, exact, 32, precision)
        with interpreter.tf32():
            dot_kernel[(1,)](a, b, rounded, 32, precision)
        error = (rounded - a @ b).abs().max() / (a @ b).abs().max()
        assert (1e-5 < error < 1e-3) if precision == "tf32" else torch.equal(rounded, exact)
        torch.testing.assert_close(exact, a @ b)


@pytest.mark.parametrize("chosen", ["given", "reversed", "shuffled", "corners"])
def test_order(chosen):
    programs = list(range(3 * 1 * 4))
    queue, count = torch.empty(len(programs), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with interpreter.order(chosen):
        queue_kernel[lambda _: (3, 1, 4)](count, queue)
    found = queue[: count.item()].tolist()
    if chosen == "shuffled":
        assert found not in (programs, programs[::-1])
        assert sorted(found) == programs
    else:
        assert found == {"given": programs, "reversed": programs[::-1], "corners": [0, 3, 8, 11]}[chosen]


def test_loops_and_infinities_are_silent():
    out = torch.empty(1)
    with warnings.catch_warnings(action="error"):
        loop_kernel[(1,)](torch.tensor([7]), out)
    assert out.item() == float("inf")


def test_overflow():
    x = torch.empty(1)
    with interpreter.order("corners"):
        stride_kernel[(3,)](x, 2**30)
        with interpreter.overflow() as reach, pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflow"):
            stride_kernel[(3,)](x, 2**30)
    assert reach == {"stride_kernel": 0}


@torch.library.custom_op("baton_tests::unwritten", mutates_args=())
def unwritten(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_poisoned(poisoned):
    x = torch.zeros(3)
    made = [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,)), x.new_empty_strided((3,), (1,))]
    assert all(memory.isnan().all() for memory in [*made, unwritten(x), torch.empty(3, dtype=torch.bfloat16)])
    assert torch.equal(torch.empty(2, dtype=torch.int32), torch.full((2,), 2**31 - 1, dtype=torch.int32))
    assert not torch.zeros(3).isnan().any()
