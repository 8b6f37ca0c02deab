"""The Mamba mixer (Gu and Dao, arXiv 2312.00752): short convolution, selective scan, gate; with Jamba's norms of dt, B and C.

Projections that shard differently are separate parameters: where others have one from d_model to x and z, here are two. dt, B and C
are products with all channels, so that ranks that share the channels out add their parts of them up.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...configs.schema import ModelConfig
from ...kernels.documents import Documents
from ...kernels.scan import LocalScan, Scan
from ...kernels.selective_scan import SelectiveScanInFlight, start_selective_scan
from ...kernels.steps import NO_LIMIT, positive_steps
from ...kernels.swiglu import swiglu
from ..initialization import Initializers, inverse_softplus_dt, ones
from ..norm import RMSNorm
from ..sharding import COLUMNS, ROWS, Sharding, SplitGroups
from .short_conv import ShortConv
from .state import RecurrentState, Stepped

SHARED = SplitGroups(1)
"""Every rank of tp has all of it, and a gradient from its own channels."""


class Mamba(nn.Module):
    """[b, l, d] -> [b, l, d]."""

    sequence_sharded: ClassVar[bool] = True
    sharding: ClassVar[Sharding] = {
        "x_proj.weight": ROWS,
        "z_proj.weight": ROWS,
        "out_proj.weight": COLUMNS,
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, d, inner = config.mamba, config.d_model, config.mamba_inner
        self.x_proj = nn.Linear(d, inner, bias=False)
        self.z_proj = nn.Linear(d, inner, bias=False)
        self.conv = ShortConv(sizes.conv_width, x=(inner, ROWS))
        self.select = Selection(inner, config.dt_rank, sizes.state_dim, config.norm_eps if sizes.norms else None)
        self.ssm = SelectiveStateSpace(inner, sizes.state_dim)
        self.out_proj = nn.Linear(inner, d, bias=False)

    def forward(
        self,
        u: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        state: RecurrentState | None = None,
    ) -> Tensor:
        """u [b, l, d], documents if packed -> [b, l, d]; positions are not needed. state: of generation, which goes on by u.

        The gate is not the scan's own: its projection runs while states travel, in backward too.
        """
        x = self.x_proj(u)
        halo = self.conv.start_halo(x)
        (x,) = self.conv(x, halo=halo.wait() if halo else None, documents=documents, state=state)
        scan = self.ssm(x, *self.select(x), documents, state)
        z = self.z_proj(u)
        y, final = scan.finish()
        if state is not None and final is not None:
            state.keep("ssm", final)
        return self.out_proj(swiglu(z, y))


class Selection(nn.Module):
    """What makes the scan selective: each token's dt, B and C, from its channels."""

    def __init__(self, inner: int, dt_rank: int, state_dim: int, norm_eps: float | None) -> None:
        """norm_eps: of the norms of dt, B and C; None: without them."""
        super().__init__()
        self.sizes, self.normed = (dt_rank, state_dim, state_dim), norm_eps is not None
        self.sharding: Sharding = {"dtbc_proj.weight": COLUMNS, "dt_proj.weight": ROWS}
        self.dtbc_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        if norm_eps is not None:
            self.dt_norm, self.b_norm, self.c_norm = (RMSNorm(size, norm_eps) for size in self.sizes)
            self.sharding |= {"dt_norm.weight": SHARED, "b_norm.weight": SHARED, "c_norm.weight": SHARED}
        self.dt_proj = nn.Linear(dt_rank, inner, bias=False)
        self.sum_over_channels: Callable[[Tensor], Tensor] | None = None
        """Adds the products up over the ranks that have the other channels, and their gradients."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., inner] -> dt [..., inner] before its bias and softplus, B and C [..., n]."""
        dtbc = self.dtbc_proj(x)
        if self.sum_over_channels is not None:
            dtbc = self.sum_over_channels(dtbc)
        dt, B, C = dtbc.split(self.sizes, -1)
        if self.normed:
            dt, B, C = self.dt_norm(dt), self.b_norm(B), self.c_norm(C)
        return self.dt_proj(dt), B, C


def _integers(A_log: Tensor, generator: torch.Generator) -> None:
    """A = 1, 2, ... for the state dims of each channel (S4D's real initialisation)."""
    A_log.copy_(torch.arange(1, A_log.shape[1] + 1, dtype=A_log.dtype).log())


class SelectiveStateSpace(nn.Module):
    """The selective scan and its own parameters, which stay in fp32 whatever the rest computes in."""

    fp32: ClassVar[bool] = True
    sharding: ClassVar[Sharding] = {"A_log": ROWS, "D": ROWS, "dt_bias": ROWS}
    initializers: ClassVar[Initializers] = {"A_log": _integers, "D": ones, "dt_bias": inverse_softplus_dt}

    def __init__(self, inner: int, state_dim: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(inner, state_dim))
        self.D = nn.Parameter(torch.empty(inner))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.scan: Scan = LocalScan()

    def forward(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, documents: Documents | None, state: RecurrentState | None = None
    ) -> SelectiveScanInFlight | Stepped:
        """x and dt [b, l, inner], B and C [b, l, n] -> the scan on its way to y [b, l, inner]."""
        before = None if state is None else state.ssm
        if before is not None and x.shape[1] == 1:
            return self._step(x, dt, B, C, before)
        # Copies: the scan outlives this call, after which FSDP may free the parameters.
        A, D, dt_bias = -self.A_log.exp(), self.D.clone(), self.dt_bias.clone()
        resets = None if documents is None else documents.resets
        return start_selective_scan(x, dt, A, B, C, D, None, dt_bias, initial_state=before, resets=resets, scan=self.scan)

    def _step(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Stepped:
        """One token of each sequence, operands as `forward` has them; the state [b, inner, n] changes in place."""
        dtype = x.dtype
        x, dt, B, C = (t.squeeze(1).to(state.dtype) for t in (x, dt, B, C))
        steps = positive_steps(dt, self.dt_bias, *NO_LIMIT)[..., None]
        state.mul_((-self.A_log.exp() * steps).exp()).add_(steps * B[:, None] * x[..., None])
        y = (state @ C[..., None]).squeeze(-1) + self.D * x
        return Stepped(y[:, None].to(dtype), state)
