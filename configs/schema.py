"""Every key a run's YAML file may hold, what it means, and what is allowed. Imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .checks import (
    check_attention,
    check_batch,
    check_context,
    check_copies,
    check_divides,
    check_experts,
    check_pipeline,
    check_precision,
    check_rotated,
    check_sequence_parallel,
    check_start,
    check_tensor_degree,
    refuse_zero_bubble,
)
from .errors import KeyedError
from .pattern import LayerKinds, find_cuts, parse_pattern

Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Recompute = Literal["none", "mixer", "feed_forward", "layer"]
Activation = Literal["swiglu", "relu2"]


class Section(BaseModel):
    """Unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MambaConfig(Section):
    """The Mamba mixer (`m`)."""

    expand: Count = 2
    """Inner channels as a multiple of d_model."""
    state_dim: Count = 16
    conv_width: Annotated[int, Field(ge=2)] = 4
    dt_rank: Count | None = None
    """Of the matrix that makes steps of channels; null: d_model / 16, rounded up."""
    norms: bool = True
    """RMS norms of dt, B and C, as Jamba has them."""


class Mamba2Config(Section):
    """The Mamba-2 mixer (`M`)."""

    expand: Count = 2
    """Inner channels as a multiple of d_model, where `heads` does not give them."""
    heads: Count | None = None
    """null: expand * d_model / head_dim."""
    head_dim: Count = 64
    state_dim: Count = 128
    groups: Count = 1
    """Groups of heads that share B and C."""
    conv_width: Annotated[int, Field(ge=2)] = 4
    chunk_size: Count = 64
    """Tokens the scan works on together; changes the speed, not the result."""
    dt_min: Annotated[float, Field(ge=0)] = 0.0
    """Steps are at least this, after softplus."""
    dt_max: Positive | None = None
    """And at most this; null: any."""

    @property
    def dt_limit(self) -> tuple[float, float]:
        """Between which steps are."""
        return self.dt_min, math.inf if self.dt_max is None else self.dt_max

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.dt_max is not None and self.dt_max <= self.dt_min:
            raise KeyedError("dt_max", f"is {self.dt_max}, allowed: more than dt_min, {self.dt_min}")
        return self


class RopeConfig(Section):
    """Rotary position embedding."""

    theta: Positive = 10000.0
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of a head's dims, the first ones: what is rotated."""


class AttentionConfig(Section):
    """The attention mixer (`*`)."""

    heads: Count = 8
    kv_heads: Count = 8
    head_dim: Count = 64
    rope: RopeConfig | None = None
    """None: no position information, as Jamba has it."""
    scale: Positive | None = None
    """Of scores, before their softmax; null: 1 / sqrt(head_dim)."""

    @property
    def rotated(self) -> int:
        """A head's dims that rope rotates."""
        return 0 if self.rope is None else int(self.head_dim * self.rope.fraction)


class MLPConfig(Section):
    """The feed-forward (`-`)."""

    hidden: Count = 1024
    activation: Activation = "swiglu"
    """swiglu: down(silu(gate x) * up x); relu2: down(relu(up x)^2), without a gate."""


