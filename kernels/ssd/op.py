"""The SSD operation: argument checks, and one autograd.Function around the four functions with the scan injected."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..scan import LocalScan, Scan
from .reference import chunk_main_grads, chunk_maps, chunk_outputs, chunk_state_grads, make_chunks, pad_and_chunk, unchunk

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
    document_ids: Tensor | None = None,
    chunk_size: int = 64,
    scan: Scan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's state-space scan, with exact gradients of every tensor argument.

        dt' = clamp(softplus(dt + dt_bias), *dt_limit);  S_t = exp(A dt'_t) S_{t-1} + dt'_t x_t B_tᵀ;  y_t = S_t C_t + D x_t

    x             [b, l, h, p]
    dt            [b, l, h], before softplus
    A             [h], negative
    B, C          [b, l, g, n]; head i reads group i // (h // g)
    D, dt_bias    [h] or None
    initial_state [b, h, p, n] or None (zero)
    document_ids  [b, l] integers or None: the state resets where the id differs from the token before
    chunk_size    tokens worked on together; the result does not depend on it
    scan          how states pass from chunk to chunk; None: along this tensor. `parallel.affine_scan` has the one over ranks

    Computes in fp32 (fp64 for fp64 inputs). Returns y [b, l, h, p] in x's dtype and, if asked for, the final state
    [b, h, p, n] in the dtype of the computation. Raises ValueError, naming the argument.
    """
    scan = scan or LocalScan()
    _check(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, document_ids, scan)
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, allowed: 1 and more")
    resets = None if document_ids is None else document_starts(document_ids)
    y, final = SSD.apply(x, dt, A, B, C, D, dt_bias, initial_state, resets, dt_limit, chunk_size, scan)
    return (y, final) if return_final_state else y


def document_starts(document_ids: Tensor) -> Tensor:
    """[b, l] ids -> [b, l] bool, True at the first token of each document but the first."""
    return F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))


class SSD(torch.autograd.Function):
    """maps -> scan -> outputs, and backwards state gradients -> reverse scan -> main gradients."""

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
        chunk_size: int,
        scan: Scan,
    ) -> tuple[Tensor, Tensor]:
        b = x.shape[0]
        chunks = make_chunks(x, _positive(dt, dt_bias, dt_limit), A, B, C, resets, scan.segments, chunk_size)
        log_T, U = (t.unflatten(0, (b, -1)) for t in chunk_maps(chunks))
        S_in, final = scan.forward(log_T, U, initial_state)
        # A tensor of its own and not a view: FSDP warns of views that a module returns.
        y = torch.empty_like(x).copy_(unchunk(chunk_outputs(chunks, S_in.flatten(0, 1), D), x.shape, scan.segments))
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state, resets, log_T, S_in)
        ctx.settings = dt_limit, chunk_size, scan
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, dt_bias, initial_state, resets, log_T, S_in = ctx.saved_tensors
        dt_limit, chunk_size, scan = ctx.settings
        b = x.shape[0]
        chunks = make_chunks(x, _positive(dt, dt_bias, dt_limit), A, B, C, resets, scan.segments, chunk_size)
        dy = pad_and_chunk(torch.zeros_like(x) if dy is None else dy, scan.segments, chunk_size)
        dU, dinitial = scan.backward(log_T, chunk_state_grads(chunks, dy).unflatten(0, (b, -1)), dfinal)
        grads = chunk_main_grads(chunks, dy, D, S_in.flatten(0, 1), dU.flatten(0, 1))
        dx, dB, dC = (unchunk(g, t.shape, scan.segments) for g, t in ((grads.dx, x), (grads.dB, B), (grads.dC, C)))
        ddt = unchunk(grads.ddt, dt.shape, scan.segments) * _positive_grad(dt, dt_bias, dt_limit)
        return (
            dx,
            ddt.to(dt.dtype),
            grads.dA.to(A.dtype),
            dB,
            dC,
            None if D is None or grads.dD is None else grads.dD.to(D.dtype),
            None if dt_bias is None else ddt.sum((0, 1), dtype=torch.float64).to(dt_bias.dtype),
            None if initial_state is None else dinitial.to(initial_state.dtype),
            *[None] * 4,
        )


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
    document_ids: Tensor | None,
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
        "document_ids": (document_ids, (b, l)),
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
    if scan.sharded and document_ids is not None:
        raise ValueError("ssd: document_ids with a scan over ranks: a document's start on a rank boundary would go unseen")
