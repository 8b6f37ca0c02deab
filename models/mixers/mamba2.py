"""The Mamba-2 mixer (Dao and Gu, arXiv 2405.21060): short convolution, SSD scan, gated norm.

Projections that shard differently are separate parameters. B and C are one, its rows ordered group by group (B then C of
each), so that cutting between groups is cutting rows.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...configs.schema import ModelConfig
from ...kernels.conv import causal_conv
from ...kernels.documents import Documents
from ...kernels.scan import LocalScan, Scan
from ...kernels.ssd import SSDInFlight, start_ssd
from ...parallel.halo import Halo, SequenceHalo
from ..initialization import Initializers, ones, uniform_fan_in, zeros
from ..norm import GatedGroupRMSNorm
from ..sharding import COLUMNS, ROWS, Sharding, SplitGroups


class Mamba2(nn.Module):
    """[b, l, d] -> [b, l, d]."""

    sequence_sharded: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, d, inner = config.mamba2, config.d_model, config.inner
        heads, shared = inner // sizes.head_dim, 2 * sizes.groups * sizes.state_dim
        self.head_dim, self.state_dim = sizes.head_dim, sizes.state_dim
        self.sharding: Sharding = {
            "z_proj.weight": ROWS,
            "x_proj.weight": ROWS,
            "bc_proj.weight": SplitGroups(sizes.groups),
            "dt_proj.weight": ROWS,
            "out_proj.weight": COLUMNS,
        }
        self.z_proj = nn.Linear(d, inner, bias=False)
        self.x_proj = nn.Linear(d, inner, bias=False)
        self.bc_proj = nn.Linear(d, shared, bias=False)
        self.dt_proj = nn.Linear(d, heads, bias=False)
        self.conv = ShortConv(inner, shared, sizes.groups, sizes.conv_width)
        self.ssm = StateSpace(heads, sizes.chunk_size)
        self.norm = GatedGroupRMSNorm(inner, sizes.groups, config.norm_eps)
        self.out_proj = nn.Linear(inner, d, bias=False)

    def forward(self, u: Tensor, positions: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """u [b, l, d], documents if packed -> [b, l, d]; positions are not needed.

        What others wait for comes first, and what needs nothing of them is computed while it travels, in backward too.
        """
        x, bc = self.x_proj(u), self.bc_proj(u)
        halo = self.conv.start_halo(x, bc)
        dt = self.dt_proj(u)
        x, bc = self.conv(x, bc, halo.wait() if halo else None, documents)
        B, C = bc.unflatten(-1, (-1, 2, self.state_dim)).unbind(3)
        scan = self.ssm(x.unflatten(-1, (-1, self.head_dim)), dt, B, C, documents)
        z = self.z_proj(u)
        y, _ = scan.finish()
        return self.out_proj(self.norm(y.flatten(2), z))


class ShortConv(nn.Module):
    """Causal depthwise convolution and SiLU of x and of B and C, which share one halo."""

    initializers: ClassVar[Initializers] = {
        "x_weight": uniform_fan_in,
        "x_bias": zeros,
        "bc_weight": uniform_fan_in,
        "bc_bias": zeros,
    }

    def __init__(self, inner: int, shared: int, groups: int, width: int) -> None:
        super().__init__()
        self.sharding: Sharding = {
            "x_weight": ROWS,
            "x_bias": ROWS,
            "bc_weight": SplitGroups(groups),
            "bc_bias": SplitGroups(groups),
        }
        self.x_weight = nn.Parameter(torch.empty(inner, width))
        self.x_bias = nn.Parameter(torch.empty(inner))
        self.bc_weight = nn.Parameter(torch.empty(shared, width))
        self.bc_bias = nn.Parameter(torch.empty(shared))
        self.reach = width - 1
        self.halo: SequenceHalo | None = None

    def start_halo(self, x: Tensor, bc: Tensor) -> Halo | None:
        """Sends the last tokens of each segment on to the next; None where the whole sequence is here."""
        if self.halo is None:
            return None
        tails = [t.unflatten(1, (self.halo.segments, -1))[:, :, -self.reach :] for t in (x, bc)]
        return self.halo.start(torch.cat(tails, -1))

    def forward(self, x: Tensor, bc: Tensor, halo: Tensor | None, documents: Documents | None) -> tuple[Tensor, Tensor]:
        """x [b, l, inner], bc [b, l, shared], the tokens before each segment or None, documents if packed -> x and bc."""
        halos = (None, None) if halo is None else halo.split([x.shape[-1], bc.shape[-1]], -1)
        positions = None if documents is None else documents.positions
        x = causal_conv(x, self.x_weight, self.x_bias, halos[0], positions)
        return x, causal_conv(bc, self.bc_weight, self.bc_bias, halos[1], positions)


def _log_uniform_decay(A_log: Tensor, generator: torch.Generator) -> None:
    """log A with A uniform in [1, 16]."""
    A_log.uniform_(1.0, 16.0, generator=generator).log_()


def _inverse_softplus_dt(dt_bias: Tensor, generator: torch.Generator) -> None:
    """softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
    dt = dt_bias.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class StateSpace(nn.Module):
    """The SSD scan and its own parameters, which stay in fp32 whatever the rest computes in."""

    fp32: ClassVar[bool] = True
    sharding: ClassVar[Sharding] = {"A_log": ROWS, "D": ROWS, "dt_bias": ROWS}
    initializers: ClassVar[Initializers] = {"A_log": _log_uniform_decay, "D": ones, "dt_bias": _inverse_softplus_dt}

    def __init__(self, heads: int, chunk_size: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.chunk_size = chunk_size
        self.scan: Scan = LocalScan()

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, documents: Documents | None) -> SSDInFlight:
        """x [b, l, h, p], dt [b, l, h], B and C [b, l, g, n] -> the scan on its way to y [b, l, h, p]."""
        # Copies: the scan outlives this call, after which FSDP may free the parameters.
        A, D, dt_bias = -self.A_log.exp(), self.D.clone(), self.dt_bias.clone()
        resets = None if documents is None else documents.resets
        return start_ssd(x, dt, A, B, C, D, dt_bias, resets=resets, chunk_size=self.chunk_size, scan=self.scan)
