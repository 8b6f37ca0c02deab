"""RMS norms for Megatron's layers: also under sequence_parallel, which its own without Transformer Engine refuse."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn

from ..norm import GatedGroupRMSNorm, RMSNorm


class Norm(RMSNorm):
    """[l, b, d] -> [l, b, d]. Its gradient is of this tp rank's tokens alone under sequence_parallel: Megatron adds those up."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> None:
        """eps: config.layernorm_epsilon unless given. Raises ValueError for norms that are no RMS norm."""
        super().__init__(hidden_size, config.layernorm_epsilon if eps is None else eps)
        if config.normalization != "RMSNorm":
            raise ValueError(f"normalization is {config.normalization!r}, allowed with this spec: 'RMSNorm'")
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma is True, allowed with this spec: False")
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class GatedNorm(GatedGroupRMSNorm):
    """The mixer's, its channels cut over tp."""

    def __init__(self, channels: int, groups: int, eps: float, config: TransformerConfig, tp: dist.ProcessGroup) -> None:
        """channels and groups: of all tp ranks. eps: Megatron's own mixer has 1e-5."""
        super().__init__(channels, groups, eps)
        ones = torch.ones(channels // tp.size(), dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(ones)
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.tp_group = tp

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """As Megatron's modules have it."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets, **groups
        )
