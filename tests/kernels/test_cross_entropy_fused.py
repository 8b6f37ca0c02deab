"""Projection and cross entropy in chunks, by the kernels and by the reference, against whole logits in fp64."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import interpreter
from baton.kernels.cross_entropy import IGNORED, cross_entropy_sum, op, projected_cross_entropy_sum
from baton.kernels.cross_entropy.fused import block_sizes, gradient_, statistics
from baton.kernels.dispatch import chosen
from helpers import DEVICE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned")

LARGEST = block_sizes(10**6)["BLOCK"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["triton", "reference"]


@pytest.fixture
def chunk(monkeypatch):
    """Sets how many tokens of v logits of a dtype a chunk has."""
    return lambda tokens, v, dtype: monkeypatch.setitem(op.CHUNK_BYTES, DEVICE.type, tokens * v * dtype.itemsize)


def draw(shape, v, dtype=torch.float64, scale=1.0):
    """x [*shape, d] and weight [v, d], whose logits are about normal times scale, and labels, of which each third is ignored."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*rows, 6, generator=generator, dtype=torch.float64) for rows in (shape, (v,)))
    labels = torch.randint(0, v, shape, generator=generator)
    labels.view(-1)[::3] = IGNORED
    return x.to(DEVICE, dtype), weight.mul(scale / 6**0.5).to(DEVICE, dtype), labels.to(DEVICE)


def whole(x, weight, labels):
    return cross_entropy_sum(F.linear(x, weight), labels)


