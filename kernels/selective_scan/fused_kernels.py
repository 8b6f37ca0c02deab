"""Triton kernels of the selective scan; `fused` launches them.

A program has BD channels of one sequence's segment, and walks its tokens. Tensors in a program are vectors of channels, a tuple of
them being one for each state dim or each token of a chunk: a thread then has all of a channel, sums over state dims stay in its
registers, and no layout is ever converted. B and C [b, l, n] are contiguous, and read as scalars.

Tokens are counted over all sequences. Segment k is one of `per_run` of `length` tokens that a run of `run` tokens is cut into, the
last of them shorter. Of a token past the segment's end everything is loaded as 0, and its step is 0, the identity.
"""

# Tuples grow as Triton unrolls a loop.
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(raw):
    """Exact to a few roundings also where it is small."""
    u = tl.exp(-tl.abs(raw))
    # log(1 + u) = u log(w) / (w - 1) with w = fl(1 + u): the rounding of w cancels.
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(raw, 0.0) + log1p


@triton.jit
def _positive(raw, low, high):
    """clamp(softplus(raw), low, high); nan stays."""
    positive = _softplus(raw)
    positive = tl.where(positive < low, low, positive)
    return tl.where(positive > high, high, positive)


@triton.jit
def _slope(raw, low, high):
    """The derivative of `_positive`."""
    positive = _softplus(raw)
    return tl.where((positive < low) | (positive > high), 0.0, tl.sigmoid(raw))


