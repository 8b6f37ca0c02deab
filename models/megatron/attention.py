"""Causal attention for Megatron's `SelfAttention`, over cp too: its own without Transformer Engine refuses that."""

import math
from typing import Any, Literal

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from ...kernels.attention import causal_attention
from ...parallel.attention.sequence import SequenceAttention
from .sequence import cp_layout, read_documents

STRATEGIES: dict[str, Literal["ring", "ulysses", "allgather", "usp"]] = {
    "p2p": "ring",
    "a2a": "ulysses",
    "all_gather": "allgather",
    "a2a+p2p": "usp",
}
"""Megatron's cp_comm_type, and what it is called here."""


class CoreAttention(MegatronModule):
    """What stands between the projections. cp_comm_type, Megatron's option, says how keys pass over cp."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Raises ValueError for what the attention here does not do."""
        super().__init__(config)
        assert pg_collection is not None, "Megatron's stack hands the process groups on"
        _check(config, attn_mask_type, attention_type, attention_dropout)
        self.scale = 1.0 if softmax_scale is None else softmax_scale * math.sqrt(config.kv_channels)
        """Of queries, since scores are divided by the root of a head's size."""
        self.layout = cp_layout(pg_collection.cp)
        self.attend: Any = causal_attention
        if self.layout.ranks > 1:
            asked = cp_comm_type or "p2p"
            if asked not in STRATEGIES:
                raise ValueError(f"cp_comm_type is {asked!r}, allowed: {', '.join(STRATEGIES)}")
            sizes = config.hierarchical_context_parallel_sizes
            degree = sizes[0] if asked == "a2a+p2p" and sizes else None
            self.attend = SequenceAttention(self.layout, pg_collection.cp, STRATEGIES[asked], degree)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [l, b, h, e], key and value [l, b, hk, e], of packed documents without b -> [l, b, h e], or [l, h e].

        The mask is causal, and within documents, whatever attention_mask is. Raises ValueError for a bias.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is given, allowed with this spec: none")
        packed = query.dim() == 3
        q, k, v = (t[None] if packed else t.transpose(0, 1) for t in (query, key, value))
        documents = read_documents(packed_seq_params, q.shape[1], self.layout, q.device)
        out = self.attend(q if self.scale == 1.0 else q * self.scale, k, v, documents).flatten(2)
        return out[0] if packed else out.transpose(0, 1).contiguous()


def _check(config: TransformerConfig, mask: AttnMaskType, attention_type: str, dropout: float | None) -> None:
    """Raises ValueError, naming the config's key."""
    windowed = getattr(config, "window_size", None)
    allowed = {
        "attention_dropout": (config.attention_dropout if dropout is None else dropout, (0, 0.0)),
        "attn_mask_type": (mask, (AttnMaskType.causal, AttnMaskType.padding_causal)),
        "attention_type": (attention_type, ("self",)),
        "softmax_type": (config.softmax_type, ("vanilla",)),
        "window_size": (windowed, (None,)),
        "apply_query_key_layer_scaling": (config.apply_query_key_layer_scaling, (False,)),
    }
    for name, (found, values) in allowed.items():
        if found not in values:
            names = ", ".join(str(getattr(value, "name", value)) for value in dict.fromkeys(values))
            raise ValueError(f"{name} is {getattr(found, 'name', found)}, allowed with this spec: {names}")
