"""Grouped-query causal attention; without position information unless rope is asked for, as Jamba has it."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...configs.schema import ModelConfig
from ...kernels.attention import causal_attention
from ...kernels.documents import Documents
from ..sharding import COLUMNS, ROWS, Sharding, SplitGroups
from .state import KVCache


class Attention(nn.Module):
    """[b, l, d] -> [b, l, d]. `attend` is the core operation, swapped where the sequence is sharded."""

    sequence_sharded: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, d = config.attention, config.d_model
        self.head_dim, self.rope, self.rotated = sizes.head_dim, sizes.rope, sizes.rotated
        self.scale = 1.0 if sizes.scale is None else sizes.scale * math.sqrt(sizes.head_dim)
        """Of queries, since scores are divided by the root of head_dim."""
        self.sharding: Sharding = {
            "q_proj.weight": ROWS,
            "k_proj.weight": SplitGroups(sizes.kv_heads),
            "v_proj.weight": SplitGroups(sizes.kv_heads),
            "o_proj.weight": COLUMNS,
        }
        self.q_proj = nn.Linear(d, sizes.heads * sizes.head_dim, bias=False)
        self.k_proj = nn.Linear(d, sizes.kv_heads * sizes.head_dim, bias=False)
        self.v_proj = nn.Linear(d, sizes.kv_heads * sizes.head_dim, bias=False)
        self.o_proj = nn.Linear(sizes.heads * sizes.head_dim, d, bias=False)
        self.attend: Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor] = causal_attention

    def forward(
        self, u: Tensor, positions: Tensor | None = None, documents: Documents | None = None, state: KVCache | None = None
    ) -> Tensor:
        """u [b, l, d], positions in the whole sequence ([l] or [b, l], None: 0 to l - 1), documents if packed -> [b, l, d].

        state: of generation, which goes on by u; the tokens before are seen too.
        """
        q, k, v = (proj(u).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope is not None:
            if documents is not None:
                positions = documents.positions
            elif positions is None:
                positions = torch.arange(u.shape[1], device=u.device)
            cos, sin = rotary_angles(positions, self.rotated, self.rope.theta)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.scale != 1.0:
            q = q * self.scale
        return self.o_proj(self._attend(q, k, v, documents, state).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, state: KVCache | None) -> Tensor:
        first = state is None or state.longest == 0
        if state is not None:
            state.append(k, v)
            if not first:
                return state.attend(q)
        return self.attend(q, k, v, documents)


def rotary_angles(positions: Tensor, dims: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., l, dims / 2] fp64 of the angles position / theta^(2i / dims) (Su et al., arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, dims, 2, device=positions.device, dtype=torch.float64) / dims)
    angles = positions.double()[..., None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + r/2) of the first r of the dims of x [b, l, h, e], as Llama pairs them; cos and sin have r/2."""
    cos, sin = (t[..., None, :].to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin))
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)