@triton.jit
def _row(ptr, at, here):
    """A vector of channels, 0 where not `here`."""
    return tl.load(ptr + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _scalar(ptr, here):
    return tl.load(ptr, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _place(d, BD: tl.constexpr):
    """The program's segment and its channels, the channels being the faster: neighbours read the same tokens."""
    blocks = tl.cdiv(d, BD)
    channel = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    return tl.program_id(0) // blocks, channel, channel < d


@triton.jit
def _tokens(k, run, per_run, length):
    """The first token of segment k, and how many it has."""
    within = (k % per_run) * length
    return (k // per_run).to(tl.int64) * run + within, tl.minimum(length, run - within)


@triton.jit
def _rates(A_ptr, channel, here, d, N: tl.constexpr):
    """A log2(e) by state dim. Where no channel is, something negative: times an infinite step it must not be nan."""
    rates = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(A_ptr + n * d + channel, mask=here, other=-1.0) * LOG2E,)
    return rates


@triton.jit
def _load_state(ptr, k, channel, here, d, N: tl.constexpr):
    """Of [k, d, n]."""
    state = ()
    for n in tl.static_range(N):
        state = state + (tl.load(ptr + (k.to(tl.int64) * d + channel) * N + n, mask=here, other=0.0),)
    return state


@triton.jit
def _store_state(ptr, k, channel, here, d, state, N: tl.constexpr):
    """As [k, d, n]."""
    for n in tl.static_range(N):
        tl.store(ptr + (k.to(tl.int64) * d + channel) * N + n, state[n], mask=here)


@triton.jit
def _zero_state(N: tl.constexpr, BD: tl.constexpr):
    state = ()
    for _ in tl.static_range(N):
        state = state + (tl.zeros([BD], tl.float32),)
    return state


@triton.jit
def _step(dt_ptr, bias, resets_ptr, t, at, here, low, high, HAS_RESETS: tl.constexpr):
    """Of token t: the step Δ, and what its decay is computed from, which a reset makes infinite."""
    delta = _positive(_row(dt_ptr, at, here) + bias, low, high)
    if HAS_RESETS:
        decaying = tl.where(tl.load(resets_ptr + t) != 0, float("inf"), delta)
    else:
        decaying = delta
    return delta, decaying


@triton.jit
def _advance(state, rates, decaying, update, B_ptr, N: tl.constexpr):
    """The state after a token."""
    after = ()
    for n in tl.static_range(N):
        after = after + (tl.exp2(decaying * rates[n]) * state[n] + update * _scalar(B_ptr + n, True),)
    return after


@triton.jit
def _read(state, C_ptr, N: tl.constexpr):
    y = state[0] * _scalar(C_ptr, True)
    for n in tl.static_range(1, N):
        y += state[n] * _scalar(C_ptr + n, True)
    return y


@triton.jit
def _of_channels(ptr, channel, here, THERE: tl.constexpr, BD: tl.constexpr):
    """A parameter [d], 0 where it is not given."""
    values = tl.zeros([BD], tl.float32)
    if THERE:
        values = _row(ptr, channel, here)
    return values


@triton.jit
def maps_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, resets_ptr, T_ptr, U_ptr,
    d, run, per_run, length, x_stride, dt_stride, low, high,
    HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """T and U of a segment."""
    k, channel, here = _place(d, BD)
    first, count = _tokens(k, run, per_run, length)
    bias = _of_channels(bias_ptr, channel, here, HAS_BIAS, BD)
    rates = _rates(A_ptr, channel, here, d, N)
    state = _zero_state(N, BD)
    total = tl.zeros([BD], tl.float32)
    for i in range(0, count):
        t = first + i
        delta, decaying = _step(dt_ptr, bias, resets_ptr, t, t * dt_stride + channel, here, low, high, HAS_RESETS)
        update = delta * _row(x_ptr, t * x_stride + channel, here)
        state = _advance(state, rates, decaying, update, B_ptr + t * N, N)
        total += decaying
    tl.store(T_ptr + k.to(tl.int64) * d + channel, total, mask=here)
    _store_state(U_ptr, k, channel, here, d, state, N)


@triton.jit
def outputs_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, resets_ptr, S_in_ptr, y_ptr,
    d, run, per_run, length, x_stride, dt_stride, z_stride, low, high,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y of a segment, from the state that enters it."""
    k, channel, here = _place(d, BD)
    first, count = _tokens(k, run, per_run, length)
    bias = _of_channels(bias_ptr, channel, here, HAS_BIAS, BD)
    skip = _of_channels(D_ptr, channel, here, HAS_D, BD)
    rates = _rates(A_ptr, channel, here, d, N)
    state = _load_state(S_in_ptr, k, channel, here, d, N)
    for i in range(0, count):
        t = first + i
        delta, decaying = _step(dt_ptr, bias, resets_ptr, t, t * dt_stride + channel, here, low, high, HAS_RESETS)
        x = _row(x_ptr, t * x_stride + channel, here)
        state = _advance(state, rates, decaying, delta * x, B_ptr + t * N, N)
        y = _read(state, C_ptr + t * N, N)
        if HAS_D:
            y += skip * x
        if HAS_Z:
            z = _row(z_ptr, t * z_stride + channel, here)
            y *= z * tl.sigmoid(z)
        tl.store(y_ptr + t * d + channel, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def state_grads_kernel(
    dt_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, resets_ptr, dy_ptr, dS_in_ptr,
    d, run, per_run, length, dt_stride, z_stride, dy_stride, low, high,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that enters a segment, through the segment's own outputs."""
    k, channel, here = _place(d, BD)
    first, count = _tokens(k, run, per_run, length)
    bias = _of_channels(bias_ptr, channel, here, HAS_BIAS, BD)
    rates = _rates(A_ptr, channel, here, d, N)
    state = _zero_state(N, BD)
    for i in range(0, count):
        t = first + (count - 1 - i)
        _, decaying = _step(dt_ptr, bias, resets_ptr, t, t * dt_stride + channel, here, low, high, HAS_RESETS)
        dy = _row(dy_ptr, t * dy_stride + channel, here)
        if HAS_Z:
            z = _row(z_ptr, t * z_stride + channel, here)
            dy *= z * tl.sigmoid(z)
        before = ()
        for n in tl.static_range(N):
            before = before + (tl.exp2(decaying * rates[n]) * (state[n] + dy * _scalar(C_ptr + t * N + n, True)),)
        state = before
    _store_state(dS_in_ptr, k, channel, here, d, state, N)


@triton.jit(do_not_specialize=["window"])
def states_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, resets_ptr, S_in_ptr, dy_ptr, states_ptr, dz_ptr,
    d, run, per_run, length, window, x_stride, dt_stride, z_stride, dy_stride, low, high,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    N: tl.constexpr, BD: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """The states that enter the chunks of Q tokens of a segment, [window, chunks, n, d], and dz; from segment `window` on."""
    own, channel, here = _place(d, BD)
    k = own + window
    first, count = _tokens(k, run, per_run, length)
    bias = _of_channels(bias_ptr, channel, here, HAS_BIAS, BD)
    skip = _of_channels(D_ptr, channel, here, HAS_D, BD)
    rates = _rates(A_ptr, channel, here, d, N)
    state = _load_state(S_in_ptr, k, channel, here, d, N)
    chunks = length // Q
    for j in range(0, tl.cdiv(count, Q)):
        for n in tl.static_range(N):
            tl.store(states_ptr + ((own.to(tl.int64) * chunks + j) * N + n) * d + channel, state[n], mask=here)
        for i in range(j * Q, tl.minimum(j * Q + Q, count)):
            t = first + i
            delta, decaying = _step(dt_ptr, bias, resets_ptr, t, t * dt_stride + channel, here, low, high, HAS_RESETS)
            x = _row(x_ptr, t * x_stride + channel, here)
            state = _advance(state, rates, decaying, delta * x, B_ptr + t * N, N)
            if HAS_Z:
                z = _row(z_ptr, t * z_stride + channel, here)
                sigmoid = tl.sigmoid(z)
                y = _read(state, C_ptr + t * N, N)
                if HAS_D:
                    y += skip * x
                dz = _row(dy_ptr, t * dy_stride + channel, here) * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
                tl.store(dz_ptr + t * d + channel, dz.to(dz_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["window", "zero"])
def main_grads_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, resets_ptr, dU_ptr, dy_ptr, states_ptr,
    flow_inout_ptr, dA_inout_ptr, dx_ptr, ddt_ptr, dBC_ptr, dD_ptr, dbias_ptr,
    d, run, per_run, length, window, windows, zero, x_stride, dt_stride, z_stride, dy_stride, low, high,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    N: tl.constexpr, BD: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """dx and ddt of a segment, and its parts of the other gradients; from segment `window` on, of `windows`.

    Chunk after chunk from the end. In a chunk one state dim after the other: forward over the tokens from the state that enters
    the chunk, keeping decays and decayed states, and back from the gradient of the state that leaves it. That gradient,
    `flow_inout` [window, n, d], and the sums of dA, `dA_inout` [k, n, d], are in memory from chunk to chunk. Sums over channels are
    over the program's: dBC [2, blocks, window, length, n].

    zero: 0, which the compiler does not know. Added to what addresses are computed from, it keeps those of the chunk's first loop
    from being held in registers until its last, which then spills.
    """
    own, channel, here = _place(d, BD)
    k = own + window
    first, count = _tokens(k, run, per_run, length)
    bias = _of_channels(bias_ptr, channel, here, HAS_BIAS, BD)
    skip = _of_channels(D_ptr, channel, here, HAS_D, BD)
    dD, dbias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    chunks = tl.cdiv(count, Q)
    blocks = tl.cdiv(d, BD)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    dB_ptr = dBC_ptr + (block * windows + own) * length * N
    dC_ptr = dBC_ptr + ((block + blocks) * windows + own) * length * N
    for i in range(0, chunks):
        j = chunks - 1 - i
        start = first + j * Q
        left = count - j * Q
        delta, update, reset, dy, through_B, through_A = (), (), (), (), (), ()
        for q in tl.static_range(Q):
            t = start + q
            valid = here & (q < left)
            step = tl.where(valid, _positive(_row(dt_ptr, t * dt_stride + channel, valid) + bias, low, high), 0.0)
            weight = _row(dy_ptr, t * dy_stride + channel, valid)
            if HAS_Z:
                z = _row(z_ptr, t * z_stride + channel, valid)
                weight *= z * tl.sigmoid(z)
            delta = delta + (step,)
            update = update + (step * _row(x_ptr, t * x_stride + channel, valid),)
            dy = dy + (weight,)
            through_B = through_B + (tl.zeros([BD], tl.float32),)
            through_A = through_A + (tl.zeros([BD], tl.float32),)
            if HAS_RESETS:
                reset = reset + (tl.load(resets_ptr + t, mask=q < left, other=0) != 0,)

        for n in range(0, N):
            A = tl.load(A_ptr + n * d + channel, mask=here, other=-1.0)
            h = _row(states_ptr, ((own.to(tl.int64) * (length // Q) + j) * N + n) * d + channel, here)
            at = (own.to(tl.int64) * N + n) * d + channel
            G = _row(flow_inout_ptr, at, here & (i > 0))
            G += _row(dU_ptr, (k.to(tl.int64) * d + channel) * N + n, here & (i == 0))
            at_A = (k.to(tl.int64) * N + n) * d + channel
            dA = _row(dA_inout_ptr, at_A, here & (i > 0))
            decays, decayed = (), ()
            for q in tl.static_range(Q):
                decay = tl.exp2(delta[q] * (A * LOG2E))
                if HAS_RESETS:
                    decay = tl.where(reset[q], 0.0, decay)
                decays = decays + (decay,)
                decayed = decayed + (decay * h,)
                h = decay * h + update[q] * _scalar(B_ptr + start * N + q * N + n, q < left)
                tl.store(dC_ptr + j * Q * N + q * N + n, tl.sum(h * dy[q]))
            new_B, new_A = (), ()
            for q in tl.static_range(Q - 1, -1, -1):
                G += dy[q] * _scalar(C_ptr + start * N + q * N + n, q < left)
                tl.store(dB_ptr + j * Q * N + q * N + n, tl.sum(G * update[q]))
                flow = decayed[q] * G
                dA += delta[q] * flow
                new_A = (through_A[q] + A * flow,) + new_A
                new_B = (through_B[q] + G * _scalar(B_ptr + start * N + q * N + n, q < left),) + new_B
                G *= decays[q]
            through_B, through_A = new_B, new_A
            tl.store(flow_inout_ptr + at, G, mask=here)
            tl.store(dA_inout_ptr + at_A, dA, mask=here)

        start += zero
        for q in tl.static_range(Q):
            t = start + q
            valid = here & (q < left)
            x = _row(x_ptr, t * x_stride + channel, valid)
            slope = _slope(_row(dt_ptr, t * dt_stride + channel, valid) + bias, low, high)
            ddt = tl.where(valid, (x * through_B[q] + through_A[q]) * slope, 0.0)
            dx = delta[q] * through_B[q]
            if HAS_D:
                dx += skip * dy[q]
                dD += x * dy[q]
            dbias += ddt
            tl.store(dx_ptr + t * d + channel, dx.to(dx_ptr.dtype.element_ty), mask=valid)
            tl.store(ddt_ptr + t * d + channel, ddt.to(ddt_ptr.dtype.element_ty), mask=valid)
        # What the threads left in memory is there for the next chunk.
        tl.debug_barrier()
    if HAS_D:
        tl.store(dD_ptr + k.to(tl.int64) * d + channel, dD, mask=here)
    if HAS_BIAS:
        tl.store(dbias_ptr + k.to(tl.int64) * d + channel, dbias, mask=here)
