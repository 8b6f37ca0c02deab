"""Mamba-1's selective scan in PyTorch: a sequential oracle, and the four functions that the fast path is made of.

Recurrence, per sequence, channel and state dim, with Δ = clamp(softplus(dt + dt_bias), low, high):

    h_t = exp(A Δ_t) h_{t-1} + Δ_t B_t x_t        h: [d, n]; a document's first token forgets h_{t-1}
    y_t = (<C_t, h_t> + D x_t) silu(z_t)

(Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, algorithm 2.)

Over a chunk of tokens the recurrence is an affine map of the state: h_out = exp(A T) h_in + U, T = Σ Δ. So the work is:

    forward     maps          -> (T, U) of every chunk, from a zero state
                a scan         -> S_in of every chunk           (injected: local, or over ranks)
                outputs       -> y
    backward    state_grads   -> the direct gradient of every S_in
                a reverse scan -> the gradient of every U        (injected)
                main_grads    -> the gradients of all operands

With G_t the gradient of h_t, the gradient of A Δ_t is what flows over the edge t-1 -> t, f_t = exp(A Δ_t) h_{t-1} G_t. It is
computed as this product of three, never as a difference, which would cancel badly under strong decay.

Every function goes through the chunks in blocks, and nothing of l d n elements is ever in memory.

Shapes: b sequences of l tokens, in `runs` equal runs of neighbouring tokens; each run is s / runs chunks of CHUNK, the last one
padded with Δ = 0, the identity step. d channels, state n.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ssd.reference import pad_and_chunk, unchunk
from .segments import CHUNK

# Floats of one block's [chunks, CHUNK, d, n].
BLOCK_FLOATS = 1 << 21


def selective_scan_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, under autograd: the oracle of every test.

    x, z [b, l, d]; dt [b, l, d] positive; A [d, n]; B, C [b, l, n]; D [d]; initial_state [b, d, n]; resets [b, l] bool.
    Returns y [b, l, d] and the final state [b, d, n].
    """
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    ys = []
    for t in range(x.shape[1]):
        if resets is not None:
            state = state * (~resets[:, t]).to(x.dtype)[:, None, None]
        update = (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        state = torch.exp(A * dt[:, t, :, None]) * state + update
        ys.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(ys, 1)
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z)), state


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
    """Each chunk's affine map from a zero state: T [b, s, d], inf where a document starts, and U [b, s, d, n]."""
    steps = _Steps(dt, A, dt_bias, resets, low, high, runs)
    x, B = steps.cut(x), steps.cut(B)
    U = steps.new_states()
    for at in steps.blocks():
        U[at] = steps.states(at, x, B, torch.zeros_like(U[at]))[:, -1]
    return steps.total().unflatten(0, (dt.shape[0], -1)), U.unflatten(0, (dt.shape[0], -1))


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
    """y [b, l, d] in x's dtype, from the state entering each chunk, S_in [b, s, d, n]."""
    steps = _Steps(dt, A, dt_bias, resets, low, high, runs)
    shape, dtype = x.shape, x.dtype
    x, B, C, z = steps.cut(x), steps.cut(B), steps.cut(C), None if z is None else steps.cut(z)
    S_in, y = S_in.flatten(0, 1), torch.empty_like(x)
    for at in steps.blocks():
        out = steps.read(at, x, C, D, steps.states(at, x, B, S_in[at])[:, 1:])
        y[at] = out if z is None else out * F.silu(z[at].to(out.dtype))
    return unchunk(y, shape, runs).to(dtype, copy=True)


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
    """The gradient of each chunk's S_in through its own outputs, [b, s, d, n]; dy [b, l, d]."""
    steps = _Steps(dt, A, dt_bias, resets, low, high, runs)
    C, dy, z = steps.cut(C), steps.cut(dy), None if z is None else steps.cut(z)
    dS_in = steps.new_states()
    for at in steps.blocks():
        ungated = dy[at].to(dS_in.dtype)
        if z is not None:
            ungated = ungated * F.silu(z[at].to(dS_in.dtype))
        _, dS_in[at] = steps.state_grads(at, ungated, C, torch.zeros_like(dS_in[at]))
    return dS_in.unflatten(0, (dt.shape[0], -1))


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
    """Everything but the states: dy [b, l, d], S_in and dU [b, s, d, n] (dU: the gradient of the state leaving a chunk).

    Returns dx, ddt, dA, dB, dC, dD, dz and ddt_bias; dA [d, n], dD and ddt_bias [d] in the dtype of the computation, the others as
    their operands; dz is empty without z.
    """
    steps = _Steps(dt, A, dt_bias, resets, low, high, runs)
    of_tokens = [(t.shape, t.dtype) for t in (x, dt, B, C)]
    dz = dy.new_empty(0) if z is None else torch.empty_like(steps.cut(z))
    slope = steps.cut(_positive_grad(dt, dt_bias, low, high))
    x, B, C, dy = steps.cut(x), steps.cut(B), steps.cut(C), steps.cut(dy)
    S_in, dU = S_in.flatten(0, 1), dU.flatten(0, 1)
    dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, slope, B, C))
    dA, dD, dbias = (torch.zeros_like(t, dtype=torch.float64) for t in (A, A[:, 0], A[:, 0]))
    gate = None if z is None else steps.cut(z)
    for at in steps.blocks():
        states = steps.states(at, x, B, S_in[at])
        x_f, B_f, dy_f, delta = (t[at].to(slope.dtype) for t in (x, B, dy, steps.dt))
        if gate is not None:
            z_f = gate[at].to(slope.dtype)
            sigmoid = z_f.sigmoid()
            dz[at] = dy_f * steps.read(at, x, C, D, states[:, 1:]) * sigmoid * (1 + z_f * (1 - sigmoid))
            dy_f = dy_f * z_f * sigmoid
        G, _ = steps.state_grads(at, dy_f, C, dU[at])
        flow = steps.decay(at) * states[:, :-1] * G
        dC[at] = torch.einsum("kqdn,kqd->kqn", states[:, 1:], dy_f)
        dB[at] = torch.einsum("kqdn,kqd->kqn", G, delta * x_f)
        through_B = torch.einsum("kqdn,kqn->kqd", G, B_f)
        dx_f = delta * through_B
        dx[at] = dx_f if D is None else dx_f + D.to(dx_f.dtype) * dy_f
        ddt[at] = (x_f * through_B + torch.einsum("kqdn,dn->kqd", flow, steps.A)) * slope[at]
        dA += torch.einsum("kqdn,kqd->dn", flow, delta)
        dD += (x_f * dy_f).sum((0, 1))
        dbias += ddt[at].sum((0, 1))
    grads = [unchunk(t, shape, runs).to(dtype) for t, (shape, dtype) in zip((dx, ddt, dB, dC), of_tokens, strict=True)]
    dA, dD, dbias = (t.to(slope.dtype) for t in (dA, dD, dbias))
    dz = dz if z is None else unchunk(dz, z.shape, runs).clone()
    return grads[0], grads[1], dA, grads[2], grads[3], dD, dz, dbias


