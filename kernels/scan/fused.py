"""The scan and the fold of decays in Triton: one launch, whatever the number of maps.

A program has some elements of one sequence's state in registers and walks the maps. T governs rows of `inner` neighbouring
elements of the state: a scalar per head has the head's state as its row, a diagonal has rows of one element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 512, 4


@triton.jit
def walk_kernel(
    T_ptr,
    U_ptr,
    rate_ptr,
    initial_ptr,
    S_in_ptr,
    folded_ptr,
    final_ptr,
    maps,
    rows,
    inner,
    REVERSE: tl.constexpr,
    HAS_RATE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S_in and the final state, or, if FOLD, the sum of T's logarithms and the final state."""
    LOG2E: tl.constexpr = 1.4426950408889634
    b = tl.program_id(1).to(tl.int64)
    elements = rows * inner
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = element < elements
    row = element // inner

    scale = tl.full([BLOCK], LOG2E, tl.float32)
    if HAS_RATE:
        scale *= tl.load(rate_ptr + element, mask=here, other=0.0)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + b * elements + element, mask=here, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, maps, num_stages=3):
        if REVERSE:
            at = b * maps + (maps - 1 - i)
        else:
            at = b * maps + i
        log = tl.load(T_ptr + at * rows + row, mask=here, other=0.0)
        U = tl.load(U_ptr + at * elements + element, mask=here, other=0.0)
        if FOLD:
            total += log
        else:
            tl.store(S_in_ptr + at * elements + element, state, mask=here)
        state = tl.exp2(log * scale) * state + U
    tl.store(final_ptr + b * elements + element, state, mask=here)
    if FOLD:
        tl.store(folded_ptr + b * rows + row, total, mask=here & (element % inner == 0))


@torch.library.custom_op("baton::exclusive_scan", mutates_args=())
def exclusive_scan(T: Tensor, U: Tensor, initial: Tensor | None, rate: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """T [b, s, *k], U [b, s, *k, ...], initial [b, *k, ...] or None, rate [*k, n] or None; all fp32 -> S_in, final."""
    S_in, final = torch.empty_like(U, memory_format=torch.contiguous_format), U.new_empty(U[:, 0].shape)
    _launch(T, U, initial, rate, reverse, S_in, None, final)
    return S_in, final


@exclusive_scan.register_fake
def _(T: Tensor, U: Tensor, initial: Tensor | None, rate: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(U, memory_format=torch.contiguous_format), U.new_empty(U[:, 0].shape)


@torch.library.custom_op("baton::fold", mutates_args=())
def fold(T: Tensor, U: Tensor, initial: Tensor | None, rate: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """Operands as `exclusive_scan` -> T [b, *k] and U [b, *k, ...] of all maps as one."""
    folded, final = T.new_empty(T[:, 0].shape), U.new_empty(U[:, 0].shape)
    _launch(T, U, initial, rate, reverse, None, folded, final)
    return folded, final


@fold.register_fake
def _(T: Tensor, U: Tensor, initial: Tensor | None, rate: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    return T.new_empty(T[:, 0].shape), U.new_empty(U[:, 0].shape)


def _launch(
    T: Tensor,
    U: Tensor,
    initial: Tensor | None,
    rate: Tensor | None,
    reverse: bool,
    S_in: Tensor | None,
    folded: Tensor | None,
    final: Tensor,
) -> None:
    b, maps = U.shape[:2]
    rows, elements = T[0, 0].numel(), U[0, 0].numel()
    walk_kernel[(triton.cdiv(elements, BLOCK), b)](
        T.contiguous(),
        U.contiguous(),
        None if rate is None else rate.contiguous(),
        None if initial is None else initial.contiguous(),
        S_in,
        folded,
        final,
        maps,
        rows,
        elements // rows,
        REVERSE=reverse,
        HAS_RATE=rate is not None,
        HAS_INITIAL=initial is not None,
        FOLD=folded is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
