"""Counts what this process launches on a device: kernels, and the bytes of the tensors that they are given.

    with record() as launches:
        y = ssd(...)
    len(launches), sum(launch.bytes for launch in launches)

A kernel of Triton is one launch. Each tensor that it is passed counts once, the elements of the view and not those behind it, and
one named `<name>_inout_ptr` twice, for it is read and written. Caches may save some of these bytes; a kernel that goes through a
tensor again and again may move more.

An ATen operation that touches memory counts as one launch, though it may be several: inputs and results once each, what it changes
in place twice. Views and the allocation of memory are none. Operations of the namespace `baton` are looked into, but for those that
stand for one of ATen's.

With execute=False nothing is launched and no memory is needed: tensors are then to be on the device "meta".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

SINGLE = {"baton::add_wide_product_"}
"""Operations of ours that are one launch on a GPU, whatever they are elsewhere."""
WRITES_ONLY = {"aten::copy_", "aten::fill_", "aten::zero_"}
"""Operations in place that do not read what they change."""
READS_NOTHING = ("new_", "zeros_like", "ones_like", "full_like")
"""Operations of which the tensor they are given only says what the result is like begin with one of these."""
MOVES_NOTHING = {"aten::_unsafe_view", "aten::detach", "aten::lift_fresh"}
"""And are not marked as views."""


class Launch(NamedTuple):
    """One kernel of Triton, or one operation of ATen."""

    name: str
    """The kernel's function, such as `walk_kernel`, or the operation with its namespace, such as `aten::sum`."""
    bytes: int


@contextmanager
def record(execute: bool = True) -> Iterator[list[Launch]]:
    """The launches of all threads, in their order, until it is left."""
    launches: list[Launch] = []
    with _triton_launches(launches, execute), _Operations(launches):
        yield launches


@contextmanager
def _triton_launches(launches: list[Launch], execute: bool) -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    before = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]
    for kind, run in before:
        kind.run = _counting(run, launches, execute)
    try:
        yield
    finally:
        for kind, run in before:
            kind.run = run


def _counting(run: Callable[..., Any], launches: list[Launch], execute: bool) -> Callable[..., Any]:
    @wraps(run)
    def counted(self: Any, *args: Any, **options: Any) -> Any:
        arguments = dict(zip(self.arg_names, args, strict=False)) | options
        passed = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        moved = sum(tensor.nbytes * (2 if name.endswith("_inout_ptr") else 1) for name, tensor in passed.items())
        launches.append(Launch(self.fn.__name__, moved))
        if not execute:
            return None
        # The interpreter moves tensors about with operations of its own.
        with _disable_current_modes():
            return run(self, *args, **options)

    return counted


class _Operations(TorchDispatchMode):
    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if func.namespace == "baton" and name not in SINGLE:
            # Past the functions for meta tensors, which would tell shapes and launch nothing.
            key = torch._C.DispatchKey.CUDA if _on_gpu(args) else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        moved = _moved(func._schema, args, kwargs, result)
        if moved:
            self.launches.append(Launch(name, moved))
        return result


def _on_gpu(args: Any) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in args)


def _moved(schema: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes; 0 for what is no launch."""
    views = any(returned.alias_info is not None and not returned.alias_info.is_write for returned in schema.returns)
    if views or "empty" in schema.name or schema.name in MOVES_NOTHING:
        return 0
    moved: list[Any] = []
    arguments = [] if schema.name.removeprefix("aten::").startswith(READS_NOTHING) else schema.arguments
    for place, argument in enumerate(arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if not (changed and (argument.is_out or schema.name in WRITES_ONLY)):
            moved.append(value)
        if changed:
            moved.append(value)
    for value, returned in zip([result] if len(schema.returns) == 1 else result or (), schema.returns, strict=True):
        if returned.alias_info is None:
            moved.append(value)
    return sum(leaf.nbytes for leaf in tree_leaves(moved) if isinstance(leaf, Tensor))
