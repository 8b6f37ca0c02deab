"""The scan and the fold over one device in PyTorch, map after map."""

import torch
from torch import Tensor

from .transitions import Transition


def exclusive_scan(T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool, transition: Transition) -> tuple[Tensor, Tensor]:
    """As `op.exclusive_scan`."""
    out = torch.empty_like(U)
    state = torch.zeros_like(U[:, 0]) if initial is None else initial.to(U.dtype)
    order = range(U.shape[1])
    for i in reversed(order) if reverse else order:
        out[:, i] = state
        state = transition.step(T[:, i], state, U[:, i])
    return out, state


def fold(T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool, transition: Transition) -> tuple[Tensor, Tensor]:
    """As `op.fold`."""
    order = range(U.shape[1])
    first, *others = reversed(order) if reverse else order
    state = U[:, first] if initial is None else transition.step(T[:, first], initial.to(U.dtype), U[:, first])
    for i in others:
        state = transition.step(T[:, i], state, U[:, i])
    return transition.fold(T.flip(1) if reverse else T), state
