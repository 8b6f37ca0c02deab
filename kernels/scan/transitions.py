"""How the maps of a recurrence are written down and composed."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
