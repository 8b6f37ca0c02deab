"""The selective scan: argument checks, and autograd around the four functions with the scan injected, in two halves."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import fused
from ..scan import Decay, LocalScan, Pending, Scan, exclusive_scan, without_memory
from ..steps import NO_LIMIT
from . import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_STATE_DIMS = 64


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    scan: Scan | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Mamba-1's selective scan, with exact gradients of every tensor argument.

        Δ = clamp(softplus(dt + dt_bias), *dt_limit);  h_t = exp(A Δ_t) h_{t-1} + Δ_t B_t x_t;  y_t = (<C_t, h_t> + D x_t) silu(z_t)

    x             [b, l, d]
    dt            [b, l, d], before softplus
    A             [d, n], negative
    B, C          [b, l, n]
    D, dt_bias    [d] or None
    z             [b, l, d] or None: no gate
    initial_state [b, d, n] or None (zero)
    resets        [b, l] bool or None: tokens before which the state is forgotten, as at the start of a packed document
    scan          how states pass from segment to segment; None: along this tensor. `parallel.affine_scan` has the one over ranks

    Computes in fp32 (fp64 for fp64 dt). Returns y [b, l, d] in x's dtype and, if asked for, the final state [b, d, n] in the
    dtype of the computation. Over ranks the initial state is the whole sequence's and is looked at only where that begins, and
    the final state is None but where it ends. The Triton kernels take state dims up to 64. Raises ValueError, naming the argument.
    """
    if scan is not None:
        y, final = start_selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, resets, scan=scan).finish()
    else:
        _check(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, resets, LocalScan())
        functions, options = _implementation(x, dt, A, B, C, z), (*map(float, dt_limit), 1)
        y, final = _Whole.apply(x, dt, A, B, C, D, z, dt_bias, initial_state, resets, functions, options)
    return (y, final) if return_final_state else y


class SelectiveScanInFlight(NamedTuple):
    """A scan whose states are on the wire: what `finish` does not need of them has been done."""

    carrier: Tensor
    """Ties both halves together in the autograd graph; [b, l, d] without memory behind it."""
    flight: "_Flight"

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Waits for the states -> y [b, l, d], and the final state [b, d, n] where the sequence ends, else None."""
        return _Finish.apply(self.carrier, self.flight)


def start_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    scan: Scan,
) -> SelectiveScanInFlight:
    """The first half of `selective_scan`, arguments as there: the states set out, and computation goes on until `finish`.

    In backward it is the same: whatever autograd has to do for what was computed in between runs while the gradients of the
    states are on the wire.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, resets, scan)
    flight = _Flight(scan, _implementation(x, dt, A, B, C, z), dt_limit)
    return SelectiveScanInFlight(_Start.apply(x, dt, A, B, C, D, z, dt_bias, initial_state, resets, flight), flight)


class _Whole(torch.autograd.Function):
    """Both halves in one where the whole sequence is here: nothing is left on the way between them, so that it can be compiled."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        resets: Tensor | None,
        functions: ModuleType,
        options: tuple[float, float, int],
    ) -> tuple[Tensor, Tensor]:
        T, U = functions.maps(x, dt, A, B, dt_bias, resets, *options)
        S_in, final = exclusive_scan(T, U, initial_state, transition=Decay(A.to(U.dtype)))
        y = functions.outputs(x, dt, A, B, C, D, z, dt_bias, resets, S_in, *options)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, resets, initial_state, T, S_in)
        ctx.functions, ctx.options = functions, options
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *operands, initial_state, T, S_in = ctx.saved_tensors
        _, dt, A, _, C, _, z, dt_bias, resets = operands
        dS_in = ctx.functions.state_grads(dt, A, C, z, dt_bias, resets, dy, *ctx.options)
        dU, dinitial = exclusive_scan(T, dS_in, dfinal, reverse=True, transition=Decay(A.to(T.dtype)))
        gradients = ctx.functions.main_grads(*operands, S_in, dU, dy, *ctx.options)
        return *_as(operands, gradients), *_as([initial_state], [dinitial]), None, None, None


class _Flight:
    """What the two halves of one call hand each other; emptied as it is used, so that nothing outlives its need.

    No dataclass: FSDP looks into these for tensors that a module returns, and hooks what is none of its business.
    """

    def __init__(self, scan: Scan, functions: ModuleType, dt_limit: tuple[float, float]) -> None:
        self.scan, self.functions = scan, functions
        self.options = *map(float, dt_limit), scan.segments
        self.pending: Pending[tuple[Tensor, Tensor | None]] | None = None
        self.operands: tuple[Any, ...] = ()
        self.S_in: Tensor | None = None

    def land(self) -> tuple[Tensor, Tensor | None]:
        """Waits for what is on the wire."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()


