"""The mixture of experts as Jamba has it: softmax over all experts, the top k without renormalising, no token dropped."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from ..kernels.moe import grouped_linear, permute, route, unpermute
from ..kernels.swiglu import swiglu
from .sharding import Sharding, Split


class MoE(nn.Module):
    """[b, l, d] -> [b, l, d], and the load-balancing loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.moe
        self.aux_loss = sizes.aux_loss
        self.router = Router(config.d_model, sizes.experts)
        self.experts = Experts(sizes.experts, config.d_model, sizes.hidden)
        self.sum_over_tokens: Callable[[Tensor], Tensor] | None = None
        """Adds statistics of tokens up over the ranks that hold others; each rank's gradient is that of its own tokens."""
        self.choose: Callable[[Tensor], Tensor] = lambda probabilities: probabilities.topk(sizes.top_k, -1).indices
        """Each token's experts [t, k] by their probabilities [t, E]; comparisons put the choices of another run in its place."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, l, d] -> y [b, l, d], and a scalar in fp32 or wider: aux_loss * E Σ_e f_e p_e.

        f_e: how often a token chose expert e, p_e: its mean probability, over all tokens of the micro-step on all ranks
        (Switch Transformer, arXiv 2101.03961, equation 4, with top-k hits). Perfect balance gives aux_loss * top_k.
        """
        tokens = x.flatten(0, 1)
        probabilities = self.router(tokens)
        chosen = self.choose(probabilities)
        weights = probabilities.gather(-1, chosen)
        y = self.experts(tokens, weights.to(x.dtype), chosen)
        return y.view_as(x), self.aux_loss * self._imbalance(probabilities, chosen)

    def _imbalance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        experts = probabilities.shape[1]
        # Not bincount: on a GPU the host waits for that.
        hits = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0).sum(0)
        # One message: hits, sums of probabilities, tokens. Summed before the product, which is not linear in the batch.
        statistics = torch.cat([hits, probabilities.sum(0), hits.new_full((1,), len(chosen))])
        if self.sum_over_tokens is not None:
            statistics = self.sum_over_tokens(statistics)
        hits, totals, count = statistics.split([experts, experts, 1])
        return experts * (hits / count * (totals / count)).sum()


class Router(nn.Module):
    """Probabilities of the experts, in fp32 whatever the rest computes in."""

    fp32: ClassVar[bool] = True

    def __init__(self, d: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d))

    def forward(self, tokens: Tensor) -> Tensor:
        """[t, d] -> [t, E], each row sums to 1."""
        return F.linear(tokens.to(self.weight.dtype), self.weight).softmax(-1)


class Experts(nn.Module):
    """SwiGLU experts as stacked weights [E, out, in]."""

    sharding: ClassVar[Sharding] = {"gate_proj": Split(1), "up_proj": Split(1), "down_proj": Split(2)}

    def __init__(self, experts: int, d: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, hidden, d))
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, d))
        self.down_proj = nn.Parameter(torch.empty(experts, d, hidden))

    def forward(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """tokens [t, d], weights and chosen experts [t, k] -> [t, d]."""
        routing = route(chosen, self.gate_proj.shape[0])
        x, counts = permute(tokens, routing), routing.counts
        gate, up = (grouped_linear(x, weight, counts) for weight in (self.gate_proj, self.up_proj))
        h = swiglu(gate, up, weights.flatten().index_select(0, routing.order))
        return unpermute(grouped_linear(h, self.down_proj, counts), routing)
