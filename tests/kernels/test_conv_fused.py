"""The short convolution's kernels, forward and backward, against the definition in fp64."""

import itertools
from typing import NamedTuple

import pytest
import torch

import interpreter
from baton.kernels.conv import causal_conv, fused
from baton.kernels.dispatch import chosen
from helpers import DEVICE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """b sequences of so many runs of so many tokens, c channels."""

    b: int
    runs: int
    tokens: int
    channels: int
    width: int
    bias: bool = True
    halo: bool = True
    documents: bool = True

    def draw(self, dtype=torch.float32):
        """x, weight, bias, halo, with None for what is absent; and positions."""
        generator = torch.Generator().manual_seed(0)
        b, runs, tokens, c, width, *present = self
        shapes = (b, runs * tokens, c), (c, width), (c,), (b, runs, width - 1, c)
        drawn = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
        operands = [t if wanted else None for t, wanted in zip(drawn, (True, True, *present), strict=False)]
        return operands, self.positions().to(DEVICE) if self.documents else None

    def positions(self):
        """Documents of 1, 2, 3, ... tokens, another one first in each sequence; the first began two tokens before."""
        rows = []
        for row in range(self.b):
            lengths = itertools.count(1 + row)
            places = itertools.chain(range(2, 4 + row), itertools.chain.from_iterable(range(n) for n in lengths))
            rows.append(list(itertools.islice(places, self.runs * self.tokens)))
        return torch.tensor(rows)


CASES = [
    Case(2, 2, 37, 40, 4),
    Case(1, 1, 70, 300, 4, halo=False, documents=False),
    Case(1, 1, 41, 33, 3, bias=False, halo=False),
    Case(2, 3, 1, 16, 4),
    Case(1, 2, 2, 20, 4, documents=False),
    Case(1, 2, 5, 24, 2, bias=False),
    Case(1, 2, 6, 1, 4),
]
"""More than one stripe of a run and more than one block of channels; runs shorter than the halo; one channel."""


def results(kernels, operands, positions, dtype=None):
    """y, and the operands' gradients for a weighting at random, computed in dtype."""
    leaves = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in operands]
    with chosen(kernels):
        y = causal_conv(*leaves, positions)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, operands[0].dtype).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def assert_close(operands, positions):
    """fp32 to 1e-5, 16 bits to twice the error of PyTorch in the same dtype."""
    exact = results("reference", operands, positions, torch.float64)
    plain = results("reference", operands, positions)
    for number, (found, same_dtype, expected) in enumerate(zip(results("triton", operands, positions), plain, exact, strict=True)):
        assert found.dtype == operands[0].dtype
        error, allowed = relative_error(found, expected), max(2 * relative_error(same_dtype, expected), 1e-5)
        assert error <= allowed, f"result {number}: {error}, allowed {allowed}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    assert_close(*case.draw(dtype))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 4, 31, 32, 33, 65])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_every_width_and_length(width, tokens, dtype):
    for channels, halo, documents in itertools.product((1, 17), (False, True), (False, True)):
        assert_close(*Case(2, 2 if halo else 1, tokens, channels, width, True, halo, documents).draw(dtype))


@pytest.mark.exhaustive
def test_longest_stripe(monkeypatch):
    monkeypatch.setattr(fused, "ENOUGH_PROGRAMS", 1)
    assert_close(*Case(1, 2, 2 * fused.MAX_STRIPE + 9, 300, 4).draw())


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_any_order_of_programs_gives_the_same_bits(order):
    operands, positions = Case(1, 2, 34, 16, 3).draw()
    given = results("triton", operands, positions)
    with interpreter.order(order):
        for one, other in zip(given, results("triton", operands, positions), strict=True):
            assert torch.equal(one, other)


