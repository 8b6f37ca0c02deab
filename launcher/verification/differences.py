"""How far tensors are from their references, over all ranks."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...parallel.gradients import local_part

Errors = dict[str, dict[str, float]]
"""By quantity and name: the largest difference over the largest reference value, or the largest difference where that is 0."""

Key = tuple[str, str]
"""A quantity and a name."""


class Differences:
    """Collects the errors of one run, of the keys that it is to have.

    Whatever is not finite becomes an error of inf or nan, which is within no tolerance, and so does what no rank has.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self.largest = dict.fromkeys(keys, torch.tensor([-1.0, 0.0], dtype=torch.float64))

    def add(self, key: Key, found: Tensor, reference: Tensor) -> None:
        """Of a tensor, or this rank's part of one (DTensor), and the whole reference, all on one device.

        Raises ValueError for different shapes.
        """
        if found.shape != reference.shape:
            raise ValueError(f"{key[0]} of {key[1]}: {list(found.shape)}, not {list(reference.shape)}")
        reference, found = _own_part(reference.double(), found), local_part(found).double()
        if not found.numel():
            return
        # The maximum over ranks says nothing of nan.
        both = torch.stack([(found - reference).abs().max(), reference.abs().max()]).nan_to_num(nan=torch.inf, posinf=torch.inf)
        self.largest[key] = torch.maximum(self.largest[key].to(both), both)

    def errors(self, device: torch.device | None = None) -> Errors:
        """The errors; with the device, the largest over all ranks of the default group, which all must call it."""
        largest = torch.stack([both.to(device) for both in self.largest.values()])
        if device is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        errors: Errors = {}
        for (quantity, name), (difference, scale) in zip(self.largest, largest.tolist(), strict=True):
            errors.setdefault(quantity, {})[name] = difference / (scale or 1.0) if difference >= 0 else torch.inf
        return errors


def _own_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that lies where this rank's part of `like` does."""
    if not isinstance(like, DTensor):
        return whole
    # From the last axis to the first: FSDP, whose axes come first, cuts what tp and ep have left.
    for axis, placement in reversed(list(enumerate(like.placements))):
        if isinstance(dim := getattr(placement, "dim", None), int):
            parts = whole.chunk(like.device_mesh.size(axis), dim)
            rank = like.device_mesh.get_local_rank(axis)
            whole = parts[rank] if rank < len(parts) else whole.narrow(dim, 0, 0)
    return whole