def results(loss, x, weight, labels, dtype=None):
    """The loss, and the gradients of 0.3 times it, computed in dtype."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight)]
    value = loss(*leaves, labels)
    return [value.detach(), *torch.autograd.grad(0.3 * value, leaves)]


def mean_error(found, reference):
    """Root of the mean square of the difference, over that of the reference."""
    return ((found.double() - reference).square().mean() / reference.square().mean()).sqrt().item()


def assert_close(kernels, x, weight, labels):
    """fp64 to 1e-12; below to 1e-5, or twice the error of PyTorch with whole logits in the same dtype.

    In 16 bits dx is rounded once more than there, since the loss's gradient comes after; so that it is not chance how the largest
    error of two roundings compares with that of one, errors are then means.
    """
    measure = mean_error if x.dtype.itemsize == 2 else relative_error
    exact = results(whole, x, weight, labels, torch.float64)
    plain = results(whole, x, weight, labels)
    with chosen(kernels):
        found = results(projected_cross_entropy_sum, x, weight, labels)
    assert [t.dtype for t in found] == [torch.promote_types(x.dtype, torch.float32), x.dtype, x.dtype]
    for name, one, same_dtype, expected in zip(("loss", "dx", "dweight"), found, plain, exact, strict=True):
        floor = 1e-12 if x.dtype == torch.float64 else 1e-5
        error, allowed = measure(one, expected), max(2 * measure(same_dtype, expected), floor)
        assert error <= allowed, f"{name}: {error}, allowed {allowed}"


@pytest.mark.parametrize("tokens_of_chunk", [1, 4, 100])
@pytest.mark.parametrize("v", [2, 37, 200])
def test_fp64(chunk, v, tokens_of_chunk):
    chunk(tokens_of_chunk, v, torch.float64)
    assert_close("reference", *draw((2, 7), v))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "v"), [((2, 7), 37), ((9,), LARGEST + 500), ((3, 1, 5), 2 * LARGEST)])
def test_below_fp64(chunk, shape, v, dtype, kernels):
    chunk(4, v, dtype)
    assert_close(kernels, *draw(shape, v, dtype))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype, kernels):
    x, weight, labels = draw((20,), 300, dtype, scale=1e4)
    assert F.linear(x, weight).abs().max() > 1e4
    assert_close(kernels, x, weight, labels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_all_ignored(kernels):
    x, weight, labels = draw((2, 5), 40, torch.float32)
    with chosen(kernels):
        for result in results(projected_cross_entropy_sum, x, weight, torch.full_like(labels, IGNORED)):
            assert (result == 0).all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_vocabulary_of_one(kernels):
    with chosen(kernels):
        for result in results(projected_cross_entropy_sum, *draw((2, 5), 1, torch.float32)):
            assert (result == 0).all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_tokens(kernels):
    x, weight, labels = draw((0,), 40, torch.float32)
    with chosen(kernels):
        loss, dx, dweight = results(projected_cross_entropy_sum, x, weight, labels)
    assert loss == 0
    assert dx.shape == (0, 6)
    assert (dweight == 0).all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_strided_operands(chunk, kernels):
    x, weight, labels = draw((8, 5), 40, torch.float32)
    chunk(7, 40, torch.float32)
    strided = x.mT.contiguous().mT, weight.T.contiguous().T, labels.T.contiguous().T
    with chosen(kernels):
        found, expected = (results(projected_cross_entropy_sum, *operands) for operands in (strided, (x, weight, labels)))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-6


def test_labels_that_lie_apart():
    x, weight, labels = draw((9,), 40, torch.float32)
    apart = torch.stack([labels, 40 + labels], 1)[:, 0]
    with chosen("triton"):
        found, expected = (results(projected_cross_entropy_sum, x, weight, places) for places in (apart, labels))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-6


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_label_beyond_the_vocabulary_is_not_silent(kernels):
    x, weight, labels = draw((4,), 40, torch.float32)
    labels[1] = 40
    with chosen(kernels):
        assert projected_cross_entropy_sum(x, weight, labels) == float("inf")


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for(wanted, monkeypatch):
    x, weight, labels = draw((2, 7), 30)
    expected = results(whole, x, weight, labels)
    counts = {"mm": 0, "addmm_": 0}
    for owner, name in ((torch, "mm"), (torch.Tensor, "addmm_")):
        inner = getattr(owner, name)

        def counted(*args, inner=inner, name=name, **named):
            counts[name] += 1
            return inner(*args, **named)

        monkeypatch.setattr(owner, name, counted)
    leaves = [t.requires_grad_(needed) for t, needed in zip((x, weight), wanted, strict=True)]
    loss = projected_cross_entropy_sum(*leaves, labels)
    assert relative_error(loss.detach(), expected[0]) <= 1e-12
    assert (counts["mm"], counts["addmm_"]) == wanted
    if any(wanted):
        (0.3 * loss).backward()
    for leaf, needed, gradient in zip(leaves, wanted, expected[1:], strict=True):
        assert relative_error(leaf.grad, gradient) <= 1e-12 if needed else leaf.grad is None
    with torch.no_grad():
        assert relative_error(projected_cross_entropy_sum(*leaves, labels), expected[0]) <= 1e-12
    assert (counts["mm"], counts["addmm_"]) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_over_shards(dtype):
    """Statistics and gradients of a vocabulary in three parts, the label in one of them; nan in a row that is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 3 * 150, generator=generator).mul(3).to(DEVICE, dtype)
    labels = torch.randint(0, 450, (9,), generator=generator).to(DEVICE)
    labels[4], logits[4, 10] = IGNORED, float("nan")
    before = logits.double()
    exact = torch.softmax(before, 1)
    exact.scatter_add_(1, labels.clamp(min=0)[:, None], -torch.ones_like(exact))
    exact[4] = 0
    for part in range(3):
        first, own = 150 * part, logits[:, 150 * part : 150 * (part + 1)]
        found, wide = statistics(own, labels, first), own.double()
        kept = torch.arange(9, device=DEVICE) != 4
        assert torch.equal(found[0][kept], wide.amax(1).float()[kept])
        sums = (wide - wide.amax(1, keepdim=True)).exp().sum(1)
        assert relative_error(found[1][kept], sums[kept]) <= 1e-6
        here = (labels >= first) & (labels < first + 150)
        assert torch.equal(found[2] > float("-inf"), here)
        assert torch.equal(found[2][here], before.gather(1, labels.clamp(min=0)[:, None]).float()[:, 0][here])
        total = (before - wide.amax(1, keepdim=True)).exp().sum(1).float()
        gradient_(own, labels, found[0].contiguous(), 1 / total, first, IGNORED)
    assert relative_error(logits, exact) <= max(1e-6, torch.finfo(dtype).eps)


