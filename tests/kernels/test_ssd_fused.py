"""The SSD scan's Triton kernels against the token-by-token recurrence in fp64: values and every gradient."""

import functools

import pytest
import torch
import torch.distributed as dist
from ssd_operands import assert_close, documents, fast, operands, oracle, outcome
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import interpreter
from baton.kernels.dispatch import chosen
from baton.kernels.launches import record
from baton.kernels.ssd import fused, ssd
from baton.kernels.ssd import operands as cutting
from baton.parallel.affine_scan import SequenceScan
from baton.parallel.layout import Layout
from helpers import DEVICE, relative_error

pytestmark = pytest.mark.usefixtures("poisoned")

SHARED = ("A", "D", "dt_bias")
WIDE = (*SHARED, "initial_state")
"""Operands that stay in fp32 beside 16 bits, as a model has them."""


def draw(shape, dtype=torch.float32, gate=False, dt_scale=1.0):
    """Operands on the device, rounded to dtype; B is as large as a trained model's, so that sums over n are of x's size."""
    values = operands(*shape, dt_scale)
    values["B"] /= shape[5] ** 0.5
    if gate:
        values["z"] = torch.randn(values["x"].shape, generator=torch.Generator().manual_seed(2))
    return {name: t.to(DEVICE, torch.float32 if name in WIDE else dtype) for name, t in values.items()}


def exact(values, **options):
    return outcome(oracle, {name: t.double() for name, t in values.items()}, **options)


def kernels(values, **options):
    with chosen("triton"):
        return outcome(functools.partial(fast, chunk_size=64), values, **options)


