"""Hugging Face's hybrids: their config.json, and the `ModelConfig` that computes the same.

What is read here was compared with transformers 5.23 (`tests/models/test_hf.py`). A key that changes what is computed and that no
model here can do is refused by its name.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import ValidationError

from ...configs.errors import KeyedError, UserError
from ...configs.pattern import CUT, FEED_FORWARDS, MIXERS
from ...configs.schema import TRAINING_KEYS, ModelConfig

Values = dict[str, Any]
Keys = dict[str, str | tuple[str, ...]]
"""By key of config.json the keys of `ModelConfig` that have its value."""

LETTERS = {name: letter for letter, name in (MIXERS | FEED_FORWARDS).items()}
BLOCKS = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
"""What lists of layers call them, in newer files and in older ones."""


class Family(NamedTuple):
    """One model_type."""

    model_type: str
    architecture: str
    defaults: Values
    """Of the keys that matter, where a file does not have them."""
    only: Values
    """Keys with the one value that is supported; None stands for a key that is not there, too."""
    keys: Keys
    read: Callable[[Values], Values]
    """What is not one key's value: dotted keys of `ModelConfig`."""
    write: Callable[[ModelConfig], Values]
    """And back."""


def read_config(values: Values, source: str) -> ModelConfig:
    """config.json as a `ModelConfig`. Raises UserError with the key that is not supported; source: the file's name."""
    family = find_family(values, source)
    values = family.defaults | _usual(values, family)
    for key, allowed in family.only.items():
        if values.get(key) not in (allowed, None):
            raise UserError(f"{source}: {key} is {values[key]!r}, allowed: {allowed!r}")
    try:
        ours = {name: values[key] for key, names in family.keys.items() for name in _names(names)} | family.read(values)
        return ModelConfig.model_validate(_nested(ours))
    except KeyError as missing:
        raise UserError(f"{source}: {missing.args[0]} is missing") from None
    except (TypeError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{source}: values that do not make a model: {error}") from None
    except KeyedError as error:
        raise UserError(f"{source}: {error.key} {error}") from None
    except ValidationError as errors:
        first = errors.errors()[0]
    cause, keys = first.get("ctx", {}).get("error"), ".".join(map(str, first["loc"]))
    if isinstance(cause, KeyedError):
        keys, message = f"{keys}.{cause.key}".strip("."), str(cause)
    else:
        message = f"is {first['input']!r}: {first['msg']}"
    theirs = [key for key, names in family.keys.items() if keys in _names(names)]
    what = theirs[0] if theirs else "the list of layers" if keys == "pattern" else f"what would be model.{keys}"
    raise UserError(f"{source}: {what}: {message}")


def find_family(values: Values, source: str) -> Family:
    """By model_type. Raises UserError."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{source}: model_type is {kind!r}, allowed: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _usual(values: Values, family: Family) -> Values:
    """By the keys that are looked at here, and without those that say null where there is a default, as transformers takes them."""
    renamed = {ALIASES[family.model_type].get(key, key): value for key, value in values.items()}
    usual = {
        key: value for key, value in renamed.items() if value is not None or key == "pad_token_id" or key not in family.defaults
    }
    # Granite has no default of its own for these heads.
    if renamed.get("num_key_value_heads", family.model_type != "granitemoehybrid") in (None, False):
        heads = usual.get("num_attention_heads", family.defaults.get("num_attention_heads"))
        usual |= {} if heads is None else {"num_key_value_heads": heads}
    return usual


def write_config(model: ModelConfig, model_type: str | None = None) -> Values:
    """config.json of the family, or of the first that computes what the model does. Raises UserError where none does."""
    reasons = []
    for family in [FAMILIES[model_type]] if model_type else FAMILIES.values():
        reason = _difference(model, family)
        if reason is None:
            return _written(model, family)
        reasons.append(f"{family.model_type}: {reason}")
    raise UserError(f"no such model of Hugging Face's: {'; '.join(reasons)}")


def _written(model: ModelConfig, family: Family) -> Values:
    leaves, used = _leaves(model) | {"mamba2.heads": model.mamba2_heads}, _used(model)
    values: Values = {"model_type": family.model_type, "architectures": [family.architecture]}
    for key, names in family.keys.items():
        of_parts = [name for name in _names(names) if "." not in name or name.partition(".")[0] in used]
        values |= {key: leaves[of_parts[0]]} if of_parts else {}
    return values | family.write(model)


def _difference(model: ModelConfig, family: Family) -> str | None:
    """Why the family does not compute what the model does; None: it does."""
    try:
        again = read_config(_written(model, family), "config.json")
    except (UserError, ValueError) as error:
        return str(error)
    wrong = difference(model, again)
    return None if wrong is None else f"model.{wrong} is {_relevant(model)[wrong]!r}, there {_relevant(again).get(wrong)!r}"


def difference(one: ModelConfig, other: ModelConfig) -> str | None:
    """The first key by which two models compute something else; None where they compute the same."""
    ours, theirs = _relevant(one), _relevant(other)
    return next((key for key in ours if ours[key] != theirs.get(key)), None)


def _relevant(model: ModelConfig) -> Values:
    """By dotted key what the model computes, each in one way of writing it."""
    leaves, used = _leaves(model), _used(model)
    leaves["pattern"] = (model.pattern * model.repeat).replace(CUT, "")
    leaves["mamba2.heads"], leaves["mamba.dt_rank"] = model.mamba2_heads, model.dt_rank
    leaves["attention.scale"] = model.attention.scale or model.attention.head_dim**-0.5
    leaves["moe.choice_bias"] = model.moe.choice_bias or model.moe.bias_rate > 0
    if model.moe.groups == model.moe.top_groups:
        leaves["moe.groups"] = leaves["moe.top_groups"] = 1
    for key in ("repeat", "mamba2.expand", *TRAINING_KEYS):
        leaves.pop(key, None)
    return {key: value for key, value in leaves.items() if "." not in key or key.partition(".")[0] in used}


def _used(model: ModelConfig) -> set[str]:
    """The sections of kinds that the pattern has."""
    return {kind for layer in model.layers for kind in layer if kind is not None}


def _leaves(model: ModelConfig) -> Values:
    """By dotted key; rope as a whole."""
    values = model.model_dump()
    leaves = {key: value for key, value in values.items() if not isinstance(value, dict)}
    return leaves | {
        f"{key}.{name}": v for key, section in values.items() if isinstance(section, dict) for name, v in section.items()
    }


def _nested(ours: Values) -> Values:
    """Dotted keys as sections, without those of kinds that the pattern does not have: their values may make no sense."""
    nested: Values = {}
    for key, value in ours.items():
        section, _, name = key.rpartition(".")
        if not section:
            nested[name] = value
        elif LETTERS[section] in ours["pattern"]:
            nested.setdefault(section, {})[name] = value
    return nested


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _head_dim(values: Values) -> int:
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def _own_head_dim(model: ModelConfig) -> Values:
    """Where it is not what would be taken without the key."""
    usual = model.d_model // model.attention.heads
    return {} if "attention" not in _used(model) or model.attention.head_dim == usual else {"head_dim": model.attention.head_dim}


def _limits(values: Values) -> Values:
    """Of steps; infinity is written in several ways."""
    limits = values["time_step_limit"]
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        raise KeyedError("time_step_limit", f"is {limits!r}, allowed: two numbers")
    low, high = limits
    high = math.inf if isinstance(high, dict) or high is None else float(high)
    return {"mamba2.dt_min": float(low), "mamba2.dt_max": None if high == math.inf else high}


def _limit(model: ModelConfig) -> Values:
    high = model.mamba2.dt_max
    return {"time_step_limit": [model.mamba2.dt_min, {"__float__": "Infinity"} if high is None else high]}


def _expand(model: ModelConfig) -> int:
    """Inner channels of Mamba-2 for each of the model's, which theirs have in whole numbers."""
    expand, rest = divmod(model.inner, model.d_model)
    if rest and "mamba2" in _used(model):
        raise ValueError(f"its {model.inner} inner channels are no multiple of model.d_model, {model.d_model}")
    return expand


def _rope(values: Values) -> Values:
    """Without the fraction of a head's dims."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise KeyedError(f"{key}.rope_type", f"is {kind!r}, allowed: 'default'")
    return {"theta": rope.get("rope_theta") or values.get("rope_theta") or 10000.0}


def _jamba_read(values: Values) -> Values:
    layers, experts = range(values["num_hidden_layers"]), values["num_experts"] > 1
    for key in ("attn_layer_period", "expert_layer_period"):
        if values[key] < 1:
            raise KeyedError(key, f"is {values[key]}, allowed: 1 and more")
    mixers = ["*" if i % values["attn_layer_period"] == values["attn_layer_offset"] else "m" for i in layers]
    moe = ["E" if experts and i % values["expert_layer_period"] == values["expert_layer_offset"] else "-" for i in layers]
    rank = values["mamba_dt_rank"]
    return {
        "pattern": "".join(a + b for a, b in zip(mixers, moe, strict=True)),
        "attention.head_dim": _head_dim(values),
        "mamba.dt_rank": None if rank == "auto" else rank,
        "mamba.norms": True,
        "moe.balance": "pooled",
    }


def _jamba_write(model: ModelConfig) -> Values:
    kinds = model.layers
    attention = _period([layer.mixer == "attention" for layer in kinds], "attention")
    experts = _period([layer.feed_forward == "moe" for layer in kinds], "experts")
    values = {
        "num_hidden_layers": len(kinds),
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "mamba_dt_rank": model.dt_rank,
        **_own_head_dim(model),
    }
    return values | ({} if "moe" in _used(model) else {"num_experts": 1, "num_experts_per_tok": 1})


def _period(there: list[bool], what: str) -> tuple[int, int]:
    """Period and offset of the layers that have something; beyond all layers where none has."""
    for period in range(1, len(there) + 2):
        for offset in range(period):
            if [i % period == offset for i in range(len(there))] == there:
                return period, offset
    raise ValueError(f"its layers with {what} do not come at one period")


SSD_KEYS: Keys = {
    "mamba_n_heads": "mamba2.heads",
    "mamba_n_groups": "mamba2.groups",
    "mamba_d_state": "mamba2.state_dim",
    "mamba_d_conv": "mamba2.conv_width",
}
SSD_DEFAULTS = {"mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2}


def _ssd_read(values: Values) -> Values:
    """Of Bamba and Granite."""
    size = values.get("mamba_d_head", "auto")
    if size == "auto":
        size = values["mamba_expand"] * values["hidden_size"] // values["mamba_n_heads"]
    return {"mamba2.head_dim": size, "attention.head_dim": _head_dim(values)} | _limits(values)


def _ssd_write(model: ModelConfig) -> Values:
    expand = _expand(model)
    values = {"num_hidden_layers": len(model.layers), "mamba_expand": expand, "mamba_d_head": model.mamba2.head_dim}
    if "mamba2" not in _used(model):
        # It is looked at all the same.
        values |= {"mamba_n_heads": 1, "mamba_d_head": expand * model.d_model}
    return values | _limit(model) | _own_head_dim(model)


def _bamba_read(values: Values) -> Values:
    attention = values["attn_layer_indices"] or []
    pattern = "".join("*-" if i in attention else "M-" for i in range(values["num_hidden_layers"]))
    fraction = (values.get("rope_parameters") or {}).get("partial_rotary_factor", 0.5)
    return {"pattern": pattern, "attention.rope": _rope(values) | {"fraction": fraction}} | _ssd_read(values)


def _bamba_write(model: ModelConfig) -> Values:
    indices = [i for i, layer in enumerate(model.layers) if layer.mixer == "attention"]
    rope = _rope_written(model)
    if model.attention.rope is not None:
        rope["rope_parameters"]["partial_rotary_factor"] = model.attention.rope.fraction
    return {"attn_layer_indices": indices, **rope, **_ssd_write(model)}


def _rope_written(model: ModelConfig) -> Values:
    rope = model.attention.rope
    return {} if rope is None else {"rope_parameters": {"rope_type": "default", "rope_theta": rope.theta}}


def _granite_read(values: Values) -> Values:
    kinds = values.get("layer_types") or values.get("layers_block_type") or ["mamba"] * values["num_hidden_layers"]
    feed_forward = "E" if values["num_local_experts"] else "-"
    ours = {
        "pattern": "".join(LETTERS[_block(kind)] + feed_forward for kind in kinds),
        "moe.balance": "pooled",
        "moe.renormalize": True,
    }
    position = values["position_embedding_type"]
    if position not in (None, "rope", "nope"):
        raise KeyedError("position_embedding_type", f"is {position!r}, allowed: null, 'nope', 'rope'")
    return ours | ({"attention.rope": _rope(values)} if position == "rope" else {}) | _ssd_read(values)


def _granite_write(model: ModelConfig) -> Values:
    values = {
        "layer_types": ["full_attention" if layer.mixer == "attention" else "linear_attention" for layer in model.layers],
        "attention_multiplier": model.attention.scale or model.attention.head_dim**-0.5,
        "position_embedding_type": "rope" if model.attention.rope else None,
        **_rope_written(model),
    }
    return values | _ssd_write(model) | ({} if "moe" in _used(model) else {"num_local_experts": 0})


def _mamba2_read(values: Values) -> Values:
    return {"pattern": "M" * values["num_hidden_layers"]} | _limits(values)


def _mamba2_write(model: ModelConfig) -> Values:
    return {"num_hidden_layers": len(model.layers), "expand": _expand(model)} | _limit(model)


def _nemotron_read(values: Values) -> Values:
    """transformers bounds steps by time_step_min from below whatever time_step_limit says."""
    letters = values.get("hybrid_override_pattern")
    if letters is not None and (others := sorted({*letters} - {*"M*-E"})):
        raise KeyedError("hybrid_override_pattern", f"has {others[0]!r}, allowed: M, *, -, E")
    blocks = values.get("layers_block_type") or values.get("layer_types")
    if blocks is not None:
        letters = "".join(LETTERS[_block(kind)] for kind in blocks)
    if letters is None:
        raise KeyError("layers_block_type")
    return {
        "pattern": letters,
        "mlp.activation": "relu2",
        "moe.activation": "relu2",
        "moe.scores": "sigmoid",
        "moe.choice_bias": True,
        "moe.aux_loss": 0.0,
    }


def _nemotron_write(model: ModelConfig) -> Values:
    names = {"mamba2": "linear_attention", "attention": "full_attention"}
    kinds = [kind for layer in model.layers for kind in layer if kind is not None]
    if model.mamba2.dt_max is not None:
        raise ValueError("its steps have no model.mamba2.dt_max")
    return {"layers_block_type": [names.get(kind, kind) for kind in kinds], "num_hidden_layers": len(kinds)}


def _block(name: str) -> str:
    if name not in BLOCKS:
        raise KeyedError("layer_types", f"has {name!r}, allowed: {', '.join(BLOCKS)}")
    return BLOCKS[name]


ENDS: Keys = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "tie_word_embeddings": "tied_embeddings",
    "initializer_range": "initializer_range",
}
HEADS: Keys = {"num_attention_heads": "attention.heads", "num_key_value_heads": "attention.kv_heads"}
PADDED: Keys = {"rms_norm_eps": "norm_eps", "pad_token_id": "padding_token"}
COMMON = {"vocab_size": 32000, "tie_word_embeddings": False, "initializer_range": 0.02, "num_hidden_layers": 32}
SILU = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "mamba_proj_bias": False, "mamba_conv_bias": True}
NO_LIMIT = [0.0, math.inf]

ALIASES: dict[str, dict[str, str]] = {
    "jamba": {"num_local_experts": "num_experts"},
    "mamba2": {},
    "bamba": {},
    "granitemoehybrid": {},
    "nemotron_h": {
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_dt_min": "time_step_min",
        "mamba_conv_bias": "use_conv_bias",
        "num_local_experts": "n_routed_experts",
    },
}
"""Keys that transformers takes for others."""

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "jamba",
            "JambaForCausalLM",
            COMMON
            | {"vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 14336, "rms_norm_eps": 1e-6, "pad_token_id": 0}
            | {"num_attention_heads": 32, "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 2}
            | {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4}
            | {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": "auto", "router_aux_loss_coef": 0.001},
            SILU | {"mamba_inner_layernorms": True, "sliding_window": None},
            ENDS
            | PADDED
            | HEADS
            | {"num_experts": "moe.experts", "num_experts_per_tok": "moe.top_k", "router_aux_loss_coef": "moe.aux_loss"}
            | {"intermediate_size": ("mlp.hidden", "moe.hidden"), "mamba_d_state": "mamba.state_dim"}
            | {"mamba_d_conv": "mamba.conv_width", "mamba_expand": "mamba.expand"},
            _jamba_read,
            _jamba_write,
        ),
        Family(
            "mamba2",
            "Mamba2ForCausalLM",
            COMMON
            | {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "layer_norm_epsilon": 1e-5, "num_heads": 128}
            | {"head_dim": 64, "state_size": 128, "n_groups": 8, "conv_kernel": 4, "initializer_range": 0.1}
            | {"time_step_limit": NO_LIMIT},
            {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True},
            ENDS
            | {"layer_norm_epsilon": "norm_eps", "num_heads": "mamba2.heads", "head_dim": "mamba2.head_dim"}
            | {"state_size": "mamba2.state_dim", "n_groups": "mamba2.groups", "conv_kernel": "mamba2.conv_width"},
            _mamba2_read,
            _mamba2_write,
        ),
        Family(
            "bamba",
            "BambaForCausalLM",
            COMMON
            | SSD_DEFAULTS
            | {"vocab_size": 128000, "hidden_size": 4096, "intermediate_size": 14336, "rms_norm_eps": 1e-5, "pad_token_id": 0}
            | {"num_attention_heads": 32, "num_key_value_heads": 8, "attn_layer_indices": None, "time_step_limit": NO_LIMIT},
            SILU | {"z_loss_coefficient": 0.0},
            ENDS | PADDED | HEADS | SSD_KEYS | {"intermediate_size": "mlp.hidden"},
            _bamba_read,
            _bamba_write,
        ),
        Family(
            "granitemoehybrid",
            "GraniteMoeHybridForCausalLM",
            COMMON
            | SSD_DEFAULTS
            | {"hidden_size": 4096, "intermediate_size": 11008, "rms_norm_eps": 1e-6, "pad_token_id": None}
            | {"num_attention_heads": 32, "num_key_value_heads": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
            | {"router_aux_loss_coef": 0.001, "shared_intermediate_size": 1024, "position_embedding_type": None}
            | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0}
            | {"time_step_limit": NO_LIMIT},
            SILU,
            ENDS
            | PADDED
            | HEADS
            | SSD_KEYS
            | {"intermediate_size": "moe.hidden", "shared_intermediate_size": ("moe.shared_hidden", "mlp.hidden")}
            | {"num_local_experts": "moe.experts", "num_experts_per_tok": "moe.top_k", "router_aux_loss_coef": "moe.aux_loss"}
            | {"embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale"}
            | {"attention_multiplier": "attention.scale", "logits_scaling": "logits_divisor"},
            _granite_read,
            _granite_write,
        ),
        Family(
            "nemotron_h",
            "NemotronHForCausalLM",
            COMMON
            | {"vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "layer_norm_epsilon": 1e-5}
            | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "time_step_min": 0.001}
            | {"ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4}
            | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688, "routed_scaling_factor": 1.0}
            | {"moe_shared_expert_intermediate_size": 7688, "norm_topk_prob": True, "n_group": 1, "topk_group": 1},
            {"attention_bias": False, "mlp_bias": False, "use_bias": False, "mamba_proj_bias": False, "use_conv_bias": True}
            | {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "moe_latent_size": None, "num_nextn_predict_layers": 0},
            ENDS
            | HEADS
            | {"layer_norm_epsilon": "norm_eps", "head_dim": "attention.head_dim", "intermediate_size": "mlp.hidden"}
            | {"ssm_state_size": "mamba2.state_dim", "mamba_num_heads": "mamba2.heads", "mamba_head_dim": "mamba2.head_dim"}
            | {"n_groups": "mamba2.groups", "conv_kernel": "mamba2.conv_width", "time_step_min": "mamba2.dt_min"}
            | {"n_routed_experts": "moe.experts", "num_experts_per_tok": "moe.top_k", "moe_intermediate_size": "moe.hidden"}
            | {"moe_shared_expert_intermediate_size": "moe.shared_hidden", "norm_topk_prob": "moe.renormalize"}
            | {"routed_scaling_factor": "moe.scale", "n_group": "moe.groups", "topk_group": "moe.top_groups"},
            _nemotron_read,
            _nemotron_write,
        ),
    )
}
