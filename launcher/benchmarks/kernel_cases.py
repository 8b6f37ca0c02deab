"""The operations of `kernels` as they are measured: their sizes, by default those of a large hybrid, their operands and one call.

Operands come in order; those in floating point are differentiated. Weights are as large as a layer has them on one GPU.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...configs.schema import MoEConfig
from ...kernels.conv import causal_conv
from ...kernels.cross_entropy import projected_cross_entropy_sum
from ...kernels.norm import add_rms_norm, gated_group_rms_norm, rms_norm
from ...kernels.selective_scan import selective_scan
from ...kernels.ssd import ssd
from ...kernels.swiglu import swiglu
from ...models.moe import Experts

EPS = 1e-5
Operands = list[Tensor]


@dataclass(frozen=True)
class Case:
    """One operation at one size."""

    name: ClassVar[str]
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    def operands(self, device: torch.device) -> Operands:
        """Random ones; on the device `meta` only shapes."""
        raise NotImplementedError

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """The results."""
        raise NotImplementedError

    def _random(self, device: torch.device, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> Operands:
        return [torch.randn(shape, dtype=dtype or self.dtype, device=device) for shape in shapes]


@dataclass(frozen=True)
class SSD(Case):
    """Mamba-2's scan, with D and dt_bias, ungated."""

    name: ClassVar[str] = "ssd"
    heads: int = 80
    head_dim: int = 64
    groups: int = 1
    state_dim: int = 128

    def operands(self, device: torch.device) -> Operands:
        """x [1, l, h, p], dt [1, l, h], A [h], B and C [1, l, g, n], D and dt_bias [h]; A, D and dt_bias in fp32."""
        of_token, of_group = (1, self.tokens, self.heads), (1, self.tokens, self.groups, self.state_dim)
        x, dt, B, C = self._random(device, (*of_token, self.head_dim), of_token, of_group, of_group)
        A, D, dt_bias = self._random(device, *[(self.heads,)] * 3, dtype=torch.float32)
        return [x, dt, -A.exp(), B, C, D, dt_bias]

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """y."""
        y = ssd(*operands)
        assert isinstance(y, Tensor)
        return (y,)


@dataclass(frozen=True)
class SelectiveScan(Case):
    """Mamba-1's scan, with D, gate and dt_bias."""

    name: ClassVar[str] = "selective_scan"
    channels: int = 5120
    state_dim: int = 16

    def operands(self, device: torch.device) -> Operands:
        """x, dt [1, l, d], A [d, n], B and C [1, l, n], D [d], z [1, l, d], dt_bias [d]; A, D and dt_bias in fp32."""
        of_token, of_state = (1, self.tokens, self.channels), (1, self.tokens, self.state_dim)
        x, dt, z, B, C = self._random(device, *[of_token] * 3, *[of_state] * 2)
        shapes = (self.channels, self.state_dim), (self.channels,), (self.channels,)
        A, D, dt_bias = self._random(device, *shapes, dtype=torch.float32)
        return [x, dt, -A.exp(), B, C, D, z, dt_bias]

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """y."""
        y = selective_scan(*operands)
        assert isinstance(y, Tensor)
        return (y,)


@dataclass(frozen=True)
class Conv(Case):
    """The short convolution of x, B and C together."""

    name: ClassVar[str] = "conv"
    channels: int = 5120 + 256
    width: int = 4

    def operands(self, device: torch.device) -> Operands:
        """x [1, l, c], weight [c, w], bias [c]."""
        return self._random(device, (1, self.tokens, self.channels), (self.channels, self.width), (self.channels,))

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """y."""
        return (causal_conv(*operands),)


@dataclass(frozen=True)
class RMSNorm(Case):
    """The plain norm."""

    name: ClassVar[str] = "rms_norm"
    channels: int = 5120

    def operands(self, device: torch.device) -> Operands:
        """x [1, l, d], weight [d]."""
        return self._random(device, (1, self.tokens, self.channels), (self.channels,))

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """The normed x."""
        x, weight = operands
        return (rms_norm(x, weight, EPS),)


