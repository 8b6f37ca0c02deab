"""The selective scan: the reference against the sequential recurrence, the Triton kernels against both, and over ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import interpreter
from baton.kernels.dispatch import chosen
from baton.kernels.scan import LocalScan
from baton.kernels.selective_scan import selective_scan, selective_scan_sequential
from baton.parallel.affine_scan import SequenceScan
from baton.parallel.layout import Layout
from helpers import DEVICE, relative_error

SHARED = ("A", "D", "dt_bias")
"""Operands that every rank has whole."""


def draw(l, d, n, b=2, gate=True, skip=True, strong=1.0, seed=0):
    """Operands by name, the initial state, resets, and weights of y and of the final state; values that fp32 has."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator).double()  # noqa: E731
    operands = {
        "x": normal(b, l, d),
        "dt": normal(b, l, d) - 1,
        "A": -normal(d, n).abs() * strong - 0.05,
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        "dt_bias": normal(d) / 2,
    }
    operands |= {"D": normal(d)} if skip else {}
    operands |= {"z": normal(b, l, d)} if gate else {}
    resets = torch.zeros(b, l, dtype=torch.bool)
    resets[0, [0, l // 3, l // 3 + 1, l // 2]] = True
    rest = normal(b, d, n), resets, normal(b, l, d), normal(b, d, n)
    return {name: t.to(DEVICE) for name, t in operands.items()}, *(t.to(DEVICE) for t in rest)


def run(function, operands, initial, resets, dy, dfinal, dtype=torch.float64, **options):
    """y, the final state, and the gradients by name, under weights of both."""
    cast = lambda name: dtype if name in ("x", "dt", "B", "C", "z") else dy.dtype  # noqa: E731
    leaves = {name: t.detach().to(cast(name), copy=True).requires_grad_() for name, t in operands.items()}
    state = None if initial is None else initial.clone().requires_grad_()
    y, final = function(**leaves, initial_state=state, resets=resets, **options)
    loss = (y.to(dy.dtype) * dy).sum()
    (loss if final is None else loss + (final * dfinal).sum()).backward()
    gradients = {name: t.grad for name, t in leaves.items()} | ({} if state is None else {"initial_state": state.grad})
    return {"y": y.detach()} | ({} if final is None else {"final": final.detach()}) | gradients


def oracle(dt, dt_bias=None, dt_limit=(0.0, float("inf")), **operands):
    """The definition from raw dt."""
    return selective_scan_sequential(dt=F.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit), **operands)


def fast(**operands):
    return selective_scan(**operands, return_final_state=True)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= tolerance, name


class Runs(LocalScan):
    """Local, of a sequence that is said to be in two runs."""

    segments = 2


@pytest.mark.parametrize("strong", [1.0, 100.0])
def test_reference_is_the_recurrence(strong):
    with chosen("reference"):
        sizes = draw(77, 6, 5, strong=strong)
        assert_close(run(fast, *sizes), run(oracle, *sizes), 1e-12)
        assert_close(run(fast, *sizes, dt_limit=(0.1, 0.6)), run(oracle, *sizes, dt_limit=(0.1, 0.6)), 1e-12)
        plain, _, _, *weights = draw(34, 3, 2, gate=False, skip=False)
        del plain["dt_bias"]
        expected = run(oracle, plain, None, None, *weights)
        assert_close(run(fast, plain, None, None, *weights), expected, 1e-12)
        assert_close(run(fast, plain, None, None, *weights, scan=Runs()), expected, 1e-12)


def test_reference_in_blocks(monkeypatch):
    """What one block holds does not matter."""
    from baton.kernels.selective_scan import reference

    sizes = draw(200, 3, 2)
    expected = run(oracle, *sizes)
    for floats in (1, 32 * 6 * 5):
        monkeypatch.setattr(reference, "BLOCK_FLOATS", floats)
        assert_close(run(fast, *sizes), expected, 1e-12)


@pytest.fixture
def short_segments(monkeypatch):
    """Of two chunks of the backward kernel, so that few tokens are many segments."""
    from baton.kernels.selective_scan import fused, segments

    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 2 * fused.Q)
    monkeypatch.setattr(segments, "LONGEST_SEGMENT", 2 * fused.Q)
    return fused


