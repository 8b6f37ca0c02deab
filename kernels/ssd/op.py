"""The SSD operation: argument checks, registration with torch.library, and autograd around the functions, the scan injected."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import fused
from ..scan import LocalScan, Pending, Scan, exclusive_scan, without_memory
from ..steps import NO_LIMIT
from ..target import generation
from . import reference
from .operands import Grads, Operands, Prepared

HEAD_DIMS, STATE_DIMS = (32, 64, 128), (16, 64, 128, 256)
"""That the Triton kernels take."""
MOST_SEQUENCES = 65535
"""A limit of the third axis of a grid."""


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
    z: Tensor | None = None,
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
    chunk_size    tokens that the reference works on together (the kernels have their own size); changes the speed, not the result
    scan          how states pass from chunk to chunk; None: along this tensor. `parallel.affine_scan` has the one over ranks
    z             [b, l, h, p] or None: a gate, y silu(z) instead of y

    Computes in fp32 (fp64 for fp64 inputs). The Triton kernels multiply matrices of x's dtype with fp32 sums, so they take x, B and
    C in one dtype of bf16, fp16 and fp32, p of 32, 64, 128 and n of 16, 64, 128, 256. Returns y [b, l, h, p] in x's dtype and, if
    asked for, the final state [b, h, p, n] in the dtype of the computation. Over ranks the initial state is the whole sequence's
    and is looked at only where that begins, and the final state is None but where it ends. Raises ValueError, naming the argument.
    """
    y, final = start_ssd(
        x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, resets=resets, chunk_size=chunk_size, scan=scan
    ).finish(z)
    return (y, final) if return_final_state else y


