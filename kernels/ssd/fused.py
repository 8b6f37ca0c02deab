"""The SSD scan's functions on Triton kernels: tensors in, tensors out; the same functions as in `reference`.

Launches: forward prepare, maps, (the scan), outputs; backward prepare, state_grads, (the scan), six for main_grads, and with a gate
one for gate_grads. Documents, and parameters in 16 bits, cost a small one each for every function.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..target import generation, input_precision
from . import fused_kernels as kernels
from .operands import PROGRAMS, Grads, Operands, Prepared, R, kernel_chunk, segment_length

HEADS = 8
"""That a program of the kernels which only read decays takes."""


class Config(NamedTuple):
    """Tiles and warps of one shape: `fused_kernels` says what each kernel takes.

    chunk are tokens; rows are channels of heads, kept along a whole segment; channels and dims are parts of p and n that a product
    takes at a time; tokens those of a tile of dB or dC. stages: how far ahead operands are loaded.
    """

    chunk: int
    segment_rows: int
    segment_warps: int
    output_rows: int
    output_warps: int
    score_channels: int
    score_dims: int
    score_warps: int
    group_tokens: int
    group_channels: int
    group_dims: int
    group_warps: int
    stages: int


def config(p: int, n: int, dtype: torch.dtype, generation: int) -> Config:
    """The shipped configuration of a head dim, a state dim, the operands' dtype, and a device's `target.generation`.

    The largest tiles that spill no register on the device: fp32 is held as two words for its three products, Hopper and Blackwell
    read operands from shared memory where Ampere needs registers, AMD has 64 KiB of shared memory.
    """
    # Not 12: consumer cards have the shared memory of 8.
    wide = generation in (9, 10)
    if dtype == torch.float32:
        return Config(
            chunk=kernel_chunk(dtype.itemsize),
            segment_rows=32,
            segment_warps=8,
            output_rows=32 if n <= 128 and wide else 16,
            output_warps=8,
            score_channels=64 if p <= 64 else 16,
            score_dims=min(n, 32),
            score_warps=4,
            group_tokens=32 if p <= 64 and n > 16 else 16,
            group_channels=64,
            group_dims=min(n, 64 if p <= 64 else 32),
            group_warps=8,
            stages=1,
        )
    return Config(
        chunk=kernel_chunk(dtype.itemsize),
        segment_rows=64,
        segment_warps=8 if n > 128 or (generation == 10 and n == 64) else 4,
        output_rows=64 if wide and p >= 64 and n <= 128 else 32,
        output_warps=8,
        score_channels=128,
        score_dims=min(n, 128),
        score_warps=8,
        group_tokens=128 if wide and p <= 64 else 64,
        group_channels=32 if wide else 128,
        group_dims=min(n, 128),
        group_warps=8,
        stages=2 if generation and n <= 128 else 1,
    )


class Sizes(NamedTuple):
    """Of a call: b counts runs of sequences, l their tokens."""

    b: int
    l: int
    h: int
    p: int
    g: int
    n: int
    config: Config

    @property
    def chunk(self) -> int:
        return self.config.chunk

    @property
    def block(self) -> int:
        return self.chunk * R

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.l, self.block)

    @property
    def padded(self) -> int:
        return self.blocks * self.block

    @property
    def segment_length(self) -> int:
        return segment_length(self.chunk, self.b * self.l, self.h)

    @property
    def segments(self) -> int:
        return triton.cdiv(self.l, self.segment_length)

    def parts(self, tiles: int) -> int:
        """Programs that share a group's heads, where the sequence alone gives too few."""
        heads = self.h // self.g
        wanted = max(1, min(heads, PROGRAMS // (self.b * self.g * tiles)))
        return triton.cdiv(heads, triton.cdiv(heads, wanted))


class _Call:
    """The operands of one call as the kernels take them, and the arguments that launches share."""

    def __init__(self, o: Operands) -> None:
        self.runs = o.runs
        self.sizes = s = _sizes(o)
        self.x, self.B, self.C, self.raw = self.heads(o.x), self.rows(o.B), self.rows(o.C), self.rows(o.dt)
        self.A, self.D, self.dt_bias = (None if t is None else t.float().contiguous() for t in (o.A, o.D, o.dt_bias))
        self.documents = None
        if o.resets is not None:
            # Counted from each run's first token.
            self.documents = o.resets.unflatten(1, (o.runs, -1)).flatten(0, 1).cumsum(1, dtype=torch.int32)
        # The largest number of fp32 stands for no limit.
        self.limits = o.low, min(o.high, torch.finfo(torch.float32).max)
        self.chunks = {"P": s.p, "Q": s.chunk, "R": R, "HAS_DOC": o.resets is not None}
        self.shape = self.chunks | {"N": s.n}
        self.dots = {"PRECISION": input_precision(o.x.dtype), "STAGES": s.config.stages}

    def rows(self, t: Tensor) -> Tensor:
        """[b, l, ...] -> [b * runs, l / runs, ...] whose last dim is dense; a copy only where the strides ask for one."""
        cut = t.unflatten(1, (self.runs, -1)).flatten(0, 1)
        return cut if cut.stride(-1) == 1 else cut.contiguous()

    def heads(self, t: Tensor) -> Tensor:
        """As `rows`, heads side by side too."""
        cut = self.rows(t)
        return cut if cut.stride(2) == cut.shape[3] else cut.contiguous()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def segments(
        self, v: Tensor, k: Tensor, prepared: Prepared, state: Tensor, log_T: Tensor | None, reverse: bool, *edges: Tensor
    ) -> None:
        """Launches `segment_kernel`; edges: blocks, ends and past, to write."""
        s = self.sizes
        rows = s.config.segment_rows
        # Whole heads of one group side by side, or a part of one head.
        while rows > s.p and (s.h // s.g) * s.p % rows:
            rows //= 2
        kernels.segment_kernel[(s.h * s.p // rows * s.segments * s.b,)](
            v, k, *prepared.steps, self.documents, state, log_T, *(edges or [None] * 3),
            s.l, s.h, s.g, s.segments, s.segment_length, s.padded, *v.stride()[:2], *k.stride()[:3],
            **self.shape, **self.dots, ROWS=rows, REVERSE=reverse, WRITE=bool(edges), num_warps=s.config.segment_warps,
        )  # fmt: skip

    def outputs(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        prepared: Prepared,
        state: Tensor,
        out: Tensor,
        gate: str = "none",
        **optional: Tensor | None,
    ) -> None:
        """Launches `output_kernel`; with `blocks`, in reverse."""
        s = self.sizes
        names = ("z", "dout", "dz")
        rows, dots = s.config.output_rows, self.dots
        if gate == "backward":
            # Its gradient needs the registers that wider tiles and loading ahead would take.
            rows, dots = min(rows, 32), dots | {"STAGES": 1}
        kernels.output_kernel[(s.p // rows * s.h * s.segments * s.b,)](
            v, k, q, *prepared.steps, self.documents, prepared.scores, self.D, state, *(optional.get(name) for name in names), out,
            optional.get("blocks"),
            s.l, s.h, s.g, s.segments, s.segment_length, s.padded, *v.stride()[:2], *k.stride()[:3], *q.stride()[:3],
            **self.shape, **dots, ROWS=rows, HALVES=s.n > 128 and v.dtype == torch.float32,
            REVERSE="blocks" in optional, GATE=gate, HAS_D=self.D is not None, num_warps=s.config.output_warps,
        )  # fmt: skip


def _sizes(o: Operands) -> Sizes:
    b, l, h, p = o.x.shape
    g, n = o.B.shape[2:]
    return Sizes(b * o.runs, l // o.runs, h, p, g, n, config(p, n, o.x.dtype, generation(o.x.device)))


def map_count(o: Operands) -> int:
    """Maps of each sequence: one a segment."""
    return o.runs * _sizes(o).segments


def prepared_like(o: Operands) -> Prepared:
    """As `prepare`, without values."""
    s = _sizes(o)
    steps = torch.empty(2, s.b, s.h, s.padded, dtype=torch.float32, device=o.x.device)
    return Prepared(steps, torch.empty(s.b, s.g, s.padded // s.chunk, s.chunk, s.chunk, dtype=torch.float32, device=o.x.device))


def prepare(o: Operands) -> Prepared:
    """steps [2, b, h, padded]: positive dt, and sums of A dt in each chunk in powers of two; scores [b, g, chunks, t, s]: C Bᵀ."""
    call, prepared = _Call(o), prepared_like(o)
    s = call.sizes
    kernels.prepare_kernel[(s.padded // s.chunk, s.g + triton.cdiv(s.h, HEADS), s.b)](
        call.raw, call.dt_bias, call.A, call.B, call.C, *prepared.steps, prepared.scores, s.l, s.h, s.g, s.padded,
        *call.raw.stride()[:2], *call.B.stride()[:3], *call.C.stride()[:3], *call.limits,
        N=s.n, NT=min(s.n, 64), Q=s.chunk, BH=HEADS, HAS_BIAS=call.dt_bias is not None,
        PRECISION=input_precision(o.B.dtype), num_warps=4,
    )  # fmt: skip
    return prepared


def maps(o: Operands, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Each segment's map from a zero state: log_T [b, s, h] (natural logarithm) and U [b, s, h, p, n] in fp32."""
    call = _Call(o)
    return _segment_maps(o, call, call.x, call.B, prepared, reverse=False)


def state_grads(o: Operands, prepared: Prepared, dy: Tensor) -> Tensor:
    """The gradient of each segment's S_in through its own outputs, [b, s, h, p, n] in fp32."""
    call = _Call(o)
    return _segment_maps(o, call, call.heads(dy), call.C, prepared, reverse=True)[1]


def _segment_maps(o: Operands, call: _Call, v: Tensor, k: Tensor, prepared: Prepared, reverse: bool) -> tuple[Tensor, Tensor]:
    s, count = call.sizes, map_count(o)
    log_T, U = call.new(o.x.shape[0], count, s.h), call.new(o.x.shape[0], count, s.h, s.p, s.n)
    call.segments(v, k, prepared, U, log_T, reverse)
    return log_T, U


def outputs(o: Operands, prepared: Prepared, z: Tensor | None, S_in: Tensor) -> Tensor:
    """y [b, l, h, p] in x's dtype, times silu(z) if z is given, from the state entering each segment, S_in [b, s, h, p, n]."""
    call, y = _Call(o), torch.empty_like(o.x, memory_format=torch.contiguous_format)
    if z is None:
        call.outputs(call.x, call.B, call.C, prepared, S_in, y)
    else:
        call.outputs(call.x, call.B, call.C, prepared, S_in, y, "forward", z=z.contiguous())
    return y


def gate_grads(o: Operands, prepared: Prepared, z: Tensor, S_in: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y, before its gate, and of z, [b, l, h, p] in their dtypes; y is computed anew."""
    call, dy = _Call(o), torch.empty_like(o.x, memory_format=torch.contiguous_format)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    call.outputs(call.x, call.B, call.C, prepared, S_in, dy, "backward", z=z.contiguous(), dout=dout.contiguous(), dz=dz)
    return dy, dz


def main_grads(o: Operands, prepared: Prepared, S_in: Tensor, dU: Tensor, dy: Tensor) -> Grads:
    """Everything but the states, from those entering segments and the gradients of those leaving them, [b, s, h, p, n]."""
    call, dx = _Call(o), torch.empty_like(o.x, memory_format=torch.contiguous_format)
    s, dy = call.sizes, call.heads(dy)
    S, G = (call.new(s.b, s.h, s.blocks, s.p, s.n, dtype=o.x.dtype) for _ in range(2))
    past = call.new(s.b, s.h, s.blocks, s.p)
    call.outputs(dy, call.C, call.B, prepared, dU, dx, blocks=G)
    call.segments(call.x, call.B, prepared, S_in, None, False, S, G, past)
    dscores, inside, own, between, xdy = _scores(call, prepared, dy)
    dB, dC, entering, leaving = _groups(call, prepared, dy, dscores, S, G)
    ddt = torch.empty(o.dt.shape, dtype=o.dt.dtype, device=dy.device)
    sums, (dA, ddt_bias, dD) = call.new(3, s.b, s.blocks, s.h), (call.new(s.h) for _ in range(3))
    kernels.decay_kernel[(s.blocks, triton.cdiv(s.h, HEADS), s.b)](
        inside, own, between, entering, leaving, past, xdy, call.documents, *prepared.steps,
        call.raw, call.dt_bias, call.A, ddt, sums,
        s.l, s.h, s.padded, s.b, *call.raw.stride()[:2], *call.limits,
        **call.chunks, BH=HEADS, TILES=s.n // s.config.group_dims, HAS_BIAS=call.dt_bias is not None, num_warps=4,
    )  # fmt: skip
    kernels.reduce_kernel[(s.h, 3)](sums, dA, ddt_bias, dD, s.b * s.blocks, s.h, BLOCK=256)
    return Grads(dx, ddt, dA, dB.view(o.B.shape), dC.view(o.C.shape), dD, ddt_bias)


def _scores(call: _Call, prepared: Prepared, dy: Tensor) -> tuple[Tensor, ...]:
    s, x, B, C = call.sizes, call.x, call.B, call.C
    pairs = R * (R + 1) // 2 * s.blocks
    parts = s.parts(pairs)
    dscores = call.new(s.b, parts, s.g, s.padded, s.block)
    inside, own = (call.new(s.b, s.h, s.padded) for _ in range(2))
    between = call.new(R - 1, s.b, s.h, s.padded)
    xdy = call.new(s.b, s.h, s.padded // s.chunk)
    kernels.scores_kernel[(pairs * parts * s.g * s.b,)](
        x, dy, B, C, *prepared.steps, call.documents, dscores, inside, between, own, xdy,
        s.l, s.h, s.g, s.padded, parts, s.b, *x.stride()[:2], *dy.stride()[:2], *B.stride()[:3], *C.stride()[:3],
        **call.shape, **call.dots, PT=min(s.p, s.config.score_channels), NT=s.config.score_dims, num_warps=s.config.score_warps,
    )  # fmt: skip
    return dscores, inside, own, between, xdy


def _groups(call: _Call, prepared: Prepared, dy: Tensor, dscores: Tensor, S: Tensor, G: Tensor) -> tuple[Tensor, ...]:
    s, c, x, B, C = call.sizes, call.sizes.config, call.x, call.B, call.C
    tiles, parts = s.n // c.group_dims, dscores.shape[1]
    entering, leaving = (call.new(tiles, s.b, s.h, s.padded) for _ in range(2))
    dtype = B.dtype if parts == 1 else torch.float32
    dB, dC = (call.new(parts, s.b, s.l, s.g, s.n, dtype=dtype) for _ in range(2))
    kernels.group_kernel[(2 * s.padded // c.group_tokens * tiles * parts * s.g * s.b,)](
        x, dy, B, C, *prepared.steps, call.documents, dscores, S, G, dB, dC, entering, leaving,
        s.l, s.h, s.g, s.padded, parts, s.b, *x.stride()[:2], *dy.stride()[:2], *B.stride()[:3], *C.stride()[:3],
        **call.shape, **call.dots, PT=min(s.p, c.group_channels), NT=c.group_dims, T=c.group_tokens, num_warps=c.group_warps,
    )  # fmt: skip
    dB, dC = (t.squeeze(0) if parts == 1 else t.sum(0).to(B.dtype) for t in (dB, dC))
    return dB, dC, entering, leaving
