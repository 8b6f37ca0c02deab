"""Every key a run's YAML file may hold, what it means, and what is allowed. Imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .pattern import LayerKinds, parse_pattern

Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class KeyedError(ValueError):
    """A value that is wrong beside another: names its dotted key, so that the message can name the line."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def _divides(key: str, part: int, whole: int, name: str) -> None:
    if whole % part:
        raise KeyedError(key, f"is {part}, allowed: a divisor of {name}, {whole}")


class Section(BaseModel):
    """Unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Mamba2Config(Section):
    """The Mamba-2 mixer (`M`)."""

    expand: Count = 2
    """Inner channels as a multiple of d_model."""
    head_dim: Count = 64
    state_dim: Count = 128
    groups: Count = 1
    """Groups of heads that share B and C."""
    conv_width: Annotated[int, Field(ge=2)] = 4
    chunk_size: Count = 64
    """Tokens the scan works on together; changes the speed, not the result."""


class RopeConfig(Section):
    """Rotary position embedding."""

    theta: Positive = 10000.0


class AttentionConfig(Section):
    """The attention mixer (`*`)."""

    heads: Count = 8
    kv_heads: Count = 8
    head_dim: Count = 64
    rope: RopeConfig | None = None
    """None: no position information, as Jamba has it."""


class MLPConfig(Section):
    """The SwiGLU feed-forward (`-`)."""

    hidden: Count = 1024


class MoEConfig(Section):
    """The mixture of SwiGLU experts (`E`), dropless, softmax then top-k without renormalising, as Jamba has it."""

    experts: Count = 8
    top_k: Count = 2
    hidden: Count = 1024
    aux_loss: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the load-balancing loss, per layer and micro-step."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k > self.experts:
            raise KeyedError("top_k", f"is {self.top_k}, allowed: at most model.moe.experts, {self.experts}")
        return self


class ModelConfig(Section):
    """The hybrid model."""

    pattern: str
    """One letter a sub-layer: M mamba2, * attention, - mlp, E moe."""
    repeat: Count = 1
    """How many times the pattern follows itself."""
    vocab_size: Count
    d_model: Count
    norm_eps: Positive = 1e-5
    initializer_range: Positive = 0.02
    """Standard deviation of the weight matrices at the start."""
    mamba2: Mamba2Config = Mamba2Config()
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()
    moe: MoEConfig = MoEConfig()

    @property
    def layers(self) -> list[LayerKinds]:
        """What each layer is made of, first to last."""
        return parse_pattern(self.pattern) * self.repeat

    @property
    def inner(self) -> int:
        """Channels inside a Mamba-2 mixer."""
        return self.mamba2.expand * self.d_model

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        try:
            parse_pattern(self.pattern)
        except ValueError as error:
            raise KeyedError("pattern", str(error)) from None
        _divides("mamba2.head_dim", self.mamba2.head_dim, self.inner, "expand * d_model")
        _divides("mamba2.groups", self.mamba2.groups, self.inner // self.mamba2.head_dim, "the Mamba-2 heads")
        _divides("attention.kv_heads", self.attention.kv_heads, self.attention.heads, "attention.heads")
        if self.attention.rope is not None and self.attention.head_dim % 2:
            raise KeyedError("attention.head_dim", f"is {self.attention.head_dim}, allowed with rope: an even number")
        return self


class Degrees(NamedTuple):
    """Ranks along each axis of a mesh."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int


