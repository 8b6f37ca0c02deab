"""The feed-forward: SwiGLU (Shazeer, arXiv 2002.05202), or the squared ReLU without a gate (So et al., arXiv 2109.08668)."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import Activation
from ..kernels.swiglu import swiglu
from .sharding import COLUMNS, ROWS, Sharding


def relu2(up: Tensor, weights: Tensor | None = None) -> Tensor:
    """relu(up)^2, and times weights where given: up [..., hidden], weights [...] -> [..., hidden]. In PyTorch on every device."""
    y = F.relu(up).square()
    return y if weights is None else y * weights[..., None]


class MLP(nn.Module):
    """down(silu(gate x) * up x), or down(relu(up x)^2), [b, l, d] -> [b, l, d]."""

    def __init__(self, d: int, hidden: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        self.sharding: Sharding = {"up_proj.weight": ROWS, "down_proj.weight": COLUMNS}
        if self.gated:
            self.sharding["gate_proj.weight"] = ROWS
            self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, d]."""
        return self.down_proj(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, hidden], what `down_proj` takes."""
        return swiglu(self.gate_proj(x), self.up_proj(x)) if self.gated else relu2(self.up_proj(x))