class MoEConfig(Section):
    """The mixture of experts (`E`): as Jamba has it, softmax then top-k without renormalising, unless keys say otherwise."""

    experts: Count = 8
    top_k: Count = 2
    hidden: Count = 1024
    shared_hidden: Annotated[int, Field(ge=0, strict=True)] = 0
    """Hidden units of one more expert that every token passes; 0: none."""
    activation: Activation = "swiglu"
    """Of the experts, as model.mlp's."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What makes an expert's probability of its logit: all of them, or its own alone."""
    renormalize: bool = False
    """Whether the probabilities of a token's experts are divided by their sum."""
    scale: Positive = 1.0
    """Of the weights that come of it."""
    groups: Count = 1
    """Groups of experts, as many in each."""
    top_groups: Count = 1
    """Groups that a token's experts are of: those whose two best are the best together."""
    aux_loss: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the load-balancing loss, per micro-step."""
    balance: Literal["layer", "pooled"] = "layer"
    """layer: a load-balancing loss for each layer, added up; pooled: one, over the tokens of all layers (Jamba's)."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean square of the router's log-sum-exp, per layer and micro-step."""
    bias_rate: Annotated[float, Field(ge=0)] = 0.0
    """How much an expert's bias, which counts for the choice alone, moves towards balance after each step."""
    choice_bias: bool = False
    """Whether experts have such a bias where bias_rate is 0."""
    capacity: Positive | None = None
    """In training, tokens that an expert takes at most, in units of what balance gives it; the rest pass it by. None: all."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k > self.experts:
            raise KeyedError("top_k", f"is {self.top_k}, allowed: at most model.moe.experts, {self.experts}")
        check_divides("groups", self.groups, self.experts, "model.moe.experts")
        each = self.experts // self.groups
        if self.groups > 1 and each < 2:
            raise KeyedError("groups", f"is {self.groups}, allowed: groups of two experts and more")
        if self.top_groups > self.groups or self.top_k > self.top_groups * each:
            least = -(-self.top_k // each)
            raise KeyedError("top_groups", f"is {self.top_groups}, allowed: {least} to {self.groups}")
        return self


class ModelConfig(Section):
    """The hybrid model."""

    pattern: str
    """One letter a sub-layer: M mamba2, m mamba, * attention, - mlp, E moe. `|`: a pipeline may be cut here (parallel.pp)."""
    repeat: Count = 1
    """How many times the pattern follows itself."""
    vocab_size: Count
    d_model: Count
    tied_embeddings: bool = False
    """Whether the projection to the vocabulary is the embedding's matrix."""
    norm_eps: Positive = 1e-5
    initializer_range: Positive = 0.02
    """Standard deviation of the weight matrices at the start."""
    embedding_scale: Positive = 1.0
    """What embedded tokens are multiplied by."""
    residual_scale: Positive = 1.0
    """What a mixer or a feed-forward gives is multiplied by before it is added."""
    logits_divisor: Positive = 1.0
    padding_token: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Whose embedding is not trained."""
    mamba: MambaConfig = MambaConfig()
    mamba2: Mamba2Config = Mamba2Config()
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()
    moe: MoEConfig = MoEConfig()

    @property
    def layers(self) -> list[LayerKinds]:
        """What each layer is made of, first to last."""
        return [*parse_pattern(self.pattern)] * self.repeat

    @property
    def cuts(self) -> list[int]:
        """The layers before which `|` stands, ascending."""
        return find_cuts(self.pattern * self.repeat)

    @property
    def inner(self) -> int:
        """Channels inside a Mamba-2 mixer."""
        return self.mamba2.expand * self.d_model if self.mamba2.heads is None else self.mamba2.heads * self.mamba2.head_dim

    @property
    def mamba2_heads(self) -> int:
        """Heads of a Mamba-2 mixer."""
        return self.inner // self.mamba2.head_dim

    @property
    def mamba_inner(self) -> int:
        """Channels inside a Mamba mixer."""
        return self.mamba.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """Of a Mamba mixer."""
        return -(-self.d_model // 16) if self.mamba.dt_rank is None else self.mamba.dt_rank

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        try:
            parse_pattern(self.pattern)
        except ValueError as error:
            raise KeyedError("pattern", str(error)) from None
        mixers = {layer.mixer for layer in self.layers}
        if "mamba2" in mixers:
            check_divides("mamba2.head_dim", self.mamba2.head_dim, self.inner, "expand * d_model")
            check_divides("mamba2.groups", self.mamba2.groups, self.mamba2_heads, "the Mamba-2 heads")
        if "attention" in mixers:
            check_divides("attention.kv_heads", self.attention.kv_heads, self.attention.heads, "attention.heads")
            check_rotated(self.attention)
        if self.padding_token is not None and self.padding_token >= self.vocab_size:
            raise KeyedError("padding_token", f"is {self.padding_token}, allowed: below model.vocab_size, {self.vocab_size}")
        return self


TRAINING_KEYS = (
    "initializer_range",
    "mamba2.chunk_size",
    "moe.aux_loss",
    "moe.balance",
    "moe.bias_rate",
    "moe.capacity",
    "moe.z_loss",
)
"""Of ModelConfig, those that a run may change on its way: no shape depends on them, and nothing that a trained model computes."""


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
    pp: Count = 1
    """Pipeline: the layers are split into stages, at the pattern's `|` or, without any, where the stages cost the same."""
    ep: Count = 1
    """Expert: experts are split over ranks of dp and cp, which keep their tokens and exchange them."""
    dp: Count | Literal["auto"] = "auto"
    """Data. `auto`: the ranks that the other degrees leave."""
    replicate: Count = 1
    """HSDP: of the dp ranks, how many groups have a copy of the parameters each; 1: they are sharded over all of dp and cp."""
    zero: Literal[2, 3] = 3
    """Of a layer's gathered parameters: 3 frees them after its forward, and gathers them again in backward; 2 keeps them until
    then. In a pipeline torch's schedules keep a stage's from a backward to the next forward, and its gradients whole."""
    sequence_parallel: bool = False
    """Whether tp ranks share out the tokens between tensor regions: norms, residuals, routers."""
    recompute: Recompute = "none"
    """Which part of each layer, with its norm, backward computes again instead of keeping what it needs of forward."""
    schedule: Annotated[Literal["1f1b", "interleaved_1f1b"], BeforeValidator(refuse_zero_bubble)] = "1f1b"
    """Order of a pipeline's forwards and backwards."""
    stages_per_rank: Count = 1
    """Of a pipeline; interleaved_1f1b wants 2 or more, which shorten the bubble."""
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
        given = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp}
        fixed = {name: degree for name, degree in given.items() if degree != "auto"}
        product = math.prod(fixed.values())
        left = next((name for name in ("cp", "dp") if name not in fixed), None)
        if world % product or (left is None and product != world):
            named = {name: degree for name, degree in fixed.items() if name != "pp" or degree > 1}
            factors = " * ".join(f"{name} {degree}" for name, degree in named.items())
            allowed = f"a multiple of {product} ranks" if left else f"{product} ranks, or parallel.dp=auto"
            raise KeyedError(list(named)[-1], f"gives {factors} = {product} on {world} ranks; allowed: {allowed}")
        values = {"dp": 1} | fixed | ({left: world // product} if left else {})
        return Degrees(**values, ep=self.ep)

    @property
    def stages(self) -> int:
        """Parts that a pipeline cuts the model into."""
        return self.pp * self.stages_per_rank

    @property
    def segments(self) -> int:
        """Contiguous runs of tokens that the whole sequence is cut into (1 until `cp` is a number)."""
        cp = 1 if self.cp == "auto" else self.cp
        return cp * (2 if self.layout == "zigzag" and cp > 1 else 1)


class TokenizerConfig(Section):
    """How text becomes tokens."""

    kind: Literal["bpe", "byte", "file"] = "bpe"
    """bpe: trained on the corpus, model.vocab_size tokens; byte: 256 bytes and the end of document; file: one that is there."""
    file: Path | None = None
    """A tokenizer.json of Hugging Face's library, for kind file."""
    end: str = "<|endoftext|>"
    """Its token at a document's end."""

    @model_validator(mode="after")
    def _file_is_named(self) -> Self:
        if (self.kind == "file") != (self.file is not None):
            allowed = "a file" if self.kind == "file" else "null"
            raise KeyedError("file", f"is {self.file}, allowed with kind {self.kind}: {allowed}")
        return self


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
        check_divides("micro_steps", self.micro_steps, self.sequences, "batch.sequences")
        return self


class OptimizerConfig(Section):
    """AdamW. Norms, biases, A_log, D and dt_bias are not decayed."""

    lr: Positive = 3e-4
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Positive = 1.0
    """Largest norm of all gradients together."""
    implementation: Literal["auto", "torch", "apex", "transformer_engine"] = "auto"
    """torch: its fused AdamW; apex, transformer_engine: their FusedAdam; auto: on GPUs one that is installed, else torch."""


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
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""


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
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Of the computation; bf16 keeps parameters, gradients' sums, A_log, D, dt_bias and the router in fp32."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """auto: Triton kernels on CUDA and ROCm where they take the sizes, PyTorch elsewhere; triton: an error where they do not."""
    norms: Literal["baton", "apex"] = "baton"
    """apex: its FusedRMSNorm, on GPUs, in place of the kernel here; the gated norm stays."""
    start_from: Path | None = None
    """A checkpoint, or a run's folder with some, whose weights a new run begins with; null: random ones."""
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
        self.check()
        return self

    def check(self) -> None:
        """Raises KeyedError where values do not fit each other, also after `model_copy`, which does not look."""
        check_precision(self)
        check_start(self)
        check_tensor_degree(self.model, self.parallel.tp)
        check_context(self.model, self.parallel, self.data.context)
        check_attention(self.model, self.parallel)
        check_sequence_parallel(self.parallel, self.data.context)
        check_pipeline(self.model, self.parallel, self.batch.micro_steps)
        check_copies(self.parallel)
        check_experts(self.model, self.parallel)
        check_batch(self)

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
        config.check()
        return config