class ParallelConfig(Section):
    """Degrees of the mesh, and how the sequence lies on it."""

    tp: Count = 1
    """Tensor: heads, hidden units and vocabulary are split."""
    cp: Count | Literal["auto"] = 1
    """Context: the sequence is split through the whole model. `auto`: over the ranks that the other degrees leave."""
    pp: Literal[1] = 1
    ep: Literal[1] = 1
    dp: Count | Literal["auto"] = "auto"
    """Data. `auto`: the ranks that the other degrees leave."""
    layout: Literal["contiguous", "zigzag"] = "contiguous"
    """Which parts of the sequence a cp rank holds; zigzag balances causal attention."""
    strategy: Literal["auto", "ring", "allgather", "doubling", "sliced"] = "auto"
    """How boundary states pass over cp. `auto`: the fastest by latency and bandwidth, see `links`."""
    transport: Literal["fp32", "bf16"] = "fp32"
    """What boundary states travel as; they accumulate in fp32."""
    attention: Literal["auto", "ulysses", "ring", "usp", "allgather"] = "auto"
    """How attention works over cp. `auto`: by heads, ranks and length."""
    links: Path | None = None
    """Latency and bandwidth as `baton bench exchange` measured and wrote them; none: defaults of the backend."""

    def degrees(self, world: int) -> "Degrees":
        """Numbers for `auto`, on `world` ranks. Raises KeyedError when the degrees do not multiply to it."""
        given = {"tp": self.tp, "cp": self.cp, "dp": self.dp}
        fixed = {name: degree for name, degree in given.items() if degree != "auto"}
        product = math.prod(fixed.values())
        left = next((name for name in ("cp", "dp") if name not in fixed), None)
        if world % product or (left is None and product != world):
            named = " * ".join(f"{name} {degree}" for name, degree in fixed.items())
            allowed = f"a multiple of {product} ranks" if left else f"{product} ranks, or parallel.dp=auto"
            raise KeyedError(list(fixed)[-1], f"gives {named} = {product} on {world} ranks; allowed: {allowed}")
        values = {"dp": 1} | fixed | ({left: world // product} if left else {})
        return Degrees(**values, pp=self.pp, ep=self.ep)

    @property
    def segments(self) -> int:
        """Contiguous runs of tokens that the whole sequence is cut into (1 until `cp` is a number)."""
        cp = 1 if self.cp == "auto" else self.cp
        return cp * (2 if self.layout == "zigzag" and cp > 1 else 1)


class TokenizerConfig(Section):
    """How text becomes tokens."""

    kind: Literal["bpe", "byte"] = "bpe"
    """bpe: trained on the corpus, model.vocab_size tokens; byte: 256 bytes and the end of document."""


class DataConfig(Section):
    """The corpus: text, and the token files made of it."""

    input: list[str] = []
    """Files or folders of text (.py .txt .md .rst .jsonl, .gz of these); empty: the Python standard library's sources."""
    folder: Path
    """Where the token files (.bin/.idx) and the tokenizer lie; made from `input` when it is not there."""
    max_bytes: Count = 8_000_000
    """Text beyond this many bytes is left out."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Of the tokens: the last ones, files being in a mixed order."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    context: Count
    """Tokens in a sequence."""
    documents: Literal["single", "packed"] = "single"
    """packed: a sequence's documents do not see each other; single: a sequence is one document, whatever it is cut from."""


class BatchConfig(Section):
    """What one optimizer step sees, over all ranks."""

    sequences: Count = 1
    micro_steps: Count = 1
    """Parts that a step is computed in, one after another; no mesh changes their number."""

    @model_validator(mode="after")
    def _micro_steps_fit(self) -> Self:
        _divides("micro_steps", self.micro_steps, self.sequences, "batch.sequences")
        return self


class OptimizerConfig(Section):
    """AdamW. Norms, biases, A_log, D and dt_bias are not decayed."""

    lr: Positive = 3e-4
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Positive = 1.0
    """Largest norm of all gradients together."""


class ScheduleConfig(Section):
    """Steps, and the learning rate over them."""

    steps: Count
    warmup: Annotated[int, Field(ge=0, strict=True)] = 0
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final: Fraction = 0.1
    """Learning rate at the last step, as a fraction of the highest."""


class CheckpointConfig(Section):
    """When checkpoints are written, to the run's folder."""

    every: Count = 100
    keep: Count = 2
    """The newest ones that stay."""


class EvaluationConfig(Section):
    """Validation loss."""

    every: Count = 100
    sequences: Count = 8


class LoggingConfig(Section):
    """What a run reports."""

    every: Count = 1
    """Steps between lines of metrics.jsonl and TensorBoard."""
    sample_tokens: Annotated[int, Field(ge=0, strict=True)] = 48
    """Length of the text continued at the end; 0: none."""


class Config(Section):
    """A whole run."""

    run: Path
    """The run's folder: checkpoints, metrics, plots."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Of the computation; bf16 keeps parameters, gradients' sums, A_log, D, dt_bias and the router in fp32."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """auto: Triton kernels on CUDA and ROCm where they take the sizes, PyTorch elsewhere; triton: an error where they do not."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        self._check_parts()
        return self

    def _check_parts(self) -> None:
        if self.kernels == "triton" and self.precision == "fp64":
            raise KeyedError("kernels", "is triton, whose kernels do not compute in precision fp64; allowed: auto, reference")
        check_tensor_degree(self.model, self.parallel.tp)
        check_context(self.model, self.parallel, self.data.context)
        check_attention(self.model, self.parallel)
        per_micro_step = self.batch.sequences // self.batch.micro_steps
        if self.parallel.dp != "auto" and per_micro_step % self.parallel.dp:
            raise KeyedError(
                "parallel.dp", f"is {self.parallel.dp}, allowed: a divisor of a micro-step's sequences, {per_micro_step}"
            )
        tokens = per_micro_step * self.data.context
        if any(layer.feed_forward == "moe" for layer in self.model.layers) and self.model.moe.experts > tokens:
            raise KeyedError("model.moe.experts", f"is {self.model.moe.experts}, more than a micro-step's {tokens} tokens")

    def to_yaml(self) -> str:
        """A file from which `load_config` reads the same."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def resolved(self, world: int) -> Self:
        """The same on `world` ranks, with numbers for `auto`. Raises KeyedError where the degrees do not fit."""
        try:
            degrees = self.parallel.degrees(world)
        except KeyedError as error:
            raise KeyedError(f"parallel.{error.key}", str(error)) from None
        config = self.model_copy(update={"parallel": self.parallel.model_copy(update=degrees._asdict())})
        config._check_parts()
        return config


def check_tensor_degree(model: ModelConfig, tp: int) -> None:
    """Raises KeyedError where tp cuts something that does not divide, with the degrees that would work."""
    mixers = {layer.mixer for layer in model.layers}
    feed_forwards = {layer.feed_forward for layer in model.layers}
    sizes = {"model.vocab_size": model.vocab_size}
    shared = {}
    if "mamba2" in mixers:
        sizes["the Mamba-2 heads"] = model.inner // model.mamba2.head_dim
        shared["model.mamba2.groups"] = model.mamba2.groups
    if "attention" in mixers:
        sizes["model.attention.heads"] = model.attention.heads
        shared["model.attention.kv_heads"] = model.attention.kv_heads
    if "mlp" in feed_forwards:
        sizes["model.mlp.hidden"] = model.mlp.hidden
    if "moe" in feed_forwards:
        sizes["model.moe.hidden"] = model.moe.hidden

    def fits(degree: int) -> bool:
        whole = all(size % degree == 0 for size in sizes.values())
        return whole and all(size % degree == 0 or degree % size == 0 for size in shared.values())

    if not fits(tp):
        wrong = [name for name, size in sizes.items() if size % tp]
        wrong += [name for name, size in shared.items() if size % tp and tp % size]
        allowed = ", ".join(str(degree) for degree in range(1, 1 + min(sizes.values())) if fits(degree))
        every = sizes | shared
        named = " and ".join(f"{name} ({every[name]})" for name in wrong)
        raise KeyedError("parallel.tp", f"is {tp}, which does not divide {named}; allowed: {allowed}")


def check_context(model: ModelConfig, parallel: ParallelConfig, context: int) -> None:
    """Raises KeyedError where the sequence does not cut into equal segments, each at least as long as the convs' reach."""
    segments, reach = parallel.segments, model.mamba2.conv_width - 1
    recurrent = any(layer.mixer == "mamba2" for layer in model.layers)
    chunks = math.ceil(context / model.mamba2.chunk_size) if recurrent else context
    fitting = _fitting_cp(parallel, context, reach if recurrent else 1, chunks)
    if context % segments:
        below = context - context % segments or segments
        raise KeyedError(
            "parallel.cp",
            f"is {parallel.cp}, whose {segments} {parallel.layout} segments do not divide data.context ({context}); "
            f"data.context={below} would, or cp of {fitting}",
        )
    if recurrent and segments > 1 and context // segments < reach:
        raise KeyedError(
            "parallel.cp",
            f"is {parallel.cp}: a segment of {context // segments} tokens is shorter than the conv's reach, {reach}; "
            f"allowed: cp of {fitting}",
        )
    if parallel.cp != "auto" and parallel.cp > chunks:
        raise KeyedError(
            "parallel.cp",
            f"is {parallel.cp}, more ranks than the {chunks} chunks of model.mamba2.chunk_size ({model.mamba2.chunk_size}) "
            f"in data.context ({context}); allowed: cp of {fitting}, or a chunk_size of at most {context // parallel.cp}",
        )


def check_attention(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises KeyedError where Ulysses cannot deal the heads out evenly."""
    cp = 1 if parallel.cp == "auto" else parallel.cp
    heads = model.attention.heads // parallel.tp
    if parallel.attention == "ulysses" and any(layer.mixer == "attention" for layer in model.layers) and heads % cp:
        fits = ", ".join(str(degree) for degree in range(1, heads + 1) if heads % degree == 0)
        raise KeyedError(
            "parallel.attention",
            f"is ulysses: {heads} heads (model.attention.heads over tp {parallel.tp}) do not divide over cp {cp}; "
            f"allowed: usp, ring, allgather, auto, or cp of {fits}",
        )


def _fitting_cp(parallel: ParallelConfig, context: int, reach: int, chunks: int) -> str:
    """Degrees, at most `chunks`, whose segments divide the context and are as long as `reach`."""
    each = 2 if parallel.layout == "zigzag" else 1
    fits = [cp for cp in range(1, chunks + 1) if cp == 1 or (context % (cp * each) == 0 and context // (cp * each) >= reach)]
    return ", ".join(str(cp) for cp in fits[:16]) + (" ..." if len(fits) > 16 else "")