class SSDInFlight(NamedTuple):
    """A scan whose states are on the wire: what `finish` does not need of them has been done."""

    carrier: Tensor
    """What autograd sees of the first half: it ties both together, or where nothing travels is one of the operands."""
    flight: "_Flight | _Whole"

    def finish(self, z: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Waits for the states -> y [b, l, h, p], gated by z of that shape if given, and the final state [b, h, p, n], None but
        where the sequence ends."""
        assert self.flight.operands is not None, "finish was called before"
        x = self.flight.operands.x
        if z is not None and (z.shape != x.shape or z.device != x.device):
            raise ValueError(f"ssd: z is {list(z.shape)} on {z.device}, expected {list(x.shape)} on {x.device} as x")
        return self.flight.finish(self.carrier, z)


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
    states are on the wire. Where nothing travels, `finish` does it all, as one op.
    """
    scan = scan or LocalScan()
    _check(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, resets, scan)
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, allowed: 1 and more")
    operands = Operands(x, dt, A, B, C, D, dt_bias, resets, float(dt_limit[0]), float(dt_limit[1]), scan.segments, chunk_size)
    triton = fused("ssd", x.device, obstacle(operands))
    if isinstance(scan, LocalScan):
        return SSDInFlight(A, _Whole(operands, triton, initial_state))
    flight = _Flight(operands, triton, scan)
    return SSDInFlight(_Start.apply(*operands, initial_state, flight), flight)


def obstacle(o: Operands) -> str | None:
    """What the kernels cannot take, for `dispatch.fused`."""
    p, n = o.x.shape[3], o.B.shape[3]
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    if o.x.dtype not in kinds or o.B.dtype != o.x.dtype or o.C.dtype != o.x.dtype:
        return f"x, B and C are {o.x.dtype}, {o.B.dtype} and {o.C.dtype}, allowed: the same of bf16, fp16, fp32"
    if o.dt.dtype not in kinds:
        return f"dt is {o.dt.dtype}, allowed: bf16, fp16, fp32"
    if o.x.shape[0] * o.runs > MOST_SEQUENCES:
        return f"x has {o.x.shape[0] * o.runs} runs of tokens, allowed: at most {MOST_SEQUENCES}"
    if p not in HEAD_DIMS:
        return f"x has head dim {p}, allowed: {', '.join(map(str, HEAD_DIMS))}"
    if n not in STATE_DIMS:
        return f"B has state dim {n}, allowed: {', '.join(map(str, STATE_DIMS))}"
    if o.x.dtype == torch.float32 and n > 128 and generation(o.x.device) == 10:
        # Its products go by tensor memory there, and the rest does not fit the registers.
        return f"B has state dim {n}, allowed in fp32 on Blackwell: at most 128"
    return None


OPERANDS = (
    "bool triton, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? resets, "
    "float low, float high, SymInt runs, SymInt chunk"
)
PREPARED = "Tensor steps, Tensor scores"


TENSORS = Operands._fields[:8]
"""Those of the operands that are tensors."""


def _with_operands(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(implementation, Operands, ...) as an op's flat arguments call it."""
    count = len(Operands._fields)

    def call(triton: bool, *args: Any) -> Any:
        return function(_implementation(triton), Operands(*args[:count]), *args[count:])

    return call


def _op(name: str, arguments: str, results: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers `baton::name(operands, arguments) -> results`; the function gets the implementation and `Operands` instead."""
    schema = f"({', '.join(part for part in (OPERANDS, arguments) if part)}) -> {results}"

    def register(function: Callable[..., Any]) -> Any:
        return torch.library.custom_op(f"baton::{name}", _with_operands(function), mutates_args=(), schema=schema)

    return register


def _implementation(triton: bool) -> Any:
    if not triton:
        return reference
    from . import fused

    return fused


@_op("ssd_prepare", "", "(Tensor, Tensor)")
def _prepare(functions: Any, o: Operands) -> Prepared:
    return functions.prepare(o)


@_op("ssd_maps", PREPARED, "(Tensor, Tensor)")
def _maps(functions: Any, o: Operands, *prepared: Tensor) -> tuple[Tensor, Tensor]:
    return functions.maps(o, Prepared(*prepared))


@_op("ssd_outputs", f"{PREPARED}, Tensor? z, Tensor S_in", "Tensor")
def _outputs(functions: Any, o: Operands, steps: Tensor, scores: Tensor, z: Tensor | None, S_in: Tensor) -> Tensor:
    return functions.outputs(o, Prepared(steps, scores), z, S_in)


@_op("ssd_gate_grads", f"{PREPARED}, Tensor z, Tensor S_in, Tensor dout", "(Tensor, Tensor)")
def _gate_grads(
    functions: Any, o: Operands, steps: Tensor, scores: Tensor, z: Tensor, S_in: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    return functions.gate_grads(o, Prepared(steps, scores), z, S_in, dout)


@_op("ssd_state_grads", f"{PREPARED}, Tensor dy", "Tensor")
def _state_grads(functions: Any, o: Operands, steps: Tensor, scores: Tensor, dy: Tensor) -> Tensor:
    return functions.state_grads(o, Prepared(steps, scores), dy)


@_op("ssd_main_grads", f"{PREPARED}, Tensor S_in, Tensor dU, Tensor dy", f"({', '.join(['Tensor'] * 7)})")
def _main_grads(functions: Any, o: Operands, steps: Tensor, scores: Tensor, S_in: Tensor, dU: Tensor, dy: Tensor) -> Grads:
    return functions.main_grads(o, Prepared(steps, scores), S_in, dU, dy)


@_op("ssd", "Tensor? z, Tensor? initial_state", "(Tensor, Tensor, Tensor, Tensor)")
def _ssd(functions: Any, o: Operands, z: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, ...]:
    """y, the final state; for backward the maps' log_T and the states entering them."""
    prepared = functions.prepare(o)
    log_T, U = functions.maps(o, prepared)
    S_in, final = exclusive_scan(log_T, U, initial_state)
    return functions.outputs(o, prepared, z, S_in), final, log_T, S_in


@_op(
    "ssd_backward",
    "Tensor? z, Tensor log_T, Tensor S_in, Tensor dout, Tensor? dfinal",
    f"({', '.join(['Tensor'] * 9)})",
)
def _ssd_backward(
    functions: Any, o: Operands, z: Tensor | None, log_T: Tensor, S_in: Tensor, dout: Tensor, dfinal: Tensor | None
) -> tuple[Tensor, ...]:
    """`Grads`, dz (empty where there is no gate), and the gradient of the initial state."""
    prepared = functions.prepare(o)
    dy, dz = (dout, dout.new_empty(0)) if z is None else functions.gate_grads(o, prepared, z, S_in, dout)
    dU, dinitial = exclusive_scan(log_T, functions.state_grads(o, prepared, dy), dfinal, reverse=True)
    return (*functions.main_grads(o, prepared, S_in, dU, dy), dz, dinitial)


def _wide(o: Operands) -> Tensor:
    """Of the dtype of the computation."""
    return o.dt.new_empty(0, dtype=torch.promote_types(o.dt.dtype, torch.float32))


def _state_like(o: Operands) -> Tensor:
    (b, _, h, p), n = o.x.shape, o.B.shape[3]
    return _wide(o).new_empty(b, h, p, n)


def _states_like(functions: Any, o: Operands) -> tuple[Tensor, Tensor]:
    (b, _, h, p), count = o.x.shape, functions.map_count(o)
    return _wide(o).new_empty(b, count, h), _wide(o).new_empty(b, count, h, p, o.B.shape[3])


def _grads_like(o: Operands) -> Grads:
    dx, ddt, dB, dC = (t.new_empty(t.shape) for t in (o.x, o.dt, o.B, o.C))
    return Grads(dx, ddt, _wide(o).new_empty(o.A.shape), dB, dC, _wide(o).new_empty(o.A.shape), _wide(o).new_empty(o.A.shape))


FAKES: dict[Any, Callable[..., Any]] = {
    _prepare: lambda functions, o: functions.prepared_like(o),
    _maps: lambda functions, o, *prepared: _states_like(functions, o),
    _outputs: lambda functions, o, *rest: o.x.new_empty(o.x.shape),
    _gate_grads: lambda functions, o, steps, scores, z, *rest: (o.x.new_empty(o.x.shape), z.new_empty(z.shape)),
    _state_grads: lambda functions, o, *rest: _states_like(functions, o)[1],
    _main_grads: lambda functions, o, *rest: _grads_like(o),
    _ssd: lambda functions, o, *rest: (
        o.x.new_empty(o.x.shape),
        _state_like(o),
        *_states_like(functions, o),
    ),
    _ssd_backward: lambda functions, o, z, *rest: (
        *_grads_like(o),
        o.x.new_empty(0) if z is None else z.new_empty(z.shape),
        _state_like(o),
    ),
}
for op, fake in FAKES.items():
    op.register_fake(_with_operands(fake))


def _save_whole(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    triton, *rest = inputs
    operands, (z, initial_state) = Operands(*rest[: len(Operands._fields)]), rest[len(Operands._fields) :]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.triton, ctx.sizes = triton, operands[len(TENSORS) :]
    ctx.save_for_backward(*operands[: len(TENSORS)], z, initial_state, *output[2:])


def _whole_backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, *states: None) -> tuple[Tensor | None, ...]:
    *tensors, z, initial_state, log_T, S_in = ctx.saved_tensors
    o = Operands(*tensors, *ctx.sizes)
    dout = torch.zeros_like(o.x) if dout is None else dout
    *grads, dz, dinitial = _ssd_backward(ctx.triton, *o, z, log_T, S_in, dout, dfinal)
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return None, *_operand_grads(o, Grads(*grads)), None if z is None else dz, dinitial


_ssd.register_autograd(_whole_backward, setup_context=_save_whole)


def _operand_grads(o: Operands, grads: Grads) -> tuple[Tensor | None, ...]:
    """In the order of `Operands`, None for what has none."""
    dA, dD, ddt_bias = (
        None if t is None else g.to(t.dtype) for t, g in ((o.A, grads.dA), (o.D, grads.dD), (o.dt_bias, grads.ddt_bias))
    )
    tensors = grads.dx, grads.ddt, dA, grads.dB, grads.dC, dD, ddt_bias
    return (*tensors, *[None] * (len(Operands._fields) - len(tensors)))


class _Whole:
    """A scan of which nothing travels; no NamedTuple for `_Flight`'s reason."""

    def __init__(self, operands: Operands, triton: bool, initial_state: Tensor | None) -> None:
        self.operands, self.triton, self.initial_state = operands, triton, initial_state

    def finish(self, carrier: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        y, final, *_ = _ssd(self.triton, *self.operands, z, self.initial_state)
        return y, final


class _Flight:
    """What the two halves of one call hand each other; emptied as it is used, so that nothing outlives its need.

    No dataclass: FSDP looks into these for tensors that a module returns, and hooks what is none of its business.
    """

    def __init__(self, operands: Operands, triton: bool, scan: Scan) -> None:
        self.operands: Operands | None = operands
        self.triton, self.scan = triton, scan
        self.pending: Pending[tuple[Tensor, Tensor | None]] | None = None
        self.prepared: tuple[Tensor, ...] = ()
        self.states: tuple[Tensor, ...] = ()

    def finish(self, carrier: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _Finish.apply(carrier, z, self)

    def land(self) -> tuple[Tensor, Tensor | None]:
        """Waits for what is on the wire."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()

    def take(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What the other half left: of `prepare`, and states."""
        taken = self.prepared, self.states
        self.prepared = self.states = ()
        return taken


class _Start(torch.autograd.Function):
    """Forward: maps, and their scan set out. Backward: the gradients of the states arrive, and from them those of the operands."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *fields, initial_state, flight = args
        o = Operands(*fields)
        flight.prepared = _prepare(flight.triton, *o)
        log_T, U = _maps(flight.triton, *o, *flight.prepared)
        flight.pending, flight.states = flight.scan.start(log_T, U, initial_state), (log_T,)
        ctx.save_for_backward(*o[: len(TENSORS)], initial_state)
        ctx.flight, ctx.sizes = flight, o[len(TENSORS) :]
        return without_memory(o.x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, initial_state = ctx.saved_tensors
        o, flight = Operands(*tensors, *ctx.sizes), ctx.flight
        dU, dinitial = flight.land()
        prepared, (S_in,) = flight.take()
        grads = Grads(*_main_grads(flight.triton, *o, *prepared, S_in, dU, dy))
        dinitial = None if initial_state is None or dinitial is None else dinitial.to(initial_state.dtype)
        return *_operand_grads(o, grads), dinitial, None


class _Finish(torch.autograd.Function):
    """Forward: the states arrive, and from them the outputs. Backward: the gradients of the states set out."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, z: Tensor | None, flight: _Flight) -> tuple[Tensor, Tensor | None]:
        o, flight.operands = flight.operands, None
        assert o is not None
        prepared, (log_T,) = flight.take()
        S_in, final = flight.land()
        y = _outputs(flight.triton, *o, *prepared, z, S_in)
        ctx.save_for_backward(*o[: len(TENSORS)], z, log_T, S_in)
        ctx.flight, ctx.sizes = flight, o[len(TENSORS) :]
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        *tensors, z, log_T, S_in = ctx.saved_tensors
        o, flight = Operands(*tensors, *ctx.sizes), ctx.flight
        dout = torch.zeros_like(o.x) if dout is None else dout
        prepared = _prepare(flight.triton, *o)
        dy, dz = (dout, None) if z is None else _gate_grads(flight.triton, *o, *prepared, z, S_in, dout)
        if not ctx.needs_input_grad[0]:
            return None, dz, None
        dS_in = _state_grads(flight.triton, *o, *prepared, dy)
        flight.pending = flight.scan.start(log_T, dS_in, dfinal, reverse=True)
        flight.prepared, flight.states = prepared, (S_in,)
        return dy, dz, None


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
