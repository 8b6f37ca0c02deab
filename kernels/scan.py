"""Exclusive scan of affine maps along one device: what `parallel.affine_scan` continues over ranks.

Over a run of tokens a recurrence is S_out = T S_in + U. Given every run's (T, U) in sequence order, the scan gives each run
its S_in. Maps compose, (T2, U2) after (T1, U1) = (T2 T1, T2 U1 + U2), and the adjoint is the same scan in the reverse direction
with transposed T and the gradients of S_in in U's place.
"""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", covariant=True)


class Transition(Protocol):
    """How a recurrence's T is written down, and what it does to a state; b sequences, s maps of each."""

    def step(self, T: Tensor, S: Tensor, U: Tensor) -> Tensor:
        """One map of S: T [b, ...], S and U [b, ...] -> [b, ...]."""

    def compose(self, then: Tensor, first: Tensor) -> Tensor:
        """`then` after `first`, both as T."""

    def fold(self, T: Tensor) -> Tensor:
        """All maps of dim 1, one after another, as one: [b, s, ...] -> [b, ...]."""

    def adjoint(self, T: Tensor) -> Tensor:
        """The transposed map."""

    def grads(self, T: Tensor, S_in: Tensor, dU: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of T as T, from the states entering the maps and the gradients of those leaving; and of `rate`."""


@dataclass(frozen=True, eq=False)
class Decay:
    """T > 0, kept as its natural logarithm, -inf for a reset. T [b, s, *k] governs states [b, s, *k, ...].

    A scalar per head (Mamba-2) has k = [h]; one for every channel and state dim has the shape of the state.
    rate: T is exp(rate T') instead, with T' [b, s, *k] and rate [*k, n] (Mamba-1: T' is the sum of dt, rate is A), so that
    T' alone travels. A reset is then T' = inf, and rate must be negative.
    """

    rate: Tensor | None = None

    def step(self, T: Tensor, S: Tensor, U: Tensor) -> Tensor:
        """As `Transition.step`."""
        return torch.addcmul(U, self._factor(T, S), S)

    def compose(self, then: Tensor, first: Tensor) -> Tensor:
        """As `Transition.compose`."""
        return then + first

    def fold(self, T: Tensor) -> Tensor:
        """As `Transition.fold`."""
        return T.sum(1)

    def adjoint(self, T: Tensor) -> Tensor:
        """A diagonal is its own transpose."""
        return T

    def grads(self, T: Tensor, S_in: Tensor, dU: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Transition.grads`; a reset has the gradient 0."""
        flow = self._factor(T, S_in) * S_in * dU
        if self.rate is None:
            return flow.flatten(T.dim()).sum(-1) if flow.dim() > T.dim() else flow, None
        finite = torch.where(T.isinf(), torch.zeros_like(T), T)
        return (flow * self.rate).sum(-1), (flow * finite[..., None]).sum((0, 1))

    def _factor(self, T: Tensor, S: Tensor) -> Tensor:
        log = T.reshape(*T.shape, *[1] * (S.dim() - T.dim()))
        return (log if self.rate is None else log * self.rate).exp()


@dataclass(frozen=True, eq=False)
class Dense:
    """S T + U with T [b, s, h, K, K] and states [b, s, h, V, K] (delta rule: T = I - β k kᵀ); zeros for a reset."""

    def step(self, T: Tensor, S: Tensor, U: Tensor) -> Tensor:
        """As `Transition.step`."""
        return torch.matmul(S, T) + U

    def compose(self, then: Tensor, first: Tensor) -> Tensor:
        """As `Transition.compose`."""
        return torch.matmul(first, then)

    def fold(self, T: Tensor) -> Tensor:
        """As `Transition.fold`."""
        whole = T[:, 0]
        for then in T.unbind(1)[1:]:
            whole = self.compose(then, whole)
        return whole

    def adjoint(self, T: Tensor) -> Tensor:
        """The matrices transposed."""
        return T.mT

    def grads(self, T: Tensor, S_in: Tensor, dU: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Transition.grads`."""
        return torch.matmul(S_in.mT, dU), None


SCALAR = Decay()


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
    out = torch.empty_like(U)
    state = torch.zeros_like(U[:, 0]) if initial is None else initial.to(U.dtype)
    order = range(U.shape[1])
    for i in reversed(order) if reverse else order:
        out[:, i] = state
        state = transition.step(T[:, i], state, U[:, i])
    return out, state


def fold(
    T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool = False, transition: Transition = SCALAR
) -> tuple[Tensor, Tensor]:
    """All maps of dim 1 as one, as `exclusive_scan` takes them: its T [b, ...], and U, which `initial` has gone through."""
    order = range(U.shape[1])
    first, *others = reversed(order) if reverse else order
    state = U[:, first] if initial is None else transition.step(T[:, first], initial.to(U.dtype), U[:, first])
    for i in others:
        state = transition.step(T[:, i], state, U[:, i])
    return transition.fold(T.flip(1) if reverse else T), state


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
