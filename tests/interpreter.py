"""Triton's interpreter, corrected: kernels run on the CPU as the device would compute them.

Import it before anything that imports triton: where no GPU is, it sets TRITON_INTERPRET, which triton reads once. Where one is
(and TRITON_INTERPRET is not set) it changes nothing, and `tf32` and `order` do nothing, so that the same tests run on the device.

What triton's own interpreter does wrong, and is put right here (tried with triton 3.6.0 and 3.7.1):
- bf16 is held as its bits in uint16, and arithmetic is done on these integers; it is now done in fp32 and rounded.
- fp32 is truncated to bf16; it is now rounded to the nearest, ties to even.
- `range` over a tensor of one element raises with numpy >= 2.4 (3.6).
- numpy warns of an overflow wherever a kernel counts on exp2 of something large being inf.
- Every call of a device function, such as `tl.sum`, patches all of `triton.language` anew, which takes longer than the rest.
What it cannot show by itself: products that use TF32 (`tf32`), programs in another order (`order`), indices that pass 2^31
(`overflow`).
"""

import contextlib
import dataclasses
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()

Grid = tuple[int, int, int]
Programs = list[Grid]


def _all_programs(grid: Grid) -> Programs:
    return list(itertools.product(*map(range, grid)))


def _shuffled(grid: Grid) -> Programs:
    programs = _all_programs(grid)
    random.Random(0).shuffle(programs)
    return programs


def _corners(grid: Grid) -> Programs:
    return list(itertools.product(*(sorted({0, size - 1}) for size in grid)))


_ORDERS: dict[str, Callable[[Grid], Programs]] = {
    "given": _all_programs,
    "reversed": lambda grid: _all_programs(grid)[::-1],
    "shuffled": _shuffled,
    "corners": _corners,
}


@dataclasses.dataclass
class _Settings:
    order: str = "given"
    tf32: bool = False
    reach: dict[str, int] | None = None


_settings = _Settings()


@contextlib.contextmanager
def _set(**values: Any) -> Iterator[None]:
    before = {name: getattr(_settings, name) for name in values}
    vars(_settings).update(values)
    try:
        yield
    finally:
        vars(_settings).update(before)


def tf32() -> contextlib.AbstractContextManager[None]:
    """Dots of fp32 that allow it (`input_precision="tf32"`, the default) round their operands to TF32, as tensor cores do."""
    return _set(tf32=True)


def order(programs: Literal["given", "reversed", "shuffled", "corners"]) -> contextlib.AbstractContextManager[None]:
    """The order in which a launch's programs run; `corners` are only the first and last of each of the grid's axes."""
    assert programs in _ORDERS, programs
    return _set(order=programs)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Bits of bf16 in uint16 -> float32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> bits of bf16 in uint16, rounded to the nearest, ties to even; nan stays nan."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + to_even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with the 13 lowest bits rounded away, ties away from zero, as PTX's cvt.rna.tf32 does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


