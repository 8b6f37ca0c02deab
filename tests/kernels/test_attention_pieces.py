"""Causal attention in pieces against softmax written out in fp64, with every gradient; how the pieces are cut; memory."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from baton.kernels.attention import area, causal_attention, cut, flash_cpu, flash_cuda, op, reference
from baton.kernels.documents import pack_documents
from helpers import relative_error

L = 61
ROWS = [[0, 1, 2, 9, 40, 41, L], [0, L]]
"""Two sequences of L tokens: documents of one token, at the start too, and a single one."""


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def operands(l=L, h=4, hk=2, e=8):
    """q, k, v and a gradient of the output, in fp64."""
    return draw((2, l, h, e), (2, l, hk, e), (2, l, hk, e), (2, l, h, e))


def definition(q, k, v, rows):
    """Each document of each row alone."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    out = torch.zeros_like(q)
    for b, boundaries in enumerate(rows):
        for start, stop in pairwise(boundaries):
            qd, kd, vd = (t[b, start:stop] for t in (q, k, v))
            scores = torch.einsum("ihe,jhe->hij", qd, kd) / q.shape[-1] ** 0.5
            seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            out[b, start:stop] = torch.einsum("hij,jhe->ihe", scores.masked_fill(~seen, float("-inf")).softmax(-1), vd)
    return out


def outcome(function, q, k, v, dout, dtype=torch.float64):
    """The output and the gradients of q, k and v."""
    q, k, v = (t.to(dtype, copy=True).requires_grad_() for t in (q, k, v))
    out = function(q, k, v)
    out.backward(dout.to(dtype))
    return [out.detach(), q.grad, k.grad, v.grad]


def assert_is_definition(rows, h=4, hk=2):
    documents = pack_documents(rows, torch.arange(L))
    found = outcome(lambda *qkv: causal_attention(*qkv, documents), *operands(h=h, hk=hk))
    for one, other in zip(found, outcome(lambda *qkv: definition(*qkv, rows), *operands(h=h, hk=hk)), strict=True):
        assert relative_error(one, other) <= 1e-12


def emulate_varlen(monkeypatch):
    """The kernels that take many pieces in one launch, run one by one: what is left to check is how launches are put together."""
    launches = []

    def runs(q_bounds, k_bounds, longest_q, longest_k, causal):
        launches.append(len(q_bounds) - 1)
        queries, keys = ([slice(*pair) for pair in pairwise(bounds.tolist())] for bounds in (q_bounds, k_bounds))
        assert longest_q == max(s.stop - s.start for s in queries)
        assert longest_k == max(s.stop - s.start for s in keys)
        return [op.Piece(*pair, causal) for pair in zip(queries, keys, strict=True)]

    def forward(q, k, v, *sizes):
        _, outs, lses = zip(*flash_cpu.forward(q, k, v, runs(*sizes)), strict=True)
        return torch.cat(outs), torch.cat(lses, 1)

    def backward(dout, q, k, v, out, lse, *sizes):
        assert lse.is_contiguous()
        _, *grads = zip(*flash_cpu.backward(dout, q, k, v, out, lse, runs(*sizes)), strict=True)
        return tuple(torch.cat(grad) for grad in grads)

    monkeypatch.setattr(flash_cuda, "_flash", forward)
    monkeypatch.setattr(flash_cuda, "_flash_backward", backward)
    monkeypatch.setattr(op, "backend", lambda q: flash_cuda)
    return launches


@pytest.mark.parametrize("backend", ["flash_cpu", "flash_cuda", "reference"])
def test_causal_attention(monkeypatch, backend):
    launches = emulate_varlen(monkeypatch)
    monkeypatch.setattr(op, "backend", lambda q: getattr(op, backend))
    monkeypatch.setattr(reference, "TILE", 7)
    assert_is_definition(ROWS)
    assert_is_definition([[0, L], [0, L]], h=3, hk=1)
    assert_is_definition([[*range(0, L + 1)], [*range(0, L, 2), L]], h=2, hk=2)
    assert launches == ([7, 7, 2, 2, 92, 92] if backend == "flash_cuda" else [])


@pytest.mark.parametrize("rows", [ROWS, [[0, L], [0, L]]], ids=["packed", "single"])
@pytest.mark.parametrize("backend", ["flash_cpu", "flash_cuda", "reference"])
def test_keys_that_come_in_lots_merge(monkeypatch, backend, rows):
    """Spans of one rank against those of several, in any order: partial outputs and gradients are those of the whole."""
    emulate_varlen(monkeypatch)
    monkeypatch.setattr(op, "backend", lambda q: getattr(op, backend))
    monkeypatch.setattr(reference, "TILE", 5)
    q, k, v, dout = operands()
    expected = outcome(lambda *qkv: definition(*qkv, rows), q, k, v, dout)
    lots = [((20, 33), (50, L)), ((0, 9), (33, 50)), ((9, 20),)]
    out, dq, dk, dv = (torch.zeros_like(t) for t in (q, q, k, v))
    part = lambda t, lot: torch.cat([t[:, slice(*span)] for span in lot], 1).flatten(0, 1)  # noqa: E731
    for own in lots:
        running = op.RunningAttention(part(q, own))
        plan = [(lot, part(k, lot), part(v, lot), cut(own, lot, rows)) for lot in lots]
        for _, keys, values, pieces in plan:
            running.add(keys, values, pieces)
        result = running.result()
        put(out, own, result[0])
        for lot, keys, values, pieces in plan:
            grads = op.attention_gradients(part(dout, own), part(q, own), keys, values, *result, pieces)
            for total, spans, grad in zip((dq, dk, dv), (own, lot, lot), grads, strict=True):
                put(total, spans, grad)
    for found, other in zip((out, dq, dk, dv), expected, strict=True):
        assert relative_error(found, other) <= 1e-12


