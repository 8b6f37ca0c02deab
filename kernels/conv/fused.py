"""Depthwise causal convolution and SiLU in Triton.

A program walks along a stripe of one run's tokens, a block of channels wide, with the last tokens in registers: a token is read
once, and once more by the next stripe if it is among the last WIDTH - 1. The backward walks the same way with the gradients of
the last tokens in registers, each complete WIDTH - 1 steps after its token; that far it goes on into the next stripe, whose
pre-activations it recomputes.
"""

# Kernels grow tuples of tokens, whose types change.
# mypy: disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 256
FORWARD_UNROLL, BACKWARD_UNROLL = 8, 4
"""Tokens that are loaded ahead. The backward takes at least WIDTH - 1."""
MIN_STRIPE, MAX_STRIPE = 32, 256
ENOUGH_PROGRAMS = 2048
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(run, runs, channels, stripe, BLOCK: tl.constexpr):
    """The part of this program: sequence and run, both int64, the stripe's number among all, its first token, its channels."""
    blocks = tl.cdiv(channels, BLOCK)
    stripes = tl.cdiv(run, stripe)
    number = tl.program_id(0) // blocks
    which = (number // stripes).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return which // runs, which % runs, number.to(tl.int64), (number % stripes) * stripe, channel


@triton.jit
def _taps(weight_ptr, channel, inside, channel_stride, tap_stride, WIDTH: tl.constexpr):
    """Each channel's weights, that of the current token first."""
    taps = ()
    for back in tl.static_range(WIDTH):
        at = weight_ptr + channel * channel_stride + (WIDTH - 1 - back) * tap_stride
        taps = taps + (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _before(x_ptr, halo_ptr, first, inside, x_stride, halo_stride, WIDTH: tl.constexpr, HAS_HALO: tl.constexpr):
    """The WIDTH - 1 tokens before the stripe, the nearest first: of the run, or of its halo."""
    window = ()
    for back in tl.static_range(1, WIDTH):
        token = tl.load(x_ptr - back * x_stride, mask=inside & (first >= back), other=0.0)
        if HAS_HALO:
            at = halo_ptr + (WIDTH - 1 + first - back) * halo_stride
            token = tl.where(first >= back, token, tl.load(at, mask=inside & (first < back), other=0.0))
        window = window + (token.to(tl.float32),)
    return window


@triton.jit
def _tokens(ptr, offset, stop, inside, stride, COUNT: tl.constexpr):
    """COUNT tokens from `offset` on, zeros from `stop` on."""
    tokens = ()
    for i in tl.static_range(COUNT):
        token = tl.load(ptr + (offset + i) * stride, mask=inside & (offset + i < stop), other=0.0)
        tokens = tokens + (token.to(tl.float32),)
    return tokens


@triton.jit
def _positions(ptr, offset, stop, stride, COUNT: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """The tokens' places in their documents."""
    positions = ()
    for i in tl.static_range(COUNT):
        position = 0
        if HAS_POSITIONS:
            position = tl.load(ptr + (offset + i) * stride, mask=offset + i < stop, other=0)
        positions = positions + (position,)
    return positions


@triton.jit
def _seen(window, position, WIDTH: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """Of the last WIDTH tokens those of the current one's document; selected, since the others may be infinite."""
    seen = (window[0],)
    for back in tl.static_range(1, WIDTH):
        token = window[back]
        if HAS_POSITIONS:
            token = tl.where(position >= back, token, 0.0)
        seen = seen + (token,)
    return seen


@triton.jit
def _convolved(seen, taps, bias, WIDTH: tl.constexpr):
    """The pre-activation and its sigmoid."""
    out = bias
    for back in tl.static_range(WIDTH):
        out += seen[back] * taps[back]
    return out, 1.0 / (1.0 + tl.exp2(-out * LOG2E))


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    halo_ptr,
    positions_ptr,
    y_ptr,
    run,
    runs,
    channels,
    stripe,
    x_batch,
    x_token,
    weight_channel,
    weight_tap,
    halo_batch,
    halo_run,
    halo_token,
    positions_batch,
    positions_token,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    batch, which, _, first, channel = _place(run, runs, channels, stripe, BLOCK)
    inside = channel < channels
    token = which * run + first
    x_ptr += batch * x_batch + token * x_token + channel
    y_ptr += (batch * runs * run + token) * channels + channel
    if HAS_HALO:
        halo_ptr += batch * halo_batch + which * halo_run + channel
    if HAS_POSITIONS:
        positions_ptr += batch * positions_batch + token * positions_token
    taps = _taps(weight_ptr, channel, inside, weight_channel, weight_tap, WIDTH)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    window = _before(x_ptr, halo_ptr, first, inside, x_token, halo_token, WIDTH, HAS_HALO)
    length = tl.minimum(stripe, run - first)
    for offset in range(0, length, UNROLL):
        x = _tokens(x_ptr, offset, length, inside, x_token, UNROLL)
        positions = _positions(positions_ptr, offset, length, positions_token, UNROLL, HAS_POSITIONS)
        for i in tl.static_range(UNROLL):
            window = (x[i],) + window
            out, sigmoid = _convolved(_seen(window, positions[i], WIDTH, HAS_POSITIONS), taps, bias, WIDTH)
            window = window[: WIDTH - 1]
            tl.store(y_ptr + (offset + i) * channels, out * sigmoid, mask=inside & (offset + i < length))


@triton.jit
def backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    halo_ptr,
    positions_ptr,
    dx_ptr,
    dhalo_ptr,
    partials_ptr,
    run,
    runs,
    channels,
    stripe,
    dy_batch,
    dy_token,
    x_batch,
    x_token,
    weight_channel,
    weight_tap,
    halo_batch,
    halo_run,
    halo_token,
    positions_batch,
    positions_token,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    batch, which, number, first, channel = _place(run, runs, channels, stripe, BLOCK)
    inside = channel < channels
    token = which * run + first
    dy_ptr += batch * dy_batch + token * dy_token + channel
    x_ptr += batch * x_batch + token * x_token + channel
    dx_ptr += (batch * runs * run + token) * channels + channel
    if HAS_HALO:
        halo_ptr += batch * halo_batch + which * halo_run + channel
        dhalo_ptr += (batch * runs + which) * (WIDTH - 1) * channels + channel
    if HAS_POSITIONS:
        positions_ptr += batch * positions_batch + token * positions_token
    taps = _taps(weight_ptr, channel, inside, weight_channel, weight_tap, WIDTH)
    dbias = tl.zeros([BLOCK], tl.float32)
    bias = dbias
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    window = _before(x_ptr, halo_ptr, first, inside, x_token, halo_token, WIDTH, HAS_HALO)
    pending = ()  # gradients of the last WIDTH - 1 tokens, the nearest first, from the steps so far
    dtaps = (dbias,)
    for _ in tl.static_range(1, WIDTH):
        pending = pending + (dbias,)
        dtaps = dtaps + (dbias,)
    rest = run - first
    length = tl.minimum(stripe, rest)
    for offset in range(0, length + WIDTH - 1, UNROLL):
        x = _tokens(x_ptr, offset, rest, inside, x_token, UNROLL)
        dy = _tokens(dy_ptr, offset, rest, inside, dy_token, UNROLL)
        positions = _positions(positions_ptr, offset, rest, positions_token, UNROLL, HAS_POSITIONS)
        for i in tl.static_range(UNROLL):
            window = (x[i],) + window
            seen = _seen(window, positions[i], WIDTH, HAS_POSITIONS)
            window = window[: WIDTH - 1]
            out, sigmoid = _convolved(seen, taps, bias, WIDTH)
            dout = tl.where(offset + i < rest, dy[i] * sigmoid * (1.0 + out * (1.0 - sigmoid)), 0.0)
            own = tl.where(offset + i < length, dout, 0.0)
            dbias += own
            sums = (dtaps[0] + own * seen[0],)
            passed = (dout * taps[0],)
            for back in tl.static_range(1, WIDTH):
                sums = sums + (dtaps[back] + own * seen[back],)
                share = dout * taps[back]
                if HAS_POSITIONS:
                    share = tl.where(positions[i] >= back, share, 0.0)
                passed = passed + (pending[back - 1] + share,)
            dtaps = sums
            pending = passed[: WIDTH - 1]
            complete = offset + i - (WIDTH - 1)
            tl.store(dx_ptr + complete * channels, passed[WIDTH - 1], mask=inside & (complete >= 0) & (complete < length))
            if HAS_HALO and i < WIDTH - 1:
                tl.store(dhalo_ptr + i * channels, passed[WIDTH - 1], mask=inside & (first == 0) & (offset == 0))
    partials_ptr += number * (WIDTH + 1) * channels + channel
    for back in tl.static_range(WIDTH):
        tl.store(partials_ptr + (WIDTH - 1 - back) * channels, dtaps[back], mask=inside)
    tl.store(partials_ptr + WIDTH * channels, dbias, mask=inside)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None) -> Tensor:
    """As `causal_conv`: arguments of one dtype that fit, widths 2 to 4 -> y [b, l, c], contiguous."""
    x, bias, halo = _rows_of(x, bias, halo)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch = Launch(x, weight, halo)
    forward_kernel[launch.grid](
        x,
        weight,
        bias,
        halo,
        positions,
        y,
        *launch.sizes,
        *x.stride()[:2],
        *weight.stride(),
        *_strides(halo, 3),
        *_strides(positions, 2),
        WIDTH=weight.shape[1],
        HAS_BIAS=bias is not None,
        HAS_HALO=halo is not None,
        HAS_POSITIONS=positions is not None,
        UNROLL=FORWARD_UNROLL,
        **launch.tile,
    )
    return y


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias ([c] also without one) and halo (without one: empty), each in its argument's dtype.

    Those of weight and bias are summed in fp32, stripe by stripe in a fixed order.
    """
    dy, x, bias, halo = _rows(dy), *_rows_of(x, bias, halo)
    channels, width = weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dhalo = x.new_empty(0 if halo is None else halo.shape)
    launch = Launch(x, weight, halo)
    partials = torch.empty(launch.stripes, width + 1, channels, dtype=torch.float32, device=x.device)
    backward_kernel[launch.grid](
        dy,
        x,
        weight,
        bias,
        halo,
        positions,
        dx,
        None if halo is None else dhalo,
        partials,
        *launch.sizes,
        *dy.stride()[:2],
        *x.stride()[:2],
        *weight.stride(),
        *_strides(halo, 3),
        *_strides(positions, 2),
        WIDTH=width,
        HAS_BIAS=bias is not None,
        HAS_HALO=halo is not None,
        HAS_POSITIONS=positions is not None,
        UNROLL=BACKWARD_UNROLL,
        **launch.tile,
    )
    # Each in memory of its own, as the results of an operator must be.
    dweight, dbias = partials[:, :width].sum(0).t().to(weight.dtype), partials[:, width].sum(0).to(weight.dtype)
    return dx, dweight.contiguous(), dbias, dhalo


class Launch:
    """How the work is cut: blocks of channels, and stripes short enough for enough programs."""

    def __init__(self, x: Tensor, weight: Tensor, halo: Tensor | None) -> None:
        b, l, c = x.shape
        runs = 1 if halo is None else halo.shape[1]
        run = l // runs
        block = max(32, min(MAX_BLOCK, triton.next_power_of_2(c)))
        blocks = triton.cdiv(c, block)
        stripe = MAX_STRIPE
        while stripe > MIN_STRIPE and b * runs * triton.cdiv(run, stripe) * blocks < ENOUGH_PROGRAMS:
            stripe //= 2
        self.stripes = b * runs * triton.cdiv(run, stripe)
        self.grid = (self.stripes * blocks,)
        self.sizes = run, runs, c, stripe
        self.tile = {"BLOCK": block, "num_warps": max(1, block // 64)}


def _rows_of(x: Tensor, bias: Tensor | None, halo: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _rows(x), bias if bias is None else _rows(bias), halo if halo is None else _rows(halo)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring channels next to one another."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]