class _Start(torch.autograd.Function):
    """Forward: maps, and their scan set out. Backward: the gradients of the states arrive, and from them those of the operands."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        resets: Tensor | None,
        flight: _Flight,
    ) -> Tensor:
        T, U = flight.functions.maps(x, dt, A, B, dt_bias, resets, *flight.options)
        flight.pending = flight.scan.start(T, U, initial_state, transition=Decay(A.to(U.dtype)))
        flight.operands = x, dt, A, B, C, D, z, dt_bias, resets, T
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, resets, initial_state)
        ctx.flight = flight
        return without_memory(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *operands, initial_state = ctx.saved_tensors
        flight = ctx.flight
        dU, dinitial = flight.land()
        S_in, flight.S_in = flight.S_in, None
        gradients = flight.functions.main_grads(*operands, S_in, dU, dy, *flight.options)
        return *_as(operands, gradients), *_as([initial_state], [dinitial]), None, None


class _Finish(torch.autograd.Function):
    """Forward: the states arrive, and from them the outputs. Backward: the gradients of the states set out."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, flight: _Flight) -> tuple[Tensor, Tensor | None]:
        *operands, T = flight.operands
        flight.operands = ()
        S_in, final = flight.land()
        y = flight.functions.outputs(*operands, S_in, *flight.options)
        x, dt, A, _, C, _, z, dt_bias, resets = operands
        ctx.save_for_backward(dt, A, C, z, dt_bias, resets, T, S_in)
        ctx.flight, ctx.dtype = flight, x.dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor, None]:
        dt, A, C, z, dt_bias, resets, T, S_in = ctx.saved_tensors
        flight = ctx.flight
        dy = torch.zeros_like(dt, dtype=ctx.dtype) if dy is None else dy
        dS_in = flight.functions.state_grads(dt, A, C, z, dt_bias, resets, dy, *flight.options)
        flight.pending = flight.scan.start(T, dS_in, dfinal, reverse=True, transition=Decay(A.to(T.dtype)))
        flight.S_in = S_in
        return dy, None


def _as(operands: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of the operands that are there, in their dtypes; operands beyond the gradients have none."""
    pairs = zip(operands, gradients, strict=False)
    return [None if t is None or gradient is None else gradient.to(t.dtype) for t, gradient in pairs]


def _implementation(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> ModuleType:
    """The module whose functions compute."""
    named = {"x": x, "dt": dt, "B": B, "C": C, "z": z}
    others = [f"{name} is {t.dtype}" for name, t in named.items() if t is not None and t.dtype not in DTYPES]
    obstacle = None
    if others:
        obstacle = f"{others[0]}, allowed for the Triton kernels: {', '.join(map(str, DTYPES))}"
    elif A.shape[1] > MOST_STATE_DIMS:
        obstacle = f"A has {A.shape[1]} state dims, allowed for the Triton kernels: at most {MOST_STATE_DIMS}"
    if fused("selective_scan", x.device, obstacle):
        from . import fused as kernels

        return kernels
    return reference


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    resets: Tensor | None,
    scan: Scan,
) -> None:
    if x.dim() != 3 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(f"selective_scan: x is {x.dtype} {list(x.shape)}, allowed: floating point [b, l, d], none of them 0")
    if A.dim() != 2 or A.shape[1] == 0:
        raise ValueError(f"selective_scan: A is {list(A.shape)}, allowed: [d, n], none of them 0")
    b, l, d = x.shape
    n = A.shape[1]
    expected = {
        "dt": (dt, (b, l, d)),
        "A": (A, (d, n)),
        "B": (B, (b, l, n)),
        "C": (C, (b, l, n)),
        "D": (D, (d,)),
        "z": (z, (b, l, d)),
        "dt_bias": (dt_bias, (d,)),
        "initial_state": (initial_state, (b, d, n)),
        "resets": (resets, (b, l)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} is {list(tensor.shape)}, expected {list(shape)} beside x {list(x.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, expected {x.device} as x")
        if tensor.dtype != torch.bool if name == "resets" else not tensor.is_floating_point():
            raise ValueError(
                f"selective_scan: {name} is {tensor.dtype}, allowed: {'bool' if name == 'resets' else 'floating point'}"
            )
    if not 0 <= dt_limit[0] < dt_limit[1]:
        raise ValueError(f"selective_scan: dt_limit is {dt_limit}, allowed: 0 <= low < high")
    if l % scan.segments:
        raise ValueError(f"selective_scan: {l} tokens are no multiple of the {scan.segments} segments of the scan")
