"""The specs of Megatron's hybrid stack with the modules here."""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_utils import HAVE_TE
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional as F

from .attention import CoreAttention
from .mixer import Mamba2Mixer, Mamba2MixerSubmodules, Strategy
from .norm import Kind as NormKind
from .norm import choose_norm


class HybridStack(MambaStack):
    """Megatron's, whose last norm is of Transformer Engine, with ours in its place."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaStackSubmodules,
        norm: type,
        post_layer_norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **options)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = norm(config, config.hidden_size)


class Router(TopKRouter):
    """Megatron's, whose gating names a function that is there with Transformer Engine alone."""

    def gating(self, input: Tensor) -> Tensor:
        """[..., d] -> logits [..., E], in the config's moe_router_dtype."""
        if HAVE_TE:
            return super().gating(input)
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)


def build_hybrid_stack_spec(
    strategy: Strategy = "auto", transport: torch.dtype | None = None, norm: NormKind = "auto"
) -> ModuleSpec:
    """A spec for `MambaModel`; sizes are the config's.

    strategy: how the states of Mamba-2 pass over cp: auto, ring, allgather, doubling or sliced. transport: what they travel as,
    such as torch.bfloat16; None: fp32. How attention works over cp is the config's cp_comm_type.
    norm: whose RMS norms stand before each part: auto (Transformer Engine's where that is installed, else baton's), baton, apex or
    transformer_engine. Raises UserError where those that are asked for are not installed.
    """
    made = choose_norm(norm)
    linear = {"linear_fc1": ColumnParallelLinear, "linear_fc2": RowParallelLinear}
    mixer = ModuleSpec(
        module=Mamba2Mixer,
        params={"strategy": strategy, "transport": transport},
        submodules=Mamba2MixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=CoreAttention, linear_proj=RowParallelLinear
        ),
    )
    # Any number of experts: the config's counts. In turn, since grouped products are of Transformer Engine.
    moe = get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False)
    moe.submodules.router = Router
    # Norms that Megatron's own spec has within a linear layer have those names in its checkpoints.
    fused = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_", "mixer.in_proj.layer_norm_")
    layers = MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=made, mixer=mixer, mamba_bda=get_bias_dropout_add, sharded_state_dict_keys_map={"norm.": fused[2]}
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=made,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"input_layernorm.": fused[0]},
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=made,
                mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(**linear)),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": fused[1]},
            ),
        ),
        moe_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=made, mlp=moe, mlp_bda=get_bias_dropout_add),
        ),
    )
    return ModuleSpec(module=HybridStack, params={"norm": made}, submodules=layers)


hybrid_stack_spec = build_hybrid_stack_spec()
