"""What Megatron's cp group is to the operations of `parallel`: a layout, and a group beside it for states that travel."""

from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from ...kernels.documents import Documents, pack_documents
from ...parallel.layout import Layout
from ...parallel.mesh import give_up_as_the_default_group

_made: WeakValueDictionary[tuple[str, tuple[int, ...]], dist.ProcessGroup] = WeakValueDictionary()
"""Groups by what they are for and the ranks in them, in the default group; as long as a module has one."""


def cp_layout(group: dist.ProcessGroup) -> Layout:
    """Megatron's: `get_batch_on_this_cp_rank` gives rank r the chunks r and 2R - 1 - r of a sequence."""
    return Layout("zigzag" if group.size() > 1 else "contiguous", group.size())


def state_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of the ranks of `group`, for exchanges that run beside the computation.

    Collectives of two threads, or streams, on one group would meet the wrong partners.
    """
    return _make("states", dist.get_process_group_ranks(group), group)


def group_of_neighbours(group: dist.ProcessGroup, size: int) -> dist.ProcessGroup:
    """This rank's run of `size` ranks of a group; where that is all of it, the group."""
    ranks = dist.get_process_group_ranks(group)
    if size == len(ranks):
        return group
    first = dist.get_rank(group) // size * size
    return _make("neighbours", ranks[first : first + size], group)


def _make(purpose: str, ranks: list[int], within: dist.ProcessGroup) -> dist.ProcessGroup:
    """All of `within` must call it, the first time, and no others: other stages of a pipeline may have no layer that needs one.

    Raises ValueError where they have not made as many groups before, by which torch names a group of some ranks.
    """
    key = purpose, tuple(ranks)
    made = _made.get(key)
    if made is None or made not in dist.distributed_c10d._world.pg_map:
        counts = [0] * dist.get_world_size(within)
        dist.all_gather_object(counts, len(dist.distributed_c10d._world.pg_names), within)
        if len({*counts}) > 1:
            raise ValueError(
                f"ranks {dist.get_process_group_ranks(within)} are in {counts} process groups, allowed: as many each; make groups "
                "that only some of them are in after the model"
            )
        default = dist.distributed_c10d._get_default_group()
        # Bound to a device, the default group would be split for it, which all its ranks have to call.
        bound = default.bound_device_id
        if bound is not None:
            default.bound_device_id = None
        try:
            made = dist.new_group(ranks, use_local_synchronization=True, group_desc=purpose)
        finally:
            if bound is not None:
                default.bound_device_id = bound
        give_up_as_the_default_group(made, "cuda" if dist.get_backend() == "nccl" else "cpu")
        _made[key] = made
    return made


def read_documents(packed: Any, length: int, layout: Layout, device: torch.device) -> Documents | None:
    """Of Megatron's `PackedSeqParams`, for the [1, length] tokens of a rank; None for None. Raises ValueError over cp.

    Tokens after the last boundary are padding, a document of their own, as Megatron takes them. What was read is kept beside the
    boundaries: reading them, the host waits.
    """
    if packed is None:
        return None
    if layout.ranks > 1:
        raise ValueError(
            f"packed sequences (thd) over context parallel {layout.ranks}: Megatron cuts each document by itself, which this spec "
            "does not take; allowed: context_parallel_size 1, or sequences that are not packed"
        )
    known = getattr(packed, "_baton_documents", None)
    if known is None:
        boundaries = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        # A boundary may be there twice: Megatron fills such lists up.
        row = sorted({0, *boundaries.tolist(), length})
        known = packed._baton_documents = pack_documents([row], torch.arange(length, device=device))
    return known
