"""SwiGLU's gate (Shazeer, arXiv 2002.05202): one pass forward, one backward.

PyTorch's own takes two passes forward and keeps silu(gate) besides gate and up, and three backward. Counted in passes over a tensor
of the hidden size: 5 forward and 9 backward, here 3 and 5; kept for backward: 3, here 2. Not yet measured on a GPU.

A mixture of experts multiplies each row by its router's weight. Here that costs no pass: y_t = Σ_e w_e down_e(h_e) is
Σ_e down_e(w_e h_e). Weighting the experts' outputs instead would keep these [t k, d] for backward and read them there once more.
"""

import torch
from torch import Tensor

from ..dispatch import fused
from . import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up, and times weights where given: gate and up [..., hidden], weights [...] -> [..., hidden] in gate's dtype.

    The kernels compute in fp32. Raises ValueError, naming the argument.
    """
    if up.shape != gate.shape:
        raise ValueError(f"swiglu: up is {list(up.shape)}, allowed: gate's {list(gate.shape)}")
    if weights is not None and weights.shape != gate.shape[:-1]:
        raise ValueError(f"swiglu: weights is {list(weights.shape)}, allowed: {list(gate.shape[:-1])}, one for each row of gate")
    if fused("swiglu", gate.device, _obstacle(gate, up, weights)):
        return torch.ops.baton.swiglu(gate, up, weights)
    return reference.swiglu(gate, up, weights)


def _obstacle(gate: Tensor, up: Tensor, weights: Tensor | None) -> str | None:
    dtypes = {t.dtype for t in (gate, up, weights) if t is not None}
    if len(dtypes) > 1 or gate.dtype not in DTYPES:
        names = ", ".join(sorted(map(str, dtypes)))
        return f"gate, up and weights are {names}, allowed: all bfloat16, all float16 or all float32"
    return None


@torch.library.custom_op("baton::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    from . import fused as kernels

    return kernels.swiglu(gate, up, weights)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("baton::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from . import fused as kernels

    return kernels.swiglu_backward(dy, gate, up, weights)


@_swiglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape), gate.new_empty((0,) if weights is None else weights.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    gate, up, weights = ctx.saved_tensors
    dgate, dup, dweights = torch.ops.baton.swiglu_backward(dy, gate, up, weights)
    return dgate, dup, None if weights is None else dweights


_swiglu.register_autograd(_backward, setup_context=_save)
