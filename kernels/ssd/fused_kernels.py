"""Triton kernels of the SSD scan; `fused` launches them.

A run of l tokens of one sequence is cut into segments, a segment into blocks of R chunks, a chunk is Q tokens. Per head, with
a_t = A dt_t in powers of two, cs the inclusive cumulative a inside a chunk and cl its last value, S the state, G its gradient:

    S_t = 2^a_t S_{t-1} + dt_t x_t B_tᵀ             y_t = S_t C_t + D x_t
    G_t = 2^a_{t+1} G_{t+1} + dy_t C_tᵀ             dx_t = dt_t G_t B_t + D dy_t

Forward and backward are mirror images (time, x and dy, B and C, S and G change places), so two kernels serve both, by REVERSE:

    segment_kernel   a serial pass that only carries the state: each segment's contribution from zero, or the state at block edges
    output_kernel    a serial pass that also multiplies it out: y; in reverse dx, and G at block edges

With the states at the blocks' edges in memory the rest is parallel over blocks, the loop over a group's heads inside, so that dB,
dC and d(C Bᵀ) are summed in registers: no atomics, nothing of size l x n x h, the same bits every time.

    scores_kernel    d(C Bᵀ), and the flow of gradient between tokens of one block
    group_kernel     dC and the flow from states into tokens; dB and the flow from tokens into states
    decay_kernel     the flow over each edge t-1 -> t is the gradient of a_t: from it ddt, and parts of dA, ddt_bias, dD

The flow over an edge is a sum over pairs of tokens on either side of it. It is put together from pairs inside a chunk, between the
chunks of a block, between a block and what lies outside, and outside on both sides, <S, G> decayed over the block. Shorter ways
cancel, in bf16 by more than the result: the running sum of dy·(y - D x) - x·(dx - D dy), or <S, G> from block to block by what
enters and leaves in between.

Documents: `doc` counts the documents begun in the run so far. A pair of tokens of different documents has the decay 0.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MOST = tl.constexpr(-24.0)
"""A stronger decay of one token counts as this, in powers of two: it would drown the differences of those around it in the sum."""


@triton.jit
def _tile(ptr, at, i, stride, j, here):
    """Rows i of `stride` elements and columns j, zero where not `here` [rows, 1].

    An address is a 64-bit scalar `at` and 32-bit offsets within the tile: 64-bit offsets of whole tiles would fill the registers.
    """
    return tl.load((ptr + at) + i[:, None] * stride + j[None, :], mask=here, other=0.0)


@triton.jit
def _softplus(raw):
    """log(1 + e^raw) to full precision also where it is small: log(w) u / (w - 1) is log1p(u) for w = 1 + u as rounded."""
    u = tl.exp2(tl.minimum(raw, 20.0) * LOG2E)
    w = 1.0 + u
    small = tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.where(raw > 20.0, raw, small)


@triton.jit
def _prepare_steps(
    raw_ptr, bias_ptr, A_ptr, dt_ptr, cs_ptr, b, h, t, l, heads, padded, raw_batch, raw_token, low, high, HAS_BIAS: tl.constexpr
):
    here = (t < l)[:, None] & (h < heads)[None, :]
    raw = tl.load(raw_ptr + b * raw_batch + t.to(tl.int64)[:, None] * raw_token + h[None, :], mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=h < heads, other=0.0)[None, :]
    dt = tl.where(here, tl.minimum(tl.maximum(_softplus(raw), low), high), 0.0)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0) * LOG2E
    at = (b * heads + h)[None, :] * padded + t[:, None]
    tl.store(dt_ptr + at, dt, mask=(h < heads)[None, :])
    tl.store(cs_ptr + at, tl.cumsum(tl.maximum(dt * A[None, :], MOST), 0), mask=(h < heads)[None, :])


@triton.jit
def prepare_kernel(
    raw_ptr,
    bias_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    dt_ptr,
    cs_ptr,
    scores_ptr,
    l,
    heads,
    groups,
    padded,
    raw_batch,
    raw_token,
    B_batch,
    B_token,
    B_group,
    C_batch,
    C_token,
    C_group,
    low,
    high,
    N: tl.constexpr,
    NT: tl.constexpr,
    Q: tl.constexpr,
    BH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What every head or group needs of a chunk, once.

    raw [b, l, h] -> dt = clamp(softplus(raw + bias)) and cs, both [b, h, padded] in fp32; past the end dt is 0.
    C Bᵀ -> scores [b, g, chunks, t, s] in fp32. Not in output_kernel, where it would be made once a head, and where a product
    that feeds another would be held twice in registers.
    """
    b = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(0)
    q = tl.arange(0, Q)
    t = chunk * Q + q
    if tl.program_id(1) >= groups:
        h = (tl.program_id(1) - groups) * BH + tl.arange(0, BH)
        _prepare_steps(
            raw_ptr, bias_ptr, A_ptr, dt_ptr, cs_ptr, b, h, t, l, heads, padded, raw_batch, raw_token, low, high, HAS_BIAS
        )
    else:
        group = tl.program_id(1)
        here = (t < l)[:, None]
        first = (chunk * Q).to(tl.int64)
        scores = tl.zeros((Q, Q), tl.float32)
        for n0 in tl.static_range(0, N, NT):
            n = n0 + tl.arange(0, NT)
            C = _tile(C_ptr, b * C_batch + first * C_token + group * C_group, q, C_token, n, here)
            B = _tile(B_ptr, b * B_batch + first * B_token + group * B_group, q, B_token, n, here)
            scores = tl.dot(C, tl.trans(B), scores, input_precision=PRECISION)
        at = ((b * groups + group) * (padded // Q) + chunk) * (Q * Q)
        tl.store((scores_ptr + at) + q[:, None] * Q + q[None, :], scores)


@triton.jit
def _documents(doc_ptr, row, start, t, l, Q: tl.constexpr):
    """Documents of the tokens t of a chunk, of the token before it and of its last; past the end is the last document."""
    doc = tl.load(doc_ptr + row + tl.minimum(t, l - 1))
    before = tl.load(doc_ptr + row + tl.minimum(start, l) - 1, mask=start > 0, other=0)
    last = tl.load(doc_ptr + row + tl.minimum(start + Q, l) - 1)
    return doc, before, last


@triton.jit
def segment_kernel(
    v_ptr,
    k_ptr,
    dt_ptr,
    cs_ptr,
    doc_ptr,
    state_ptr,
    log_T_ptr,
    blocks_ptr,
    ends_ptr,
    past_ptr,
    l,
    heads,
    groups,
    segments,
    segment_length,
    padded,
    v_batch,
    v_token,
    k_batch,
    k_token,
    k_group,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    REVERSE: tl.constexpr,
    WRITE: tl.constexpr,
    HAS_DOC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state [rows of heads x p, n] along one segment; v = x, k = B, or in REVERSE v = dy, k = C.

    WRITE: from `state` [b, s, h, p, n] on, and the state at each block's start goes to `blocks` [b, h, blocks, p, n]; with G at its
    end, `ends` [b, h, blocks, p, n], Σ_n S G goes to `past` [b, h, blocks, p].
    Otherwise from zero, and the segment's map goes to `state` and log_T [b, s, h] (natural logarithm).
    """
    tiles = heads * P // ROWS
    pid = tl.program_id(0)
    row = pid % tiles * ROWS + tl.arange(0, ROWS)
    segment = pid // tiles % segments
    b = (pid // tiles // segments).to(tl.int64)
    HEADS: tl.constexpr = (ROWS + P - 1) // P
    h0 = pid % tiles * ROWS // P
    head = b * heads + h0 + tl.arange(0, HEADS)
    row_head = b * heads + row // P
    group = h0 // (heads // groups)
    q = tl.arange(0, Q)
    n = tl.arange(0, N)
    at_state = (b * segments + segment) * heads * (P * N)
    in_state = row[:, None] * N + n[None, :]
    if WRITE:
        S = tl.load((state_ptr + at_state) + in_state)
    else:
        S = tl.zeros((ROWS, N), tl.float32)
    log_T = tl.zeros((HEADS,), tl.float32)
    start = segment * segment_length
    blocks = (tl.minimum(segment_length, l - start) + Q * R - 1) // (Q * R)
    for i in tl.range(0, blocks * R, num_stages=STAGES):
        if REVERSE:
            c = blocks * R - 1 - i
        else:
            c = i
        t0 = start + c * Q
        t = t0 + q
        if WRITE:
            edge = (i % R == 0) & (row[:, None] >= 0)
            block = (b * heads + h0) * (padded // (Q * R)) + t0 // (Q * R)
            in_block = (row // P - h0) * (padded // (Q * R)) * P + row % P
            at = block * (P * N)
            in_blocks = in_block[:, None] * N + n[None, :]
            tl.store((blocks_ptr + at) + in_blocks, S.to(blocks_ptr.dtype.element_ty), mask=edge)
            G = tl.load((ends_ptr + at) + in_blocks, mask=edge, other=0.0)
            tl.store((past_ptr + block * P) + in_block, tl.sum(S * G.to(tl.float32), 1), mask=(i % R == 0) & (row >= 0))
        here = (t < l)[:, None]
        first = t0.to(tl.int64)
        v = _tile(v_ptr, b * v_batch + first * v_token, q, v_token, row, here)
        k = _tile(k_ptr, b * k_batch + first * k_token + group * k_group, q, k_token, n, here)
        cs = tl.load(cs_ptr + head[None, :] * padded + t[:, None])
        cl = tl.load(cs_ptr + head * padded + (t0 + Q - 1))
        row_cl = tl.load(cs_ptr + row_head * padded + (t0 + Q - 1))
        if REVERSE:
            w = tl.exp2(cs)
        else:
            w = tl.exp2(cl[None, :] - cs) * tl.load(dt_ptr + head[None, :] * padded + t[:, None])
        decay = tl.exp2(row_cl)
        if HAS_DOC:
            doc, before, last = _documents(doc_ptr, b * l, t0, t, l, Q)
            if REVERSE:
                w = tl.where((doc == before)[:, None], w, 0.0)
            else:
                w = tl.where((doc == last)[:, None], w, 0.0)
            decay = tl.where(before == last, decay, 0.0)
            cl = tl.where(before == last, cl, float("-inf"))
        weighted = tl.reshape(v, (Q, HEADS, ROWS // HEADS)).to(tl.float32) * w[:, :, None]
        weighted = tl.reshape(weighted.to(k.dtype), (Q, ROWS))
        S = tl.dot(tl.trans(weighted), k, S * decay[:, None], input_precision=PRECISION)
        log_T += cl
    if not WRITE:
        tl.store((state_ptr + at_state) + in_state, S)
        at = (b * segments + segment) * heads + h0 + tl.arange(0, HEADS)
        tl.store(log_T_ptr + at, log_T * LN2, mask=(pid % tiles * ROWS) % P == 0)


@triton.jit
def output_kernel(
    v_ptr,
    k_ptr,
    q_ptr,
    dt_ptr,
    cs_ptr,
    doc_ptr,
    scores_ptr,
    D_ptr,
    state_ptr,
    z_ptr,
    dout_ptr,
    dz_ptr,
    out_ptr,
    blocks_ptr,
    l,
    heads,
    groups,
    segments,
    segment_length,
    padded,
    v_batch,
    v_token,
    k_batch,
    k_token,
    k_group,
    q_batch,
    q_token,
    q_group,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    HALVES: tl.constexpr,
    REVERSE: tl.constexpr,
    GATE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_DOC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs along one segment from the state that enters it, `state` [b, s, h, p, n]; ROWS of p a program.

    Forward v = x, k = B, q = C, out = y. GATE "forward": y silu(z) instead; "backward": out = dy = dout silu(z), and dz.
    REVERSE v = dy, k = C, q = B, out = dx; G at each block's end goes to `blocks` [b, h, blocks, p, n].
    """
    tiles: tl.constexpr = P // ROWS
    pid = tl.program_id(0)
    tile = pid % tiles
    h = pid // tiles % heads
    segment = pid // tiles // heads % segments
    b = (pid // tiles // heads // segments).to(tl.int64)
    group = h // (heads // groups)
    q = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tile * ROWS + tl.arange(0, ROWS)
    at_state = ((b * segments + segment) * heads + h) * (P * N)
    in_state = p[None, :] * N + n[:, None]
    S = tl.load((state_ptr + at_state) + in_state)
    D = 0.0
    if HAS_D:
        D = tl.load(D_ptr + h)
    start = segment * segment_length
    blocks = (tl.minimum(segment_length, l - start) + Q * R - 1) // (Q * R)
    chunks = (tl.minimum(segment_length, l - start) + Q - 1) // Q
    if REVERSE:
        chunks = blocks * R
    decays = (b * heads + h) * padded
    for i in tl.range(0, chunks, num_stages=STAGES):
        if REVERSE:
            c = chunks - 1 - i
        else:
            c = i
        t0 = start + c * Q
        t = t0 + q
        here = (t < l)[:, None]
        first = t0.to(tl.int64)
        if REVERSE:
            at = ((b * heads + h) * (padded // (Q * R)) + t0 // (Q * R)) * (P * N)
            tl.store((blocks_ptr + at) + in_state, S.to(blocks_ptr.dtype.element_ty), mask=(i % R == 0) & (n[:, None] >= 0))
        at_query = b * q_batch + first * q_token + group * q_group
        if HALVES:
            # fp32 is held in registers, twice.
            low, high = tl.split(tl.permute(tl.reshape(S, (2, N // 2, ROWS)), (1, 2, 0)))
            half = tl.arange(0, N // 2)
            query = _tile(q_ptr, at_query, q, q_token, half, here)
            out = tl.dot(query, low.to(query.dtype), input_precision=PRECISION)
            query = _tile(q_ptr, at_query + N // 2, q, q_token, half, here)
            out = tl.dot(query, high.to(query.dtype), out, input_precision=PRECISION)
        else:
            query = _tile(q_ptr, at_query, q, q_token, n, here)
            out = tl.dot(query, S.to(query.dtype), input_precision=PRECISION)
        v = _tile(v_ptr, b * v_batch + first * v_token + h * P, q, v_token, p, here)
        key = _tile(k_ptr, b * k_batch + first * k_token + group * k_group, q, k_token, n, here)
        cs = tl.load(cs_ptr + decays + t)
        cl = tl.load(cs_ptr + decays + t0 + Q - 1)
        dt = tl.load(dt_ptr + decays + t)
        # Rows are the tokens that read, columns those that are read. min: the other side of the diagonal would overflow.
        if REVERSE:
            L = tl.exp2(tl.minimum(cs[None, :] - cs[:, None], 0.0)) * dt[:, None]
            seen = q[None, :] >= q[:, None]
            enter, leave = tl.exp2(cl - cs) * dt, tl.exp2(cs)
        else:
            L = tl.exp2(tl.minimum(cs[:, None] - cs[None, :], 0.0)) * dt[None, :]
            seen = q[None, :] <= q[:, None]
            enter, leave = tl.exp2(cs), tl.exp2(cl - cs) * dt
        decay = tl.exp2(cl)
        at = ((b * groups + group) * (padded // Q) + t0 // Q) * (Q * Q)
        if REVERSE:
            scores = tl.load((scores_ptr + at) + q[None, :] * Q + q[:, None])
        else:
            scores = tl.load((scores_ptr + at) + q[:, None] * Q + q[None, :])
        if HAS_DOC:
            doc, before, last = _documents(doc_ptr, b * l, t0, t, l, Q)
            seen = seen & (doc[:, None] == doc[None, :])
            if REVERSE:
                enter, leave = tl.where(doc == last, enter, 0.0), tl.where(doc == before, leave, 0.0)
            else:
                enter, leave = tl.where(doc == before, enter, 0.0), tl.where(doc == last, leave, 0.0)
            decay = tl.where(before == last, decay, 0.0)
        W = tl.where(seen, L * scores, 0.0)
        out = tl.dot(W.to(v.dtype), v, out * enter[:, None], input_precision=PRECISION)
        if HAS_D:
            out += v.to(tl.float32) * D
        at = ((b * l + first) * heads + h) * P
        in_out = q[:, None] * (heads * P) + p[None, :]
        if GATE != "none":
            z = tl.load((z_ptr + at) + in_out, mask=here, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(z)
            if GATE == "forward":
                out *= z * sigmoid
            else:
                dout = tl.load((dout_ptr + at) + in_out, mask=here, other=0.0).to(tl.float32)
                dz = dout * out * sigmoid * (1.0 + z * (1.0 - sigmoid))
                tl.store((dz_ptr + at) + in_out, dz.to(dz_ptr.dtype.element_ty), mask=here)
                out = dout * z * sigmoid
        tl.store((out_ptr + at) + in_out, out.to(out_ptr.dtype.element_ty), mask=here)
        weighted = (v.to(tl.float32) * leave[:, None]).to(v.dtype)
        S = tl.dot(tl.trans(key), weighted, S * decay, input_precision=PRECISION)


@triton.jit
def scores_kernel(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    dt_ptr,
    cs_ptr,
    doc_ptr,
    dscores_ptr,
    inside_ptr,
    between_ptr,
    own_ptr,
    xdy_ptr,
    l,
    heads,
    groups,
    padded,
    parts,
    batch,
    x_batch,
    x_token,
    dy_batch,
    dy_token,
    B_batch,
    B_token,
    B_group,
    C_batch,
    C_token,
    C_group,
    P: tl.constexpr,
    N: tl.constexpr,
    PT: tl.constexpr,
    NT: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    HAS_DOC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """d(C Bᵀ) [t, s], summed over a group's heads, with t in one chunk of a block and s in the same or an earlier one.

    With M[t, s] = L[t, s] (dy_t·x_s) (C_t·B_s), for s before t, what decay_kernel needs [b, h, padded]:
    inside   Σ_s M[t, s] dt_s - dt_t Σ_r M[r, t], both inside t's chunk
    own      Σ_r M[r, t] inside t's chunk, with r = t
    between  [R - 1, ...], in chunk k of a block: Σ_s M[t, s] dt_s over chunk j < k at j, Σ_r M[r, t] over chunk i > k at i - 1
    xdy      x·dy summed over each chunk, [b, h, chunks]
    """
    pid = tl.program_id(0)
    PAIRS: tl.constexpr = R * (R + 1) // 2
    pair = pid % PAIRS
    block = pid // PAIRS % (padded // (Q * R))
    part = pid // PAIRS // (padded // (Q * R)) % parts
    rest = pid // PAIRS // (padded // (Q * R)) // parts
    group = rest % groups
    b = (rest // groups).to(tl.int64)
    # Pairs in the order (0, 0), (1, 0), (1, 1), (2, 0), ...
    later = 0
    for r in tl.static_range(1, R):
        later += tl.where(pair >= r * (r + 1) // 2, 1, 0)
    earlier = pair - later * (later + 1) // 2
    t0 = block * (Q * R) + later * Q
    s0 = block * (Q * R) + earlier * Q
    q = tl.arange(0, Q)
    p = tl.arange(0, PT)
    t, s = t0 + q, s0 + q
    t_here, s_here = (t < l)[:, None], (s < l)[:, None]
    t_first, s_first = t0.to(tl.int64), s0.to(tl.int64)
    scores = tl.zeros((Q, Q), tl.float32)
    for n0 in tl.static_range(0, N, NT):
        n = n0 + tl.arange(0, NT)
        C = _tile(C_ptr, b * C_batch + t_first * C_token + group * C_group, q, C_token, n, t_here)
        B = _tile(B_ptr, b * B_batch + s_first * B_token + group * B_group, q, B_token, n, s_here)
        scores = tl.dot(C, tl.trans(B), scores, input_precision=PRECISION)
    same = later == earlier
    diagonal = same & (q[:, None] == q[None, :])
    seen = (later > earlier) | (q[:, None] >= q[None, :])
    if HAS_DOC:
        t_doc = tl.load(doc_ptr + b * l + tl.minimum(t, l - 1))
        s_doc = tl.load(doc_ptr + b * l + tl.minimum(s, l - 1))
        seen = seen & (t_doc[:, None] == s_doc[None, :])
    own_score = tl.sum(tl.where(diagonal, scores, 0.0), 1)
    dscores = tl.zeros((Q, Q), tl.float32)
    heads_a_part = (heads // groups + parts - 1) // parts
    h0 = group * (heads // groups) + part * heads_a_part
    for h in tl.range(h0, tl.minimum(h0 + heads_a_part, (group + 1) * (heads // groups)), num_stages=STAGES):
        xy = tl.zeros((Q, Q), tl.float32)
        for p0 in tl.static_range(0, P, PT):
            dy = _tile(dy_ptr, b * dy_batch + t_first * dy_token + h * P + p0, q, dy_token, p, t_here)
            x = _tile(x_ptr, b * x_batch + s_first * x_token + h * P + p0, q, x_token, p, s_here)
            xy = tl.dot(dy, tl.trans(x), xy, input_precision=PRECISION)
        decays = (b * heads + h) * padded
        cs_t, cs_s = tl.load(cs_ptr + decays + t), tl.load(cs_ptr + decays + s)
        dt_s = tl.load(dt_ptr + decays + s)
        # Between chunks the decay goes over the ends of the earlier one and of those in between.
        for r in tl.static_range(0, R - 1):
            cs_t += tl.where((r >= earlier) & (r < later), tl.load(cs_ptr + decays + block * (Q * R) + r * Q + Q - 1), 0.0)
        L = tl.where(seen, tl.exp2(tl.minimum(cs_t[:, None] - cs_s[None, :], 0.0)), 0.0)
        xdy = tl.sum(tl.where(diagonal, xy, 0.0), 1)
        M = xy * L
        dscores += M * dt_s[None, :]
        M = tl.where(diagonal, 0.0, M * scores)
        rows, columns = tl.sum(M * dt_s[None, :], 1), tl.sum(M, 0)
        if same:
            dt_t = tl.load(dt_ptr + decays + t)
            tl.store(inside_ptr + decays + t, rows - dt_t * columns)
            tl.store(own_ptr + decays + t, columns + xdy * own_score)
            tl.store(xdy_ptr + (decays + t0) // Q, tl.sum(tl.where(diagonal, xy, 0.0)))
        else:
            slot = tl.cast(batch, tl.int64) * heads * padded
            tl.store(between_ptr + earlier * slot + decays + t, rows)
            tl.store(between_ptr + (later - 1) * slot + decays + s, columns)
    at = (((b * parts + part) * groups + group) * padded + t0) * (Q * R) + (s0 - block * (Q * R))
    tl.store((dscores_ptr + at) + q[:, None] * (Q * R) + q[None, :], dscores)


@triton.jit
def _group_side(
    v_ptr,
    k_ptr,
    o_ptr,
    dt_ptr,
    cs_ptr,
    doc_ptr,
    dscores_ptr,
    blocks_ptr,
    out_ptr,
    flow_ptr,
    l,
    heads,
    groups,
    padded,
    parts,
    v_batch,
    v_token,
    k_batch,
    k_token,
    k_group,
    o_batch,
    o_token,
    o_group,
    tile,
    part,
    group,
    b,
    batch,
    P: tl.constexpr,
    N: tl.constexpr,
    PT: tl.constexpr,
    NT: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    LEAVING: tl.constexpr,
    HAS_DOC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of T tokens and NT state dims of dC (v = dy, k = C, o = B, blocks = S), or LEAVING of dB (v = x, k = B, o = C,
    blocks = G)."""
    tiles_n: tl.constexpr = N // NT
    tile_n = tile % tiles_n
    t0 = tile // tiles_n * T
    block = t0 // (Q * R)
    block_start = block * (Q * R)
    i = tl.arange(0, T)
    j = tl.arange(0, Q)
    n = tile_n * NT + tl.arange(0, NT)
    p = tl.arange(0, PT)
    t = t0 + i
    here = (t < l)[:, None]
    first, block_first = t0.to(tl.int64), block_start.to(tl.int64)
    in_block = (t - block_start) // Q
    k = _tile(k_ptr, b * k_batch + first * k_token + group * k_group, i, k_token, n, here)
    at = (((b * parts + part) * groups + group) * padded + block_start) * (Q * R)
    total = tl.zeros((T, NT), tl.float32)
    for c in tl.static_range(0, R):
        others = (block_start + c * Q + j < l)[:, None]
        other = _tile(o_ptr, b * o_batch + (block_first + c * Q) * o_token + group * o_group, j, o_token, n, others)
        # Chunks of which t would come before s are not written.
        if LEAVING:
            dscores = tl.load(
                (dscores_ptr + at) + (c * Q + j)[None, :] * (Q * R) + (t - block_start)[:, None],
                mask=(c >= in_block)[:, None] & (j >= 0)[None, :],
                other=0.0,
            )
        else:
            dscores = tl.load(
                (dscores_ptr + at) + (t - block_start)[:, None] * (Q * R) + (c * Q + j)[None, :],
                mask=(c <= in_block)[:, None] & (j >= 0)[None, :],
                other=0.0,
            )
        total = tl.dot(dscores.to(other.dtype), other, total, input_precision=PRECISION)
    if HAS_DOC:
        doc = tl.load(doc_ptr + b * l + tl.minimum(t, l - 1))
        before = tl.load(doc_ptr + b * l + block_start - 1, mask=block_start > 0, other=0)
        last = tl.load(doc_ptr + b * l + tl.minimum(block_start + Q * R, l) - 1)
    heads_a_part = (heads // groups + parts - 1) // parts
    h0 = group * (heads // groups) + part * heads_a_part
    for h in tl.range(h0, tl.minimum(h0 + heads_a_part, (group + 1) * (heads // groups)), num_stages=STAGES):
        decays = (b * heads + h) * padded
        cs = tl.load(cs_ptr + decays + t)
        if LEAVING:
            # To the block's end: over the rest of the chunk, and over the chunks after it.
            cs = tl.load(cs_ptr + decays + block_start + in_block * Q + Q - 1) - cs
            for r in tl.static_range(1, R):
                cs += tl.where(in_block < r, tl.load(cs_ptr + decays + block_start + r * Q + Q - 1), 0.0)
        else:
            for r in tl.static_range(0, R - 1):
                cs += tl.where(in_block > r, tl.load(cs_ptr + decays + block_start + r * Q + Q - 1), 0.0)
        w = tl.exp2(cs)
        if HAS_DOC:
            w = tl.where(doc == (last if LEAVING else before), w, 0.0)
        weight = w
        if LEAVING:
            weight = w * tl.load(dt_ptr + decays + t)
        flow = tl.zeros((T,), tl.float32)
        at = ((b * heads + h) * (padded // (Q * R)) + block) * (P * N)
        for p0 in tl.static_range(0, P, PT):
            v = _tile(v_ptr, b * v_batch + first * v_token + h * P + p0, i, v_token, p, here)
            S = tl.load((blocks_ptr + at + p0 * N) + p[:, None] * N + n[None, :])
            flow += tl.sum(tl.dot(k, tl.trans(S), input_precision=PRECISION) * v.to(tl.float32), 1)
            total = tl.dot((v.to(tl.float32) * weight[:, None]).to(v.dtype), S, total, input_precision=PRECISION)
        tl.store(flow_ptr + tl.cast(tile_n * batch, tl.int64) * heads * padded + decays + t, flow * w)
    at = ((tl.cast(part * batch, tl.int64) + b) * l + first) * (groups * N) + group * N
    tl.store((out_ptr + at) + i[:, None] * (groups * N) + n[None, :], total.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def group_kernel(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    dt_ptr,
    cs_ptr,
    doc_ptr,
    dscores_ptr,
    S_ptr,
    G_ptr,
    dB_ptr,
    dC_ptr,
    entering_ptr,
    leaving_ptr,
    l,
    heads,
    groups,
    padded,
    parts,
    batch,
    x_batch,
    x_token,
    dy_batch,
    dy_token,
    B_batch,
    B_token,
    B_group,
    C_batch,
    C_token,
    C_group,
    P: tl.constexpr,
    N: tl.constexpr,
    PT: tl.constexpr,
    NT: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    HAS_DOC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dC and dB [parts, b, l, g, n] of one tile, S and G [b, h, blocks, p, n] being the states at the blocks' start and end.

    And the flow of gradient [tiles of n, b, h, padded]: entering_t = dy_t·(S C_t) decayed from the block's start,
    leaving_s = x_s·(G B_s) decayed to its end (without dt_s).
    """
    pid = tl.program_id(0)
    tiles = padded // T * (N // NT)
    tile = pid // 2 % tiles
    part = pid // 2 // tiles % parts
    rest = pid // 2 // tiles // parts
    group = rest % groups
    b = (rest // groups).to(tl.int64)
    if pid % 2 == 0:
        _group_side(
            dy_ptr, C_ptr, B_ptr, dt_ptr, cs_ptr, doc_ptr, dscores_ptr, S_ptr, dC_ptr, entering_ptr,
            l, heads, groups, padded, parts, dy_batch, dy_token, C_batch, C_token, C_group, B_batch, B_token, B_group,
            tile, part, group, b, batch, P, N, PT, NT, T, Q, R, False, HAS_DOC, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _group_side(
            x_ptr, B_ptr, C_ptr, dt_ptr, cs_ptr, doc_ptr, dscores_ptr, G_ptr, dB_ptr, leaving_ptr,
            l, heads, groups, padded, parts, x_batch, x_token, B_batch, B_token, B_group, C_batch, C_token, C_group,
            tile, part, group, b, batch, P, N, PT, NT, T, Q, R, True, HAS_DOC, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _sum_tiles(ptr, at, here, stride, TILES: tl.constexpr):
    """[heads, Q] of the sum over `TILES` arrays that lie `stride` apart."""
    total = tl.load(ptr + at, mask=here, other=0.0)
    for i in tl.static_range(1, TILES):
        total += tl.load(ptr + i * stride + at, mask=here, other=0.0)
    return total


@triton.jit
def _store_ddt(
    da, dx_x, dt, t, b, h, raw_ptr, bias_ptr, A_ptr, ddt_ptr, l, heads, raw_batch, raw_token, low, high, HAS_BIAS: tl.constexpr
):
    """ddt through clamp and softplus, [heads, Q]; returns what it adds to dA and to ddt_bias, [heads]."""
    here = (h < heads)[:, None] & (t < l)[None, :]
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0)
    raw = tl.load(raw_ptr + b * raw_batch + t.to(tl.int64)[None, :] * raw_token + h[:, None], mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=h < heads, other=0.0)[:, None]
    da = tl.where(A[:, None] * LOG2E * dt > MOST, da, 0.0)
    unclamped = _softplus(raw)
    free = here & (unclamped >= low) & (unclamped <= high)
    ddt = tl.where(free, (dx_x + A[:, None] * da) * tl.sigmoid(raw), 0.0)
    tl.store(ddt_ptr + (b * l + t)[None, :] * heads + h[:, None], ddt.to(ddt_ptr.dtype.element_ty), mask=here)
    return tl.sum(tl.where(here, da * dt, 0.0), 1), tl.sum(ddt, 1)


@triton.jit
def decay_kernel(
    inside_ptr,
    own_ptr,
    between_ptr,
    entering_ptr,
    leaving_ptr,
    past_ptr,
    xdy_ptr,
    doc_ptr,
    dt_ptr,
    cs_ptr,
    raw_ptr,
    bias_ptr,
    A_ptr,
    ddt_ptr,
    sums_ptr,
    l,
    heads,
    padded,
    batch,
    raw_batch,
    raw_token,
    low,
    high,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOC: tl.constexpr,
):
    """ddt [b, l, h] of one block from the flows in it, and its part of dA, ddt_bias and dD [3, b, blocks, h]."""
    b = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    mine = h < heads
    here = mine[:, None]
    q = tl.arange(0, Q)
    t0 = block * (Q * R)
    head = b * heads + h
    stride = tl.cast(batch, tl.int64) * heads * padded
    start = (head * padded)[:, None] + (t0 + q)[None, :]
    past = tl.sum(tl.load(past_ptr + ((head * blocks + block) * P)[:, None] + tl.arange(0, P)[None, :], mask=here, other=0.0), 1)
    decay, ahead = tl.zeros((BH,), tl.float32), tl.zeros((BH,), tl.float32)
    for k in tl.static_range(0, R):
        decay += tl.load(cs_ptr + head * padded + t0 + k * Q + Q - 1, mask=mine, other=0.0)
        ahead += tl.sum(_sum_tiles(entering_ptr, start + k * Q, here, stride, TILES), 1)
    past *= tl.exp2(decay)
    if HAS_DOC:
        before = tl.load(doc_ptr + b * l + t0 - 1, mask=t0 > 0, other=0)
        last = tl.load(doc_ptr + b * l + tl.minimum(t0 + Q * R, l) - 1)
        past = tl.where(before == last, past, 0.0)
    behind = tl.zeros((BH,), tl.float32)
    dA, dbias, dD = tl.zeros((BH,), tl.float32), tl.zeros((BH,), tl.float32), tl.zeros((BH,), tl.float32)
    for k in tl.static_range(0, R):
        at = start + k * Q
        dt = tl.load(dt_ptr + at, mask=here, other=0.0)
        entering = _sum_tiles(entering_ptr, at, here, stride, TILES)
        leaving = _sum_tiles(leaving_ptr, at, here, stride, TILES)
        ends = entering + tl.load(inside_ptr + at, mask=here, other=0.0)
        ahead -= tl.sum(entering, 1)
        over = past + ahead + behind
        begins = leaving
        for j in tl.static_range(0, R - 1):
            between = tl.load(between_ptr + j * stride + at, mask=here, other=0.0)
            if j < k:
                ends += between
            else:
                begins += between
        # Pairs of which one chunk lies before this one and the other after it.
        for j in tl.static_range(0, k):
            for i in tl.static_range(k + 1, R):
                outer = tl.load(between_ptr + (i - 1) * stride + start + j * Q, mask=here, other=0.0)
                over += tl.sum(outer * tl.load(dt_ptr + start + j * Q, mask=here, other=0.0), 1)
        crossing = begins * dt
        da = tl.cumsum(ends, 1, reverse=True) + tl.cumsum(crossing, 1) - crossing + over[:, None]
        dx_x = begins + tl.load(own_ptr + at, mask=here, other=0.0)
        da_dt, ddt = _store_ddt(
            da, dx_x, dt, t0 + k * Q + q,
            b, h, raw_ptr, bias_ptr, A_ptr, ddt_ptr, l, heads, raw_batch, raw_token, low, high, HAS_BIAS,
        )  # fmt: skip
        behind += tl.sum(leaving * dt, 1)
        dA += da_dt
        dbias += ddt
        dD += tl.load(xdy_ptr + head * (padded // Q) + t0 // Q + k, mask=mine, other=0.0)
    kind = tl.cast(batch, tl.int64) * blocks * heads
    at_sums = (b * blocks + block) * heads + h
    tl.store(sums_ptr + at_sums, dA, mask=mine)
    tl.store(sums_ptr + kind + at_sums, dbias, mask=mine)
    tl.store(sums_ptr + 2 * kind + at_sums, dD, mask=mine)


@triton.jit
def reduce_kernel(sums_ptr, dA_ptr, dbias_ptr, dD_ptr, rows, heads, BLOCK: tl.constexpr):
    """[3, rows, h] -> dA, ddt_bias and dD [h]."""
    h, kind = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, rows, BLOCK):
        row = i + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + (kind * rows + row) * heads + h, mask=row < rows, other=0.0)
    out = tl.sum(total, 0)
    if kind == 0:
        tl.store(dA_ptr + h, out)
    elif kind == 1:
        tl.store(dbias_ptr + h, out)
    else:
        tl.store(dD_ptr + h, out)
