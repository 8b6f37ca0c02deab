"""The hybrid language model: single-device code; `parallelize` wires it to a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..configs.pattern import LayerKinds
from ..configs.schema import ModelConfig
from ..kernels.documents import Documents
from .initialization import initialize
from .mixers.attention import Attention
from .mixers.mamba2 import Mamba2
from .mlp import MLP
from .moe import MoE
from .norm import RMSNorm
from .vocabulary import Embedding, Projection

BUILDERS: dict[str, Callable[[ModelConfig], nn.Module]] = {"mamba2": Mamba2, "attention": Attention, "mlp": MLP, "moe": MoE}


class Losses(NamedTuple):
    """What training adds up: both are scalars in fp32 or wider."""

    cross_entropy: Tensor  # summed over this rank's tokens
    auxiliary: Tensor  # weighted, of the whole micro-step: the same on every rank


class Layer(nn.Module):
    """norm -> mixer -> residual, norm -> feed-forward -> residual."""

    def __init__(self, config: ModelConfig, kinds: LayerKinds) -> None:
        super().__init__()
        self.kinds = kinds
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = BUILDERS[kinds.mixer](config)
        if kinds.feed_forward is not None:
            self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
            self.feed_forward = BUILDERS[kinds.feed_forward](config)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [b, l, d], positions [l] -> x, and the layer's auxiliary loss if it has one."""
        y = self.mixer(self.mixer_norm(x), positions, documents)
        if self.kinds.feed_forward is None:
            # Not left to the next layer's norm: checkpointing would keep two tensors of a layer's border instead of their sum.
            return x + y, None
        normed, x = self.feed_forward_norm(y, x)
        y, auxiliary = self.feed_forward(normed), None
        if self.kinds.feed_forward == "moe":
            y, auxiliary = y
        return x + y, auxiliary


class Head(nn.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.projection = Projection(config.d_model, config.vocab_size)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `Projection`."""
        return self.projection(self.norm(x), labels)


class HybridModel(nn.Module):
    """Embedding, layers as the pattern says, head. Parameters are empty until `initialize_model` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.packed = False
        """Whether sequences are packed documents, so that none may come without saying where they lie."""
        self.strategies: Any = None
        """How the sequence's parts meet over ranks, `parallelize.Strategies`, where it is sharded."""
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.layers: list[Layer] = nn.ModuleList(Layer(config, kinds) for kinds in config.layers)  # type: ignore[assignment]
        self.head = Head(config)

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, positions: Tensor | None = None, documents: Documents | None = None
    ) -> Tensor | Losses:
        """Logits [b, l, vocab] of ids [b, l]; with labels [b, l] (already shifted, IGNORED counts nothing), the losses.

        positions [l] are the tokens' places in the whole sequence; None: 0 to l - 1. documents: of packed sequences; a label
        at a document's end is the caller's to ignore. Raises ValueError without them where the data is known to be packed.
        """
        if self.packed and documents is None:
            raise ValueError("the data is packed (data.documents) and no documents came with it: see Layout.documents")
        x = self.embedding(ids)
        auxiliary = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for layer in self.layers:
            x, extra = layer(x, positions, documents)
            if extra is not None:
                auxiliary = auxiliary + extra
        out = self.head(x, labels)
        return out if labels is None else Losses(out, auxiliary)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that are filled and sharded one after another, by their names."""
        layers = {f"layers.{i}": layer for i, layer in enumerate(self.layers)}
        return {"embedding": self.embedding, **layers, "head": self.head}


def initialize_part(part: nn.Module, name: str, config: ModelConfig, seed: int) -> None:
    """Fills one of `HybridModel.parts` with the values that the whole model has there."""
    adds = sum(2 if layer.feed_forward else 1 for layer in config.layers)
    initialize(part, name, seed, config.initializer_range, adds)


def build_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> HybridModel:
    """The model on one device, filled."""
    model = HybridModel(config).to(dtype)
    for name, part in model.parts().items():
        initialize_part(part, name, config, seed)
    return model
