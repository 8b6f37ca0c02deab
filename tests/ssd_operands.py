"""What tests of the SSD scan share: operands, the definition, and the outcome of a function with every gradient."""

import torch
from torch.nn import functional as F

from baton.kernels.ssd import ssd, ssd_sequential
from helpers import relative_error

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def operands(b, l, h, p, g, n, dt_scale=1.0):
    """fp64 operands by name; dt before softplus, spread so that decays run from almost 1 to almost 0."""
    draw = torch.Generator().manual_seed(l * 31 + h)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=draw)  # noqa: E731
    decay = -torch.rand(h, dtype=torch.float64, generator=draw) * 4 - 0.1
    values = (normal(b, l, h, p), normal(b, l, h) * 2 * dt_scale, decay, normal(b, l, g, n), normal(b, l, g, n))
    return dict(zip(NAMES, (*values, normal(h), normal(h), normal(b, h, p, n)), strict=True))


def fast(t, chunk_size, **options):
    """The operation -> y, the final state."""
    operands = [t[name] for name in NAMES[:-1]]
    rest = {"initial_state": t["initial_state"], "z": t.get("z"), "chunk_size": chunk_size}
    return ssd(*operands, return_final_state=True, **rest, **options)


def oracle(t, dt_limit=(0.0, float("inf")), resets=None):
    """The definition, token by token -> y, the final state."""
    dt = F.softplus(t["dt"] + t["dt_bias"]).clamp(*dt_limit)
    y, final = ssd_sequential(t["x"], dt, t["A"], t["B"], t["C"], t["D"], t["initial_state"], resets)
    return (y * F.silu(t["z"]) if "z" in t else y), final


def outcome(function, values, *args, **options):
    """y, the final state, and the gradient of every operand for a loss that weights both at random."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    y, final = function(leaves, *args, **options)
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=draw).to(t.device, t.dtype) for t in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return {"y": y.detach(), "final": final.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def assert_close(found, reference, tolerance):
    """Every result within `tolerance` of the reference."""
    for name, value in reference.items():
        error = relative_error(found[name], value)
        assert error <= tolerance, f"{name}: {error}"


def documents(b, l, share):
    """Tokens that begin a document, but not the first: it goes on from the initial state."""
    starts = torch.rand(b, l, generator=torch.Generator().manual_seed(5)) < share
    starts[:, 0] = False
    return starts