@dataclass(frozen=True)
class AddRMSNorm(RMSNorm):
    """The norm of the residual stream, to which a layer's output is added."""

    name: ClassVar[str] = "add_rms_norm"

    def operands(self, device: torch.device) -> Operands:
        """x and residual [1, l, d], weight [d]."""
        return self._random(device, *[(1, self.tokens, self.channels)] * 2, (self.channels,))

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """The normed sum, and the sum."""
        x, residual, weight = operands
        return add_rms_norm(x, residual, weight, EPS)


@dataclass(frozen=True)
class GatedNorm(RMSNorm):
    """Mamba-2's gated norm, all channels one group."""

    name: ClassVar[str] = "gated_norm"

    def operands(self, device: torch.device) -> Operands:
        """y and z [1, l, c], weight [c]."""
        return self._random(device, *[(1, self.tokens, self.channels)] * 2, (self.channels,))

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """The normed y."""
        y, z, weight = operands
        return (gated_group_rms_norm(y, z, weight, self.channels, EPS),)


@dataclass(frozen=True)
class CrossEntropy(Case):
    """The loss and the projection to a vocabulary, or to a rank's part of one."""

    name: ClassVar[str] = "cross_entropy"
    channels: int = 4096
    vocabulary: int = 65536

    def operands(self, device: torch.device) -> Operands:
        """x [l, d], weight [v, d], labels [l]."""
        x, weight = self._random(device, (self.tokens, self.channels), (self.vocabulary, self.channels))
        return [x, weight / self.channels**0.5, torch.randint(self.vocabulary, (self.tokens,), device=device)]

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """The summed loss; its gradients are computed with it."""
        return (projected_cross_entropy_sum(*operands),)


@dataclass(frozen=True)
class SwiGLU(Case):
    """A dense layer's gate."""

    name: ClassVar[str] = "swiglu"
    hidden: int = 14336

    def operands(self, device: torch.device) -> Operands:
        """gate and up [l, hidden]."""
        return self._random(device, *[(self.tokens, self.hidden)] * 2)

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """silu(gate) up."""
        return (swiglu(*operands),)


@dataclass(frozen=True)
class MoE(Case):
    """A layer's experts, without the router: routing, permutation, three products and the gate."""

    name: ClassVar[str] = "moe"
    channels: int = 4096
    hidden: int = 14336
    experts: int = 16
    chosen: int = 2

    def operands(self, device: torch.device) -> Operands:
        """tokens [l, d], weights [l, k], the experts' chosen [l, k], and the experts' matrices."""
        x, weights = self._random(device, (self.tokens, self.channels), (self.tokens, self.chosen))
        chosen = torch.rand(self.tokens, self.experts, device=device).topk(self.chosen).indices
        shapes = (self.experts, self.hidden, self.channels), (self.experts, self.channels, self.hidden)
        matrices = self._random(device, shapes[0], shapes[0], shapes[1])
        return [x, weights, chosen, *[matrix.mul_(self.channels**-0.5) for matrix in matrices]]

    def call(self, *operands: Any) -> tuple[Tensor, ...]:
        """y [1, l, d]."""
        x, weights, chosen, *matrices = operands
        named = {f"stacked.{name}_proj": matrix for name, matrix in zip(("gate", "up", "down"), matrices, strict=True)}
        return (torch.func.functional_call(self._layer, named, (x[None], weights[None], chosen[None])),)

    @cached_property
    def _layer(self) -> Experts:
        with torch.device("meta"):
            return Experts(self.channels, MoEConfig(experts=self.experts, top_k=self.chosen, hidden=self.hidden))


CASES: dict[str, type[Case]] = {
    case.name: case for case in (SSD, SelectiveScan, Conv, RMSNorm, AddRMSNorm, GatedNorm, CrossEntropy, SwiGLU, MoE)
}


def differentiated(operands: Operands) -> Operands:
    """Those with gradients, which are asked for from now on."""
    return [operand.requires_grad_() for operand in operands if operand.is_floating_point()]
