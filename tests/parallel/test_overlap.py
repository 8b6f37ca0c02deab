"""What is on the wire does not hold up what needs nothing of it, in forward and in backward."""

import time

import pytest
import torch
import torch.distributed as dist

from baton.models.mixers.mamba2 import Mamba2
from baton.parallel.affine_scan import SequenceScan
from baton.parallel.halo import SequenceHalo
from baton.parallel.layout import Layout
from baton.parallel.segments import Passing
from helpers import relative_error, tiny_config

DELAY = 0.4
"""Seconds that each exchange is made to last: far more than the work of the whole mixer."""


class Log:
    """What happened when."""

    def __init__(self):
        self.times = {}

    def __call__(self, name):
        self.times.setdefault(name, []).append(time.monotonic())

    def forward(self, name):
        return lambda *_: self(f"{name} forward")

    def backward(self, name):
        return lambda *_: self(f"{name} backward")


def build(rank, layout):
    config = tiny_config(["precision=fp64"])
    torch.manual_seed(0)
    mixer = Mamba2(config.model).double()
    for parameter in mixer.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    mixer.ssm.scan = SequenceScan(layout, dist.group.WORLD, "sliced")
    mixer.conv.halo = SequenceHalo(layout, dist.group.WORLD)
    u = torch.randn(1, 48, config.model.d_model, dtype=torch.float64)
    return mixer, layout.shard(u, rank).requires_grad_()


def step(mixer, u):
    y = mixer(u)
    y.square().sum().backward()
    return [y.detach(), u.grad, *(p.grad for p in mixer.parameters())]


def delayed(rank, layout):
    """Outcomes without and with delays, and what happened when."""
    plain = step(*build(rank, layout))
    mixer, u = build(rank, layout)
    log, scan, wait = Log(), mixer.ssm.scan, Passing.wait
    run, start = scan.run, scan.start

    def slow_run(*arguments):
        time.sleep(DELAY)
        out = run(*arguments)
        log("states arrive")
        return out

    def slow_wait(passing):
        log("halo needed")
        return wait(passing)

    def logged_start(*arguments, **options):
        log("states leave")
        return start(*arguments, **options)

    scan.run, scan.start = slow_run, logged_start
    for name in ("z_proj", "dt_proj", "out_proj"):
        projection = getattr(mixer, name)
        projection.register_forward_hook(log.forward(name))
        projection.weight.register_hook(log.backward(name))
    started = SequenceHalo.pass_on

    def logged_pass_on(*arguments):
        log("halo leaves")
        return started(*arguments)

    Passing.wait, SequenceHalo.pass_on = slow_wait, logged_pass_on
    try:
        slow = step(mixer, u)
    finally:
        Passing.wait, SequenceHalo.pass_on = wait, started
    return plain, slow, log.times


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_work_goes_on_while_states_travel(pool, kind):
    """The z projection runs between the states' leaving and their arrival, the dt projection while the halo travels."""
    for plain, slow, times in pool.run(2, delayed, Layout(kind, 2)):
        for one, other in zip(slow, plain, strict=True):
            assert relative_error(one, other) <= 1e-14
        for direction, index in (("forward", 0), ("backward", 1)):
            (z,), (dt,) = times[f"z_proj {direction}"], times[f"dt_proj {direction}"]
            assert times["states leave"][index] < z < times["states arrive"][index] - DELAY / 2
            assert times["halo leaves"][index] < dt < times["halo needed"][index]
            assert times["states arrive"][index] - times["states leave"][index] >= DELAY