class _Steps:
    """Decays of all chunks: k = b s of them, q tokens each."""

    def __init__(
        self,
        dt: Tensor,
        A: Tensor,
        dt_bias: Tensor | None,
        resets: Tensor | None,
        low: float,
        high: float,
        runs: int,
    ) -> None:
        self.runs = runs
        self.dt = self.cut(F.softplus(_raw(dt, dt_bias)).clamp(low, high))  # [k, q, d]
        self.A = A.to(self.dt.dtype)  # [d, n]
        self.resets = None if resets is None else self.cut(resets)  # [k, q]

    def cut(self, tensor: Tensor) -> Tensor:
        """[b, l, ...] -> [k, q, ...]."""
        return pad_and_chunk(tensor, self.runs, CHUNK)

    def blocks(self) -> Iterator[slice]:
        """Of chunks."""
        step = max(1, BLOCK_FLOATS // (CHUNK * self.A.numel()))
        for start in range(0, len(self.dt), step):
            yield slice(start, min(start + step, len(self.dt)))

    def new_states(self) -> Tensor:
        """For one state of each chunk, [k, d, n]."""
        return self.dt.new_empty(len(self.dt), *self.A.shape)

    def total(self) -> Tensor:
        """T [k, d]."""
        T = self.dt.sum(1)
        return T if self.resets is None else T.masked_fill(self.resets.any(1)[:, None], float("inf"))

    def decay(self, at: slice) -> Tensor:
        """Of each token, [k, q, d, n]; 0 at a document's start."""
        decay = (self.dt[at][..., None] * self.A).exp()
        return decay if self.resets is None else decay.masked_fill(self.resets[at][..., None, None], 0.0)

    def states(self, at: slice, x: Tensor, B: Tensor, S: Tensor) -> Tensor:
        """The state before the first token, S [k, d, n], and after each, [k, q + 1, d, n]."""
        decay = self.decay(at)
        update = (self.dt[at] * x[at])[..., None] * B[at].to(S.dtype)[:, :, None]
        states = S.new_empty(len(S), CHUNK + 1, *S.shape[1:])
        states[:, 0] = S
        for t in range(CHUNK):
            states[:, t + 1] = torch.addcmul(update[:, t], decay[:, t], states[:, t])
        return states

    def read(self, at: slice, x: Tensor, C: Tensor, D: Tensor | None, states: Tensor) -> Tensor:
        """y without its gate, [k, q, d]."""
        y = torch.einsum("kqdn,kqn->kqd", states, C[at].to(states.dtype))
        return y if D is None else y + D.to(y.dtype) * x[at]

    def state_grads(self, at: slice, dy: Tensor, C: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the state after each token, [k, q, d, n], and of the state before the first, [k, d, n]."""
        decay, G = self.decay(at), dy[..., None] * C[at].to(dy.dtype)[:, :, None]
        for t in reversed(range(CHUNK)):
            G[:, t] += leaving
            leaving = decay[:, t] * G[:, t]
        return G, leaving


def _raw(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    raw = dt.to(torch.promote_types(dt.dtype, torch.float32))
    return raw if dt_bias is None else raw + dt_bias.to(raw.dtype)


def _positive_grad(dt: Tensor, dt_bias: Tensor | None, low: float, high: float) -> Tensor:
    raw = _raw(dt, dt_bias)
    positive = F.softplus(raw)
    return raw.sigmoid() * ((positive >= low) & (positive <= high))
