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
computed as this product of three, never as a difference, which would cancel badly under strong decay. U, and the gradient of S_in,
are sums over the chunk's tokens with the decay from each to its end, or from its beginning: no step there waits for another.

Every function goes through the chunks in blocks that stay in a processor's cache, where they lie [k, q, n, d], and nothing of l d n
elements is ever in memory. Decays are powers of 2, which PyTorch takes on CPUs several times faster than those of e; vectors times
matrices have the vector first, which is ten times faster there than the other way round.

Shapes: b sequences of l tokens, in `runs` equal runs of neighbouring tokens; each run is s / runs chunks of CHUNK, the last one
padded with Δ = 0, the identity step. d channels, state n; k = b s chunks of q tokens.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ssd.reference import pad_and_chunk, unchunk
from ..steps import positive_steps, slopes
from .segments import CHUNK

# Floats of one block's [chunks, CHUNK, d, n].
BLOCK_FLOATS = 1 << 18


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
        from_each = steps.decay(steps.until_end(at))
        U[at] = from_each.mul_((steps.dt[at] * x[at])[:, :, None]).mul_(B[at].to(U.dtype)[..., None]).sum(1).mT
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
        states = steps.states(at, steps.decay_of(at), x, B, S_in[at].mT)
        out = steps.read(at, x, C, D, states)
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
        to_each = steps.decay(steps.since_start(at))
        dS_in[at] = to_each.mul_(ungated[:, :, None]).mul_(C[at].to(dS_in.dtype)[..., None]).sum(1).mT
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
    slope = steps.cut(slopes(dt, dt_bias, low, high))
    x, B, C, dy = steps.cut(x), steps.cut(B), steps.cut(C), steps.cut(dy)
    S_in, dU = S_in.flatten(0, 1), dU.flatten(0, 1)
    dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, slope, B, C))
    dA, dD, dbias = (torch.zeros_like(t, dtype=torch.float64) for t in (A.T, A[:, 0], A[:, 0]))
    gate = None if z is None else steps.cut(z)
    for at in steps.blocks():
        entering, decay = S_in[at].mT, steps.decay_of(at)
        states = steps.states(at, decay, x, B, entering)
        x_f, B_f, dy_f, delta = (t[at].to(slope.dtype) for t in (x, B, dy, steps.dt))
        if gate is not None:
            z_f = gate[at].to(slope.dtype)
            sigmoid = z_f.sigmoid()
            dz[at] = dy_f * steps.read(at, x, C, D, states) * sigmoid * (1 + z_f * (1 - sigmoid))
            dy_f = dy_f * z_f * sigmoid
        G = steps.gradients(at, decay, dy_f, C, dU[at].mT)
        dC[at] = _row_times(dy_f, states.mT)
        dB[at] = _row_times(delta * x_f, G.mT)
        through_B = _row_times(B_f, G)
        dx_f = delta * through_B
        dx[at] = dx_f if D is None else dx_f + D.to(dx_f.dtype) * dy_f
        # What flows over each edge: its decay, the state before it, the gradient after it.
        flow = decay
        flow[:, 1:].mul_(states[:, :-1])
        flow[:, 0].mul_(entering)
        flow.mul_(G)
        dA += torch.mul(flow, delta[:, :, None], out=G).sum((0, 1))
        ddt[at] = (x_f * through_B + flow.mul_(steps.A).sum(2)) * slope[at]
        dD += (x_f * dy_f).sum((0, 1))
        dbias += ddt[at].sum((0, 1))
    grads = [unchunk(t, shape, runs).to(dtype) for t, (shape, dtype) in zip((dx, ddt, dB, dC), of_tokens, strict=True)]
    dA, dD, dbias = (t.to(slope.dtype) for t in (dA.T, dD, dbias))
    dz = dz if z is None else unchunk(dz, z.shape, runs).clone()
    return grads[0], grads[1], dA, grads[2], grads[3], dD, dz, dbias


def _row_times(row: Tensor, matrix: Tensor) -> Tensor:
    """[k, q, i] times [k, q, i, o] -> [k, q, o]."""
    return torch.matmul(row[:, :, None], matrix)[:, :, 0]


class _Steps:
    """Decays of all chunks."""

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
        self.dt = self.cut(positive_steps(dt, dt_bias, low, high))  # [k, q, d]
        self.A = A.to(self.dt.dtype).T.contiguous()  # [n, d]
        self.rates = (A.T.double() / math.log(2)).to(self.dt.dtype).contiguous()
        """Of the power of 2."""
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
        return self.dt.new_empty(len(self.dt), *self.A.T.shape)

    def total(self) -> Tensor:
        """T [k, d]."""
        T = self.dt.sum(1)
        return T if self.resets is None else T.masked_fill(self.resets.any(1)[:, None], float("inf"))

    def decay(self, elapsed: Tensor) -> Tensor:
        """Over times [k, q, d] -> [k, q, n, d]; inf: 0."""
        return (elapsed[:, :, None] * self.rates).exp2_()

    def decay_of(self, at: slice) -> Tensor:
        """Of each token, [k, q, n, d]; 0 at a document's start."""
        decay = self.decay(self.dt[at])
        return decay if self.resets is None else decay.masked_fill_(self.resets[at][..., None, None], 0.0)

    def until_end(self, at: slice) -> Tensor:
        """Time after each token until its chunk ends, [k, q, d]; inf where a document starts in between."""
        left = F.pad(self.dt[at][:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
        if self.resets is None:
            return left
        starts = F.pad(self.resets[at][:, 1:], (0, 1)).flip(1).cumsum(1).flip(1)
        return left.masked_fill(starts[..., None] > 0, float("inf"))

    def since_start(self, at: slice) -> Tensor:
        """Time from a chunk's begin over each token, [k, q, d]; inf from a document's start on."""
        passed = self.dt[at].cumsum(1)
        return passed if self.resets is None else passed.masked_fill(self.resets[at].cumsum(1)[..., None] > 0, float("inf"))

    def states(self, at: slice, decay: Tensor, x: Tensor, B: Tensor, S: Tensor) -> Tensor:
        """The state after each token, [k, q, n, d], from that before the first, S [k, n, d]."""
        states = (self.dt[at] * x[at])[:, :, None] * B[at].to(S.dtype)[..., None]
        before = S
        for now, kept in zip(states.unbind(1), decay.unbind(1), strict=True):
            before = now.addcmul_(kept, before)
        return states

    def read(self, at: slice, x: Tensor, C: Tensor, D: Tensor | None, states: Tensor) -> Tensor:
        """y without its gate, [k, q, d]."""
        y = _row_times(C[at].to(states.dtype), states)
        return y if D is None else y + D.to(y.dtype) * x[at]

    def gradients(self, at: slice, decay: Tensor, dy: Tensor, C: Tensor, leaving: Tensor) -> Tensor:
        """Of the state after each token, [k, q, n, d]; leaving [k, n, d]: of the last one, from what comes after the chunk."""
        G = dy[:, :, None] * C[at].to(dy.dtype)[..., None]
        each, kept = G.unbind(1), decay.unbind(1)
        each[-1].add_(leaving)
        for t in reversed(range(CHUNK - 1)):
            each[t].addcmul_(kept[t + 1], each[t + 1])
        return G
