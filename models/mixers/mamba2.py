"""The Mamba-2 mixer (Dao and Gu, arXiv 2405.21060): short convolution, SSD scan, gated norm.

Projections that shard differently are separate parameters. B and C are one, its rows ordered group by group (B then C of
each), so that cutting between groups is cutting rows.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...configs.schema import Mamba2Config, ModelConfig
from ...kernels.documents import Documents
from ...kernels.scan import LocalScan, Scan
from ...kernels.ssd import SSDInFlight, start_ssd
from ...kernels.steps import positive_steps
from ..initialization import Initializers, inverse_softplus_dt, log_uniform_decay, ones
from ..norm import GatedGroupRMSNorm
from ..sharding import COLUMNS, ROWS, Sharding, SplitGroups
from .short_conv import ShortConv
from .state import RecurrentState, Stepped


class Mamba2(nn.Module):
    """[b, l, d] -> [b, l, d]."""

    sequence_sharded: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, d, inner, heads = config.mamba2, config.d_model, config.inner, config.mamba2_heads
        shared = 2 * sizes.groups * sizes.state_dim
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
        self.conv = ShortConv(sizes.conv_width, x=(inner, ROWS), bc=(shared, SplitGroups(sizes.groups)))
        self.ssm = StateSpace(heads, sizes)
        self.norm = GatedGroupRMSNorm(inner, sizes.groups, config.norm_eps)
        self.out_proj = nn.Linear(inner, d, bias=False)

    def forward(
        self,
        u: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        state: RecurrentState | None = None,
    ) -> Tensor:
        """u [b, l, d], documents if packed -> [b, l, d]; positions are not needed. state: of generation, which goes on by u.

        What others wait for comes first, and what needs nothing of them is computed while it travels, in backward too.
        """
        x, bc = self.x_proj(u), self.bc_proj(u)
        halo = self.conv.start_halo(x, bc)
        dt = self.dt_proj(u)
        x, bc = self.conv(x, bc, halo=halo.wait() if halo else None, documents=documents, state=state)
        B, C = bc.unflatten(-1, (-1, 2, self.state_dim)).unbind(3)
        scan = self.ssm(x.unflatten(-1, (-1, self.head_dim)), dt, B, C, documents, state)
        z = self.z_proj(u)
        y, final = scan.finish()
        if state is not None and final is not None:
            state.keep("ssm", final)
        return self.out_proj(self.norm(y.flatten(2), z))


class StateSpace(nn.Module):
    """The SSD scan and its own parameters, which stay in fp32 whatever the rest computes in."""

    fp32: ClassVar[bool] = True
    sharding: ClassVar[Sharding] = {"A_log": ROWS, "D": ROWS, "dt_bias": ROWS}
    initializers: ClassVar[Initializers] = {"A_log": log_uniform_decay, "D": ones, "dt_bias": inverse_softplus_dt}

    def __init__(self, heads: int, sizes: Mamba2Config) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.chunk_size, self.dt_limit = sizes.chunk_size, sizes.dt_limit
        self.scan: Scan = LocalScan()

    def forward(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, documents: Documents | None, state: RecurrentState | None = None
    ) -> SSDInFlight | Stepped:
        """x [b, l, h, p], dt [b, l, h], B and C [b, l, g, n] -> the scan on its way to y [b, l, h, p]."""
        before = None if state is None else state.ssm
        if before is not None and x.shape[1] == 1:
            return self._step(x, dt, B, C, before)
        # Copies: the scan outlives this call, after which FSDP may free the parameters.
        A, D, dt_bias = -self.A_log.exp(), self.D.clone(), self.dt_bias.clone()
        resets = None if documents is None else documents.resets
        return start_ssd(x, dt, A, B, C, D, dt_bias, self.dt_limit, before, resets, self.chunk_size, self.scan)

    def _step(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Stepped:
        """One token of each sequence, operands as `forward` has them; the state [b, h, p, n] changes in place."""
        dtype, heads = x.dtype, x.shape[2]
        x, B, C = (t.squeeze(1).to(state.dtype) for t in (x, B, C))
        B, C = (t.repeat_interleave(heads // t.shape[1], 1) for t in (B, C))
        steps = positive_steps(dt.squeeze(1), self.dt_bias, *self.dt_limit)
        decay = (-self.A_log.exp() * steps).exp()
        state.mul_(decay[..., None, None]).add_((steps[..., None] * x)[..., None] * B[:, :, None])
        y = (state @ C[..., None]).squeeze(-1) + self.D[:, None] * x
        return Stepped(y[:, None].to(dtype), state)
