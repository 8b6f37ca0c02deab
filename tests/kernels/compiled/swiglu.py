"""SwiGLU's gate: a dense layer's and an expert's, a narrow expert's, and one in fp32."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from baton.kernels.swiglu.fused import swiglu, swiglu_backward
from huge import huge_tensor

SIZES = {"dense": (14336, False), "expert": (14336, True), "narrow expert": (512, True)}


def _both(gate: Tensor, up: Tensor, weights: Tensor | None) -> None:
    swiglu_backward(swiglu(gate, up, weights), gate, up, weights)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for name, (hidden, weighted) in SIZES.items():
            gate, up = (torch.empty(4096, hidden, dtype=dtype, device="meta") for _ in range(2))
            weights = torch.empty(4096, dtype=dtype, device="meta") if weighted else None
            yield f"{name} {str(dtype).removeprefix('torch.')}", lambda a=gate, b=up, w=weights: _both(a, b, w)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    gate = huge_tensor((262144, 64), torch.bfloat16, (16384, 1))
    weights = torch.ones(262144, dtype=torch.bfloat16)
    yield "rows far apart", lambda: _both(gate, gate, weights)