def test_documents_see_nothing_of_others():
    """Of the tokens before a document some are infinite and some are no numbers: neither comes through, forward or backward."""
    operands, _ = Case(1, 2, 10, 24, 4).draw()
    x, weight, bias, halo = (t.detach() for t in operands)
    x[:, 3], x[:, 4], halo[:, 0], halo[:, 1, 0] = float("inf"), float("nan"), float("nan"), float("-inf")
    # Documents begin at tokens 0, 3, 5 and, with one token in the halo of the second run, 9; that of tokens 3 and 4 is bad.
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], device=DEVICE)
    x.requires_grad_()
    halo.requires_grad_()
    good = torch.ones_like(x)
    good[:, 3:5] = 0
    with chosen("triton"):
        y = causal_conv(x, weight, bias, halo, positions)
        dx, dhalo = torch.autograd.grad(y, (x, halo), good)
    alone = x.detach().double(), weight.double(), bias.double(), halo.detach().double()
    alone[0][:, 3:5], alone[3][:, 0], alone[3][:, 1, 0] = 0, 0, 0
    alone = [t.requires_grad_() for t in alone]
    expected = causal_conv(*alone, positions)
    expected_dx, expected_dhalo = torch.autograd.grad(expected, (alone[0], alone[3]), good.double())
    others = good.bool()
    assert relative_error(y[others], expected[others]) <= 1e-5
    assert relative_error(dx[others], expected_dx[others]) <= 1e-5
    assert relative_error(dhalo, expected_dhalo) <= 1e-5


def test_steps_after_the_last_token_count_nothing():
    """There the last token meets other taps: finite where a token is, their product is not where none is."""
    (x, weight, *_), _ = Case(1, 1, 6, 24, 4, False, False, False).draw()
    with torch.no_grad():
        x[:, -1], weight[:, -1], weight[:, -2] = 3e38, 0, 10
    with chosen("triton"):
        (found,) = torch.autograd.grad(causal_conv(x, weight).sum(), x)
    (expected,) = torch.autograd.grad(causal_conv(x.double(), weight.double()).sum(), x)
    assert relative_error(found, expected) <= 1e-5


def test_strided_operands():
    """A slice of channels, a transposed tensor, a part of a halo, a transposed weight, and gradients that are expanded."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 12, 40), (1, 24, 12), (3, 24), (48,), (1, 2, 2, 40)
    leaves = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
    wide, transposed, weight, bias, halo = leaves
    positions = torch.arange(24, device=DEVICE)[None, ::2] % 7
    for x in (wide[..., 9:33], transposed.mT):
        operands = x, weight.t(), bias[::2], halo[..., 9:33]
        with chosen("triton"):
            found = torch.autograd.grad(causal_conv(*operands, positions).sum(), leaves, materialize_grads=True)
        with chosen("reference"):
            y = causal_conv(*(t.double() for t in operands), positions)
            expected = torch.autograd.grad(y.sum(), leaves, materialize_grads=True)
        used = [i for i, t in enumerate(expected) if t.any()]
        assert len(used) == 4
        for i in used:
            assert relative_error(found[i], expected[i]) <= 1e-5


def test_no_tokens():
    operands, _ = Case(1, 1, 0, 8, 4, halo=False, documents=False).draw()
    y, dx, dweight, dbias = results("triton", operands, None)
    assert y.shape == dx.shape == (1, 0, 8)
    assert torch.equal(dweight, torch.zeros_like(dweight))
    assert torch.equal(dbias, torch.zeros_like(dbias))


def test_compiles_whole():
    operands, positions = Case(1, 2, 6, 24, 4).draw()
    compiled = torch.compile(causal_conv, fullgraph=True, backend="aot_eager")
    with chosen("triton"):
        found = torch.autograd.grad(compiled(*operands, positions).square().sum(), operands)
        expected = torch.autograd.grad(causal_conv(*operands, positions).square().sum(), operands)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_operators_keep_their_promises():
    for case in (Case(1, 2, 6, 24, 4), Case(1, 1, 6, 24, 2, False, False, False)):
        operands, positions = case.draw()
        torch.library.opcheck(torch.ops.baton.causal_conv.default, (*operands, positions))


def test_bad_operands_are_named():
    x, weight = torch.zeros(1, 4, 6, device=DEVICE), torch.zeros(6, 4, device=DEVICE)
    with pytest.raises(ValueError, match="causal_conv: positions are torch.float32, allowed: int32 and int64"):
        causal_conv(x, weight, positions=torch.zeros(1, 4, device=DEVICE))
    with pytest.raises(ValueError, match="causal_conv: weight is on meta, x on"):
        causal_conv(x, weight.to("meta"))
    with chosen("triton"):
        with pytest.raises(ValueError, match="x, weight, bias and halo are float32, float64, allowed"):
            causal_conv(x, weight.double())
        with pytest.raises(ValueError, match=r"weight is \[6, 5\], allowed"):
            causal_conv(x, torch.zeros(6, 5, device=DEVICE))
