"""The norms' kernels, forward and backward, against the definitions in fp64."""

from functools import partial

import pytest
import torch

import interpreter
from baton.kernels.dispatch import chosen
from baton.kernels.norm import add_rms_norm, fused, gated_group_rms_norm, rms_norm
from helpers import DEVICE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5


def draw(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def results(kernels, function, operands, dtype=None):
    """Outputs, and the operands' gradients for a weighting at random, computed in dtype."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in operands]
    with chosen(kernels):
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(DEVICE, operands[0].dtype).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def assert_close(function, operands):
    """fp32 to 1e-5, 16 bits to twice the error of PyTorch in the same dtypes."""
    exact = results("reference", function, operands, torch.float64)
    plain = results("reference", function, operands)
    for number, (found, same_dtype, expected) in enumerate(zip(results("triton", function, operands), plain, exact, strict=True)):
        assert found.dtype == same_dtype.dtype
        error, allowed = relative_error(found, expected), max(2 * relative_error(same_dtype, expected), 1e-5)
        assert error <= allowed, f"result {number}: {error}, allowed {allowed}"


def doubled(sums):
    """What a group of two equal parts adds up."""
    return 2 * sums


NORM = partial(rms_norm, eps=EPS)
ADD = partial(add_rms_norm, eps=EPS)
SHAPES = [(2, 3, 40), (1, 16), (200, 24), (5, 1500), (3, 8193)]
"""One row and fewer than a program has; several programs; the last width is one of those whose rows are read twice."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_its_sum(shape, dtype):
    if shape[-1] > 8192 and dtype == torch.float32:
        pytest.skip("rows in fp32 are at most 8192 wide")
    x, residual, weight = draw(shape, shape, shape[-1:], dtype=dtype)
    assert_close(NORM, (x, weight))
    assert_close(lambda x, residual, weight: ADD(x, residual, weight), (x, residual, weight))


def gated(group_size, sum_over_group=None):
    return lambda y, z, weight: gated_group_rms_norm(y, z, weight, group_size, EPS, sum_over_group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "group_size"), [((2, 3, 48), 16), ((300, 40), 20), ((2, 3, 1500), 1500), ((2, 4099), 4099)])
