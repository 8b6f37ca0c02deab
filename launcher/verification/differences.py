"""How far tensors are from their references, over all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from .steps import Found

Errors = dict[str, dict[str, float]]
"""By quantity and name: the largest difference over the largest reference value, or the largest difference where that is 0."""


class Differences:
    """Collects the errors of one run. Whatever is not finite becomes an error of inf or nan, which is within no tolerance."""

    def __init__(self) -> None:
        self.largest: dict[tuple[str, str], Tensor] = {}

    def add(self, found: Found, reference: Tensor) -> None:
        """Of a tensor and its reference, both on one device. Raises ValueError for different shapes."""
        if found.tensor.shape != reference.shape:
            shapes = f"{list(found.tensor.shape)}, not {list(reference.shape)}"
            raise ValueError(f"{found.quantity} of {found.name}: {shapes}")
        difference = (found.tensor.double() - reference.double()).abs().max()
        # The maximum over ranks says nothing of nan.
        self.largest[found.quantity, found.name] = torch.stack([difference, reference.double().abs().max()]).nan_to_num(
            nan=torch.inf, posinf=torch.inf
        )

    def errors(self, over_ranks: bool) -> Errors:
        """The errors; `over_ranks`: the largest over all ranks of the default group, which all must call it."""
        largest = torch.stack(list(self.largest.values()))
        if over_ranks:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        errors: Errors = {}
        for (quantity, name), (difference, scale) in zip(self.largest, largest.tolist(), strict=True):
            errors.setdefault(quantity, {})[name] = difference / (scale or 1.0)
        return errors
