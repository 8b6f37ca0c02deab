"""The SSD scan of Mamba-2 in PyTorch: a sequential oracle, and the four chunk-parallel functions that the fast path is made of.

Recurrence, per sequence and head i (group i // (h // g)), with dt already positive:

    S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_tᵀ        S: [p, n]; a document's first token forgets S_{t-1}
    y_t = S_t C_t + D x_t

(Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, equation 16 and listing 1.)

Over a chunk of q tokens the recurrence is an affine map of the state, S_out = T S_in + U. So the work is:

    forward     chunk_maps      -> (log_T, U) of every chunk, from a zero state
                a scan           -> S_in of every chunk           (injected: local, or over ranks)
                chunk_outputs   -> y
    backward    chunk_state_grads -> the direct gradient of every S_in
                a reverse scan    -> the gradient of every U        (injected)
                chunk_main_grads  -> dx, ddt, dA, dB, dC, dD

Every one of these is parallel over chunks and walks them in cache-sized blocks; all recurrence is in the injected scan. `prepare`,
`maps`, `outputs`, `gate_grads`, `state_grads` and `main_grads` are the same on whole tensors, as `fused` has them too.

Shapes: b sequences, l tokens (s chunks of q, padded with dt = 0, the identity step), h heads of p, g groups, state n.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..steps import positive_steps, raw_steps, slopes
from .operands import Grads, Operands, Prepared

LOG2E = 1.0 / math.log(2.0)
# Floats of one block's [heads, q, q + p] work, so that it stays in cache (2 MB measured best).
BLOCK_FLOATS = 1 << 19
# In powers of two. Under this a difference of fp32 cumulative decays loses more than 2e-6: a second word is added.
SPLIT_BELOW = -24.0


def ssd_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, under autograd: the oracle of every test.

    x [b, l, h, p]; dt [b, l, h] positive; A, D [h]; B, C [b, l, g, n]; initial_state [b, h, p, n]; resets [b, l] bool.
    Returns y [b, l, h, p] and the final state [b, h, p, n].
    """
    b, l, h, p = x.shape
    repeat = h // B.shape[2]
    Bh, Ch = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    state = x.new_zeros(b, h, p, B.shape[3]) if initial_state is None else initial_state
    ys = []
    for t in range(l):
        if resets is not None:
            state = state * (~resets[:, t]).to(x.dtype)[:, None, None, None]
        update = (dt[:, t, :, None] * x[:, t])[..., None] * Bh[:, t, :, None, :]
        state = torch.exp(A * dt[:, t])[..., None, None] * state + update
        ys.append((state * Ch[:, t, :, None, :]).sum(-1))
    y = torch.stack(ys, 1)
    return (y if D is None else y + D[:, None] * x), state


class Chunks(NamedTuple):
    """The operands cut into chunks and flattened over sequences: k = b * s chunks of q tokens each, zero-padded."""

    x: Tensor  # [k, q, h, p]
    dt: Tensor  # [k, q, h] positive, fp32 or fp64; 0 where padded
    A: Tensor  # [h] in dt's dtype
    B: Tensor  # [k, q, g, n]
    C: Tensor  # [k, q, g, n]
    document: Tensor | None  # [k, q] int: documents begun in the chunk so far


def pad_and_chunk(tensor: Tensor, segments: int, chunk_size: int) -> Tensor:
    """[b, l, ...] of `segments` equal runs of tokens -> [b * s, q, ...], each run padded at its end to whole chunks."""
    b, l = tensor.shape[:2]
    rest = tensor.shape[2:]
    run = l // segments
    missing = -run % chunk_size
    if missing:
        runs = tensor.reshape(b * segments, run, *rest)
        tensor = torch.cat([runs, runs.new_zeros(b * segments, missing, *rest)], 1)
    return tensor.reshape(-1, chunk_size, *rest)


