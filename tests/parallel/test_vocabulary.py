"""Embedding and projected cross entropy with the vocabulary cut over ranks, against one process, in fp64 and below."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from baton.kernels.cross_entropy import IGNORED, cross_entropy_sum, op
from baton.kernels.dispatch import chosen
from baton.parallel.collectives import copy_to
from baton.parallel.vocabulary import VocabularyShards
from helpers import relative_error
from interpreter import INTERPRETED

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="the ranks' tensors are on the CPU"))
V, D = 48, 6
LABELS = torch.tensor([[1, 47, IGNORED, 0, 6], [7, 3, IGNORED, 24, 23], [12, IGNORED, 11, 36, 35]])


def draw(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    rows, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((V, D), (*LABELS.shape, D)))
    return (rows * scale).to(dtype).requires_grad_(), x.to(dtype).requires_grad_()


def on_a_rank(rank, world, dtype, kernels, scale, tokens_of_chunk):
    """The loss, its dx and its own rows' gradient; with the number of messages."""
    shards = VocabularyShards(dist.group.WORLD)
    rows, x = draw(dtype, scale)
    own = rows.detach().chunk(world)[rank].clone().requires_grad_()
    messages, gather = [], shards._gather
    shards._gather = lambda statistics: messages.append(statistics.shape) or gather(statistics)
    with chosen(kernels), patch.dict(op.CHUNK_BYTES, cpu=tokens_of_chunk * V // world * dtype.itemsize):
        loss = shards.projected_cross_entropy_sum(copy_to(x, shards.group), own, LABELS)
        with torch.no_grad():
            assert torch.equal(shards.projected_cross_entropy_sum(x, own, LABELS), loss)
    (0.3 * loss).backward()
    return loss.detach(), x.grad, own.grad, len(messages)


def one_process(rows, x):
    loss = cross_entropy_sum(F.linear(x, rows), LABELS)
    return loss.detach(), *torch.autograd.grad(0.3 * loss, (x, rows))


def compare(pool, world, dtype, kernels, scale=1.0, tokens_of_chunk=4):
    rows, x = draw(dtype, scale)
    plain = one_process(rows, x)
    exact = one_process(*(t.detach().double().requires_grad_() for t in (rows, x)))
    floor = 1e-12 if dtype == torch.float64 else 1e-5
    for rank, (*found, messages) in enumerate(pool.run(world, on_a_rank, world, dtype, kernels, scale, tokens_of_chunk)):
        assert messages == 2 * -(-LABELS.numel() // tokens_of_chunk)
        for name, one, same_dtype, expected in zip(("loss", "dx", "dweight"), found, plain, exact, strict=True):
            if name == "dweight":
                same_dtype, expected = (t.chunk(world)[rank] for t in (same_dtype, expected))
            error, allowed = relative_error(one, expected), max(2 * relative_error(same_dtype, expected), floor)
            assert error <= allowed, f"{name} of rank {rank}: {error}, allowed {allowed}"


@pytest.mark.parametrize("tokens_of_chunk", [4, 15, 1])
@pytest.mark.parametrize("world", [2, 4])
def test_fp64_is_exact(pool, world, tokens_of_chunk):
    compare(pool, world, torch.float64, "reference", tokens_of_chunk=tokens_of_chunk)


@pytest.mark.parametrize("kernels", [TRITON, "reference"])
@pytest.mark.parametrize("world", [2, 4])
def test_fp32_is_as_good_as_one_process(pool, world, kernels):
    compare(pool, world, torch.float32, kernels)


@pytest.mark.parametrize("kernels", [TRITON, "reference"])
def test_extreme_logits(pool, kernels):
    compare(pool, 4, torch.float32, kernels, scale=1e4)


def beyond(rank):
    """A label that no rank has, and tokens whose labels are all ignored."""
    shards = VocabularyShards(dist.group.WORLD)
    rows, x = draw(torch.float64)
    own = rows.detach().chunk(2)[rank].clone().requires_grad_()
    assert shards.projected_cross_entropy_sum(x, own, LABELS.where(LABELS != 36, V)) == float("inf")
    loss = shards.projected_cross_entropy_sum(x, own, torch.full_like(LABELS, IGNORED))
    loss.backward()
    return loss.item(), x.grad.abs().max().item(), own.grad.abs().max().item()


def test_labels_that_no_rank_has(pool):
    assert pool.run(2, beyond) == [(0.0, 0.0, 0.0)] * 2


def both_ends(rank, world):
    shards = VocabularyShards(dist.group.WORLD)
    rows, x = draw(torch.float64)
    own = rows.detach().chunk(world)[rank].clone().requires_grad_()
    embedded = shards.embed(LABELS.clamp(min=0), own)
    (embedded * x.detach()).sum().backward()
    return embedded.detach(), shards.whole(F.linear(x, own)), own.grad


@pytest.mark.parametrize("world", [2, 4])
def test_embedding_and_whole_logits(pool, world):
    rows, x = draw(torch.float64)
    embedded = rows[LABELS.clamp(min=0)]
    (embedded * x.detach()).sum().backward()
    for rank, found in enumerate(pool.run(world, both_ends, world)):
        for one, other in zip(found, (embedded.detach(), F.linear(x, rows).detach(), rows.grad.chunk(world)[rank]), strict=True):
            assert relative_error(one, other) <= 1e-12
