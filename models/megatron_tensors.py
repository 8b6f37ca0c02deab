"""The tensors of Megatron-LM's distributed checkpoints of hybrid models, each of parts of the parameters here."""

from collections.abc import Callable

from ..configs.schema import ModelConfig
from .foreign import ForeignTensor, Part, View, channels, rows_of, whole

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
"""Whose rows Megatron fills up to a multiple of what it likes."""


def megatron_tensors(model: ModelConfig) -> list[ForeignTensor]:
    """All of a checkpoint, in the order in which ours come; a mixer and a feed-forward are a layer each there."""
    found = [ForeignTensor(EMBEDDING, (Part("embedding.weight"),))]
    number = 0
    for ours, kinds in enumerate(model.layers):
        for place, kind in (("mixer", kinds.mixer), ("feed_forward", kinds.feed_forward)):
            if kind is None:
                continue
            norm, make = PARTS[kind]
            there, here = f"decoder.layers.{number}.", f"layers.{ours}.{place}"
            found.append(ForeignTensor(there + norm, (Part(f"{here}_norm.weight"),)))
            found += make(model, there, here)
            number += 1
    found.append(ForeignTensor("decoder.final_norm.weight", (Part("head.norm.weight"),)))
    return found if model.tied_embeddings else [*found, ForeignTensor(HEAD, (Part("head.projection.weight"),))]


def _mamba2(model: ModelConfig, there: str, ours: str) -> list[ForeignTensor]:
    """Projections and convolutions are one parameter there, whose parts a checkpoint has apart."""
    groups, at = model.mamba2.groups, f"{there}mixer."
    projected = {f"{name}_proj__weight": f"in_proj.weight.{name}" for name in ("z", "x", "dt")}
    found = whole(at, ours, **projected, out_proj__weight="out_proj.weight", norm__weight="norm.weight")
    found += whole(at, ours, ssm__A_log="A_log", ssm__D="D", ssm__dt_bias="dt_bias", conv__x_bias="conv1d.bias.x")
    found.append(ForeignTensor(f"{at}conv1d.weight.x", (Part(f"{ours}.conv.x_weight", channels()),)))
    for which, name in enumerate("BC"):
        rows = rows_of(groups, which)
        views: dict[str, tuple[str, View]] = {
            "in_proj.weight": ("bc_proj.weight", rows),
            "conv1d.weight": ("conv.bc_weight", channels(rows)),
            "conv1d.bias": ("conv.bc_bias", rows),
        }
        found += [ForeignTensor(f"{at}{key}.{name}", (Part(f"{ours}.{own}", view, True),)) for key, (own, view) in views.items()]
    return found


def _attention(model: ModelConfig, there: str, ours: str) -> list[ForeignTensor]:
    """Rows lie by key's head: the queries that go with it, key, value."""
    groups = model.attention.kv_heads
    parts = tuple(Part(f"{ours}.{name}_proj.weight", lambda tensor: tensor.unflatten(0, (groups, -1))) for name in "qkv")
    fused = ForeignTensor(f"{there}self_attention.linear_qkv.weight", parts, 1, True)
    return [fused, *whole(f"{there}self_attention.", ours, o_proj__weight="linear_proj.weight")]


def _mlp(at: str, ours: str, gated: bool) -> list[ForeignTensor]:
    first = tuple(Part(f"{ours}.{name}_proj.weight") for name in (["gate"] * gated + ["up"]))
    return [ForeignTensor(f"{at}linear_fc1.weight", first), *whole(at, ours, down_proj__weight="linear_fc2.weight")]


def _moe(model: ModelConfig, there: str, ours: str) -> list[ForeignTensor]:
    sizes, at, stacked = model.moe, f"{there}mlp.", f"{ours}.experts.stacked"
    gated = sizes.activation == "swiglu"
    first = tuple(Part(f"{stacked}.{name}_proj") for name in (["gate"] * gated + ["up"]))
    found = whole(at, ours, router__weight="router.weight")
    if sizes.choice_bias or sizes.bias_rate > 0:
        found += whole(at, ours, bias="router.expert_bias")
    found.append(ForeignTensor(f"{at}experts.experts.linear_fc1.weight", first, 1))
    found += whole(at, stacked, down_proj="experts.experts.linear_fc2.weight")
    return found + (_mlp(f"{at}shared_experts.", f"{ours}.experts.shared", gated) if sizes.shared_hidden else [])


Maker = Callable[[ModelConfig, str, str], list[ForeignTensor]]
PARTS: dict[str, tuple[str, Maker]] = {
    "mamba2": ("mixer.in_proj.layer_norm_weight", _mamba2),
    "attention": ("self_attention.linear_qkv.layer_norm_weight", _attention),
    "mlp": (
        "mlp.linear_fc1.layer_norm_weight",
        lambda model, there, ours: _mlp(f"{there}mlp.", ours, model.mlp.activation == "swiglu"),
    ),
    "moe": ("pre_mlp_layernorm.weight", _moe),
}
"""Of a mixer or feed-forward: the name of the norm before it, and the rest."""


def megatron_objects(model: ModelConfig) -> dict[str, list[None]]:
    """What else Megatron looks for in a checkpoint: what its linear layers keep beside their weights, which is nothing."""
    names = [each.name.partition(".weight")[0] for each in megatron_tensors(model)] + [HEAD.removesuffix(".weight")]
    ends = ("proj", "linear_qkv", "linear_fc1", "linear_fc2", "output_layer")
    linear = [name for name in dict.fromkeys(names) if name.endswith(ends)]
    counts = {name: model.moe.experts if ".experts.experts." in name else 1 for name in linear}
    return {f"{name}._extra_state/shard_{shard}_{count}": [None] for name, count in counts.items() for shard in range(count)}