def unchunk(tensor: Tensor, shape: torch.Size, segments: int) -> Tensor:
    """The reverse of `pad_and_chunk`: [b * s, q, ...] -> `shape`, the padding dropped."""
    b, l = shape[:2]
    return tensor.reshape(b * segments, -1, *shape[2:])[:, : l // segments].reshape(shape)


def make_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, resets: Tensor | None, segments: int, chunk_size: int
) -> Chunks:
    """x [b, l, h, p], dt [b, l, h] positive, A [h], B and C [b, l, g, n], resets [b, l] bool -> `Chunks`."""
    cut = [pad_and_chunk(t, segments, chunk_size) for t in (x, dt, B, C)]
    document = None if resets is None else pad_and_chunk(resets, segments, chunk_size).cumsum(1)
    return Chunks(cut[0], cut[1], A.to(dt.dtype), cut[2], cut[3], document)


def chunk_maps(c: Chunks) -> tuple[Tensor, Tensor]:
    """Each chunk's affine map from a zero state: log_T [k, h] (natural log, -inf past a document's start) and U [k, h, p, n]."""
    k, _, h, p = c.x.shape
    log_T = c.dt.new_empty(k, h)
    U = c.dt.new_empty(k, h, p, c.B.shape[3])
    for at in _blocks(c):
        decay = _Decays(c, at)
        log_T[at] = decay.log_T
        weighted = c.x[at].to(c.dt.dtype) * (decay.exit * c.dt[at])[..., None]
        U[at] = torch.bmm(_group(weighted, c).transpose(1, 2), _group(c.B[at].to(c.dt.dtype), c)).view_as(U[at])
    return log_T, U


def chunk_outputs(c: Chunks, S_in: Tensor, D: Tensor | None) -> Tensor:
    """y [k, q, h, p] in x's dtype, from the state entering each chunk, S_in [k, h, p, n]."""
    y = torch.empty_like(c.x)
    scratch = _Scratch(c.dt)
    for at in _blocks(c):
        decay = _Decays(c, at)
        x, dt = c.x[at].to(c.dt.dtype), c.dt[at]
        B, C = _group(c.B[at].to(c.dt.dtype), c), _group(c.C[at].to(c.dt.dtype), c)
        L = decay.within(scratch)
        mixed = _by_group(L, c).mul_(torch.bmm(C, B.transpose(1, 2))[:, None])
        inside = torch.bmm(mixed.view(-1, *L.shape[2:]), _heads(x * dt[..., None]))
        from_state = torch.bmm(C, _group_states(S_in[at], c).transpose(1, 2))
        out = torch.addcmul(_tokens(inside, x), _ungroup(from_state, x), decay.entry[..., None])
        y[at] = out if D is None else out.addcmul_(x, D.to(out.dtype)[:, None])
    return y


def chunk_state_grads(c: Chunks, dy: Tensor) -> Tensor:
    """The gradient of each chunk's S_in through its own outputs, [k, h, p, n]; dy [k, q, h, p]."""
    dS_in = c.dt.new_empty(*c.x.shape[:1], *c.x.shape[2:], c.C.shape[3])
    for at in _blocks(c):
        weighted = dy[at].to(c.dt.dtype) * _Decays(c, at).entry[..., None]
        dS_in[at] = torch.bmm(_group(weighted, c).transpose(1, 2), _group(c.C[at].to(c.dt.dtype), c)).view_as(dS_in[at])
    return dS_in


class MainGrads(NamedTuple):
    """Gradients of the chunked operands, in their shapes; dA and dD [h] in fp64."""

    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor | None


