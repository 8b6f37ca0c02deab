"""The mixture of experts: 16 experts, 2 of each token, d 4096, hidden 14336."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from baton.kernels.moe.fused import permute, route, unpermute
from baton.kernels.moe.fused_linear import grouped_linear, weight_gradient
from huge import huge_tensor

TOKENS, CHOICES, EXPERTS, CHANNELS, HIDDEN = 4096, 2, 16, 4096, 14336


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(rows: int, dtype: torch.dtype) -> None:
    x, dy = _empty(rows, CHANNELS, dtype=dtype), _empty(rows, HIDDEN, dtype=dtype)
    weight, counts = _empty(EXPERTS, HIDDEN, CHANNELS, dtype=dtype), _empty(EXPERTS)
    grouped_linear(x, weight, counts)
    grouped_linear(dy, weight.transpose(1, 2), counts)
    weight_gradient(dy, x, counts)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    rows = _empty(TOKENS, CHOICES)
    yield "route", lambda: route(rows, EXPERTS)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        x, y = (_empty(count, CHANNELS, dtype=dtype) for count in (TOKENS, TOKENS * CHOICES))
        yield f"permute {name}", lambda x=x: permute(x, rows)
        yield f"unpermute {name}", lambda y=y: unpermute(y, rows)
    yield "linear bfloat16", lambda: _linear(TOKENS * CHOICES, torch.bfloat16)
    yield "few rows bfloat16", lambda: _linear(512, torch.bfloat16)
    yield "linear float16", lambda: _linear(TOKENS * CHOICES, torch.float16)
    yield "linear float32", lambda: _linear(TOKENS * CHOICES, torch.float32)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    x = huge_tensor((262144, 64), torch.bfloat16, (16384, 1))
    rows = torch.arange(262144)[:, None]
    counts = torch.tensor([0, 262080, 64])
    one_weight = torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    far_weight = huge_tensor((3, 64, 64), torch.bfloat16, (2**31, 64, 1))
    yield "permute", lambda: permute(x, rows)
    yield "unpermute", lambda: unpermute(x, rows)
    # One expert: with more the last programs have no tile.
    yield "rows far apart", lambda: grouped_linear(x, one_weight, torch.tensor([262144]))
    yield "gradient, rows far apart", lambda: weight_gradient(x, x, counts)
    yield "experts far apart", lambda: grouped_linear(x, far_weight, counts)
