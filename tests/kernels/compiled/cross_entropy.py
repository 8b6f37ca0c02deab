"""The softmax of a chunk of logits: a large vocabulary, one whose rows are not aligned, a rank's part of one, and small ones."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from baton.kernels.cross_entropy.fused import gradient_, statistics
from huge import huge_tensor

SIZES = {"large": (1024, 131072), "unaligned": (2048, 50257), "small": (4096, 1024), "smallest": (4096, 100)}


def _both(logits: Tensor, labels: Tensor, first_row: int) -> None:
    found = statistics(logits, labels, first_row)
    gradient_(logits, labels, found[0], found[1], first_row, -100)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for name, (rows, columns) in SIZES.items():
            logits = torch.empty(rows, columns, dtype=dtype, device="meta")
            labels = torch.empty(rows, dtype=torch.int64, device="meta")
            yield f"{name} {str(dtype).removeprefix('torch.')}", lambda a=logits, b=labels: _both(a, b, 0)
    logits = torch.empty(8192, 16384, dtype=torch.bfloat16, device="meta")
    yield "shard bfloat16", lambda: _both(logits, torch.empty(8192, dtype=torch.int64, device="meta"), 3 * 16384)


def huge() -> Iterator[tuple[str, Callable[[], object]]]:
    logits = huge_tensor((262144, 100), torch.bfloat16, (131072, 1))
    labels = torch.full((262144,), 7 * 2**32 + 5)
    yield "rows far apart", lambda: _both(logits, labels, 7 * 2**32)