def plain(t, resets=None):
    """The chunked scan in plain PyTorch: products of matrices in the operands' dtype, decays and states in fp32."""
    x, B, C = t["x"], t["B"].repeat_interleave(t["x"].shape[2] // t["B"].shape[2], 2), t["C"]
    C = C.repeat_interleave(x.shape[2] // C.shape[2], 2)
    dt = F.softplus(t["dt"].float() + t["dt_bias"])
    starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if resets is None else resets
    S, ys = t["initial_state"], []
    for at in (slice(i, i + 64) for i in range(0, x.shape[1], 64)):
        cs, document = (dt[:, at] * t["A"]).cumsum(1), starts[:, at].cumsum(1)
        seen = (document[:, :, None] == document[:, None]).tril()[..., None]
        L = (cs[:, :, None] - cs[:, None]).masked_fill(~seen, -torch.inf).exp()
        W = (torch.einsum("bthn,bshn->btsh", C[:, at], B[:, at]).float() * L * dt[:, None, at]).to(x.dtype)
        enter, leave = cs.exp() * (document == 0)[..., None], (cs[:, -1:] - cs).exp() * (document == document[:, -1:])[..., None]
        y = torch.einsum("btsh,bshp->bthp", W, x[:, at]).float()
        y = y + torch.einsum("bthn,bhpn->bthp", C[:, at], S.to(x.dtype)).float() * enter[..., None]
        ys.append((y + t["D"][:, None] * x[:, at].float()).to(x.dtype))
        weighted = (x[:, at].float() * (dt[:, at] * leave)[..., None]).to(x.dtype)
        through = (cs[:, -1].exp() * (document[:, -1:] == 0))[..., None, None]
        S = S * through + torch.einsum("bshp,bshn->bhpn", weighted, B[:, at]).float()
    y = torch.cat(ys, 1)
    return (y.float() * F.silu(t["z"].float())).to(x.dtype) if "z" in t else y, S


def distance(found, reference):
    """Of the norms: the largest element of many that 16 bits rounded is a matter of luck."""
    return ((found.double() - reference).norm() / reference.norm()).item()


def assert_as_good_as_plain(values, resets=None):
    """Error against fp64 at most twice that of plain PyTorch in the same dtype, or 1e-5.

    In 16 bits but of the gradients that are a number a head: see `test_16_bits_of_a_number_a_head`.
    """
    wide = values["x"].dtype == torch.float32
    error = relative_error if wide else distance
    expected, same_dtype = exact(values, resets=resets), outcome(plain, values, resets=resets)
    for name, found in kernels(values, resets=resets).items():
        if wide or found.dim() > 1:
            ours, theirs = error(found, expected[name]), error(same_dtype[name], expected[name])
            assert ours <= max(2 * theirs, 1e-5), f"{name}: {ours}, plain PyTorch {theirs}"


@pytest.mark.parametrize(
    ("shape", "share", "gate"),
    [
        ((2, 90, 2, 32, 1, 16), 0.0, False),
        ((1, 133, 4, 32, 2, 64), 0.05, False),
        ((1, 65, 2, 64, 1, 16), 0.0, True),
        ((2, 1, 3, 32, 3, 16), 0.0, False),
        ((1, 64, 2, 32, 1, 16), 1.0, True),
    ],
    ids=["ragged", "documents", "gate", "one token", "all documents"],
)
def test_fp32(shape, share, gate):
    resets = documents(*shape[:2], share).to(DEVICE) if share else None
    assert_as_good_as_plain(draw(shape, gate=gate), resets)


@pytest.mark.parametrize(
    ("shape", "share", "gate", "dtype"),
    [
        ((1, 260, 2, 64, 1, 128), 0.0, False, torch.bfloat16),
        ((2, 200, 4, 32, 2, 16), 0.03, True, torch.bfloat16),
        ((1, 130, 2, 64, 1, 64), 0.0, False, torch.float16),
        ((1, 140, 2, 128, 1, 256), 0.0, False, torch.bfloat16),
    ],
    ids=["bf16", "documents and gate", "fp16", "largest tiles"],
)
def test_16_bits(shape, share, gate, dtype):
    resets = documents(*shape[:2], share).to(DEVICE) if share else None
    assert_as_good_as_plain(draw(shape, dtype, gate), resets)


@pytest.mark.slow
def test_16_bits_of_a_number_a_head():
    """dA, dD and ddt_bias, whose errors are a few numbers' luck, over several draws."""
    errors = {"dA": [], "dD": [], "ddt_bias": []}
    for l in (129, 130, 131, 132):
        values = draw((1, l, 8, 32, 2, 16), torch.bfloat16)
        found, same_dtype, expected = kernels(values), outcome(plain, values), exact(values)
        for name, pairs in errors.items():
            pairs.append((distance(found[name], expected[name]), distance(same_dtype[name], expected[name])))
    for name, pairs in errors.items():
        ours, theirs = torch.tensor(pairs).square().mean(0).sqrt().tolist()
        assert ours <= 2 * theirs, f"{name}: {ours}, plain PyTorch {theirs}"


@pytest.mark.slow
@pytest.mark.parametrize("dt_scale", [0.05, 20.0])
def test_weak_and_strong_decays(dt_scale):
    assert_as_good_as_plain(draw((1, 200, 2, 32, 1, 16), dt_scale=dt_scale))


def test_documents_under_weak_decay():
    """Nothing passes a reset, also where states would have lived on from block to block."""
    values, resets = draw((1, 200, 2, 32, 1, 16)), torch.zeros(1, 200, dtype=torch.bool, device=DEVICE)
    resets[:, [70, 150]] = True
    assert_as_good_as_plain(values | {"A": torch.full((2,), -1e-3, device=DEVICE)}, resets)


@pytest.mark.parametrize("spike", [5.0, 500.0])
def test_one_token_that_forgets_all(spike):
    """Its decay does not drown those of the tokens around it in one sum."""
    values = draw((1, 32, 2, 32, 1, 16))
    values |= {"A": torch.tensor([-16.0, -4.0], device=DEVICE), "dt_bias": torch.zeros(2, device=DEVICE)}
    values["dt"] = torch.where(torch.arange(32, device=DEVICE) == 5, spike, -6.0)[None, :, None].expand(1, 32, 2)
    assert_close(kernels(values), exact(values), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 4])
def test_several_blocks_in_a_segment(monkeypatch, programs):
    """Long sequences have segments of many blocks, of which the last is cut short, and heads of a group in one program."""
    for module in (fused, cutting):
        monkeypatch.setattr(module, "PROGRAMS", programs)
    assert_as_good_as_plain(draw((1, 200, 4, 32, 2, 16)), documents(1, 200, 0.02).to(DEVICE))


def test_limits_of_dt():
    values, limit = draw((1, 80, 2, 32, 1, 16)), (0.05, 0.8)
    assert_close(kernels(values, dt_limit=limit), exact(values, dt_limit=limit), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_any_order_of_programs_gives_the_same_bits(order):
    values = draw((1, 100, 2, 32, 2, 16))
    given = kernels(values)
    with interpreter.order(order):
        for name, found in kernels(values).items():
            assert torch.equal(found, given[name]), name


def test_tensor_cores_do_not_round_fp32():
    values = draw((1, 100, 2, 32, 1, 16))
    with interpreter.tf32():
        assert_as_good_as_plain(values)


@pytest.mark.slow
def test_strided_operands():
    """x a part of a wider tensor with its heads apart, B and C interleaved, dt transposed: as for copies of them."""
    values = draw((2, 70, 2, 32, 1, 16))
    apart = torch.zeros(2, 70, 2, 40, device=DEVICE)
    apart[..., 3:35] = values["x"]
    both = torch.stack([values["B"], values["C"]], 3)
    strided = values | {"x": apart[..., 3:35], "dt": values["dt"].transpose(1, 2).contiguous().transpose(1, 2)}
    strided |= {"B": both[:, :, :, 0], "C": both[:, :, :, 1]}
    results = []
    for t in (strided, values):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in t.items()}
        with chosen("triton"):
            y, _ = fast(leaves, 64)
            # The gradient of a sum is one number, expanded.
            results.append((y, *torch.autograd.grad(y.sum(), list(leaves.values()))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_compiles_as_one_op():
    values = draw((1, 70, 2, 32, 1, 16), gate=True)
    function = torch.compile(functools.partial(fast, chunk_size=64), fullgraph=True, backend="aot_eager")
    with chosen("triton"):
        found = outcome(function, values)
    for name, expected in kernels(values).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("triton", [True, False])
def test_operators_keep_their_promises(triton):
    """Their schemas, and what compilers are told of the results, also where z has a dtype of its own."""
    values = draw((1, 70, 2, 32, 1, 16), torch.bfloat16, gate=True)
    z, initial_state = values["z"].float(), values["initial_state"]
    operands = (triton, *(values[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")), None, 0.0, float("inf"), 1, 64)
    ops, checks = torch.ops.baton, {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(ops.ssd, (*operands, z, initial_state), **checks)
    y, final, log_T, S_in = ops.ssd(*operands, z, initial_state)
    torch.library.opcheck(ops.ssd_backward, (*operands, z, log_T, S_in, y, final), **checks)
    prepared = ops.ssd_prepare(*operands)
    torch.library.opcheck(ops.ssd_prepare, operands, **checks)
    torch.library.opcheck(ops.ssd_maps, (*operands, *prepared), **checks)
    torch.library.opcheck(ops.ssd_outputs, (*operands, *prepared, z, S_in), **checks)
    torch.library.opcheck(ops.ssd_gate_grads, (*operands, *prepared, z, S_in, y), **checks)
    torch.library.opcheck(ops.ssd_state_grads, (*operands, *prepared, y), **checks)
    torch.library.opcheck(ops.ssd_main_grads, (*operands, *prepared, S_in, S_in, y), **checks)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_checkpointing_sees_an_op(saved):
    """A policy that keeps the scan's results keeps it from being computed twice."""
    values = {name: t.requires_grad_() for name, t in draw((1, 70, 2, 32, 1, 16)).items()}

    def policy(context, op, *args, **kwargs):
        keep = saved and op is torch.ops.baton.ssd.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with chosen("triton"), record() as launches:
        checkpoint(lambda: fast(values, 64)[0], use_reentrant=False, context_fn=contexts).sum().backward()
    scans = [launch for launch in launches if launch.name == "walk_kernel"]
    assert len(scans) == (2 if saved else 3), "forward, perhaps again, and backward"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 2, 48), "initial_state": torch.zeros(1, 2, 48, 16)}, "x has head dim 48, allowed: 32, 64, 128"),
        ({"x": torch.zeros(1, 8, 2, 32, dtype=torch.float64)}, "x, B and C are torch.float64"),
        ({"B": torch.zeros(1, 8, 1, 16, dtype=torch.bfloat16)}, "x, B and C are torch.float32, torch.bfloat16"),
        ({"dt": torch.zeros(1, 8, 2, dtype=torch.float64)}, "dt is torch.float64"),
    ],
)
def test_what_kernels_cannot_take_is_named(change, message):
    values = draw((1, 8, 2, 32, 1, 16)) | {name: t.to(DEVICE) for name, t in change.items()}
    with chosen("triton"), pytest.raises(ValueError, match=f"ssd: {message}"):
        fast(values, 64)


def sharded(rank, layout, values, resets, dy):
    own = {name: t if name in WIDE else layout.shard(t, rank) for name, t in values.items()}
    leaves = {name: t.clone().requires_grad_() for name, t in own.items()}
    with chosen("triton"):
        y = ssd(**leaves, resets=layout.shard(resets, rank), scan=SequenceScan(layout, dist.group.WORLD, "ring"))
        y.backward(layout.shard(dy, rank))
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="several ranks on one GPU: `baton verify --share-device` does that")
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_over_ranks(pool, kind):
    """Maps out, states in: the same kernels where the sequence is cut over ranks."""
    layout, values, resets = Layout(kind, 2), draw((1, 180, 2, 32, 1, 16)), documents(1, 180, 0.02)
    dy = torch.randn(1, 180, 2, 32, generator=torch.Generator().manual_seed(3))
    leaves = {name: t.double().requires_grad_() for name, t in values.items()}
    y = oracle(leaves, resets=resets)[0]
    y.backward(dy.double())
    found = pool.run(2, sharded, layout, values, resets, dy)
    for rank, (own, gradients) in enumerate(found):
        assert relative_error(own, layout.shard(y.detach(), rank)) <= 1e-5
        for name in sorted(set(values) - set(WIDE)):
            assert relative_error(gradients[name], layout.shard(leaves[name].grad, rank)) <= 1e-5, name
    for name in SHARED:
        assert relative_error(sum(gradients[name] for _, gradients in found), leaves[name].grad) <= 1e-5, name
    assert relative_error(found[0][1]["initial_state"], leaves["initial_state"].grad) <= 1e-5
