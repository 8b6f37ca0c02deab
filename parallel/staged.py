"""The backend "staged": collectives for ranks that share one device, which NCCL refuses; tensors travel through the host over gloo.

It is there to verify: device kernels and sharding run together where one GPU is all there is. Every group made from a staged
default group is staged too, so DeviceMesh, DTensor and FSDP need not know, and what gloo can do is what it can do. Tested with
tensors on the CPU, which are copied in the same way; it has not been run on a GPU.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "staged"

_REDUCE = ["allreduce", "allreduce_coalesced", "reduce", "reduce_scatter"]
_REDUCE += ["_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"]
_GATHER = ["allgather", "gather", "_allgather_base", "all_gather_single"]
_GATHER += ["allgather_into_tensor_coalesced", "all_gather_single_coalesced"]
_HAND_ON = ["broadcast", "scatter", "alltoall", "alltoall_base", "all_to_all_single", "recv", "recv_anysource"]
"""Methods of a process group, under their names before and since torch 2.13, whose first argument is what they write."""


def register() -> None:
    """Makes the backend known to torch.distributed; a second call does nothing."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])


class StagedGroup(dist.ProcessGroup):
    """A process group whose operations copy their tensors to the host, run over gloo, and copy back when they are waited for."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        # The constructor that subclasses have to use; torch's stub knows only the other one.
        super().__init__(rank, size)  # type: ignore[call-arg]
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.host = dist.ProcessGroup(store, rank, size)
        for group, devices in ((self.host, ["cpu"]), (self, ["cpu", "cuda"])):
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            for device in devices:
                group._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, gloo)

    def send(self, tensors: list[Tensor], target: int, tag: int) -> dist.Work:
        """To a rank of the group, which receives with the same tag."""
        return self.host.send([_to_host(tensor) for tensor in tensors], target, tag)

    def barrier(self, opts: Any = None) -> dist.Work:
        """Of the processes; the device is not waited for."""
        return self.host.barrier(timeout=opts.timeout if opts else None)


class _Staged(dist.Work):
    """An operation under way on the host's copies."""

    def __init__(self, work: dist.Work, written: list[Tensor], copies: list[Tensor]) -> None:
        super().__init__()
        self.work, self.written, self.copies = work, written, copies

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Waits for the host, then fills the tensors; `timeout` 0 is the group's."""
        self.work.wait(timeout)
        with torch.no_grad():
            for tensor, copy in zip(self.written, self.copies, strict=True):
                # A real backend writes without telling autograd.
                tensor.data.copy_(copy)
        self.written, self.copies = [], []
        return True

    def is_completed(self) -> bool:
        """Whether the tensors are filled; they are as soon as this finds the host done."""
        return self.work.is_completed() and self.wait()


def _staged(name: str) -> Callable[..., dist.Work]:
    def run(self: StagedGroup, *args: Any) -> dist.Work:
        on_host = tree_map_only(Tensor, _to_host, args)
        work = getattr(self.host, name)(*on_host)
        return _Staged(work, _tensors(args[0]), _tensors(on_host[0]))

    return run


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _tensors(argument: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)]


for _name in (*_REDUCE, *_GATHER, *_HAND_ON):
    if hasattr(dist.ProcessGroup, _name):
        setattr(StagedGroup, _name, _staged(_name))
