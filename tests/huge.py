"""Tensors larger than memory: what integers in kernels that overflow are looked for with."""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

MAP_NORESERVE = 0x4000  # Linux; Python's mmap has no name for it before 3.13


def huge_tensor(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
    """A tensor of zeros that takes no memory but where it is written; contiguous, or of the given strides (in elements).

    With strides beyond what its shape needs, few elements lie as far apart as those of a long sequence.
    """
    stride = torch.empty(shape, device="meta").stride() if stride is None else stride
    elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
    return memory.as_strided(shape, stride)