def chunk_main_grads(c: Chunks, dy: Tensor, D: Tensor | None, S_in: Tensor, dU: Tensor) -> MainGrads:
    """Everything but the states: dy [k, q, h, p], S_in and dU [k, h, p, n] (dU: the gradient of the state leaving a chunk).

    The decay's gradient da_t is the flow of gradient over the edge t-1 -> t: a sum over pairs r >= t > s of the terms that
    cross it, so only what belongs is summed (row sums minus column sums would cancel badly under strong decay).
    """
    q, h = c.x.shape[1:3]
    dx, ddt, dB, dC = (torch.empty_like(t) for t in (c.x, c.dt, c.B, c.C))
    dA = torch.zeros(h, dtype=torch.float64, device=c.x.device)
    dD = None if D is None else torch.zeros_like(dA)
    before = torch.ones(q, q, dtype=c.dt.dtype, device=c.x.device).triu(1)
    # [suffix sums | exclusive prefix sums], one matmul for both.
    sums = torch.cat([torch.ones_like(before).triu(), before.T], 1)
    scratch = _Scratch(c.dt)
    for at in _blocks(c):
        decay = _Decays(c, at)
        x, dt, dyf = c.x[at].to(c.dt.dtype), c.dt[at], dy[at].to(c.dt.dtype)
        B, C = _group(c.B[at].to(c.dt.dtype), c), _group(c.C[at].to(c.dt.dtype), c)
        S, G = _group_states(S_in[at], c), _group_states(dU[at], c)
        # Inside the chunk: M = (C Bᵀ) ∘ L, and its gradient.
        L = decay.within(scratch)
        scores = torch.bmm(C, B.transpose(1, 2))[:, None]
        dy_h = _heads(dyf)
        dM = torch.bmm(dy_h, _heads(x * dt[..., None]).transpose(1, 2)).mul_(L.view(-1, q, q))
        M = _by_group(L, c).mul_(scores).view(-1, q, q)
        dxdt = _tokens(torch.bmm(M.transpose(1, 2), dy_h), x)
        dscores = _by_group(dM, c).sum(1)
        crossing = torch.mm(_by_group(dM, c).mul_(scores).view(-1, q), before, out=M.view(-1, q))
        da = crossing.view(-1, h, q, q).tril_().sum(2).transpose(1, 2)
        dC_g, dB_g = torch.bmm(dscores, B), torch.bmm(dscores.transpose(1, 2), C)
        # Through the state entering the chunk.
        dy_in = dyf * decay.entry[..., None]
        dC_g.baddbmm_(_group(dy_in, c), S)
        entered = _ungroup(torch.bmm(C, S.transpose(1, 2)), x).mul_(dy_in).sum(-1)
        # Through the state leaving it.
        leaving = x * (decay.exit * dt)[..., None]
        dB_g.baddbmm_(_group(leaving, c), G)
        dleaving = _ungroup(torch.bmm(B, G.transpose(1, 2)), x)
        left = leaving.mul_(dleaving).sum(-1)
        through = (S_in[at] * dU[at]).sum((2, 3))[:, None] * decay.log_T.exp()[:, None]
        dxdt = torch.addcmul(dxdt, dleaving, decay.exit[..., None])
        da = da + torch.matmul(sums, torch.cat([entered, left], 1)) + through
        # Inputs.
        dA += (da * dt).sum((0, 1))
        ddt[at] = (da * c.A).add_((dxdt * x).sum(-1))
        dx_f = dxdt * dt[..., None]
        if D is not None and dD is not None:
            dx_f.addcmul_(dyf, D.to(dx_f.dtype)[:, None])
            dD += (dyf * x).sum((0, 1, 3))
        dx[at] = dx_f
        dB[at], dC[at] = _ungroup(dB_g, c.B[at]), _ungroup(dC_g, c.C[at])
    return MainGrads(dx, ddt, dA, dB, dC, dD)


def prepare(o: Operands) -> Prepared:
    """Positive dt [b, l, h] in fp32 or fp64, clamp(softplus(dt + dt_bias), low, high); no scores."""
    return Prepared(positive_steps(o.dt, o.dt_bias, o.low, o.high), o.x.new_empty(0))


def prepared_like(o: Operands) -> Prepared:
    """As `prepare`, without values."""
    return Prepared(torch.empty_like(raw_steps(o.dt, o.dt_bias)), o.x.new_empty(0))


