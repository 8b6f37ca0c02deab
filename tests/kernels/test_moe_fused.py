"""The kernels of the mixture of experts against their definitions in fp64."""

import pytest
import torch

import interpreter
from baton.kernels.dispatch import chosen
from baton.kernels.moe import engine, fused, grouped_linear, permute, reference, route, unpermute
from baton.models.moe import MoE
from helpers import DEVICE, relative_error, tiny_config

pytestmark = pytest.mark.usefixtures("poisoned")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def choices(t, k, experts):
    """[t, k], different ones for each token."""
    return torch.rand(t, experts, generator=generator()).topk(k, -1).indices.to(DEVICE)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=generator(seed)).to(DEVICE, dtype).requires_grad_()


# Tokens, experts of each, experts: one of one, more experts than tokens, all of them, several blocks.
ROUTINGS = [(1, 1, 1), (3, 2, 70), (40, 5, 5), (300, 2, 7)]


@pytest.mark.parametrize(("t", "k", "experts"), ROUTINGS)
def test_routing(t, k, experts):
    picked = choices(t, k, experts)
    with chosen("triton"):
        found = route(picked, experts)
    expected = reference.route(picked, experts)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.int64
        assert torch.equal(one, other)
    with interpreter.order("shuffled"):
        assert torch.equal(fused.route(picked.T.contiguous().T, experts)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "k", "experts", "d"), [(1, 1, 1, 1), (40, 5, 5, 33), (150, 2, 7, 1040), (9, 3, 4, 64)])
def test_permute_and_unpermute(t, k, experts, d, dtype):
    routing = route(choices(t, k, experts), experts)
    x, y = draw(t, d, dtype=dtype), draw(t * k, d, dtype=dtype, seed=1)
    with chosen("triton"):
        spread, gathered = permute(x, routing), unpermute(y, routing)
        (dx,), (dy,) = torch.autograd.grad(spread, x, y.detach()), torch.autograd.grad(gathered, y, x.detach())
    copies = x.detach()[routing.order // k]
    sums = y.detach()[routing.rows].to(torch.float64).sum(1).to(dtype)
    assert torch.equal(spread, copies)
    assert torch.equal(dy, copies)
    for found in (gathered, dx):
        assert relative_error(found, sums.double()) <= (1e-6 if dtype == torch.float32 else 0)


def test_the_references_gradients_are_each_other():
    routing = route(choices(6, 2, 3), 3)
    x, y = (t.detach().double().requires_grad_() for t in (draw(6, 4), draw(12, 4)))
    assert torch.autograd.gradcheck(lambda x: permute(x, routing), x)
    assert torch.autograd.gradcheck(lambda y: unpermute(y, routing), y)
    assert torch.equal(permute(x, routing)[routing.rows], x[:, None].expand(6, 2, 4))


def test_strided_rows():
    routing = route(choices(20, 2, 3), 3)
    wide, tall = draw(20, 30), draw(16, 40)
    with chosen("triton"):
        assert torch.equal(permute(wide[:, 7:], routing), wide[routing.order // 2, 7:])
        assert relative_error(unpermute(tall.T, routing), tall.T[routing.rows].sum(1)) <= 1e-6


def linear_gradients(function, x, weight, counts, dtype=None):
    """y, dx and dweight for a dy at random, computed in dtype."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight)]
    y = function(*leaves, counts)
    dy = draw(*y.shape, dtype=x.dtype, seed=2).detach().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_linear_close(x, weight, counts):
    exact = linear_gradients(reference.grouped_linear, x, weight, counts, torch.float64)
    plain = linear_gradients(reference.grouped_linear, x, weight, counts)
    with chosen("triton"):
        found = linear_gradients(grouped_linear, x, weight, counts)
    for name, one, same_dtype, expected in zip(("y", "dx", "dweight"), found, plain, exact, strict=True):
        assert one.dtype == x.dtype
        error, allowed = relative_error(one, expected), max(2 * relative_error(same_dtype, expected), 1e-5)
        assert error <= allowed, f"{name}: {error}, allowed {allowed}"


# Rows of each expert: some without, all at one, one of one row; few rows an expert and many.
COUNTS = [[5, 0, 1, 70], [0, 0, 37], [1], [300, 9]]


@pytest.fixture
def triton_only(monkeypatch):
    """Where torch's grouped_mm would serve, the kernels are to be tested all the same."""
    monkeypatch.setattr(engine, "serves", lambda x, weight: False)


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_linear(counts, dtype):
    """An inner and an outer size of more than one tile that are ragged."""
    x, weight = draw(sum(counts), 75, dtype=dtype), draw(len(counts), 139, 75, dtype=dtype, seed=1)
    assert_linear_close(x, weight, torch.tensor(counts, device=DEVICE))


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_any_order_of_programs_gives_the_same_bits(order):
    x, weight, counts = draw(90, 40), draw(3, 150, 40, seed=1), torch.tensor([60, 0, 30], device=DEVICE)
    with chosen("triton"):
        given = linear_gradients(grouped_linear, x, weight, counts)
        with interpreter.order(order):
            found = linear_gradients(grouped_linear, x, weight, counts)
    for one, other in zip(given, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("triton_only")
def test_grouped_linear_of_strided_operands():
    """Also where what does not belong to an expert is not a number, and where dy is expanded."""
    counts = torch.tensor([4, 3], device=DEVICE)
    x, weight = draw(20, 7).T[:, 2:], draw(2, 18, 11, seed=1).mT
    assert_linear_close(x, weight, counts)
    with chosen("triton"):
        (found,) = torch.autograd.grad(grouped_linear(x, weight, counts).sum(), x)
    (expected,) = torch.autograd.grad(reference.grouped_linear(x.double(), weight.double(), counts).sum(), x)
    assert relative_error(found, expected) <= 1e-5
    broken = x.detach().clone()
    broken[4:] = torch.nan
    with chosen("triton"):
        y, _, dweight = linear_gradients(grouped_linear, broken, weight.detach(), counts)
    assert y[:4].isfinite().all()
    assert dweight[0].isfinite().all()
    assert dweight[1].isnan().all()


def test_counts_that_lie_apart():
    x, weight, counts = draw(6, 16), draw(3, 8, 16), torch.tensor([2, 9, 1, 9, 3, 9], device=DEVICE)[::2]
    assert_linear_close(x, weight, counts)


@pytest.mark.usefixtures("triton_only")
def test_fp32_does_not_pass_through_tf32():
    """Where tensor cores round operands to 10 bits."""
    with interpreter.tf32():
        assert_linear_close(draw(20, 64), draw(2, 64, 64, seed=1), torch.tensor([12, 8], device=DEVICE))


def test_the_engines_matmul_is_the_loop_over_experts():
    x, weight = draw(12, 16, dtype=torch.bfloat16), draw(4, 8, 16, dtype=torch.bfloat16, seed=1)
    counts = torch.tensor([5, 0, 4, 3], device=DEVICE)
    found, expected = (linear_gradients(f, x, weight, counts) for f in (engine.grouped_matmul, reference.grouped_linear))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-2


def test_no_rows():
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    x, weight = draw(0, 4), draw(3, 5, 4)
    with chosen("triton"):
        y = grouped_linear(x, weight, counts)
        assert y.shape == (0, 5)
        assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros_like(weight))


def moe(dtype, top_k=2):
    """The layer with parameters at random."""
    model = MoE(tiny_config([f"model.moe.top_k={top_k}"]).model)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator(number)))
    model.to(DEVICE, dtype)
    model.router.float()
    return model


def moe_gradients(model, kernels, x):
    with chosen(kernels):
        y, auxiliary = model(x)
        weighting = draw(*y.shape, dtype=torch.float32, seed=3).detach().to(y.dtype)
        return [y.detach(), *torch.autograd.grad((y * weighting).sum() + auxiliary, (x, *model.parameters()))]


@pytest.mark.parametrize(("dtype", "top_k"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 2)])
def test_the_layer(dtype, top_k):
    """All of it; the choices are those of the reference."""
    model, x = moe(dtype, top_k), draw(2, 37, 32, dtype=dtype)
    picked = model.choose(model.router(x.detach()))
    plain, found, exact = moe(dtype, top_k), moe(dtype, top_k), moe(dtype, top_k).double()
    for each in (plain, found, exact):
        each.choose = lambda probabilities: picked
    plain = moe_gradients(plain, "reference", x)
    found = moe_gradients(found, "triton", x)
    exact = moe_gradients(exact, "reference", x.detach().double().requires_grad_())
    for one, same_dtype, expected in zip(found, plain, exact, strict=True):
        error, allowed = relative_error(one, expected), max(2 * relative_error(same_dtype, expected), 1e-5)
        assert error <= allowed, (error, allowed)


