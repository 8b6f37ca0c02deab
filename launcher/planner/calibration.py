"""Measures what the machine at hand attains, for plans: matrices, experts, attention, the scan, element-wise work, and the link."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ...configs.schema import AttentionConfig, ModelConfig
from ...kernels.attention import causal_attention
from ...kernels.conv import causal_conv
from ...kernels.moe import grouped_linear
from ...kernels.norm import gated_group_rms_norm, rms_norm
from ...kernels.selective_scan import selective_scan
from ...kernels.ssd import ssd
from ...kernels.swiglu import swiglu
from ...models.flops import FLOPS, TRAINING, Work
from ...models.parallelize import COMPUTE_DTYPES
from ..benchmarks.exchange import measure_link
from ..benchmarks.report import console
from ..benchmarks.report import link as describe_link
from ..environment import Environment, launch, process_group
from ..errors import under_torchrun
from .machine import CPU, MEMORY, GiB, Measured, find_gpu, read_rates, write_rates

Precision = Literal["fp32", "bf16", "fp64"]
SECONDS = 1.0
"""That each rate is measured for, at least three times."""


class Sizes(NamedTuple):
    """Of what is measured: large enough to fill the device."""

    tokens: int
    d_model: int
    heads: int
    head_dim: int


SIZES = {"cuda": Sizes(16384, 4096, 32, 128), "cpu": Sizes(2048, 256, 4, 64)}
EXPERTS = 8


def calibrate(path: Path, precision: Precision, command: Sequence[str]) -> bool:
    """Adds what the machine attains in one precision to the file, and prints it. Raises UserError where the file cannot be used.

    All ranks of the machine measure at once, since they share its memory: command, with which `baton` comes here, is started for
    each, unless this process is one of them or there is one GPU. Returns whether this process goes on to plan.
    """
    known = read_rates(path) if path.exists() else []
    if not under_torchrun():
        # Whether the file can be written is known before anything is measured.
        write_rates(path, known)
    ranks = torch.cuda.device_count() or 2
    if under_torchrun() or ranks == 1:
        with process_group() as environment:
            _calibrate_together(path, precision, known, environment)
    else:
        launch(command, ranks)
    return not under_torchrun()


def _calibrate_together(path: Path, precision: Precision, known: list[Measured], environment: Environment) -> None:
    device = environment.device
    group = dist.group.WORLD
    assert group is not None
    link = measure_link(group, device, quick=True) if environment.world > 1 else None
    rates = measure_rates(device, COMPUTE_DTYPES[precision])
    slowest = torch.tensor([*rates.values()], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MIN)
    if not environment.leads:
        return
    rates = dict(zip(rates, slowest.tolist(), strict=True))
    place = {"latency": link.latency, "bandwidth": link.bandwidth} if link else {}
    entry = Measured(device=_name(device), precision=precision, rates=rates, memory=_memory(device) / GiB, **place)
    others = [each for each in known if (each.device, each.precision) != (entry.device, precision)]
    write_rates(path, [*others, entry])
    console.print(
        f"{entry.device} in {precision}, {environment.world} rank{'s' * (environment.world > 1)} at once:", soft_wrap=True
    )
    for name, rate in rates.items():
        console.print(f"  {name}: {rate / 1e9:.3g} {'GB/s' if name == MEMORY else 'GFLOP/s'}", soft_wrap=True)
    console.print(f"  link: {describe_link(link) if link else 'not measured, there is one rank'}", soft_wrap=True)
    console.print(f"Wrote {path}.", soft_wrap=True)


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of each kind of work, forward and backward together, and bytes/s of element-wise work, in one process.

    On a CPU with one thread, as workers run that share its cores.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        sizes = SIZES[device.type]
        return {name: amount / _seconds(step, device) for name, (amount, step) in _cases(sizes, device, dtype).items()}
    finally:
        torch.set_num_threads(threads)


Case = tuple[float, Callable[[], Tensor]]
"""FLOPs of a forward and a backward, or bytes; and the forward."""


def _cases(s: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    t, d, inner, hidden = s.tokens, s.d_model, 2 * s.d_model, 4 * s.d_model
    attention = AttentionConfig(heads=s.heads, kv_heads=s.heads, head_dim=s.head_dim)
    model = ModelConfig(pattern="M*", vocab_size=1, d_model=d, attention=attention)
    x, weight, experts = draw(t, d), draw(hidden, d), draw(EXPERTS, hidden, d)
    counts = torch.full((EXPERTS,), t // EXPERTS, device=device)
    q, k, v = (draw(1, t, s.heads, s.head_dim) for _ in range(3))
    heads, n = inner // 64, model.mamba2.state_dim
    inputs, dt, B, C = draw(1, t, heads, 64), draw(1, t, heads), draw(1, t, 1, n), draw(1, t, 1, n)
    A = -torch.ones(heads, device=device, dtype=torch.promote_types(dtype, torch.float32))
    conv_weight, conv_bias, channels = draw(inner, 4), draw(inner), draw(1, t, inner)
    gate, up, norm_weight, gated_weight, hidden_states = draw(t, hidden), draw(t, hidden), draw(d), draw(inner), draw(t, d)

    def passes() -> Tensor:
        normed = rms_norm(hidden_states, norm_weight, 1e-5)
        gated = gated_group_rms_norm(channels, channels, gated_weight, inner, 1e-5)
        return normed.sum() + gated.sum() + swiglu(gate, up).sum()

    steps, rates, B1, C1 = draw(1, t, inner), -torch.ones(inner, 16, device=device, dtype=A.dtype), draw(1, t, 16), draw(1, t, 16)
    mixed = {kind: FLOPS[kind](model, t) for kind in ("mamba2", "mamba", "attention")}
    conv_flops = 2 * t * 4 * inner
    return {
        Work.MATMUL: (TRAINING * 2 * t * d * hidden, lambda: F.linear(x, weight)),
        Work.EXPERTS: (TRAINING * 2 * t * d * hidden, lambda: grouped_linear(x, experts, counts)),
        Work.ATTENTION: (TRAINING * mixed["attention"][Work.ATTENTION], lambda: causal_attention(q, k, v)),
        Work.SCAN: (TRAINING * mixed["mamba2"][Work.SCAN], lambda: ssd(inputs, dt, A, B, C)),  # type: ignore[return-value, dict-item]
        Work.SELECTIVE_SCAN: (
            TRAINING * mixed["mamba"][Work.SELECTIVE_SCAN],
            lambda: selective_scan(channels, steps, rates, B1, C1),  # type: ignore[return-value, dict-item]
        ),
        Work.CONV: (TRAINING * conv_flops, lambda: causal_conv(channels, conv_weight, conv_bias)),
        # As plans count them: two passes over hidden states, three over what is gated, and twice as many backward.
        MEMORY: (3 * t * (2 * d + 3 * inner + 3 * hidden) * dtype.itemsize, passes),
    }


def _seconds(forward: Callable[[], Tensor], device: torch.device) -> float:
    """The median time of a forward with its backward, after one to warm up."""

    def run() -> float:
        _finish(device)
        start = time.perf_counter()
        out = forward()
        out.backward(torch.ones_like(out))
        _finish(device)
        return time.perf_counter() - start

    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        times.append(run())
    return sorted(times)[len(times) // 2]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return CPU
    name = torch.cuda.get_device_name(device)
    return find_gpu(name) or name


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
