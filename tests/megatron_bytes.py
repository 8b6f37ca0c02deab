"""Our mixer beside Megatron's own over cp: the same weights and tokens, and what each sends.

As a script it prints the table of docs/megatron.md:

    PYTHONPATH=tests python -P tests/megatron_bytes.py
"""

import interpreter  # isort: skip  # noqa: F401  # first: before whatever imports triton

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from megatron_cpu import megatron_on_cpu
from torch import Tensor, nn
from torch.nn import functional as F

from baton.kernels.conv import causal_conv
from baton.kernels.ssd import ssd
from baton.parallel.recorder import record


class Sizes(NamedTuple):
    """Of a mixer, and of a sequence."""

    d: int
    heads: int
    head_dim: int
    state_dim: int
    groups: int
    tokens: int

    @property
    def inner(self) -> int:
        """Channels."""
        return self.heads * self.head_dim


class Found(NamedTuple):
    """Of one mixer on one rank."""

    out: Tensor
    gradients: dict[str, Tensor]
    """Of its parameters, summed over cp, and of its input."""
    sent: int
    rounds: int
    """Forward and backward together."""


class _Norm(nn.Module):
    """Stands for mamba_ssm's gated norm, whose gate the scan has applied."""

    def __init__(self, channels: int, eps: float, group_size: int, **_: Any) -> None:
        super().__init__()
        self.weight, self.eps, self.group_size = nn.Parameter(torch.ones(channels)), eps, group_size

    def forward(self, y: Tensor, z: None = None) -> Tensor:
        """[l, b, channels]."""
        grouped = y.unflatten(-1, (-1, self.group_size))
        return F.rms_norm(grouped, (self.group_size,), eps=self.eps).flatten(-2) * self.weight


def _scan(zxbcdt: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, **options: Any) -> Tensor:
    """Stands for mamba_ssm's, by ours: convolution, scan and gate."""
    heads, groups, p = len(A), options["ngroups"], options["headdim"]
    z, xbc, dt = zxbcdt.split([heads * p, len(weight), heads], -1)
    n = (len(weight) - heads * p) // (2 * groups)
    x, B, C = causal_conv(xbc.contiguous(), weight, bias).split([heads * p, groups * n, groups * n], -1)
    B, C = (t.unflatten(-1, (groups, n)) for t in (B, C))
    y = ssd(x.unflatten(-1, (heads, p)), dt, A, B, C, D, dt_bias)
    return y.flatten(2) * F.silu(z)


@contextlib.contextmanager
def their_mixer() -> Iterator[Any]:
    """Megatron's MambaMixer, which mamba_ssm, not here, would compute."""
    import megatron.core.ssm.mamba_mixer as module

    stand_ins = {"HAVE_MAMBA_SSM": True, "mamba_split_conv1d_scan_combined": _scan, "ExtendedRMSNorm": _Norm}
    with contextlib.ExitStack() as stack:
        for name, value in stand_ins.items():
            stack.enter_context(mock.patch.object(module, name, value, create=True))
        yield module.MambaMixer


def both(rank: int, sizes: Sizes, strategy: str) -> tuple[Found, Found]:
    """Theirs and ours over all ranks as cp."""
    with megatron_on_cpu(), their_mixer() as MambaMixer:
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer import TransformerConfig

        from baton.models.megatron import Mamba2Mixer, Mamba2MixerSubmodules

        ranks = dist.get_world_size()
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(context_parallel_size=ranks)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=sizes.d,
            num_attention_heads=1,
            mamba_num_heads=sizes.heads,
            mamba_head_dim=sizes.head_dim,
            mamba_state_dim=sizes.state_dim,
            mamba_num_groups=sizes.groups,
            add_bias_linear=False,
            normalization="RMSNorm",
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            context_parallel_size=ranks,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        torch.manual_seed(0)
        linear = ColumnParallelLinear, RowParallelLinear
        options = {"d_model": sizes.d, "layer_number": 1, "pg_collection": groups}
        theirs = MambaMixer(config, MambaMixerSubmodules(*linear), **options)
        ours = Mamba2Mixer(config, Mamba2MixerSubmodules(*linear), strategy=strategy, **options)
        # By name: what they are called is the same.
        ours.load_state_dict(theirs.state_dict())
        u = torch.randn(sizes.tokens, 1, sizes.d, generator=torch.Generator().manual_seed(1))
        return _run(theirs, u, ranks, rank), _run(ours, u, ranks, rank)


def _run(mixer: Any, whole: Tensor, ranks: int, rank: int) -> Found:
    """Zigzag, as Megatron cuts sequences."""
    chunks = whole.chunk(2 * ranks)
    u = torch.cat([chunks[rank], chunks[-1 - rank]]).requires_grad_()
    with record() as traffic:
        out, _ = mixer(u)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    return Found(out.detach(), gradients | {"input": u.grad}, traffic.sent, traffic.rounds)


def main() -> None:
    """Prints the table."""
    from pool import WorkerPool

    sizes = Sizes(d=1024, heads=32, head_dim=64, state_dim=128, groups=8, tokens=8192)
    pool = WorkerPool()
    print("| cp | Megatron: MiB | rounds | state passing: MiB | rounds | ratio |\n| --- | --- | --- | --- | --- | --- |")  # noqa: T201
    for ranks in (2, 4, 8):
        found = pool.run(ranks, both, sizes, "auto")
        theirs, ours = (max(rank[which].sent for rank in found) / 2**20 for which in (0, 1))
        rounds = [max(rank[which].rounds for rank in found) for which in (0, 1)]
        print(f"| {ranks} | {theirs:.1f} | {rounds[0]} | {ours:.2f} | {rounds[1]} | {theirs / ours:.0f} |")  # noqa: T201
    pool.stop()


if __name__ == "__main__":
    main()