def map_count(o: Operands) -> int:
    """Maps of each sequence: one a chunk."""
    return o.runs * -(-(o.x.shape[1] // o.runs) // o.chunk)


def maps(o: Operands, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Each chunk's map from a zero state: log_T [b, s, h] (natural logarithm) and U [b, s, h, p, n]."""
    log_T, U = chunk_maps(_chunks(o, prepared))
    return log_T.unflatten(0, (o.x.shape[0], -1)), U.unflatten(0, (o.x.shape[0], -1))


def outputs(o: Operands, prepared: Prepared, z: Tensor | None, S_in: Tensor) -> Tensor:
    """y [b, l, h, p] in x's dtype, times silu(z) if z is given, from the state entering each chunk, S_in [b, s, h, p, n]."""
    if z is None:
        return _outputs(o, prepared, S_in)
    y = _outputs(o._replace(x=o.x.to(prepared.steps.dtype)), prepared, S_in)
    return (y * F.silu(z.to(y.dtype))).to(o.x.dtype)


def gate_grads(o: Operands, prepared: Prepared, z: Tensor, S_in: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y, before its gate, and of z, [b, l, h, p] in their dtypes; y is computed anew."""
    y = _outputs(o._replace(x=o.x.to(prepared.steps.dtype)), prepared, S_in)
    dout, wide = dout.to(y.dtype), z.to(y.dtype)
    sigmoid = torch.sigmoid(wide)
    dz = dout * y * sigmoid * (1 + wide * (1 - sigmoid))
    return (dout * wide * sigmoid).to(o.x.dtype), dz.to(z.dtype)


def state_grads(o: Operands, prepared: Prepared, dy: Tensor) -> Tensor:
    """The gradient of each chunk's S_in through its own outputs, [b, s, h, p, n]."""
    dS_in = chunk_state_grads(_chunks(o, prepared), pad_and_chunk(dy, o.runs, o.chunk))
    return dS_in.unflatten(0, (o.x.shape[0], -1))


def main_grads(o: Operands, prepared: Prepared, S_in: Tensor, dU: Tensor, dy: Tensor) -> Grads:
    """Everything but the states, from those entering chunks and the gradients of those leaving them, [b, s, h, p, n]."""
    chunked = pad_and_chunk(dy, o.runs, o.chunk)
    grads = chunk_main_grads(_chunks(o, prepared), chunked, o.D, S_in.flatten(0, 1), dU.flatten(0, 1))
    dx, dB, dC = (unchunk(g, t.shape, o.runs).clone() for g, t in ((grads.dx, o.x), (grads.dB, o.B), (grads.dC, o.C)))
    ddt = unchunk(grads.ddt, o.dt.shape, o.runs) * slopes(o.dt, o.dt_bias, o.low, o.high)
    dD = torch.zeros_like(grads.dA) if grads.dD is None else grads.dD
    dA, dD, ddt_bias = (t.to(ddt.dtype) for t in (grads.dA, dD, ddt.sum((0, 1), dtype=torch.float64)))
    return Grads(dx, ddt.to(o.dt.dtype), dA, dB, dC, dD, ddt_bias)


def _chunks(o: Operands, prepared: Prepared) -> Chunks:
    return make_chunks(o.x, prepared.steps, o.A, o.B, o.C, o.resets, o.runs, o.chunk)


def _outputs(o: Operands, prepared: Prepared, S_in: Tensor) -> Tensor:
    chunked = chunk_outputs(_chunks(o, prepared), S_in.flatten(0, 1), o.D)
    # A tensor of its own and not a view: FSDP warns of views that a module returns.
    return torch.empty_like(o.x, memory_format=torch.contiguous_format).copy_(unchunk(chunked, o.x.shape, o.runs))


class _Decays:
    """Decays of a block of chunks, with powers of two throughout (on CPU torch.exp2 is several times faster than torch.exp).

    entry [k, q, h]: from the chunk's entry to a token, 0 past a document's start
    exit [k, q, h]: from a token to the chunk's exit, 0 before the last document's start
    log_T [k, h]: over the whole chunk, natural log, -inf where a document starts
    """

    def __init__(self, c: Chunks, at: slice) -> None:
        dt = c.dt[at]
        self.document = None if c.document is None else c.document[at]
        self.cumulative = torch.cumsum(dt.double() * (c.A.double() * LOG2E), 1)
        total = self.cumulative[:, -1:]
        self.dtype = dt.dtype
        self.entry = torch.exp2(self.cumulative.to(self.dtype))
        self.exit = (total - self.cumulative).to(self.dtype).exp2_()
        self.log_T = (total[:, 0] / LOG2E).to(self.dtype)
        # On a GPU always, since looking would make it wait.
        self.two_words = self.dtype == torch.float32 and (dt.is_cuda or float(total.amin()) < SPLIT_BELOW)
        if self.document is not None:
            last = self.document[:, -1:]
            self.entry = self.entry * (self.document == 0)[..., None]
            self.exit = self.exit * (self.document == last)[..., None]
            self.log_T = self.log_T.masked_fill(last > 0, float("-inf"))

    def within(self, scratch: "_Scratch") -> Tensor:
        """L [k, h, q, q]: decay from token j (column) to token i (row), 0 where j > i or another document lies between."""
        cs = self.cumulative.transpose(1, 2)
        high = cs.to(self.dtype).contiguous()
        k, h, q = high.shape
        L = torch.sub(high[..., :, None], high[..., None, :], out=scratch(k, h, q, q))
        if self.two_words:
            low = (cs - high).to(self.dtype)
            L += low[..., :, None]
            L -= low[..., None, :]
        # tril_ overwrites, so an inf above the diagonal never meets a 0.
        L.exp2_().tril_()
        if self.document is not None:
            L *= (self.document[:, None, :, None] == self.document[:, None, None, :]).to(self.dtype)
        return L


class _Scratch:
    """One buffer that the blocks share: a fresh allocation of that size costs more than the arithmetic on it."""

    def __init__(self, like: Tensor) -> None:
        self.flat = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.flat.numel() < size:
            self.flat = self.flat.new_empty(size)
        return self.flat[:size].view(shape)


def _blocks(c: Chunks) -> Iterator[slice]:
    k, q, h, p = c.x.shape
    step = max(1, BLOCK_FLOATS // (h * q * (q + p)))
    for start in range(0, k, step):
        yield slice(start, min(start + step, k))


def _group(t: Tensor, c: Chunks) -> Tensor:
    """[k, q, h or g, e] -> [k * g, q, e of all heads in the group]; a view when g = 1."""
    k, q = t.shape[:2]
    g = c.B.shape[2]
    return t.reshape(k, q, g, -1).transpose(1, 2).reshape(k * g, q, -1)


def _ungroup(t: Tensor, like: Tensor) -> Tensor:
    """[k * g, q, e] -> the shape of `like`, [k, q, ...]."""
    k, q = like.shape[:2]
    return t.view(k, -1, q, t.shape[-1]).transpose(1, 2).reshape(like.shape)


def _group_states(S: Tensor, c: Chunks) -> Tensor:
    """[k, h, p, n] -> [k * g, heads in the group * p, n]."""
    return S.reshape(S.shape[0] * c.B.shape[2], -1, S.shape[3])


def _by_group(t: Tensor, c: Chunks) -> Tensor:
    """[k, h, q, q] or [k * h, q, q] -> [k * g, heads in the group, q, q], a view."""
    q = t.shape[-1]
    return t.view(-1, c.x.shape[2] // c.B.shape[2], q, q)


def _heads(t: Tensor) -> Tensor:
    """[k, q, h, p] -> [k * h, q, p]."""
    return t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3])


def _tokens(t: Tensor, like: Tensor) -> Tensor:
    """[k * h, q, p] -> [k, q, h, p], a view."""
    k, q, h, p = like.shape
    return t.view(k, h, q, p).transpose(1, 2)
