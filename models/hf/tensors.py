"""The tensors of Hugging Face's checkpoints, each of parts of the parameters here."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...configs.schema import ModelConfig
from ..foreign import ForeignTensor, Part, channels, rows_of, whole


def hf_tensors(model: ModelConfig, model_type: str) -> list[ForeignTensor]:
    """All tensors of a checkpoint there, in the order in which ours come."""
    names = NAMES[model_type]
    found = [ForeignTensor(names.embedding, (Part("embedding.weight"),))]
    block = 0
    for number, kinds in enumerate(model.layers):
        for place, kind in (("mixer", kinds.mixer), ("feed_forward", kinds.feed_forward)):
            if kind is None:
                continue
            prefix, ours = names.layer(block if names.blocks else number), f"layers.{number}"
            norm = names.norms[place == "feed_forward"]
            found.append(ForeignTensor(f"{prefix}.{norm}", (Part(f"{ours}.{place}_norm.weight"),)))
            found += names.parts[kind](model, f"{prefix}.", f"{ours}.{place}")
            block += 1
    found.append(ForeignTensor(names.norm, (Part("head.norm.weight"),)))
    if not model.tied_embeddings:
        found.append(ForeignTensor(HEAD, (Part("head.projection.weight"),)))
    return found


HEAD = "lm_head.weight"
Maker = Callable[[ModelConfig, str, str], list[ForeignTensor]]
"""Of a model, the prefix of names there and ours: the tensors of a mixer or a feed-forward."""


class Names(NamedTuple):
    """How a family calls what is not of a mixer or a feed-forward."""

    embedding: str
    layers: str
    norms: tuple[str, str]
    norm: str
    parts: dict[str, Maker]
    blocks: bool = False
    """Whether a feed-forward has a number of its own."""

    def layer(self, number: int) -> str:
        """The prefix of a layer's names."""
        return f"{self.layers}.{number}"


def _ssd(within: str) -> Maker:
    def make(model: ModelConfig, there: str, ours: str) -> list[ForeignTensor]:
        groups, at = model.mamba2.groups, f"{there}{within}"
        B, C = (rows_of(groups, which) for which in (0, 1))
        projected = [Part(f"{ours}.{name}_proj.weight") for name in ("z", "x", "dt")]
        shared = [Part(f"{ours}.bc_proj.weight", view, True) for view in (B, C)]
        weights = [Part(f"{ours}.conv.bc_weight", channels(view), True) for view in (B, C)]
        biases = [Part(f"{ours}.conv.bc_bias", view, True) for view in (B, C)]
        return [
            ForeignTensor(f"{at}in_proj.weight", (*projected[:2], *shared, projected[2])),
            ForeignTensor(f"{at}conv1d.weight", (Part(f"{ours}.conv.x_weight", channels()), *weights)),
            ForeignTensor(f"{at}conv1d.bias", (Part(f"{ours}.conv.x_bias"), *biases)),
            *whole(at, ours, ssm__A_log="A_log", ssm__D="D", ssm__dt_bias="dt_bias"),
            *whole(at, ours, norm__weight="norm.weight", out_proj__weight="out_proj.weight"),
        ]

    return make


def _mamba(model: ModelConfig, there: str, ours: str) -> list[ForeignTensor]:
    at = f"{there}mamba."
    return [
        ForeignTensor(f"{at}in_proj.weight", (Part(f"{ours}.x_proj.weight"), Part(f"{ours}.z_proj.weight"))),
        ForeignTensor(f"{at}conv1d.weight", (Part(f"{ours}.conv.x_weight", channels()),)),
        *whole(at, ours, conv__x_bias="conv1d.bias", select__dtbc_proj__weight="x_proj.weight"),
        *whole(at, f"{ours}.select", dt_norm__weight="dt_layernorm.weight", b_norm__weight="b_layernorm.weight"),
        *whole(at, f"{ours}.select", c_norm__weight="c_layernorm.weight", dt_proj__weight="dt_proj.weight"),
        *whole(at, ours, ssm__A_log="A_log", ssm__D="D", ssm__dt_bias="dt_proj.bias", out_proj__weight="out_proj.weight"),
    ]


def _attention(within: str) -> Maker:
    names = {f"{name}_proj__weight": f"{within}{name}_proj.weight" for name in "qkvo"}
    return lambda model, there, ours: whole(there, ours, **names)


def _mlp(within: str, gated: bool = True) -> Maker:
    names = {f"{name}_proj__weight": f"{within}{name}_proj.weight" for name in (["gate"] * gated + ["up", "down"])}
    return lambda model, there, ours: whole(there, ours, **names)


