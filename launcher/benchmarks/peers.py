"""Other projects' kernels for the same operation, where they can be imported."""

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .kernel_cases import Operands

Call = Callable[..., tuple[Tensor, ...]]


class Peer(NamedTuple):
    """Another implementation of the case `operation`."""

    name: str
    operation: str
    prepare: Callable[[Operands], Operands]
    """Makes of the case's operands its own."""
    call: Call


def find(folder: Path | None) -> tuple[list[Peer], list[str]]:
    """Those that can be imported, also from `folder`, and a line for each that cannot."""
    if folder is not None:
        sys.path.append(str(folder))
    found, missing = [], []
    for name, operation, module, prepare, make in PEERS:
        try:
            found.append(Peer(name, operation, prepare, make(import_alone(module))))
        except Exception as error:
            missing.append(f"{name} is left out: {type(error).__name__}: {error}")
    return found, missing


def import_alone(name: str) -> ModuleType:
    """The module; where its package fails, without what the package itself imports, such as extensions that are not built."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except Exception:
        spec = PathFinder.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        del sys.modules[module]
    stub = ModuleType(package)
    stub.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = stub
    return importlib.import_module(name)


def _mamba_ssm(module: Any) -> Call:
    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> tuple[Tensor, ...]:
        return (module.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True),)

    return call


def _fla(module: Any) -> Call:
    return lambda q, k, v, g: (module.chunk_simple_gla(q, k, v, g, scale=1.0)[0],)


def _simple_gla(operands: Operands) -> Operands:
    """Queries, keys, values and logarithms of decays: softplus, dt x, A dt and the groups' repetition are done before, D is not."""
    x, dt, A, B, C, _, dt_bias = (operand.detach() for operand in operands)
    step = F.softplus(dt.float() + dt_bias)
    keys, queries = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    return [queries, keys, (x * step[..., None]).to(x.dtype), A * step]


PEERS = [
    ("mamba_ssm", "ssd", "mamba_ssm.ops.triton.ssd_combined", lambda operands: operands, _mamba_ssm),
    ("fla", "ssd", "fla.ops.simple_gla.chunk", _simple_gla, _fla),
]
