"""The SwiGLU feed-forward (Shazeer, arXiv 2002.05202)."""

from typing import ClassVar

from torch import Tensor, nn

from ..kernels.swiglu import swiglu
from .sharding import COLUMNS, ROWS, Sharding


class MLP(nn.Module):
    """down(silu(gate x) * up x), [b, l, d] -> [b, l, d]."""

    sharding: ClassVar[Sharding] = {"gate_proj.weight": ROWS, "up_proj.weight": ROWS, "down_proj.weight": COLUMNS}

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, d]."""
        return self.down_proj(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, hidden], what `down_proj` takes."""
        return swiglu(self.gate_proj(x), self.up_proj(x))
