"""What the kernels are compiled for, where their host code must know: the device of this PyTorch, or one that is not here."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

Backend = Literal["cuda", "hip"]

_backend: Backend = "hip" if torch.version.hip else "cuda"
_generation: int | None = None


@contextlib.contextmanager
def compiled_for(backend: Backend, generation: int = 9) -> Iterator[None]:
    """Host code prepares launches for `backend` for a while: what compiling ahead of time, without the device, needs.

    generation: of NVIDIA's devices, the first part of the compute capability.
    """
    global _backend, _generation
    before = _backend, _generation
    _backend, _generation = backend, generation
    try:
        yield
    finally:
        _backend, _generation = before


def generation(device: torch.device) -> int:
    """NVIDIA's compute capability in whole numbers (8 Ampere, 9 Hopper, 10 Blackwell); 0 on AMD, 9 where no device is."""
    if _backend == "hip":
        return 0
    if _generation is not None or device.type != "cuda":
        return _generation or 9
    return torch.cuda.get_device_capability(device)[0]


def input_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of a `tl.dot` whose operands are `dtype`.

    fp32 goes through tensor cores in three TF32 products, which keep about fp32's accuracy; AMD's have no such mode, and there
    the products are plain fp32. What 16 bits hold is exact either way.
    """
    return "tf32x3" if dtype == torch.float32 and _backend == "cuda" else "ieee"
