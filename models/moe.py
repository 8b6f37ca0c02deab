"""The mixture of experts as Jamba has it: softmax over all experts, the top k without renormalising, no token dropped."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
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
        hits = torch.bincount(chosen.flatten(), minlength=experts).to(probabilities.dtype)
        # One message: hits, sums of probabilities, tokens. Summed before the product, which is not linear in the batch.
        statistics = torch.cat([hits, probabilities.sum(0), hits.new_tensor([len(chosen)])])
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
        k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.gate_proj.shape[0])
        x = tokens.repeat_interleave(k, 0)[order]
        h = F.silu(grouped_linear(x, self.gate_proj, counts)) * grouped_linear(x, self.up_proj, counts)
        y = grouped_linear(h, self.down_proj, counts)[order.argsort()].unflatten(0, (-1, k))
        return (y * weights[..., None]).sum(1)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [t, i] whose first counts[0] rows belong to expert 0 and so on, weight [E, o, i] -> x weight_eᵀ, [t, o]."""
    if x.is_cuda and x.dtype == torch.bfloat16 and not any(size % 8 for size in weight.shape[1:]):
        return grouped_matmul(x, weight, counts)
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, expert) for part, expert in zip(parts, weight.unbind(), strict=True)])


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """As `grouped_linear`, in one kernel where the device has it."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
