"""The norms at widths of models, up to the widest; the gated one's groups, whole and in parts."""

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from baton.kernels.norm import fused
from baton.kernels.norm.fused import gated_backward, gated_forward, gated_sums, norm_backward, norm_forward
from huge import huge_tensor

NORMS = {512: torch.bfloat16, 4096: torch.bfloat16, 8192: torch.float32, 16384: torch.bfloat16}
GROUPS = {64: torch.bfloat16, 1024: torch.bfloat16, 4096: torch.float32, 8192: torch.bfloat16}


def _norm(x: Tensor, added: bool) -> None:
    weight = torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device)
    residual = x if added else None
    normed, total, rstd = norm_forward(x, residual, weight, 1e-5)
    norm_backward(normed, residual, total if added else x, weight, rstd)


def _gated(y: Tensor, group_size: int) -> None:
    weight = torch.zeros(y.shape[-1], dtype=y.dtype, device=y.device)
    normed, rstd = gated_forward(y, y, weight, group_size, 1e-5, None)
    gated_backward(normed, y, y, weight, rstd, group_size, None)


def _part(y: Tensor, group_size: int) -> None:
    weight = torch.zeros(y.shape[-1], dtype=y.dtype, device=y.device)
    normed, rstd = gated_forward(y, y, weight, group_size, 1e-5, gated_sums(y, y, weight, None))
    gated_backward(normed, y, y, weight, rstd, group_size, gated_sums(y, y, weight, normed))


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for width, dtype in NORMS.items():
        x = torch.empty(1, 8192, width, dtype=dtype, device="meta")
        yield f"norm {width} {str(dtype).removeprefix('torch.')}", lambda x=x: (_norm(x, False), _norm(x, True))
    for width, dtype in GROUPS.items():
        y = torch.empty(1, 8192, 8 * width, dtype=dtype, device="meta")
        yield f"groups of {width} {str(dtype).removeprefix('torch.')}", lambda y=y, width=width: _gated(y, width)
    part = torch.empty(1, 8192, 8192, dtype=torch.bfloat16, device="meta")
    yield "part of 8192 bfloat16", lambda: _part(part, 16384)


def _in_short(call: Callable[[Tensor, int], None], y: Tensor, size: int) -> None:
    """With more programs that sum the weight's gradient, each of which then goes through fewer rows: the interpreter is slow."""
    with mock.patch.object(fused, "WEIGHT_PROGRAMS", 16384):
        call(y, size)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    x = huge_tensor((1, 262144, 16384), torch.bfloat16)
    yield "norm", lambda: _in_short(_norm, x, True)
    yield "groups", lambda: _in_short(_gated, x, 2048)
    yield "part", lambda: _in_short(_part, x[..., :8192], 16384)