def put(total, spans, part):
    """Adds [b l, h, e] to its places in [b, L, h, e]."""
    if part is not None:
        places = torch.cat([torch.arange(*span) for span in spans])
        total[:, places] += part.unflatten(0, (total.shape[0], -1))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_mask(seed):
    """Each pair of a query and a key before it in its document is in exactly one piece, and no other pair in any."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda high, n: sorted(set(torch.randint(1, high, (n,), generator=generator).tolist()))  # noqa: E731
    rows = [[0, *random(L, 8), L], [0, *random(L, 2), L]]
    queries, keys = (list(pairwise([0, *random(L, 6), L]))[seed % 2 :: 2] for _ in range(2))
    places, key_places = ([p for span in s for p in range(*span)] for s in (queries, keys))
    found = torch.zeros(2 * len(places), 2 * len(key_places), dtype=torch.int)
    pieces = cut(queries, keys, rows)
    for piece in pieces:
        block = found[piece.queries, piece.keys]
        block += torch.ones_like(block).tril() if piece.causal else 1
        assert not piece.causal or block.shape[0] == block.shape[1]
    expected = torch.zeros_like(found)
    for row, boundaries in enumerate(rows):
        ids = torch.bucketize(torch.arange(L), torch.tensor(boundaries), right=True)
        seen = (ids[:, None] == ids).tril()[places][:, key_places]
        expected[row * len(places) :, row * len(key_places) :][: len(places), : len(key_places)] = seen
    assert torch.equal(found, expected)
    assert area(pieces) == int(expected.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["flash_cpu", "reference"])
def test_rounding_is_that_of_pytorch(monkeypatch, dtype, backend):
    monkeypatch.setattr(op, "backend", lambda q: getattr(op, backend))
    monkeypatch.setattr(reference, "TILE", 16)
    tensors = [t.to(dtype).double() for t in operands()]
    exact = outcome(lambda *qkv: definition(*qkv, ROWS), *tensors)
    documents = pack_documents(ROWS, torch.arange(L))
    plain = outcome(lambda *qkv: plain_sdpa(*qkv, ROWS), *tensors, dtype)
    found = outcome(lambda *qkv: causal_attention(*qkv, documents), *tensors, dtype)
    for one, other, truth in zip(found, plain, exact, strict=True):
        assert one.dtype == dtype
        assert relative_error(one, truth) <= max(2 * relative_error(other, truth), 1e-5)


def plain_sdpa(q, k, v, rows):
    """PyTorch's own with a mask."""
    ids = torch.stack([torch.bucketize(torch.arange(q.shape[1]), torch.tensor(row), right=True) for row in rows])
    seen = (ids[:, :, None] == ids[:, None]).tril()[:, None]
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def test_the_flash_kernel_for_cuda_takes_what_it_is_given(monkeypatch):
    """Arguments, shapes and dtypes only, on tensors without data: there is no GPU to run it."""
    monkeypatch.setattr(op, "backend", lambda q: flash_cuda)
    pieces = cut([(0, 9), (30, L)], [(0, L)], ROWS)
    q, k = (torch.empty(t, h, 8, dtype=torch.bfloat16, device="meta") for t, h in ((80, 4), (2 * L, 2)))
    assert [flash_cuda.usable(t) for t in (q, q.float(), q[..., :7])] == [True, False, False]
    running = op.RunningAttention(q)
    running.add(k, k, pieces)
    out, lse = running.result()
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (q.dtype, q.shape, torch.float32, (4, 80))
    grads = op.attention_gradients(out, q, k, k, out, lse, pieces)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


def test_strides_do_not_matter():
    """PyTorch's kernel for CPUs reads a head's numbers as if they lay side by side."""
    operands_ = operands()
    strided = [t.mT.contiguous().mT for t in operands_[:3]]
    assert relative_error(causal_attention(*strided), causal_attention(*operands_[:3])) <= 1e-12


MEMORY = """
import resource, sys, torch
from baton.kernels.attention import causal_attention, op
torch.set_num_threads(1)
op.backend = lambda q: getattr(op, sys.argv[1])
def run(l):
    q, k, v = (torch.randn(1, l, 1, 8, requires_grad=True) for _ in range(3))
    causal_attention(q, k, v).sum().backward()
run(2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(int(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "l", "bound"), [("flash_cpu", 32768, 64), ("reference", 12288, 64)])
def test_memory_is_not_quadratic(backend, l, bound):
    """MiB above a run of 2048 tokens, forward and backward; one L x L matrix in fp32 has 4096 and 576."""
    done = subprocess.run([sys.executable, "-c", MEMORY, backend, str(l)], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) <= bound


def test_bad_operands_are_named():
    q = torch.zeros(1, 4, 4, 8)
    with pytest.raises(ValueError, match="k has 3 heads, allowed: a divisor of q's 4"):
        causal_attention(q, *torch.zeros(2, 1, 4, 3, 8))
    with pytest.raises(ValueError, match="one batch, length and head dim"):
        causal_attention(q, *torch.zeros(2, 1, 3, 4, 8))
    with pytest.raises(ValueError, match=r"documents end at \[3\], allowed: 4 for each of 1 sequences"):
        causal_attention(q, q, q, pack_documents([[0, 3]], torch.arange(3)))