if INTERPRETED:
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "triton" not in sys.modules, "import interpreter before what imports triton, which reads TRITON_INTERPRET once"
        os.environ["TRITON_INTERPRET"] = "1"

    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter as stock

    def _is_bf16(operand: Any) -> bool:
        return isinstance(operand, stock.TensorHandle) and operand.dtype.scalar == tl.bfloat16

    def _widened(operand: Any) -> Any:
        return stock.TensorHandle(from_bf16(operand.data), tl.float32) if _is_bf16(operand) else operand

    def _narrowed(result: Any) -> Any:
        """The result of an operation on bf16; a comparison's stays."""
        if result.data.dtype == np.bool_:
            return result
        return stock.TensorHandle(to_bf16(result.data), tl.bfloat16)

    class Builder(stock.InterpreterBuilder):
        """The stock builder, with bf16, TF32 and a choice of programs."""

        def cast_impl(self, src: Any, dst_type: Any) -> Any:
            if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
                return stock.TensorHandle(to_bf16(src.data.astype(np.float32)), tl.bfloat16)
            if _is_bf16(src) and dst_type.scalar == tl.bfloat16:
                return src
            return super().cast_impl(_widened(src), dst_type)

        def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
            eight_bits = 8 in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth)
            return super().create_fp_to_fp(src, dst_type, rounding_mode) if eight_bits else self.cast_impl(src, dst_type)

        def get_bf16(self, value: float) -> Any:
            return stock.TensorHandle(to_bf16(np.array([value], np.float32)), tl.bfloat16)

        def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: int) -> Any:
            if _settings.tf32 and a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
                a, b = (stock.TensorHandle(to_tf32(operand.data), tl.float32) for operand in (a, b))
            return super().create_dot(_widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)

        def create_masked_load(self, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.note_reach(ptrs, mask)
            return super().create_masked_load(ptrs, mask, *rest)

        def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.note_reach(ptrs, mask)
            return super().create_masked_store(ptrs, value, mask, *rest)

        def note_reach(self, ptrs: Any, mask: Any) -> None:
            """Keeps the largest index that the launched kernel reaches in any of its arguments."""
            if _settings.reach is None:
                return
            addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
            if not addresses.size:
                return
            last = int(addresses.max())
            base = int(self.addresses[np.searchsorted(self.addresses, last, "right") - 1])
            index = (last - base) * 8 // ptrs.get_element_ty().primitive_bitwidth
            _settings.reach[self.kernel] = max(index, _settings.reach.get(self.kernel, 0))

        def choose_programs(self, grid: tuple[int, ...]) -> tuple[int]:
            """Those that the order in force runs of `grid`; the executor goes through their number."""
            self.launched: Grid = (*map(int, grid), 1, 1)[:3]
            self.programs = _ORDERS[_settings.order](self.launched)
            return (len(self.programs),)

        def set_grid_dim(self, *_: int) -> None:
            self.grid_dim = self.launched

        def set_grid_idx(self, number: int, *_: int) -> None:
            self.grid_idx = self.programs[number]

    def _in_fp32(name: str) -> Callable[..., Any]:
        operation = getattr(stock.InterpreterBuilder, name)

        def widening(self: Builder, *operands: Any) -> Any:
            result = operation(self, *map(_widened, operands))
            return _narrowed(result) if any(map(_is_bf16, operands)) else result

        return widening

    for _name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf", "create_clampf"):
        setattr(Builder, _name, _in_fp32(_name))

    class GridExecutor(stock.GridExecutor):
        """The stock executor, over the programs that the builder chooses."""

        def __init__(self, fn: Any, arg_names: list[str], grid: Any, *hooks: Any) -> None:
            chosen = lambda args: builder.choose_programs(grid(args) if callable(grid) else grid)  # noqa: E731
            super().__init__(fn, arg_names, chosen, *hooks)

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            builder.kernel, builder.patched = self.fn.__name__, set()
            builder.addresses = np.sort([arg.data_ptr() for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)])
            with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
                super().__call__(*args, **kwargs)

    builder = Builder()
    stock.interpreter_builder = builder
    stock.interpreter_semantic = TritonSemantic(builder)
    stock.GridExecutor = GridExecutor

    _stock_patch_lang = stock._patch_lang

    def _patch_lang(fn: Any) -> Any:
        modules = {module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core}
        if modules <= builder.patched:
            return stock._LangPatchScope()
        builder.patched |= modules
        return _stock_patch_lang(fn)

    stock._patch_lang = _patch_lang

    _stock_patch_tensor = stock._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        _stock_patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    stock._patch_lang_tensor = _patch_lang_tensor

    _stock_apply = stock.ReduceScanOpInterface.apply

    def _apply(self: Any, operand: Any) -> Any:
        """Reductions and scans of one bf16 tensor: accumulated in fp32, rounded once."""
        if isinstance(operand, tuple) or operand.dtype != tl.bfloat16:
            return _stock_apply(self, operand)
        wide = _stock_apply(self, self.to_tensor(from_bf16(operand.handle.data), tl.float32))
        return stock.interpreter_semantic.cast(wide, tl.bfloat16)

    stock.ReduceScanOpInterface.apply = _apply


@contextlib.contextmanager
def overflow() -> Iterator[dict[str, int]]:
    """An integer sum, difference or product in a kernel that does not fit its type raises InterpreterError.

    Yields the largest index that each kernel reaches in one of its tensors: what was put to the test.
    """
    options = builder.options
    builder.options = dataclasses.replace(options, debug=True, sanitize_overflow=True)
    reach: dict[str, int] = {}
    try:
        with _set(reach=reach):
            yield reach
    finally:
        builder.options = options