def both(sizes, dtype=torch.float32, **options):
    """What the kernels give, the reference in the same precision, and the reference in fp64."""
    wide = [{name: value.to(dtype).double() for name, value in sizes[0].items()}, *sizes[1:]]
    narrow = [t if t is None or t.dtype == torch.bool else t.float() for t in sizes[1:]]
    with chosen("triton"):
        found = run(fast, {name: t.float() for name, t in wide[0].items()}, *narrow, dtype=dtype, **options)
    with chosen("reference"):
        plain = run(fast, {name: t.float() for name, t in wide[0].items()}, *narrow, dtype=dtype, **options)
        return found, plain, run(fast, *wide, **options)


def assert_as_good(found, plain, exact):
    """As the reference, twice its error at most, or 1e-5."""
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name].dtype == plain[name].dtype, name
        assert relative_error(found[name], value) <= max(1e-5, 2 * relative_error(plain[name], value)), name


@pytest.mark.usefixtures("poisoned")
def test_kernels(short_segments):
    """Two runs, segments and chunks that end early, channels that end within a block, and all options."""
    with interpreter.order("reversed"):
        assert_as_good(*both(draw(38, 66, 3), dt_limit=(0.05, 1.5), scan=Runs()))


@pytest.mark.usefixtures("poisoned")
def test_kernels_in_bf16_without_options(short_segments, monkeypatch):
    """And a segment at a time."""
    monkeypatch.setattr(short_segments, "WORKSPACE", 1)
    operands, _, _, dy, dfinal = draw(20, 5, 2, gate=False, skip=False)
    del operands["dt_bias"]
    with interpreter.order("shuffled"):
        assert_as_good(*both([operands, None, None, dy, dfinal], torch.bfloat16))


def test_kernels_under_strong_decay():
    """Gradients of decays are far below the terms that a difference would be taken of; steps reach from 1e-6 to 1e2."""
    operands, initial, _, *weights = draw(9, 4, 2, b=1, strong=100.0)
    operands["dt"] = operands["dt"] * 6 - 2
    operands["dt"][0, 0] = torch.tensor([-14.0, 100.0, -90.0, 0.0])
    assert_as_good(*both([operands, initial, None, *weights]))


def test_kernels_with_many_state_dims():
    """Fewer channels a program."""
    from baton.kernels.selective_scan import fused

    assert fused.channels(33) < fused.channels(16)
    operands, initial, _, *weights = draw(3, 34, 33, b=1)
    assert_as_good(*both([operands, initial, None, *weights]))


def test_operands_that_are_not_contiguous(short_segments):
    """Parts of one projection, the step's channels expanded, and gradients of any strides."""
    operands, initial, resets, dy, _ = draw(12, 6, 2)
    packed = torch.cat([operands[name] for name in ("x", "z", "B", "C")], -1).float()
    x, z, B, C = packed.split((6, 6, 2, 2), -1)
    A, dt = operands["A"].float().t().contiguous().t(), operands["dt"][..., :1].float().expand(2, 12, 6)
    results = []
    for cut in (lambda t: t, torch.Tensor.contiguous):
        leaves = [cut(t.detach()).requires_grad_() for t in (x, dt, A, B, C)]
        with chosen("triton"):
            y = selective_scan(*leaves, z=cut(z), initial_state=initial.float(), resets=resets)
            weights = dy.float().transpose(0, 1).contiguous().transpose(0, 1)
            results.append((y, *torch.autograd.grad(y, leaves, cut(weights))))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.usefixtures("poisoned")
def test_parameters_and_single_tokens_that_lie_apart():
    """D and dt_bias with gaps; one token a sequence, whose stride says nothing of being contiguous."""
    operands, initial, _, dy, _ = draw(12, 8, 3, b=3)
    dense = {name: (t[:, :1].contiguous() if t.dim() == 3 else t).float() for name, t in operands.items()}
    apart, dy = dict(dense), dy[:, :1].contiguous()
    for name in ("D", "dt_bias"):
        apart[name] = torch.stack([dense[name], dense[name] + 9], 1)[:, 0]
    apart["x"] = dense["x"].transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for values in (apart, dense):
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        with chosen("triton"):
            y = selective_scan(**leaves, initial_state=initial.float())
            results.append((y, *torch.autograd.grad(y, list(leaves.values()), dy.float())))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


