"""Convolution, norms and cross entropy against their definitions written out in fp64, with gradients."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from baton.kernels.conv import causal_conv
from baton.kernels.cross_entropy import IGNORED, cross_entropy_sum
from baton.kernels.norm import gated_group_rms_norm, rms_norm
from helpers import relative_error


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def assert_same(found, reference, operands, tolerance=1e-12):
    """Values, and gradients for a random weighting."""
    assert relative_error(found, reference) <= tolerance
    weights = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(*(torch.autograd.grad(y, operands, weights) for y in (found, reference)), strict=True):
        assert relative_error(one, other) <= tolerance


def test_conv():
    x, weight, bias = draw((2, 11, 6), (6, 4), (6,))
    reference = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=6).transpose(1, 2))
    assert_same(causal_conv(x, weight, bias), reference, (x, weight, bias))


def test_conv_continues_from_halos():
    """Two runs that are not neighbours, each after the tokens that were before it."""
    whole, weight = draw((1, 20, 3), (3, 4))
    runs = torch.cat([whole[:, 5:9], whole[:, 12:16]], 1)
    halo = torch.stack([whole[:, 2:5], whole[:, 9:12]], 1)
    reference = causal_conv(whole, weight)
    assert_same(causal_conv(runs, weight, halo=halo), torch.cat([reference[:, 5:9], reference[:, 12:16]], 1), (whole, weight))


def test_conv_does_not_see_across_documents():
    """Documents of one token and up, some across the border of two runs: each is what it is alone."""
    boundaries = [0, 1, 2, 5, 11, 12, 20]
    whole, weight, bias = draw((1, 20, 3), (3, 4), (3,))
    positions = torch.cat([torch.arange(stop - start) for start, stop in itertools.pairwise(boundaries)])[None]
    alone = [causal_conv(whole[:, start:stop], weight, bias) for start, stop in itertools.pairwise(boundaries)]
    halo = torch.stack([torch.full((1, 3, 3), float("inf"), dtype=torch.float64), whole[:, 7:10]], 1)
    found = causal_conv(whole, weight, bias, halo, positions)
    assert_same(found, torch.cat(alone, 1), (whole, weight, bias))


def test_rms_norm():
    x, weight = draw((2, 5, 8), (8,))
    reference = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert_same(rms_norm(x, weight, 1e-5), reference, (x, weight))


def test_gated_group_norm_gates_first():
    y, z, weight = draw((2, 5, 12), (2, 5, 12), (12,))
    gated = (y * z * torch.sigmoid(z)).view(2, 5, 3, 4)
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_same(gated_group_rms_norm(y, z, weight, 4, 1e-5), normed.view(2, 5, 12) * weight, (y, z, weight))


def test_cross_entropy_ignores():
    (logits,) = draw((2, 5, 7))
    labels = torch.tensor([[1, 2, IGNORED, 0, 6], [IGNORED, 3, 3, 3, 5]])
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    assert_same(cross_entropy_sum(logits, labels), -(picked * (labels >= 0)).sum(), (logits,))


def test_bad_operands_are_named():
    x, weight = torch.zeros(1, 4, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="causal_conv: weight is"):
        causal_conv(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="causal_conv: halo is"):
        causal_conv(x, weight, halo=torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match="no whole groups of 2"):
        gated_group_rms_norm(x, x, torch.zeros(3), 2, 1e-5)
