"""torch's own grouped product, where that is one kernel.

`F.grouped_mm` of torch 2.11 to 2.13 takes bf16, fp16 and fp32, but has a kernel (CUTLASS, offsets read on the device, no wait of
the host) only for bf16 on compute capabilities 9.x and 10.x, with rows of a multiple of 16 bytes and fewer than 1024 groups.
Anywhere else, ROCm included, it copies the offsets to the host, waits, and loops over the groups. On 10.x the weights' gradient of
an expert without tokens is whatever the accumulator held (pytorch issue 172439, CUTLASS issue 2674). So it serves on 9.x.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_matmul` is one kernel, forward and backward, and right."""
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device)[0] != 9:
        return False
    aligned = x.is_contiguous() and weight.is_contiguous() and not any(size % 8 for size in weight.shape[1:])
    return x.dtype == weight.dtype == torch.bfloat16 and aligned and len(x) > 0 and len(weight) < 1024


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Arguments as `op.grouped_linear`."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
