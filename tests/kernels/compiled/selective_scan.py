"""Launches of the selective scan: what `ahead_of_time` compiles, and what `overflow` runs."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from baton.kernels.selective_scan import fused, segments
from huge import huge_tensor

INF = float("inf")


def call(of_tokens: Callable[[int], Tensor], d: int, n: int, options: bool) -> None:
    """All four functions; `of_tokens(d)` is a tensor [b, l, d]. options: with D, z, dt_bias and resets."""
    x, dt, dy, B, C = (of_tokens(size) for size in (d, d, d, n, n))
    A, D, bias = -torch.ones(d, n), torch.ones(d), torch.ones(d)
    resets = torch.zeros(x.shape[:2], dtype=torch.bool)
    D, z, bias, resets = (D, of_tokens(d), bias, resets) if options else (None, None, None, None)
    _, S = fused.maps(x, dt, A, B, bias, resets, 0.0, INF, 1)
    fused.outputs(x, dt, A, B, C, D, z, bias, resets, S, 0.0, INF, 1)
    fused.state_grads(dt, A, C, z, bias, resets, dy, 0.0, INF, 1)
    fused.main_grads(x, dt, A, B, C, D, z, bias, resets, S, S, dy, 0.0, INF, 1)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Jamba's 8192 channels; the most state dims with which a program has so many channels, in either dtype."""
    for n, dtype, options in (
        (16, torch.bfloat16, True),
        (32, torch.bfloat16, True),
        (64, torch.float32, True),
        (16, torch.float32, False),
    ):
        zeros = lambda size, dtype=dtype: torch.zeros(1, 512, size, dtype=dtype)  # noqa: E731
        label = f"n{n}-{str(dtype).removeprefix('torch.')}{'' if options else '-plain'}"
        yield label, lambda zeros=zeros, n=n, options=options: call(zeros, 8192, n, options)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    """262,144 tokens, of which each tensor has a row of as many channels."""
    yield "tokens", far


def far() -> None:
    """In short segments, since a program goes through one, and all in one window."""
    segments.LONGEST_SEGMENT, fused.WORKSPACE = segments.SHORTEST_SEGMENT, 1 << 50
    call(lambda size: huge_tensor((1, 262144, size), torch.bfloat16), 16384, 2, True)
