"""Exclusive scan of affine maps along one device: what `parallel.affine_scan` continues over ranks.

Over a run of tokens a recurrence is S_out = T S_in + U. Given every run's (T, U) in sequence order, the scan gives each run
its S_in. Maps compose, (T2, U2) after (T1, U1) = (T2 T1, T2 U1 + U2), and the adjoint is the same scan in the reverse direction
with transposed T and the gradients of S_in in U's place.
"""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..dispatch import fused
from . import reference
from .transitions import SCALAR, Decay, Transition

Value = TypeVar("Value", covariant=True)


class Pending(Protocol[Value]):
    """A result that is on its way."""

    def wait(self) -> Value:
        """The result, once it is there."""


@dataclass(frozen=True)
class Done(Generic[Value]):
    """A result that was there at once."""

    value: Value

    def wait(self) -> Value:
        """The result."""
        return self.value


def without_memory(like: Tensor) -> Tensor:
    """A tensor of the shape of `like` and of one element: what ties two halves of an operation together in the autograd graph."""
    # Not `expand`: FSDP warns of views that a module returns.
    return like.new_empty_strided(like.shape, [0] * like.dim())


class Scan(Protocol):
    """What an operation with a recurrence is given to pass its states on; `LocalScan` is the plain one.

    segments: how many contiguous runs of the sequence the tokens at hand are made of (their maps come in sequence order).
    """

    segments: int

    def start(
        self, T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool = False, transition: Transition = SCALAR
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        """T as `transition` has it, U [b, s, h, ...], the whole sequence's initial state [b, h, ...] or None (zero).

        -> S_in as U, and the whole sequence's final state, as initial. Over ranks the initial state is looked at only where
        the sequence begins, and the final state is None but where it ends. `reverse` is the adjoint: from the gradients of
        S_in and of the final state, those of U and of the initial state.
        """


class LocalScan:
    """All of the sequence is here, in one run."""

    segments = 1

    def start(
        self, T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool = False, transition: Transition = SCALAR
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        """As `Scan.start`; the result is there at once."""
        return Done(exclusive_scan(transition.adjoint(T) if reverse else T, U, initial, reverse, transition))


def exclusive_scan(
    T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool = False, transition: Transition = SCALAR
) -> tuple[Tensor, Tensor]:
    """Scans over dim 1: T as `transition` has it, U [b, s, ...], initial [b, ...] or None (zero).

    Returns the state before each map, as U, and the state after the last, as initial. `reverse` starts from the end.
    """
    if isinstance(transition, Decay) and fused("exclusive_scan", U.device, _obstacle(T, U)):
        from . import fused as kernels

        return kernels.exclusive_scan(T, U, *_in_dtype_of(U, initial, transition.rate), reverse)
    return reference.exclusive_scan(T, U, initial, reverse, transition)


def fold(
    T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool = False, transition: Transition = SCALAR
) -> tuple[Tensor, Tensor]:
    """All maps of dim 1 as one, as `exclusive_scan` takes them: its T [b, ...], and U, which `initial` has gone through."""
    if isinstance(transition, Decay) and fused("fold", U.device, _obstacle(T, U)):
        from . import fused as kernels

        return kernels.fold(T, U, *_in_dtype_of(U, initial, transition.rate), reverse)
    return reference.fold(T, U, initial, reverse, transition)


def _obstacle(T: Tensor, U: Tensor) -> str | None:
    if T.dtype != torch.float32 or U.dtype != torch.float32:
        return f"T is {T.dtype} and U {U.dtype}, allowed for the Triton kernels: torch.float32"
    return None


def _in_dtype_of(U: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(U.dtype) for tensor in tensors]


def affine_scan(
    T: Tensor, U: Tensor, initial: Tensor | None = None, scan: Scan | None = None, transition: Transition = SCALAR
) -> tuple[Tensor, Tensor | None]:
    """The scan under autograd, with the gradients of T, U, initial and a decay's rate; arguments and results as `Scan.start`."""
    rate = getattr(transition, "rate", None)
    return _AffineScan.apply(T, U, initial, rate, scan or LocalScan(), transition)


class _AffineScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, T: Tensor, U: Tensor, initial: Tensor | None, rate: Tensor | None, scan: Scan, transition: Transition
    ) -> tuple[Tensor, Tensor | None]:
        S_in, final = scan.start(T, U, initial, False, transition).wait()
        ctx.save_for_backward(T, S_in, rate)
        ctx.scan, ctx.transition = scan, transition
        ctx.set_materialize_grads(False)
        return S_in, final

    @staticmethod
    def backward(ctx: Any, dS_in: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        T, S_in, _ = ctx.saved_tensors
        dS_in = torch.zeros_like(S_in) if dS_in is None else dS_in
        dU, dinitial = ctx.scan.start(T, dS_in, dfinal, True, ctx.transition).wait()
        dT, drate = ctx.transition.grads(T, S_in, dU)
        return dT, dU, dinitial, drate, None, None
