"""RMS norms for Megatron's layers: also under sequence_parallel, which its own without Transformer Engine refuse."""

import logging
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn

from ...configs.errors import UserError
from ...kernels import accelerators
from ..norm import GatedGroupRMSNorm, RMSNorm

Kind = Literal["auto", "baton", "apex", "transformer_engine"]

_log = logging.getLogger(__name__)


def choose_norm(kind: Kind) -> type:
    """The class that Megatron builds a norm by. auto: Transformer Engine's where that is installed, else the one here; logged.

    Raises UserError where what is asked for is missing.
    """
    if kind == "auto":
        kind = "baton" if _find("transformer_engine") is None else "transformer_engine"
    if kind != "baton" and _find(kind) is None:
        raise UserError(f"norm is {kind}, and {accelerators.INSTALL[kind]}; allowed: auto, baton")
    _log.info("Megatron's norms: by %s", kind)
    return {"baton": Norm, "apex": ApexNorm, "transformer_engine": EngineNorm}[kind]


def _find(name: accelerators.Name) -> Any:
    return accelerators.find(name, *{"apex": ("normalization", "FusedRMSNorm"), "transformer_engine": ("pytorch", "RMSNorm")}[name])


class EngineNorm:
    """Makes Megatron's own, of Transformer Engine, which does not look at the config's epsilon by itself."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> Any:
        """As `Norm`; without the state that its modules keep of FP8, which other norms' checkpoints have not."""
        from megatron.core.extensions.transformer_engine import TENorm

        _check(config)
        return without_extra_state(TENorm(config, hidden_size, config.layernorm_epsilon if eps is None else eps))


def without_extra_state(module: nn.Module) -> nn.Module:
    """The module, whose extra state is neither in its state dict nor missed there."""
    module.register_state_dict_post_hook(_drop_extra_state)
    module.register_load_state_dict_post_hook(_miss_no_extra_state)
    return module


def _drop_extra_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(f"{prefix}_extra_state", None)


def _miss_no_extra_state(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith("_extra_state")]


class ApexNorm:
    """Makes apex's FusedRMSNorm."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> Any:
        """As `Norm`."""
        _check(config)
        made = _find("apex")(hidden_size, config.layernorm_epsilon if eps is None else eps)
        made = made.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
        made.weight.sequence_parallel = config.sequence_parallel
        return made


def _check(config: TransformerConfig) -> None:
    """Raises ValueError for norms that are no RMS norm."""
    if config.normalization != "RMSNorm":
        raise ValueError(f"normalization is {config.normalization!r}, allowed with this spec: 'RMSNorm'")
    if config.layernorm_zero_centered_gamma:
        raise ValueError("layernorm_zero_centered_gamma is True, allowed with this spec: False")


class Norm(RMSNorm):
    """[l, b, d] -> [l, b, d]. Its gradient is of this tp rank's tokens alone under sequence_parallel: Megatron adds those up."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> None:
        """eps: config.layernorm_epsilon unless given. Raises ValueError for norms that are no RMS norm."""
        super().__init__(hidden_size, config.layernorm_epsilon if eps is None else eps)
        _check(config)
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
