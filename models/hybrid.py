"""The hybrid language model, or a run of its layers: single-device code; `parallelize` wires it to a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..configs.pattern import LayerKinds
from ..configs.schema import ModelConfig, Recompute
from ..kernels.documents import Documents
from .initialization import initialize
from .mixers.attention import Attention
from .mixers.mamba import Mamba
from .mixers.mamba2 import Mamba2
from .mixers.state import State
from .mlp import MLP
from .moe import MoE, auxiliary_loss, auxiliary_size
from .norm import RMSNorm
from .recompute import run_again
from .vocabulary import Embedding, Projection

BUILDERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "mamba2": Mamba2,
    "mamba": Mamba,
    "attention": Attention,
    "mlp": lambda config: MLP(config.d_model, config.mlp.hidden, config.mlp.activation),
    "moe": MoE,
}

TIED = {"head.projection.weight": "embedding.weight"}
"""Where a model, or the last stage of a pipeline, has a tied embedding a second time: its name there, and in the whole model."""


class MicroStep(NamedTuple):
    """What the model is called with: a rank's part of a micro-step's tokens, on its device."""

    ids: Tensor  # [b, l] int64
    labels: Tensor | None  # [b, l] int64, the next token of each, also across the ends of segments; IGNORED counts nothing
    positions: Tensor | None  # [l] int64 in the whole sequence
    documents: Documents | None  # of packed sequences


class Losses(NamedTuple):
    """What training adds up: both are scalars in fp32 or wider."""

    cross_entropy: Tensor  # summed over this rank's tokens
    auxiliary: Tensor  # weighted, of the whole micro-step: the same on every rank


class Layer(nn.Module):
    """norm -> mixer -> residual, norm -> feed-forward -> residual, where what is added may be scaled."""

    def __init__(self, config: ModelConfig, kinds: LayerKinds) -> None:
        super().__init__()
        self.kinds, self.scale = kinds, config.residual_scale
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = BUILDERS[kinds.mixer](config)
        if kinds.feed_forward is not None:
            self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
            self.feed_forward = BUILDERS[kinds.feed_forward](config)
        self.recompute: Recompute = "none"
        """What backward computes again."""

    def forward(
        self, x: Tensor, positions: Tensor | None = None, documents: Documents | None = None, state: State | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [b, l, d], positions [l] -> x, and the layer's part of the auxiliary loss if it has one. state: of its mixer."""
        if self.recompute == "layer":
            return run_again(self._both, x, positions, documents, state)
        return self._both(x, positions, documents, state)

    def _both(
        self, x: Tensor, positions: Tensor | None, documents: Documents | None, state: State | None
    ) -> tuple[Tensor, Tensor | None]:
        mix = (x, positions, documents, state)
        y = run_again(self._mix, *mix) if self.recompute == "mixer" else self._mix(*mix)
        if self.kinds.feed_forward is None:
            # Not left to the next layer's norm: a layer that is computed again would keep two tensors instead of their sum.
            return x + y, None
        return run_again(self._feed, y, x) if self.recompute == "feed_forward" else self._feed(y, x)

    def _mix(self, x: Tensor, positions: Tensor | None, documents: Documents | None, state: State | None) -> Tensor:
        return self._scaled(self.mixer(self.mixer_norm(x), positions, documents, state))

    def _feed(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        normed, x = self.feed_forward_norm(y, x)
        y, auxiliary = self.feed_forward(normed), None
        if self.kinds.feed_forward == "moe":
            y, auxiliary = y
        return x + self._scaled(y), auxiliary

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.scale == 1.0 else y * self.scale


class Head(nn.Module):
    """Final norm and projection to the vocabulary, whose logits may be divided."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.projection = Projection(config.d_model, config.vocab_size)
        self.divisor = config.logits_divisor

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `Projection`."""
        x = self.norm(x)
        return self.projection(x if self.divisor == 1.0 else x / self.divisor, labels)


class HybridModel(nn.Module):
    """Embedding, layers as the pattern says, head; or, for a pipeline's stage, some of the layers and what is at its end.

    Parameters have their names in the whole model. They are empty until `initialize_part` or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig, layers: range | None = None) -> None:
        """Layers by their numbers; None: all. The first comes with the embedding, the last with the head."""
        super().__init__()
        kinds = config.layers
        layers = range(len(kinds)) if layers is None else layers
        self.config = config
        self.first, self.last = layers.start == 0, layers.stop == len(kinds)
        self.packed = False
        """Whether sequences are packed documents, so that none may come without saying where they lie."""
        self.strategies: Any = None
        """How the sequence's parts meet over ranks, `parallelize.Strategies`, where it is sharded."""
        self.embedding = Embedding(config) if self.first else None
        self.layers: dict[str, Layer] = nn.ModuleDict({str(i): Layer(config, kinds[i]) for i in layers})  # type: ignore[assignment]
        self.head = Head(config) if self.last else None
        self.tie()

    def tie(self) -> None:
        """Makes the embedding's matrix that of the projection, where the config ties them and both are here."""
        if ends := self.tied_ends():
            ends[1].projection.weight = ends[0].weight

    def tied_ends(self) -> tuple[Embedding, Head] | tuple[()]:
        """The two parts that share a matrix, if they do."""
        if not self.config.tied_embeddings or self.embedding is None or self.head is None:
            return ()
        return self.embedding, self.head

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        parts: Tensor | None = None,
        states: dict[str, State] | None = None,
    ) -> Tensor | Losses | tuple[Tensor, Tensor]:
        """Logits [b, l, vocab] of ids [b, l]; with labels [b, l] (already shifted, IGNORED counts nothing), the losses.

        positions [l] are the tokens' places in the whole sequence; None: 0 to l - 1. documents: of packed sequences; a label
        at a document's end is the caller's to ignore. Raises ValueError without them where the data is known to be packed.

        A stage that is not the first takes as x and parts what the one before it gives, hidden states [b, l, d] and the sum of the
        layers' parts of the auxiliary loss, [auxiliary_size] in fp32 or wider; one that is not the last gives them.

        states: of generation, by layer, which go on by the tokens; logits are then of the last token alone, [b, 1, vocab].
        """
        if self.packed and documents is None:
            raise ValueError("the data is packed (data.documents) and no documents came with it: see Layout.documents")
        if self.embedding is not None:
            x = self.embedding(x)
        if parts is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            parts = torch.zeros(auxiliary_size(self.config.moe), dtype=dtype, device=x.device)
        for name, layer in self.layers.items():
            x, part = layer(x, positions, documents, None if states is None else states[name])
            if part is not None:
                parts = parts + part
        if self.head is None:
            # Where no layer has added to it, it is a schedule's buffer, on which FSDP would leave a hook in every micro-step.
            return x, parts.clone()
        out = self.head(x if states is None else x[:, -1:], labels)
        return out if labels is None else Losses(out, auxiliary_loss(parts, self.config.moe, moe_layers(self.config)))

    def parts(self) -> dict[str, nn.Module]:
        """The parts that are filled and sharded one after another, by their names."""
        ends = {"embedding": self.embedding}, {"head": self.head}
        layers = {f"layers.{number}": layer for number, layer in self.layers.items()}
        return {name: part for group in (ends[0], layers, ends[1]) for name, part in group.items() if part is not None}


def moe_layers(config: ModelConfig) -> int:
    """Layers of the whole model that have experts."""
    return sum(layer.feed_forward == "moe" for layer in config.layers)


def initialize_part(part: nn.Module, name: str, config: ModelConfig, seed: int) -> None:
    """Fills one of `HybridModel.parts` with the values that the whole model has there."""
    adds = sum(2 if layer.feed_forward else 1 for layer in config.layers)
    initialize(part, name, seed, config.initializer_range, adds, TIED if config.tied_embeddings else {})


def build_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> HybridModel:
    """The model on one device, filled."""
    model = HybridModel(config).to(dtype)
    for name, part in model.parts().items():
        initialize_part(part, name, config, seed)
    return model
