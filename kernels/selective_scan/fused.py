"""The selective scan's functions on Triton kernels: tensors in, tensors out; the same functions as in `reference`.

Launches: forward maps, [scan], outputs; backward state_grads, [scan], and for every window of segments states, main_grads and one
sum. Each kernel computes one exponential a token, channel and state dim, which takes a GPU longer than the memory that it goes
through: in tensors of x's size 2 (maps), 4 (outputs), 3 (state_grads), 5 (states) and 6 (main_grads), and the workspace.

What main_grads needs in memory while it runs: a state every Q tokens, 4 d n / Q bytes a token, and the parts of dB and dC that
each block of channels has, 8 n d / MAIN_CHANNELS bytes a token; both of WORKSPACE bytes at most, or of one segment.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import fused_kernels as kernels
from .segments import MAIN_CHANNELS, segment_length

Q = 8
"""Tokens of a chunk of main_grads."""
WARPS = 1
WORKSPACE = 1 << 30


def channels(n: int) -> int:
    """Of a program of the other kernels, which has A and the state of all state dims in registers."""
    return 64 if n <= 32 else 32


class _Cut(NamedTuple):
    """Where a call's segments lie: `per_run` in each of the runs of `run` tokens, `length` tokens each."""

    b: int
    run: int
    per_run: int
    length: int
    total: int

    @property
    def where(self) -> tuple[int, int, int]:
        """What kernels are told."""
        return self.run, self.per_run, self.length


