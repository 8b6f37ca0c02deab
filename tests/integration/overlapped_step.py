"""Run as each of two ranks with a slow link between them: what a Mamba-2 mixer's step costs, and what its parts do.

The last rank prints the least milliseconds as JSON: of the step, of the same step with nothing on the wire, and of the exchanges
alone.
"""

import json
import sys
import time

import torch
import torch.distributed as dist

from baton.configs.loading import load_config
from baton.kernels.scan import Done
from baton.launcher.environment import process_group
from baton.models.mixers.mamba2 import Mamba2
from baton.parallel.affine_scan import SequenceScan
from baton.parallel.halo import SequenceHalo
from baton.parallel.layout import Layout

SIZES = "model.mamba2={head_dim: 64, state_dim: 64, groups: 1, chunk_size: 64}"
TOKENS, WIDTH, REPEATS = 2048, 768, 7


class Nothing(SequenceScan):
    """A scan that exchanges nothing: only what a rank computes."""

    def start(self, T, U, initial, reverse=False, transition=None):
        """Zeros, as if they had come at once."""
        return Done((torch.zeros_like(U), None))


class NoHalo(SequenceHalo):
    """A halo of zeros."""

    def start(self, tails):
        """Zeros, as if they had come at once."""
        return Done(torch.zeros_like(tails))


def step(mixer, u):
    """Forward and backward."""
    mixer(u).square().sum().backward()
    mixer.zero_grad()


def exchanges(mixer, u):
    """Halo and states there and back, one after another, of the sizes of the step."""
    b, heads, p, n = 1, mixer.ssm.A_log.shape[0], mixer.head_dim, mixer.state_dim
    tails = torch.zeros(b, 1, mixer.conv.reach, 2 * u.shape[-1] + 2 * n)
    decays, states = torch.zeros(b, 1, heads), torch.zeros(b, 1, heads, p, n)
    for reverse in (False, True):
        mixer.conv.halo.start(tails).wait()
        mixer.ssm.scan.start(decays, states, None, reverse).wait()


def milliseconds(function, *arguments):
    """Of one call on the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    function(*arguments)
    dist.barrier()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group() as environment:
        layout, group = Layout("contiguous", environment.world), dist.group.WORLD
        mixer = Mamba2(load_config("quickstart", [f"model.d_model={WIDTH}", SIZES]).model)
        for parameter in mixer.parameters():
            torch.nn.init.uniform_(parameter, -0.02, 0.02)
        u = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
        # A group of its own, as `parallel.mesh` makes it.
        states = dist.new_group()
        real = SequenceScan(layout, states, "ring"), SequenceHalo(layout, group)
        none = Nothing(layout, states), NoHalo(layout, group)
        times = {"compute": [], "exchanges": [], "step": []}
        # In turn, so that whatever else the machine does falls on all three; the first round warms up.
        for _ in range(REPEATS + 1):
            mixer.ssm.scan, mixer.conv.halo = none
            times["compute"].append(milliseconds(step, mixer, u))
            mixer.ssm.scan, mixer.conv.halo = real
            times["exchanges"].append(milliseconds(exchanges, mixer, u))
            times["step"].append(milliseconds(step, mixer, u))
    if environment.rank == environment.world - 1:
        sys.stdout.write(json.dumps({name: min(values[1:]) for name, values in times.items()}))