def test_compiles():
    """In one graph, forward and backward, kernels as operators that torch.library knows."""
    from baton.kernels.selective_scan import fused

    sizes = draw(9, 3, 2)
    narrow = [{name: t.float() for name, t in sizes[0].items()}, sizes[1].float(), sizes[2], *(t.float() for t in sizes[3:])]
    with chosen("triton"):
        expected = run(fast, *narrow, dtype=torch.float32)
        found = run(torch.compile(fast, fullgraph=True, backend="aot_eager"), *narrow, dtype=torch.float32)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    operands, (initial, resets, dy, _) = narrow[0], narrow[1:]
    x, dt, A, B, C, D, z, bias = (operands[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    check = lambda operator, *arguments: torch.library.opcheck(operator, (*arguments, 0.0, 2.0, 1), test_utils="test_faketensor")  # noqa: E731
    check(fused.maps, x, dt, A, B, bias, resets)
    check(fused.outputs, x, dt, A, B, C, D, z, None, None, initial[:, None])
    check(fused.state_grads, dt, A, C, None, bias, resets, dy)
    check(fused.main_grads, x, dt, A, B, C, None, z, None, None, initial[:, None], initial[:, None], dy)


def sharded(rank, layout, sizes, strategy):
    operands, initial, resets, dy, dfinal = draw(**sizes)
    own = {name: t if name in SHARED else layout.shard(t, rank) for name, t in operands.items()}
    scan = SequenceScan(layout, dist.group.WORLD, strategy)
    return run(fast, own, initial, layout.shard(resets, rank), layout.shard(dy, rank), dfinal, scan=scan)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="several ranks on one GPU: `baton verify --share-device` does that")
@pytest.mark.parametrize("strategy", ["allgather", "sliced"])
@pytest.mark.parametrize(("kind", "world"), [("contiguous", 2), ("zigzag", 2), ("contiguous", 4), ("zigzag", 4)])
def test_over_ranks(pool, kind, world, strategy):
    """Both states are of the whole sequence: one is looked at where it begins, the other is there where it ends."""
    layout, sizes = Layout(kind, world), {"l": 288, "d": 6, "n": 5}
    with chosen("reference"):
        expected = run(oracle, *draw(**sizes))
    found = pool.run(world, sharded, layout, sizes, strategy)
    for rank, own in enumerate(found):
        assert ("final" in own) == (layout.owners[-1] == rank)
        assert (own["initial_state"] is not None) == (layout.owners[0] == rank)
        for name in own.keys() - set(SHARED):
            whole = expected[name]
            if name not in ("final", "initial_state"):
                whole = layout.shard(whole, rank)
            assert own[name] is None or relative_error(own[name], whole) <= 1e-10, name
    for name in SHARED:
        assert relative_error(sum(own[name] for own in found), expected[name]) <= 1e-10, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (1, 4, 3)}, "dt is"),
        ({"A": (2,)}, "A is"),
        ({"B": (1, 4, 5)}, "B is"),
        ({"D": (3,)}, "D is"),
        ({"z": (1, 3, 2)}, "z is"),
        ({"initial_state": (1, 2, 4)}, "initial_state is"),
    ],
)
def test_bad_shapes_are_named(change, message):
    shapes = {"x": (1, 4, 2), "dt": (1, 4, 2), "A": (2, 3), "B": (1, 4, 3), "C": (1, 4, 3)} | change
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        selective_scan(**{name: torch.zeros(shape) for name, shape in shapes.items()})


def test_bad_options_are_named():
    operands = draw(9, 2, 3)[0]
    for options, message in (
        ({"dt_limit": (1.0, 0.5)}, "dt_limit is"),
        ({"resets": torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)}, "resets is torch.int64"),
        ({"scan": Runs()}, "9 tokens are no multiple of the 2 segments"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_scan(**operands, **options)
    with chosen("triton"), pytest.raises(ValueError, match="x is torch.float64"):
        selective_scan(**operands)
