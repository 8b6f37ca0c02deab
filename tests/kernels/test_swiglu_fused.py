"""SwiGLU's kernels against the definition in fp64."""

import pytest
import torch
from torch.nn import functional as F

import interpreter
from baton.kernels.dispatch import chosen
from baton.kernels.swiglu import swiglu
from baton.kernels.swiglu.fused import TILE
from helpers import DEVICE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(2, 3, 40), (5, 1), (17, TILE + 33), (1, 2 * TILE), (70, 16)]


def draw(shape, dtype, weighted):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, shape, shape[:-1]][: 3 if weighted else 2]
    return [torch.randn(s, generator=generator).mul(2).to(DEVICE, dtype).requires_grad_() for s in shapes]


def gradients(kernels, operands, dtype=None):
    """y and the operands' gradients, for a weighting at random, computed in dtype."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in operands]
    with chosen(kernels):
        y = swiglu(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, operands[0].dtype).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_close(operands):
    """fp32 to 1e-5; 16 bits to twice the error of PyTorch in the same dtype."""
    exact = gradients("reference", operands, torch.float64)
    plain = gradients("reference", operands)
    for number, (found, same_dtype, expected) in enumerate(zip(gradients("triton", operands), plain, exact, strict=True)):
        assert found.dtype == operands[0].dtype
        error, allowed = relative_error(found, expected), max(2 * relative_error(same_dtype, expected), 1e-5)
        assert error <= allowed, f"result {number}: {error}, allowed {allowed}"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, weighted):
    assert_close(draw(shape, dtype, weighted))


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_any_order_of_programs_gives_the_same_bits(order):
    operands = draw((300, 20), torch.float32, True)
    given = gradients("triton", operands)
    with interpreter.order(order):
        for one, other in zip(given, gradients("triton", operands), strict=True):
            assert torch.equal(one, other)


def test_strided_operands():
    """The two halves of one tensor, a transposed one, and a gradient that is expanded."""
    (both,) = draw((6, 50), torch.float32, False)[:1]
    gate, up = both.chunk(2, -1)
    transposed = draw((25, 6), torch.float32, False)[0].mT
    for operands in ((gate, up), (transposed, up)):
        with chosen("triton"):
            (found,) = torch.autograd.grad(swiglu(*operands).sum(), operands[1])
        (expected,) = torch.autograd.grad((F.silu(operands[0].double()) * operands[1].double()).sum(), operands[1])
        assert relative_error(found, expected) <= 1e-6


def test_large_gates_neither_overflow_nor_vanish():
    gate = torch.tensor([[-1e4, -200.0, -60.0, 60.0, 200.0, 1e4]], device=DEVICE, requires_grad=True)
    assert_close([gate, torch.ones_like(gate).requires_grad_()])


def test_no_rows():
    with chosen("triton"):
        y = swiglu(torch.zeros(0, 8, device=DEVICE, requires_grad=True), torch.zeros(0, 8, device=DEVICE))
    assert y.shape == (0, 8)


def test_compiles_whole():
    operands = draw((4, 24), torch.float32, True)
    with chosen("triton"):
        y = torch.compile(swiglu, fullgraph=True, backend="aot_eager")(*operands)
        found = torch.autograd.grad(y.square().sum(), operands)
        expected = torch.autograd.grad(swiglu(*operands).square().sum(), operands)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_operators_keep_their_promises():
    for weighted in (False, True):
        operands = draw((3, 10), torch.float32, weighted)
        arguments = (*operands, None)[:3]
        torch.library.opcheck(torch.ops.baton.swiglu.default, arguments)


def test_bad_operands_are_named():
    x = torch.zeros(4, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"swiglu: up is \[4, 5\]"):
        swiglu(x, x[:, :5])
    with pytest.raises(ValueError, match=r"swiglu: weights is \[6\], allowed: \[4\]"):
        swiglu(x, x, x[0])
    with chosen("triton"), pytest.raises(ValueError, match=r"torch.float32, torch.float64, allowed: all bfloat16"):
        swiglu(x, x.double())
