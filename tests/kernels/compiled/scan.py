"""Launches of the scan and the fold over maps: what `ahead_of_time` compiles, and what `overflow` runs."""

from collections.abc import Callable, Iterator

import torch

from baton.kernels.scan import fused
from huge import huge_tensor


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Mamba-2's scalar per head, a diagonal, and Mamba-1's rated channels; forward from a state, and in reverse from zero."""
    state, scalar = torch.empty(1, 128, 80, 64, 128), torch.empty(1, 128, 80)
    yield "scalar", lambda: fused.exclusive_scan(scalar, state, state[:, 0], None, False)
    yield "scalar-reverse", lambda: fused.exclusive_scan(scalar, state, None, None, True)
    yield "scalar-fold", lambda: fused.fold(scalar, state, None, None, False)
    yield "diagonal", lambda: fused.exclusive_scan(state, state, state[:, 0], None, False)
    states, channels, rate = torch.empty(1, 128, 8192, 16), torch.empty(1, 128, 8192), torch.empty(8192, 16)
    yield "rated", lambda: fused.exclusive_scan(channels, states, states[:, 0], rate, False)
    yield "rated-fold", lambda: fused.fold(channels, states, states[:, 0], rate, True)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    """262,144 tokens in 4096 chunks, as 64 sequences since a program goes through one; 80 heads of 64 by 128."""
    U = huge_tensor((64, 64, 80, 64, 128), torch.float32)
    T = torch.zeros(64, 64, 80)
    yield "scan", lambda: fused.exclusive_scan(T, U, None, None, False)
    yield "fold", lambda: fused.fold(T, U, None, None, True)
