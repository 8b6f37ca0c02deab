"""The SSD operation: argument checks, and autograd around the four functions with the scan injected, in two halves."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..scan import LocalScan, Pending, Scan, without_memory
from .reference import (
    Chunks,
    chunk_main_grads,
    chunk_maps,
    chunk_outputs,
    chunk_state_grads,
    make_chunks,
    pad_and_chunk,
    unchunk,
)

NO_LIMIT = (0.0, float("inf"))


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    resets: Tensor | None = None,
    chunk_size: int = 64,
    scan: Scan | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Mamba-2's state-space scan, with exact gradients of every tensor argument.

        dt' = clamp(softplus(dt + dt_bias), *dt_limit);  S_t = exp(A dt'_t) S_{t-1} + dt'_t x_t B_tᵀ;  y_t = S_t C_t + D x_t

    x             [b, l, h, p]
    dt            [b, l, h], before softplus
    A             [h], negative
    B, C          [b, l, g, n]; head i reads group i // (h // g)
    D, dt_bias    [h] or None
    initial_state [b, h, p, n] or None (zero)
    resets        [b, l] bool or None: tokens before which the state is forgotten, as at the start of a packed document
    chunk_size    tokens worked on together; the result does not depend on it
    scan          how states pass from chunk to chunk; None: along this tensor. `parallel.affine_scan` has the one over ranks

    Computes in fp32 (fp64 for fp64 inputs). Returns y [b, l, h, p] in x's dtype and, if asked for, the final state
    [b, h, p, n] in the dtype of the computation. Over ranks the initial state is the whole sequence's and is looked at only
    where that begins, and the final state is None but where it ends. Raises ValueError, naming the argument.
    """
    y, final = start_ssd(
        x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, resets=resets, chunk_size=chunk_size, scan=scan
    ).finish()
    return (y, final) if return_final_state else y