def test_gated_norm(shape, group_size, dtype):
    if group_size > 4096 and dtype == torch.float32:
        pytest.skip("groups in fp32 are at most 4096 wide")
    assert_close(gated(group_size), draw(shape, shape, shape[-1:], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norm_of_a_part(dtype):
    """A part of a group has the values of the reference, and of the whole: here of one with two equal parts."""
    operands = draw((2, 3, 40), (2, 3, 40), (40,), dtype=dtype)
    assert_close(gated(80, doubled), operands)
    whole = results(
        "reference", lambda *halves: gated(80)(*(torch.cat([t, t], -1) for t in halves))[..., :40], operands, torch.float64
    )
    assert relative_error(results("triton", gated(80, doubled), operands)[0], whole[0]) <= (
        1e-5 if dtype == torch.float32 else 1e-2
    )


def test_mixed_dtypes():
    """A scan's fp32 output with a gate in bf16, and weights in fp32 beside activations in bf16."""
    y, weight = draw((2, 3, 40), (40,))
    z = draw((2, 3, 40), dtype=torch.bfloat16)[0]
    assert_close(gated(20), (y, z, weight))
    assert_close(NORM, (z, weight))


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_any_order_of_programs_gives_the_same_bits(order):
    shape = (400, 24)
    for function, operands in ((ADD, draw(shape, shape, (24,))), (gated(8), draw(shape, shape, (24,)))):
        given = results("triton", function, operands)
        with interpreter.order(order):
            for one, other in zip(given, results("triton", function, operands), strict=True):
                assert torch.equal(one, other)


def test_programs_go_through_their_rows(monkeypatch):
    """As where there are more rows than programs that sum the weight's gradient."""
    monkeypatch.setattr(fused, "WEIGHT_PROGRAMS", 3)
    assert_close(NORM, draw((700, 20), (20,)))
    assert_close(gated(10), draw((700, 20), (700, 20), (20,)))


def test_strided_operands():
    """Transposed, a slice, a weight of every second element, and gradients that are expanded."""
    (x, residual, weight) = draw((24, 6), (6, 40), (48,))
    operands = x.mT, residual[:, 8:32], weight[::2]
    for function in (
        lambda *t: sum(y.sum() for y in ADD(*t)),
        lambda *t: gated(8)(*t).sum(),
        lambda *t: gated(48, doubled)(*t).sum(),
    ):
        with chosen("triton"):
            found = torch.autograd.grad(function(*operands), (x, residual, weight))
        with chosen("reference"):
            expected = torch.autograd.grad(function(*(t.double() for t in operands)), (x, residual, weight))
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-5


def test_either_output_of_the_sum_may_be_unused():
    x, residual, weight = draw((4, 24), (4, 24), (24,))
    for used in (0, 1):
        operands = (x, residual, weight)[: 3 - used]
        with chosen("triton"):
            found = torch.autograd.grad(ADD(x, residual, weight)[used].square().sum(), operands)
        with chosen("reference"):
            expected = torch.autograd.grad(ADD(x, residual, weight)[used].square().sum(), operands)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-5


def test_large_gates_neither_overflow_nor_vanish():
    z = torch.tensor([[-1e4, -200.0, -60.0, 60.0, 200.0, 1e4, 1.0, -1.0]], device=DEVICE, requires_grad=True)
    assert_close(gated(8), [torch.ones_like(z), z, torch.ones_like(z[0])])


def test_no_rows():
    x, weight = draw((0, 8), (8,))
    assert_empty = results("triton", NORM, (x, weight))
    assert [t.shape for t in assert_empty] == [(0, 8), (0, 8), (8,)]
    assert torch.equal(assert_empty[-1], torch.zeros_like(weight))


@pytest.mark.parametrize("function", [ADD, gated(8), gated(48, doubled)], ids=["add", "gated", "part"])
def test_compiles_whole(function):
    operands = draw((4, 24), (4, 24), (24,))
    found = results("triton", torch.compile(function, fullgraph=True, backend="aot_eager"), operands)
    for one, other in zip(found, results("triton", function, operands), strict=True):
        assert torch.equal(one, other)


def test_operators_keep_their_promises():
    x, residual, weight = draw((2, 3, 24), (2, 3, 24), (24,))
    torch.library.opcheck(torch.ops.baton.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.baton.add_rms_norm.default, (x, residual, weight, EPS))
    torch.library.opcheck(torch.ops.baton.gated_rms_norm.default, (x, residual, weight, 8, EPS))


def test_bad_operands_are_named():
    x, weight = torch.zeros(4, 6, device=DEVICE), torch.zeros(6, device=DEVICE)
    with pytest.raises(ValueError, match=r"rms_norm: weight is \[5\], expected \[6\]"):
        rms_norm(x, weight[:5], EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual is \[3, 6\], expected \[4, 6\]"):
        add_rms_norm(x, x[:3], weight, EPS)
    with pytest.raises(ValueError, match=r"gated_group_rms_norm: z is \[4, 5\], expected \[4, 6\]"):
        gated_group_rms_norm(x, x[:, :5], weight, 3, EPS)
    with pytest.raises(ValueError, match="rms_norm: weight is on meta"):
        rms_norm(x, weight.to("meta"), EPS)
    with chosen("triton"):
        with pytest.raises(ValueError, match="x is torch.float64, allowed"):
            rms_norm(x.double(), weight, EPS)
        with pytest.raises(ValueError, match="residual is torch.bfloat16, allowed"):
            add_rms_norm(x, x.bfloat16(), weight, EPS)
        with pytest.raises(ValueError, match="x has rows of 65536 bytes, allowed"):
            rms_norm(x.new_zeros(1, 16384), x.new_zeros(16384), EPS)
