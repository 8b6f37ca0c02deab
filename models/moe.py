"""The mixture of experts as Jamba has it: softmax over all experts, the top k without renormalising, no token dropped.

Options beyond Jamba's: an expert that every token passes, a limit on an expert's tokens, a loss on the router's logits, biases
that balance the experts without a loss; DeepSeek-V3's routing, by sigmoids and in groups; weights that are normalised and scaled.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig, MoEConfig
from ..kernels.moe import Routing, grouped_linear, permute, route, unpermute
from ..kernels.swiglu import swiglu
from ..parallel.experts import ExpertCapacity, ExpertExchange
from ..parallel.layout import Layout
from .mlp import MLP, relu2
from .recompute import recomputing
from .sharding import Sharding, SplitExperts

TINY = 1e-20
"""Added to sums that are divided by: sigmoids may all be 0."""


class MoE(nn.Module):
    """[b, l, d] -> [b, l, d], and what the layer adds to the auxiliary loss (`auxiliary_loss`)."""

    load: Tensor
    """[E]: how often tokens chose each expert, on all ranks, since `rebalance`."""
    bias: Tensor | None
    """[E]: added to probabilities for the choice alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = self.sizes = config.moe
        self.router = Router(config.d_model, sizes.experts)
        biased = sizes.choice_bias or sizes.bias_rate > 0
        self.experts = Experts(config.d_model, sizes)
        self.register_buffer("load", torch.zeros(sizes.experts), persistent=False)
        self.register_buffer("bias", torch.zeros(sizes.experts) if biased else None)
        self.sum_over_tokens: Callable[[Tensor], Tensor] | None = None
        """Adds statistics of tokens up over the ranks that hold others; each rank's gradient is that of its own tokens."""
        self.choose: Callable[[Tensor], Tensor] = self.choose_experts
        """Each token's experts; comparisons put the choices of another run in its place."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, l, d] -> y [b, l, d], and the layer's part of the auxiliary loss, as `auxiliary_loss` takes it."""
        logits = self.router(x)
        sigmoid = self.sizes.scores == "sigmoid"
        probabilities = logits.sigmoid() if sigmoid else logits.softmax(-1)
        chosen = self.choose(probabilities)
        weights = self.weigh(probabilities.gather(-1, chosen))
        if sigmoid:
            # Only now: what balances experts takes shares of one, as softmax gives (DeepSeek-V3, arXiv 2412.19437, equation 18).
            probabilities = probabilities / (probabilities.sum(-1, keepdim=True) + TINY)
        y = self.experts(x, weights.to(x.dtype), chosen)
        return y, self._auxiliary(logits.flatten(0, 1), probabilities.flatten(0, 1), chosen.flatten(0, 1))

    def choose_experts(self, probabilities: Tensor) -> Tensor:
        """Probabilities [b, l, E] -> the experts [b, l, k] of each token, int64.

        Of groups only the best are chosen from, by their two best experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        """
        scores = probabilities if self.bias is None else probabilities + self.bias
        if self.sizes.groups > 1:
            grouped = scores.unflatten(-1, (self.sizes.groups, -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(self.sizes.top_groups, -1).indices
            among = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            scores = grouped.masked_fill(~among[..., None], float("-inf")).flatten(-2)
        return scores.topk(self.sizes.top_k, -1).indices

    def weigh(self, probabilities: Tensor) -> Tensor:
        """Of a token's experts, [b, l, k] -> the weights of what they give."""
        if self.sizes.renormalize:
            probabilities = probabilities / (probabilities.sum(-1, keepdim=True) + TINY)
        return probabilities if self.sizes.scale == 1.0 else probabilities * self.sizes.scale

    @torch.no_grad()
    def rebalance(self) -> None:
        """After an optimizer step: an expert with less than its share of tokens gains in bias, one with more loses.

        DeepSeek-V3's balance without a loss (arXiv 2408.15664): bias += bias_rate * sign(mean load - load).
        """
        if self.bias is not None and self.sizes.bias_rate:
            self.bias += self.sizes.bias_rate * (self.load.mean() - self.load).sign()
        self.load.zero_()

    def _auxiliary(self, logits: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """Logits and probabilities [t, E], chosen [t, k] -> the layer's part, of all tokens of the micro-step on all ranks."""
        experts, sizes = probabilities.shape[1], self.sizes
        # Not bincount: on a GPU the host waits for that.
        hits = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0).sum(0)
        squares = logits.logsumexp(-1).square().sum() if sizes.z_loss else hits.new_zeros(())
        # One message: hits, sums of probabilities, tokens, squares. Summed before the product, which is not linear in the batch.
        statistics = torch.cat([hits, probabilities.sum(0), torch.stack([hits.new_full((), len(chosen)), squares])])
        if self.sum_over_tokens is not None:
            statistics = self.sum_over_tokens(statistics)
        hits, totals, count, squares = statistics.split([experts, experts, 1, 1])
        if torch.is_grad_enabled() and not recomputing():
            self.load += hits.detach()
        penalty = sizes.z_loss * squares / count
        if sizes.balance == "pooled":
            return torch.cat([penalty, hits / count, totals / count])
        return penalty + sizes.aux_loss * experts * (hits / count * (totals / count)).sum()


def auxiliary_size(sizes: MoEConfig) -> int:
    """Numbers in a layer's part of the auxiliary loss."""
    return 1 + 2 * sizes.experts if sizes.balance == "pooled" else 1


def auxiliary_loss(parts: Tensor, sizes: MoEConfig, layers: int) -> Tensor:
    """The parts [auxiliary_size] of `layers` MoE layers, added up -> the auxiliary loss, a scalar.

    Load balancing: aux_loss * E Σ_e f_e p_e. f_e: how often a token chose expert e, p_e: its mean probability (Switch Transformer,
    arXiv 2101.03961, equation 4, with top-k hits); perfect balance gives aux_loss * top_k. By layer, or `pooled` with f and p over
    the tokens of all layers, as Jamba has it. And z_loss * mean(logsumexp(logits)^2) of each layer (ST-MoE, arXiv 2202.08906).
    """
    if sizes.balance == "layer" or layers == 0:
        return parts.sum()
    hits, probabilities = (parts[1:] / layers).chunk(2)
    return parts[0] + sizes.aux_loss * sizes.experts * (hits * probabilities).sum()


class Router(nn.Module):
    """Scores of the experts, in fp32 whatever the rest computes in."""

    fp32: ClassVar[bool] = True

    def __init__(self, d: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d))

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., d] -> logits [..., E]."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(tokens.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """Tokens to the experts that they chose and back, and the expert that every token passes."""

    token_args: ClassVar[int] = 3

    def __init__(self, d: int, sizes: MoEConfig) -> None:
        super().__init__()
        self.count, self.capacity = sizes.experts, sizes.capacity
        self.sharding: Sharding = {"stacked.up_proj": SplitExperts(1), "stacked.down_proj": SplitExperts(2)}
        if sizes.activation == "swiglu":
            self.sharding["stacked.gate_proj"] = SplitExperts(1)
        self.stacked = StackedExperts(d, sizes)
        self.shared = MLP(d, sizes.shared_hidden, sizes.activation) if sizes.shared_hidden else None
        self.exchange: ExpertExchange | None = None
        """Where the experts are spread over ranks."""
        self.token_ranks = 1
        """Ranks that share a micro-step's tokens out, as many each."""
        self.within_capacity = ExpertCapacity(Layout("contiguous", 1))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [b, l, d], weights and chosen experts [b, l, k] -> [b, l, d]."""
        routing, counts, kept = self._route(chosen)
        rows, order = permute(x.flatten(0, 1), routing), routing.order
        if kept is not None:
            rows, order = rows[:kept], order[:kept]
        row_weights = weights.flatten().index_select(0, order)
        if self.exchange is None:
            y, shared = self.stacked(rows, row_weights, counts), None if self.shared is None else self.shared(x)
        else:
            y, shared = self._on_other_ranks(self.exchange, rows, row_weights, counts, x)
        if kept is not None:
            y = F.pad(y, (0, 0, 0, len(routing.order) - len(y)))
        y = unpermute(y, routing).view_as(x)
        return y if shared is None else y + shared

    def _on_other_ranks(
        self, exchange: ExpertExchange, rows: Tensor, weights: Tensor, counts: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The rows' outputs, and the shared expert's, each half of which is computed while rows are on their way."""
        dispatch = exchange.start(rows, weights, counts)
        hidden = None if self.shared is None else self.shared.hidden(x)
        returning = dispatch.send_back(self.stacked(*dispatch.wait()))
        shared = None if self.shared is None else self.shared.down_proj(hidden)
        return returning.wait(), shared

    def _route(self, chosen: Tensor) -> tuple[Routing, Tensor, int | None]:
        """Chosen experts [b, l, k] -> routing; the rows of each expert [E]; how many rows are not dropped, None: all.

        Tokens beyond the capacity go to an expert that does not exist, after all others; the host waits for how many there are.
        Only training drops any: a batch of validation may be filled up with more sequences on one mesh than on another.
        """
        sequences, chosen = len(chosen), chosen.flatten(0, 1)
        if self.capacity is None or not self.training:
            routing = route(chosen, self.count)
            return routing, routing.counts, None
        limit = math.ceil(self.capacity * (chosen.numel() * self.token_ranks) / self.count)
        kept = self.within_capacity.keep(chosen, sequences, limit, self.count)
        routing = route(chosen.where(kept, self.count), self.count + 1)
        counts = routing.counts[:-1]
        return routing, counts, int(counts.sum())


class StackedExperts(nn.Module):
    """Experts as stacked weights [E, out, in]."""

    def __init__(self, d: int, sizes: MoEConfig) -> None:
        super().__init__()
        experts, hidden = sizes.experts, sizes.hidden
        self.gated = sizes.activation == "swiglu"
        if self.gated:
            self.gate_proj = nn.Parameter(torch.empty(experts, hidden, d))
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, d))
        self.down_proj = nn.Parameter(torch.empty(experts, d, hidden))

    def forward(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Rows [r, d] sorted by expert, their weights [r] and each expert's number of rows [E] -> [r, d]."""
        up = grouped_linear(rows, self.up_proj, counts)
        y = swiglu(grouped_linear(rows, self.gate_proj, counts), up, weights) if self.gated else relu2(up, weights)
        return grouped_linear(y, self.down_proj, counts)