def test_a_block_of_infinities():
    """16-bit logits that overflowed below leave the rest of the row right."""
    logits = torch.randn(2, LARGEST + 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, :LARGEST] = float("-inf")
    highest, total, _ = statistics(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), 0)
    assert relative_error(highest + total.log(), logits.double().logsumexp(1)) <= 1e-6


def test_any_order_of_programs_gives_the_same_bits():
    x, weight, labels = draw((3, 30), 300, torch.float32)
    with chosen("triton"):
        given = results(projected_cross_entropy_sum, x, weight, labels)
        for programs in ("reversed", "shuffled"):
            with interpreter.order(programs):
                for one, other in zip(results(projected_cross_entropy_sum, x, weight, labels), given, strict=True):
                    assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [0, 1, 300, 1100, 8192])
@pytest.mark.parametrize("row_bytes", [4, 65536, 10**6, 10**9])
def test_chunks_are_as_few_as_fit(tokens, row_bytes):
    size, most = op.chunk_size(tokens, row_bytes, "cpu"), max(1, op.CHUNK_BYTES["cpu"] // row_bytes)
    assert 1 <= size <= most
    assert len(range(0, tokens, size)) == len(range(0, tokens, most))


def test_chunks_are_even():
    assert op.chunk_size(1100, 65536, "cpu") == 640


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(chunk, dtype):
    x, weight, labels = draw((2, 7), 37, dtype)
    chunk(4, 37, dtype)
    with chosen("triton"):
        found = results(torch.compile(projected_cross_entropy_sum, fullgraph=True, backend="aot_eager"), x, weight, labels)
        expected = results(projected_cross_entropy_sum, x, weight, labels)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kernels", KERNELS)
def test_under_activation_checkpointing(kernels):
    x, weight, labels = draw((2, 7), 37, torch.float32)
    with chosen(kernels):
        found = results(lambda *a: checkpoint(projected_cross_entropy_sum, *a, use_reentrant=False), x, weight, labels)
        expected = results(projected_cross_entropy_sum, x, weight, labels)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_operators_keep_their_promises():
    x, weight, labels = draw((9,), 37, torch.float32)
    logits = F.linear(x, weight)
    torch.library.opcheck(torch.ops.baton.cross_entropy_statistics.default, (logits, labels, 0))
    highest, total, _ = statistics(logits, labels, 0)
    torch.library.opcheck(torch.ops.baton.cross_entropy_gradient_.default, (logits, labels, highest, 1 / total, 0))
    narrow = [t.bfloat16() for t in (logits, x)]
    torch.library.opcheck(torch.ops.baton.add_wide_product_.default, (torch.zeros_like(weight), *narrow))


def test_bad_operands_are_named():
    x, weight, labels = draw((2, 7), 30)
    with pytest.raises(ValueError, match=r"x is torch.int64"):
        projected_cross_entropy_sum(labels, weight, labels)
    with pytest.raises(ValueError, match=r"weight is \[30, 5\], allowed with x \[2, 7, 6\]: \[v, 6\]"):
        projected_cross_entropy_sum(x, weight[:, :5], labels)
    with pytest.raises(ValueError, match=r"weight is torch.float32 on .*, allowed: as x, torch.float64"):
        projected_cross_entropy_sum(x, weight.float(), labels)
    with pytest.raises(ValueError, match=r"labels are \[7\], allowed with x \[2, 7, 6\]: \[2, 7\]"):
        projected_cross_entropy_sum(x, weight, labels[0])
    with pytest.raises(ValueError, match=r"labels are torch.float32"):
        projected_cross_entropy_sum(x, weight, labels.float())
    with chosen("triton"), pytest.raises(ValueError, match="x is torch.float64, allowed for the Triton kernels: bf16, fp16, fp32"):
        projected_cross_entropy_sum(x, weight, labels)