def test_the_layer_compiles_whole():
    model, x = moe(torch.float32), draw(1, 12, 32)
    with chosen("triton"):
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)[0]
        expected = model(x)[0]
        (one,), (other,) = (torch.autograd.grad(y.square().sum(), x) for y in (found, expected))
    assert torch.equal(found, expected)
    assert torch.equal(one, other)


def test_operators_keep_their_promises():
    operators = torch.ops.baton
    routing = route(choices(5, 2, 3), 3)
    torch.library.opcheck(operators.route.default, (choices(5, 2, 3), 3))
    torch.library.opcheck(operators.permute.default, (draw(5, 4), routing.rows))
    torch.library.opcheck(operators.unpermute.default, (draw(10, 4), routing.rows))
    torch.library.opcheck(operators.grouped_linear.default, (draw(10, 4), draw(3, 6, 4), routing.counts))


def test_bad_operands_are_named():
    routing = route(choices(5, 2, 3), 3)
    x, weight = torch.zeros(10, 4, device=DEVICE), torch.zeros(3, 6, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"route: chosen is \[5\] torch.int64"):
        route(routing.order[:5], 3)
    with pytest.raises(ValueError, match=r"permute: x is \[10, 4\], allowed: \[5, d\]"):
        permute(x, routing)
    with pytest.raises(ValueError, match=r"unpermute: y is \[5, 4\], allowed: \[10, d\]"):
        unpermute(x[:5], routing)
    with pytest.raises(ValueError, match=r"grouped_linear: x is \[10, 3\]"):
        grouped_linear(x[:, :3], weight, routing.counts)
    with pytest.raises(ValueError, match=r"grouped_linear: weight is torch.float64, allowed: x's torch.float32"):
        grouped_linear(x, weight.double(), routing.counts)
    with pytest.raises(ValueError, match=r"grouped_linear: counts is \[2\], allowed: \[3\]"):
        grouped_linear(x, weight, routing.counts[:2])
    with chosen("triton"), pytest.raises(ValueError, match=r"grouped_linear: its argument is torch.float64"):
        grouped_linear(x.double(), weight.double(), routing.counts)