def _fused_mlp(there: str, ours: str) -> list[ForeignTensor]:
    """Granite's: gate and up in one."""
    fused = Part(f"{ours}.gate_proj.weight"), Part(f"{ours}.up_proj.weight")
    return [ForeignTensor(f"{there}shared_mlp.input_linear.weight", fused)] + whole(
        there, ours, down_proj__weight="shared_mlp.output_linear.weight"
    )


def _experts(model: ModelConfig, there: str, ours: str, names: tuple[str, ...]) -> Iterator[ForeignTensor]:
    """One tensor an expert."""
    for name in names:
        for e in range(model.moe.experts):
            view = Part(f"{ours}.experts.stacked.{name}_proj", lambda tensor, e=e: tensor[e])  # type: ignore[misc]
            yield ForeignTensor(f"{there}experts.{e}.{name}_proj.weight", (view,))


def _jamba_moe(model: ModelConfig, there: str, ours: str) -> list[ForeignTensor]:
    at = f"{there}feed_forward."
    return whole(at, ours, router__weight="router.weight") + [*_experts(model, at, ours, ("gate", "up", "down"))]


def _granite_moe(model: ModelConfig, there: str, ours: str) -> list[ForeignTensor]:
    at, stacked = f"{there}block_sparse_moe.", f"{ours}.experts.stacked"
    return [
        *whole(at, ours, router__weight="router.layer.weight"),
        ForeignTensor(f"{at}input_linear.weight", (Part(f"{stacked}.gate_proj"), Part(f"{stacked}.up_proj")), 1),
        *whole(at, stacked, down_proj="output_linear.weight"),
        *_fused_mlp(there, f"{ours}.experts.shared"),
    ]


def _nemotron_moe(model: ModelConfig, there: str, ours: str) -> list[ForeignTensor]:
    at = f"{there}mixer."
    return [
        *whole(at, ours, router__weight="gate.weight", bias="gate.e_score_correction_bias"),
        *_experts(model, at, ours, ("up", "down")),
        *_mlp("shared_experts.", False)(model, at, f"{ours}.experts.shared"),
    ]


_OF_JAMBA = ("input_layernorm.weight", "pre_ff_layernorm.weight")
_OF_GRANITE = ("input_layernorm.weight", "post_attention_layernorm.weight")
NAMES = {
    "jamba": Names(
        "model.embed_tokens.weight",
        "model.layers",
        _OF_JAMBA,
        "model.final_layernorm.weight",
        {"mamba": _mamba, "attention": _attention("self_attn."), "mlp": _mlp("feed_forward."), "moe": _jamba_moe},
    ),
    "mamba2": Names(
        "backbone.embeddings.weight",
        "backbone.layers",
        ("norm.weight", ""),
        "backbone.norm_f.weight",
        {"mamba2": _ssd("mixer.")},
    ),
    "bamba": Names(
        "model.embed_tokens.weight",
        "model.layers",
        _OF_JAMBA,
        "model.final_layernorm.weight",
        {"mamba2": _ssd("mamba."), "attention": _attention("self_attn."), "mlp": _mlp("feed_forward.")},
    ),
    "granitemoehybrid": Names(
        "model.embed_tokens.weight",
        "model.layers",
        _OF_GRANITE,
        "model.norm.weight",
        {
            "mamba2": _ssd("mamba."),
            "attention": _attention("self_attn."),
            "mlp": lambda model, there, ours: _fused_mlp(there, ours),
            "moe": _granite_moe,
        },
    ),
    "nemotron_h": Names(
        "backbone.embeddings.weight",
        "backbone.layers",
        ("norm.weight", "norm.weight"),
        "backbone.norm_f.weight",
        {"mamba2": _ssd("mixer."), "attention": _attention("mixer."), "mlp": _mlp("mixer.", False), "moe": _nemotron_moe},
        blocks=True,
    ),
}
ALIASES = {
    "mamba2": (("backbone.embedding.", "backbone.embeddings."),),
    "nemotron_h": (("model.", "backbone."), ("backbone.embedding.", "backbone.embeddings.")),
}
"""Beginnings of names in older files, or as the library has them in memory, and those above."""


def usual_name(name: str, model_type: str) -> str:
    """A name of a file as `hf_tensors` has it."""
    for other, usual in ALIASES.get(model_type, ()):
        if name.startswith(other):
            name = usual + name.removeprefix(other)
    return name
