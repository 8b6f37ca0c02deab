"""A continuation by the full forward: every new token runs the whole window again. Slow, needs no state, works on any mesh."""

import torch
import torch.distributed as dist
from torch import Tensor

from ...models.hybrid import MicroStep
from ...models.stages import Stages
from ...parallel.layout import Layout

WINDOW = 256
"""Tokens that the continuation sees, at most."""


@torch.no_grad()
def continue_greedily(stages: Stages, ids: list[int], count: int) -> list[int]:
    """The `count` most likely tokens after `ids`, one after another; every rank must call it and gets the same."""
    mesh, device = stages.mesh, stages.device
    layout = Layout(stages.config.parallel.layout, mesh.size("cp"))
    length = _window(len(layout.owners), mesh.size("tp"))
    own = layout.positions(mesh.rank("cp"), length).to(device)
    # One document, which data that is packed must be told.
    documents = layout.documents([[0, length]], mesh.rank("cp"), device)
    ids = list(ids)
    for _ in range(count):
        seen = ids[-length:]
        window = torch.tensor([seen + [0] * (length - len(seen))], device=device)
        logits = stages.forward(MicroStep(window[:, own], None, own, documents))
        # Only the rank that holds the last token knows what follows; the tokens after it are padding, which it cannot see.
        here = (own == len(seen) - 1).nonzero()
        following = torch.zeros((), dtype=torch.int64, device=device)
        if isinstance(logits, Tensor) and len(here) and mesh.rank("dp") == 0:
            following = logits[0, here[0, 0]].argmax()
        dist.all_reduce(following, group=mesh.group("pp_dp_cp"))
        ids.append(int(following))
    return ids[-count:] if count else []


def _window(segments: int, tp: int) -> int:
    """About WINDOW tokens: as many in each segment, which tp ranks can share out."""
    each = max(WINDOW // segments, 8)
    return segments * (each + -each % tp)
