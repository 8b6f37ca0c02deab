"""What Megatron-LM has to be told to build a hybrid model that computes what a `ModelConfig` says; without importing it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..configs.errors import UserError
from ..configs.pattern import FEED_FORWARDS, MIXERS
from ..configs.schema import ModelConfig

GATED_NORM_EPS = 1e-5
"""Of the mixer's gated norm, which has no option in Megatron."""


class MegatronConfig(NamedTuple):
    """Arguments by name."""

    transformer: dict[str, Any]
    """Of `TransformerConfig`, but for the activation's function, and for what an optimizer, a mesh or a device needs."""
    model: dict[str, Any]
    """Of `MambaModel`."""

    @property
    def options(self) -> list[str]:
        """Of Megatron-LM's training scripts."""
        found = ["--spec baton.models.megatron hybrid_stack_spec --is-hybrid-model"]
        for name, value in (self.model | self.transformer).items():
            if name in OPTIONS:
                found.append(OPTIONS[name](value))
            elif value is True:
                found.append(_option(name))
            elif value is not False and value is not None:
                found.append(f"{_option(name)} {value}")
        return [option for option in found if option]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


OPTIONS: dict[str, Callable[[Any], str]] = {
    "add_bias_linear": lambda value: "" if value else "--disable-bias-linear",
    "gated_linear_unit": lambda value: "--swiglu" if value else "--squared-relu",
    "layernorm_epsilon": lambda value: f"--norm-epsilon {value}",
    "num_moe_experts": lambda value: f"--num-experts {value}",
    "num_query_groups": lambda value: f"--group-query-attention --num-query-groups {value}",
    "share_embeddings_and_output_weights": lambda value: "" if value else "--untie-embeddings-and-output-weights",
    "softmax_scale": lambda value: "" if value is None else f"# no option: TransformerConfig(softmax_scale={value})",
    "vocab_size": lambda value: "",
}
"""Where an option is not the argument with a value; the vocabulary's size is the tokenizer's."""


def megatron_config(model: ModelConfig) -> MegatronConfig:
    """Raises UserError with the first key whose value Megatron, or the spec in `models.megatron`, does not compute."""
    letters = {name: letter for letter, name in (MIXERS | FEED_FORWARDS).items()}
    kinds = [kind for layer in model.layers for kind in layer if kind is not None]
    _check(model, {*kinds})
    mamba2, attention = model.mamba2, model.attention
    transformer: dict[str, Any] = {
        "num_layers": len(kinds),
        "hidden_size": model.d_model,
        "ffn_hidden_size": model.mlp.hidden,
        "num_attention_heads": attention.heads,
        "num_query_groups": attention.kv_heads,
        "kv_channels": attention.head_dim,
        "softmax_scale": attention.scale,
        "mamba_num_heads": model.mamba2_heads,
        "mamba_head_dim": mamba2.head_dim,
        "mamba_state_dim": mamba2.state_dim,
        "mamba_num_groups": mamba2.groups,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "add_bias_linear": False,
        "gated_linear_unit": _activation(model, {*kinds}) == "swiglu",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    rope = attention.rope
    return MegatronConfig(
        transformer | (_experts(model) if "moe" in kinds else {}),
        {
            "vocab_size": model.vocab_size,
            "hybrid_override_pattern": "".join(letters[kind] for kind in kinds),
            "share_embeddings_and_output_weights": model.tied_embeddings,
            "position_embedding_type": "none" if rope is None else "rope",
            **({} if rope is None else {"rotary_base": int(rope.theta), "rotary_percent": rope.fraction}),
        },
    )


def _experts(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    biased = moe.choice_bias or moe.bias_rate > 0
    return {
        "num_moe_experts": moe.experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.hidden,
        "moe_shared_expert_intermediate_size": moe.shared_hidden or None,
        "moe_router_score_function": moe.scores,
        # Softmax over a token's experts alone is that over all of them, divided by their sum.
        "moe_router_pre_softmax": moe.scores == "softmax" and not moe.renormalize,
        "moe_router_topk_scaling_factor": None if moe.scale == 1.0 else moe.scale,
        "moe_router_num_groups": moe.groups if moe.groups > 1 else None,
        "moe_router_group_topk": moe.top_groups if moe.groups > 1 else None,
        "moe_router_enable_expert_bias": biased,
        "moe_router_bias_update_rate": moe.bias_rate if biased else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss else "none",
        # Its shares of tokens add up to 1, ours to top_k.
        "moe_aux_loss_coeff": moe.aux_loss * moe.top_k,
        "moe_z_loss_coeff": moe.z_loss or None,
    }


def _activation(model: ModelConfig, kinds: set[str]) -> str:
    """Of all feed-forwards."""
    return model.moe.activation if "moe" in kinds and "mlp" not in kinds else model.mlp.activation


def _check(model: ModelConfig, kinds: set[str]) -> None:
    moe = model.moe
    allowed: dict[str, tuple[bool, Any, str]] = {
        "pattern": ("mamba" in kinds, model.pattern, "M, *, - and E, since Megatron has no Mamba-1 (m)"),
        "embedding_scale": (model.embedding_scale != 1, model.embedding_scale, "1"),
        "residual_scale": (model.residual_scale != 1, model.residual_scale, "1"),
        "logits_divisor": (model.logits_divisor != 1, model.logits_divisor, "1"),
        "padding_token": (model.padding_token is not None, model.padding_token, "null"),
    }
    if "mamba2" in kinds:
        width, limit = model.mamba2.conv_width, (model.mamba2.dt_min, model.mamba2.dt_max)
        allowed |= {
            "norm_eps": (model.norm_eps != GATED_NORM_EPS, model.norm_eps, f"{GATED_NORM_EPS}, as in Megatron's mixer"),
            "mamba2.conv_width": (width != 4, width, "4"),
            "mamba2.dt_min and dt_max": (limit != (0, None), limit, "0 and null"),
        }
    if "attention" in kinds:
        theta = 1 if model.attention.rope is None else model.attention.rope.theta
        allowed["attention.rope.theta"] = (theta != int(theta), theta, "a whole number")
    if "moe" in kinds:
        mixed = "mlp" in kinds and moe.activation != model.mlp.activation
        biased = moe.choice_bias or moe.bias_rate > 0
        scores = moe.scores == "sigmoid" and moe.renormalize != (moe.top_k > 1)
        groups = moe.groups > 1 and moe.top_k // moe.top_groups != 2
        softmax = moe.scores == "softmax" and moe.renormalize
        allowed |= {
            "moe.activation": (mixed, moe.activation, f"that of model.mlp, {model.mlp.activation}"),
            "moe.renormalize": (scores, moe.renormalize, "with scores sigmoid true, but with top_k 1 false"),
            "moe.top_groups": (groups, moe.top_groups, "half of top_k: Megatron compares groups by their top_k / top_groups best"),
            "moe.groups": (softmax and moe.groups > 1, moe.groups, "1 with scores softmax and renormalize"),
            "moe.top_k": (softmax and moe.top_k == 1, moe.top_k, "2 and more with scores softmax and renormalize"),
            "moe.capacity": (moe.capacity is not None, moe.capacity, "null"),
            "moe.balance": (moe.aux_loss > 0 and moe.balance != "layer", moe.balance, "layer, or moe.aux_loss of 0"),
            "moe.choice_bias": (biased and moe.scores == "softmax", True, "false with scores softmax"),
        }
    for key, (wrong, found, those) in allowed.items():
        if wrong:
            raise UserError(f"model.{key} is {found}, allowed for Megatron: {those}")