class SSDInFlight(NamedTuple):
    """A scan whose states are on the wire: what `finish` does not need of them has been done."""

    carrier: Tensor
    """Ties both halves together in the autograd graph; [b, l, h, p] without memory behind it."""
    flight: "_Flight"

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Waits for the states -> y [b, l, h, p], and the final state [b, h, p, n] where the sequence ends, else None."""
        return _Finish.apply(self.carrier, self.flight)


def start_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    chunk_size: int = 64,
    scan: Scan | None = None,
) -> SSDInFlight:
    """The first half of `ssd`, arguments as there: the states set out, and computation goes on until `SSDInFlight.finish`.

    In backward it is the same: whatever autograd has to do for what was computed in between runs while the gradients of the
    states are on the wire.
    """
    scan = scan or LocalScan()
    _check(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, resets, scan)
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, allowed: 1 and more")
    flight = _Flight(scan, chunk_size)
    return SSDInFlight(_Start.apply(x, dt, A, B, C, D, dt_bias, initial_state, resets, dt_limit, flight), flight)


class _Flight:
    """What the two halves of one call hand each other; emptied as it is used, so that nothing outlives its need.

    No dataclass: FSDP looks into these for tensors that a module returns, and hooks what is none of its business.
    """

    def __init__(self, scan: Scan, chunk_size: int) -> None:
        self.scan, self.chunk_size = scan, chunk_size
        self.pending: Pending[tuple[Tensor, Tensor | None]] | None = None
        self.operands: tuple[Any, ...] = ()
        self.S_in: Tensor | None = None

    def land(self) -> tuple[Tensor, Tensor | None]:
        """Waits for what is on the wire."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()

    def chunks(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, resets: Tensor | None) -> Chunks:
        """The operands, dt positive, in chunks."""
        return make_chunks(x, dt, A, B, C, resets, self.scan.segments, self.chunk_size)


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
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        resets: Tensor | None,
        dt_limit: tuple[float, float],
        flight: _Flight,
    ) -> Tensor:
        positive = _positive(dt, dt_bias, dt_limit)
        log_T, U = (t.unflatten(0, (x.shape[0], -1)) for t in chunk_maps(flight.chunks(x, positive, A, B, C, resets)))
        flight.pending = flight.scan.start(log_T, U, initial_state)
        flight.operands = x, positive, A, B, C, D, resets, log_T
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state, resets)
        ctx.dt_limit, ctx.flight = dt_limit, flight
        return without_memory(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, dt_bias, initial_state, resets = ctx.saved_tensors
        flight, segments = ctx.flight, ctx.flight.scan.segments
        chunks = flight.chunks(x, _positive(dt, dt_bias, ctx.dt_limit), A, B, C, resets)
        dU, dinitial = flight.land()
        S_in, flight.S_in = flight.S_in, None
        grads = chunk_main_grads(chunks, pad_and_chunk(dy, segments, flight.chunk_size), D, S_in.flatten(0, 1), dU.flatten(0, 1))
        dx, dB, dC = (unchunk(g, t.shape, segments) for g, t in ((grads.dx, x), (grads.dB, B), (grads.dC, C)))
        ddt = unchunk(grads.ddt, dt.shape, segments) * _positive_grad(dt, dt_bias, ctx.dt_limit)
        return (
            dx,
            ddt.to(dt.dtype),
            grads.dA.to(A.dtype),
            dB,
            dC,
            None if D is None or grads.dD is None else grads.dD.to(D.dtype),
            None if dt_bias is None else ddt.sum((0, 1), dtype=torch.float64).to(dt_bias.dtype),
            None if initial_state is None or dinitial is None else dinitial.to(initial_state.dtype),
            *[None] * 3,
        )


class _Finish(torch.autograd.Function):
    """Forward: the states arrive, and from them the outputs. Backward: the gradients of the states set out."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, flight: _Flight) -> tuple[Tensor, Tensor | None]:
        x, dt, A, B, C, D, resets, log_T = flight.operands
        flight.operands = ()
        S_in, final = flight.land()
        chunked = chunk_outputs(flight.chunks(x, dt, A, B, C, resets), S_in.flatten(0, 1), D)
        # A tensor of its own and not a view: FSDP warns of views that a module returns.
        y = torch.empty_like(x).copy_(unchunk(chunked, x.shape, flight.scan.segments))
        ctx.save_for_backward(x, dt, A, B, C, resets, log_T, S_in)
        ctx.flight = flight
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor, None]:
        x, dt, A, B, C, resets, log_T, S_in = ctx.saved_tensors
        flight = ctx.flight
        dy = torch.zeros_like(x) if dy is None else dy
        chunks = flight.chunks(x, dt, A, B, C, resets)
        dS_in = chunk_state_grads(chunks, pad_and_chunk(dy, flight.scan.segments, flight.chunk_size))
        flight.pending = flight.scan.start(log_T, dS_in.unflatten(0, (x.shape[0], -1)), dfinal, reverse=True)
        flight.S_in = S_in
        return dy, None


def _raw(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    raw = dt.to(torch.promote_types(dt.dtype, torch.float32))
    return raw if dt_bias is None else raw + dt_bias.to(raw.dtype)


def _positive(dt: Tensor, dt_bias: Tensor | None, dt_limit: tuple[float, float]) -> Tensor:
    positive = F.softplus(_raw(dt, dt_bias))
    return positive if dt_limit == NO_LIMIT else positive.clamp(*dt_limit)


def _positive_grad(dt: Tensor, dt_bias: Tensor | None, dt_limit: tuple[float, float]) -> Tensor:
    raw = _raw(dt, dt_bias)
    slope = torch.sigmoid(raw)
    if dt_limit == NO_LIMIT:
        return slope
    positive = F.softplus(raw)
    return slope * ((positive >= dt_limit[0]) & (positive <= dt_limit[1]))


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    resets: Tensor | None,
    scan: Scan,
) -> None:
    if x.dim() != 4 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(f"ssd: x is {x.dtype} {list(x.shape)}, allowed: floating point [b, l, h, p], none of them 0")
    if B.dim() != 4:
        raise ValueError(f"ssd: B is {list(B.shape)}, allowed: [b, l, g, n]")
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    expected = {
        "dt": (dt, (b, l, h)),
        "A": (A, (h,)),
        "B": (B, (b, l, g, n)),
        "C": (C, (b, l, g, n)),
        "D": (D, (h,)),
        "dt_bias": (dt_bias, (h,)),
        "initial_state": (initial_state, (b, h, p, n)),
        "resets": (resets, (b, l)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"ssd: {name} is {list(tensor.shape)}, expected {list(shape)} beside x {list(x.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"ssd: {name} is on {tensor.device}, expected {x.device} as x")
    if g == 0 or h % g:
        raise ValueError(f"ssd: B has {g} groups, allowed: a divisor of the {h} heads")
    if not 0 <= dt_limit[0] < dt_limit[1]:
        raise ValueError(f"ssd: dt_limit is {dt_limit}, allowed: 0 <= low < high")
    if l % scan.segments:
        raise ValueError(f"ssd: {l} tokens are no multiple of the {scan.segments} segments of the scan")
