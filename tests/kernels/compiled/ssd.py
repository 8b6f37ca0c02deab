"""The SSD scan: every shipped config, with documents and with a gate; g 1 of 80 heads of 64 with a state of 128 comes first."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from baton.kernels.ssd import fused
from baton.kernels.ssd.op import obstacle
from baton.kernels.ssd.operands import Operands
from huge import huge_tensor

SHAPES = {(64, 128): 80, (64, 64): 80, (64, 256): 80, (128, 128): 40, (128, 256): 40, (64, 16): 80, (32, 16): 32}
"""Heads, by the head dim and the state dim."""
SINGLE = [(64, 128), (64, 16), (128, 256)]
"""Those with every configuration of fp32."""


def _operands(x: Tensor, n: int, documents: bool) -> Operands:
    b, l, h, _ = x.shape
    small = torch.empty(h, device=x.device)
    B, C = torch.empty(b, l, 1, 2, n, dtype=x.dtype, device=x.device).unbind(3)
    resets = torch.empty(b, l, dtype=torch.bool, device=x.device) if documents else None
    dt = torch.empty(b, l, h, dtype=x.dtype, device=x.device)
    return Operands(x, dt, small, B, C, small, small, resets, 0.0, float("inf"), 1, 64)


def _all(o: Operands, gate: bool) -> None:
    if obstacle(o):
        return
    prepared = fused.prepare(o)
    _, S = fused.maps(o, prepared)
    z = torch.empty_like(o.x) if gate else None
    y = fused.outputs(o, prepared, z, S)
    if z is not None:
        fused.gate_grads(o, prepared, z, S, y)
    fused.main_grads(o, prepared, S, fused.state_grads(o, prepared, y), y)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for (p, n), h in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32) if (p, n) in SINGLE else (torch.bfloat16,):
            x = torch.empty(1, 8192, h, p, dtype=dtype, device="meta")
            name = f"p{p} n{n} {str(dtype).removeprefix('torch.')}"
            yield name, lambda x=x, n=n: _all(_operands(x, n, False), False)
            if (p, n) == (64, 128):
                yield f"{name} documents gate", lambda x=x, n=n: _all(_operands(x, n, True), True)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    # 4096 heads apart in memory, of which two are looked at: offsets pass 2^31 in few, short segments.
    l, h, p, n = 262144, 2, 64, 16
    x = huge_tensor((1, l, h, p), torch.bfloat16, (l * 16384, 16384, p, 1))
    BC = huge_tensor((1, l, 1, n), torch.bfloat16, (l * 16384, 16384, n, 1))
    dt = huge_tensor((1, l, h), torch.bfloat16, (l * 16384, 16384, 1))
    small = torch.zeros(h)
    o = Operands(x, dt, small, BC, BC, small, small, None, 0.0, float("inf"), 1, 64)
    yield "tokens far apart", lambda: _all(o, False)