def cut_sequence(dt: Tensor, runs: int) -> _Cut:
    b, l, d = dt.shape
    length = segment_length(b * l, d)
    per_run = triton.cdiv(l // runs, length)
    return _Cut(b, l // runs, per_run, length, b * runs * per_run)


@torch.library.custom_op("baton::selective_scan_maps", mutates_args=())
def maps(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    resets: Tensor | None,
    low: float,
    high: float,
    runs: int,
) -> tuple[Tensor, Tensor]:
    """As `reference.maps`; its segments are other ones."""
    dt_bias = _dense(dt_bias)
    d, n = A.shape
    cut, BD = cut_sequence(dt, runs), channels(n)
    T, U = _new(dt, cut.b, cut.total // cut.b, d), _new(dt, cut.b, cut.total // cut.b, d, n)
    x, dt, B = _rows(x), _rows(dt), B.contiguous()
    kernels.maps_kernel[(triton.cdiv(d, BD) * cut.total,)](
        x, dt, _by_state(A), B, dt_bias, _bytes(resets), T, U,
        d, *cut.where, x.stride(1), dt.stride(1), low, high,
        HAS_BIAS=dt_bias is not None, HAS_RESETS=resets is not None, N=n, BD=BD, num_warps=WARPS,
    )  # fmt: skip
    return T, U


@maps.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    resets: Tensor | None,
    low: float,
    high: float,
    runs: int,
) -> tuple[Tensor, Tensor]:
    cut = cut_sequence(dt, runs)
    return _new(dt, cut.b, cut.total // cut.b, A.shape[0]), _new(dt, cut.b, cut.total // cut.b, *A.shape)


@torch.library.custom_op("baton::selective_scan_outputs", mutates_args=())
def outputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    resets: Tensor | None,
    S_in: Tensor,
    low: float,
    high: float,
    runs: int,
) -> Tensor:
    """As `reference.outputs`."""
    D, dt_bias = _dense(D), _dense(dt_bias)
    d, n = A.shape
    cut, BD = cut_sequence(dt, runs), channels(n)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, dt, B, C = _rows(x), _rows(dt), B.contiguous(), C.contiguous()
    z = None if z is None else _rows(z)
    kernels.outputs_kernel[(triton.cdiv(d, BD) * cut.total,)](
        x, dt, _by_state(A), B, C, D, z, dt_bias, _bytes(resets), S_in.contiguous(), y,
        d, *cut.where, x.stride(1), dt.stride(1), 0 if z is None else z.stride(1), low, high,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, HAS_RESETS=resets is not None,
        N=n, BD=BD, num_warps=WARPS,
    )  # fmt: skip
    return y


@outputs.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    resets: Tensor | None,
    S_in: Tensor,
    low: float,
    high: float,
    runs: int,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("baton::selective_scan_state_grads", mutates_args=())
def state_grads(
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    resets: Tensor | None,
    dy: Tensor,
    low: float,
    high: float,
    runs: int,
) -> Tensor:
    """As `reference.state_grads`."""
    dt_bias = _dense(dt_bias)
    d, n = A.shape
    cut, BD = cut_sequence(dt, runs), channels(n)
    dS_in = _new(dt, cut.b, cut.total // cut.b, d, n)
    dt, C, dy = _rows(dt), C.contiguous(), _rows(dy)
    z = None if z is None else _rows(z)
    kernels.state_grads_kernel[(triton.cdiv(d, BD) * cut.total,)](
        dt, _by_state(A), C, z, dt_bias, _bytes(resets), dy, dS_in,
        d, *cut.where, dt.stride(1), 0 if z is None else z.stride(1), dy.stride(1), low, high,
        HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, HAS_RESETS=resets is not None, N=n, BD=BD, num_warps=WARPS,
    )  # fmt: skip
    return dS_in


@state_grads.register_fake
def _(
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    resets: Tensor | None,
    dy: Tensor,
    low: float,
    high: float,
    runs: int,
) -> Tensor:
    cut = cut_sequence(dt, runs)
    return _new(dt, cut.b, cut.total // cut.b, *A.shape)


@torch.library.custom_op("baton::selective_scan_main_grads", mutates_args=())
def main_grads(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    resets: Tensor | None,
    S_in: Tensor,
    dU: Tensor,
    dy: Tensor,
    low: float,
    high: float,
    runs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.main_grads`."""
    D, dt_bias = _dense(D), _dense(dt_bias)
    d, n = A.shape
    cut, BD, blocks = cut_sequence(dt, runs), channels(n), triton.cdiv(d, MAIN_CHANNELS)
    dx, ddt = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt))
    dz = x.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    x, dt, B, C, dy = _rows(x), _rows(dt), B.contiguous(), C.contiguous(), _rows(dy)
    z = None if z is None else _rows(z)
    rates, resets, S_in, dU = _by_state(A), _bytes(resets), S_in.contiguous(), dU.contiguous()
    a_segment = 4 * n * (cut.length // Q * d + 2 * blocks * cut.length)
    window = min(cut.total, max(1, WORKSPACE // a_segment))
    states, parts = _new(dt, window, cut.length // Q, n, d), _new(dt, 2, blocks, window, cut.length, n)
    flow, dA = _new(dt, window, n, d), _new(dt, cut.total, n, d)
    dBC = _new(dt, 2, cut.total, cut.length, n)
    dD, dbias = (None if t is None else _new(dt, cut.total, d) for t in (D, dt_bias))
    strides = [0 if t is None else t.stride(1) for t in (x, dt, z, dy)]
    has = {"HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "HAS_RESETS": resets is not None}
    for first in range(0, cut.total, window):
        here = min(window, cut.total - first)
        kernels.states_kernel[(triton.cdiv(d, BD) * here,)](
            x, dt, rates, B, C, D, z, dt_bias, resets, S_in, dy, states, None if z is None else dz,
            d, *cut.where, first, *strides, low, high, **has, N=n, BD=BD, Q=Q, num_warps=WARPS,
        )  # fmt: skip
        kernels.main_grads_kernel[(blocks * here,)](
            x, dt, rates, B, C, D, z, dt_bias, resets, dU, dy, states, flow, dA, dx, ddt, parts, dD, dbias,
            d, *cut.where, first, window, 0, *strides, low, high, **has, N=n, BD=MAIN_CHANNELS, Q=Q, num_warps=WARPS,
        )  # fmt: skip
        torch.sum(parts[:, :, :here], 1, out=dBC[:, first : first + here])
    of_runs = dBC.view(2, -1, cut.per_run * cut.length, n)[:, :, : cut.run].reshape(2, *B.shape)
    return (
        dx,
        ddt,
        dA.sum(0).t().contiguous(),
        of_runs[0].to(B.dtype, copy=True),
        of_runs[1].to(C.dtype, copy=True),
        _new(dt, 0) if dD is None else dD.sum(0),
        dz,
        _new(dt, 0) if dbias is None else dbias.sum(0),
    )


@main_grads.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    resets: Tensor | None,
    S_in: Tensor,
    dU: Tensor,
    dy: Tensor,
    low: float,
    high: float,
    runs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    dz = x.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    d, n = A.shape
    dD, dbias = (_new(dt, 0 if t is None else d) for t in (D, dt_bias))
    return dx, ddt, _new(dt, d, n), dB, dC, dD, dz, dbias


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _rows(tensor: Tensor) -> Tensor:
    """Itself where the last dim has no gaps and one stride leads from token to token over all sequences, else a copy."""
    b, l = tensor.shape[:2]
    even = b == 1 or tensor.stride(0) == l * tensor.stride(1)
    # Not contiguous(): with one token a sequence, any stride of a token passes for contiguous.
    return (
        tensor
        if even and tensor.stride(2) == 1
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    )


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _by_state(A: Tensor) -> Tensor:
    """A [d, n] -> [n, d] in fp32, so that neighbouring channels lie side by side."""
    return A.float().t().contiguous()


def _bytes(resets: Tensor | None) -> Tensor | None:
    return None if resets is None else resets.contiguous().view(torch.uint8)
