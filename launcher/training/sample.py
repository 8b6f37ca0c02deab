"""A continuation by the full forward: every new token runs the whole window again. Slow, needs no state, works on any mesh."""

import torch
import torch.distributed as dist
from torch import nn

from ...parallel.layout import Layout
from ...parallel.mesh import Mesh

WINDOW = 256
"""Tokens that the continuation sees, at most."""


@torch.no_grad()
def continue_greedily(model: nn.Module, ids: list[int], count: int, layout: Layout, mesh: Mesh, device: torch.device) -> list[int]:
    """The `count` most likely tokens after `ids`, one after another; every rank must call it and gets the same."""
    segments = len(layout.owners)
    length = max(WINDOW // segments, 8) * segments
    own = layout.positions(mesh.rank("cp"), length).to(device)
    # One document, which data that is packed must be told.
    documents = layout.documents([[0, length]], mesh.rank("cp"), device)
    ids = list(ids)
    for _ in range(count):
        seen = ids[-length:]
        window = torch.tensor([seen + [0] * (length - len(seen))], device=device)
        logits = model(window[:, own], positions=own, documents=documents)
        # Only the rank that holds the last token knows what follows; the tokens after it are padding, which it cannot see.
        here = (own == len(seen) - 1).nonzero()
        following = logits[0, here[0, 0]].argmax() if len(here) else torch.zeros((), dtype=torch.int64, device=device)
        dist.all_reduce(following, group=mesh.group("cp"))
        ids.append(int(following))
    return ids[-count:] if count else []
