"""The short convolution: of x and of B and C, alone, after halos, and with documents; each width."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from baton.kernels.conv.fused import conv_backward, conv_forward
from huge import huge_tensor


def _both(x: Tensor, width: int, runs: int, documents: bool) -> None:
    b, l, c = x.shape
    weight, bias = (torch.zeros(shape, dtype=x.dtype, device=x.device) for shape in ((c, width), (c,)))
    halo = torch.zeros(b, runs, width - 1, c, dtype=x.dtype, device=x.device) if runs else None
    positions = torch.zeros(1, 1, dtype=torch.int64, device=x.device).expand(b, l) if documents else None
    conv_backward(conv_forward(x, weight, bias, halo, positions), x, weight, bias, halo, positions)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    sizes = {
        "alone": (8192, 4, 0, False),
        "documents": (8192, 4, 0, True),
        "halos": (8192, 4, 2, True),
        "narrow": (64, 4, 2, False),
        "width 2": (8192, 2, 2, True),
        "width 3": (8192, 3, 2, True),
    }
    for name, (channels, *rest) in sizes.items():
        x = torch.empty(1, 8192, channels, dtype=torch.bfloat16, device="meta")
        yield f"{name} bfloat16", lambda x=x, rest=rest: _both(x, *rest)
    x = torch.empty(1, 8192, 8192, device="meta")
    yield "halos float32", lambda: _both(x, 4, 2, True)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    x = huge_tensor((1, 262144, 16384), torch.bfloat16)
    for runs in (0, 2):
        yield f"{runs} halos", lambda runs=runs: _both(x, 4, runs, True)
