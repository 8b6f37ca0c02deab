"""The scan's and the fold's Triton kernels against the definition in fp64."""

import math

import pytest
import torch

import interpreter
from baton.kernels.dispatch import chosen
from baton.kernels.scan import Decay, affine_scan, exclusive_scan, fold
from helpers import DEVICE, relative_error

HEADS, STATE = 3, (2, 173)
"""1038 elements in all: three blocks, of which the last is ragged and heads end within blocks."""
KINDS = ("scalar", "diagonal", "rated")


def operands(kind, maps, b=2, seed=0):
    """T, U, initial and rate (or None) in fp64 of values that fp32 has; among the decays resets and what underflows."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    choices = torch.tensor([0.0, -1e-3, -0.5, -3.0, -80.0, -200.0, -math.inf])
    log = lambda *shape: choices[torch.randint(len(choices), shape, generator=generator)]  # noqa: E731
    U, initial, rate = normal(b, maps, HEADS, *STATE), normal(b, HEADS, *STATE), None
    if kind == "scalar":
        T = log(b, maps, HEADS)
    elif kind == "diagonal":
        T = log(b, maps, HEADS, *STATE)
    else:
        T, rate = -log(b, maps, HEADS, STATE[0]), -normal(HEADS, *STATE).abs() - 0.1
    return [None if t is None else t.double().to(DEVICE) for t in (T, U, initial, rate)]


def both(function, kind, maps, reverse, with_initial, **sizes):
    """The reference in fp64 and the kernels in fp32 -> pairs of their results."""
    T, U, initial, rate = operands(kind, maps, **sizes)
    results = []
    for kernels, cast in (("reference", torch.Tensor.double), ("triton", torch.Tensor.float)):
        one, other, start, scale = (None if t is None else cast(t) for t in (T, U, initial if with_initial else None, rate))
        with chosen(kernels):
            results.append(function(one, other, start, reverse, Decay(scale)))
    return list(zip(*reversed(results), strict=True))


def assert_folds(pairs):
    """Of T the sums of logarithms, in which resets are infinite, and the state."""
    (T, T64), (U, U64) = pairs
    assert torch.equal(T.isinf(), T64.isinf())
    finite = T64.isfinite()
    assert not finite.any() or relative_error(T[finite], T64[finite]) <= 1e-6
    assert relative_error(U, U64) <= 1e-5


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_definition(kind, reverse, order):
    with interpreter.order(order):
        for found, expected in both(exclusive_scan, kind, 5, reverse, with_initial=True):
            assert relative_error(found, expected) <= 1e-5
        (S_in, expected), (final, last) = both(exclusive_scan, kind, 4, reverse, with_initial=False)
        assert relative_error(S_in, expected) <= 1e-5
        assert relative_error(final, last) <= 1e-5
        assert_folds(both(fold, kind, 2, reverse, with_initial=True, seed=3))
        assert_folds(both(fold, kind, 3, reverse, with_initial=False))


def test_one_map_of_one_number():
    T, U, initial = (torch.tensor([[[value]]], device=DEVICE) for value in (-0.5, 2.0, 3.0))
    with chosen("triton"):
        S_in, final = exclusive_scan(T, U, initial[0])
        folded, state = fold(T, U, initial[0])
    assert S_in.item() == 3.0
    assert folded.item() == -0.5
    assert final.item() == state.item() == pytest.approx(2 + 3 * math.exp(-0.5), rel=1e-6)


def test_operands_that_are_not_contiguous():
    T, U, initial, _ = operands("scalar", 3)
    pairs = [[exclusive_scan(T, U, initial)]]
    strided = [t.float().transpose(0, -1).contiguous().transpose(0, -1) for t in (T, U, initial)]
    with chosen("triton"):
        pairs.append([exclusive_scan(*strided)])
    for expected, found in zip(pairs[0][0], pairs[1][0], strict=True):
        assert found.is_contiguous()
        assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """Backward is the scan in reverse."""
    results = []
    for kernels, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        T, U, initial, rate = operands(kind, 4)
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (T.clamp(-3, 3), U, initial, rate)]
        with chosen(kernels):
            S_in, final = affine_scan(*leaves[:3], None, Decay(leaves[3]))
            gradients = torch.autograd.grad((S_in.square().sum() + final.square().sum()), [t for t in leaves if t is not None])
        results.append(gradients)
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) <= 1e-5


def test_is_an_operator():
    """torch.library knows the kernels: their shapes without running them, and that nothing is changed in place."""
    from baton.kernels.scan import fused

    T, U, initial, rate = (None if t is None else t.float() for t in operands("rated", 2))
    for operator in (fused.exclusive_scan, fused.fold):
        torch.library.opcheck(operator, (T, U, initial, rate, True))
        torch.library.opcheck(operator, (T, U, None, rate, False))


def test_other_dtypes_are_named():
    T, U, *_ = operands("scalar", 2)
    with chosen("triton"), pytest.raises(ValueError, match="T is torch.float64 and U torch.float64"):
        exclusive_scan(T, U, None)
