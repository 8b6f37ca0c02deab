"""The two ends of a language model: embedding, and the projection to logits with its loss."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from ..kernels.cross_entropy import projected_cross_entropy_sum
from .sharding import ROWS, Sharding

if TYPE_CHECKING:
    from ..parallel.vocabulary import VocabularyShards


class Embedding(nn.Module):
    """Token ids -> vectors, of which the padding token's is not trained. `shards` is set where the rows are cut over ranks."""

    # A tensor region only in its rows: ids carry no gradient, and the shards add the parts up themselves.
    sharding: ClassVar[Sharding] = {"weight": ROWS}
    output_sharded: ClassVar[bool] = True
    token_args: ClassVar[int] = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.padding, self.scale = config.padding_token, config.embedding_scale
        self.shards: VocabularyShards | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """[b, l] integers -> [b, l, d]."""
        if self.shards:
            x = self.shards.embed(ids, self.weight, self.padding)
        else:
            x = F.embedding(ids, self.weight, self.padding)
        return x if self.scale == 1.0 else x * self.scale


class Projection(nn.Module):
    """Vectors -> logits, or the cross entropy of labels. `shards` is set where the rows are cut over ranks."""

    sharding: ClassVar[Sharding] = {"weight": ROWS}
    output_sharded: ClassVar[bool] = True

    def __init__(self, d: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d))
        self.shards: VocabularyShards | None = None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """x [b, l, d] -> logits [b, l, vocab]; with labels [b, l], the cross entropy summed over tokens, a scalar."""
        if labels is not None:
            project = self.shards.projected_cross_entropy_sum if self.shards else projected_cross_entropy_sum
            return project(x, self.weight, labels)
        logits = F.linear(x, self.weight)
        return self.shards.whole(logits) if self.shards else logits
