"""What values must be beside each other: each check raises KeyedError with the key, what is wrong and what is allowed."""

import math
from typing import TYPE_CHECKING

from .errors import KeyedError
from .pattern import CUT

if TYPE_CHECKING:
    from .schema import AttentionConfig, Config, ModelConfig, ParallelConfig


def refuse_zero_bubble(schedule: object) -> object:
    """A schedule's name as it is. Raises ValueError for the field's zero-bubble schedules: what is allowed, and the reason."""
    name = str(schedule).lower().replace("_", "").replace("-", "").removeprefix("schedule")
    if "zerobubble" in name or name.startswith(("zb", "dualpipe")):
        raise ValueError(
            "1f1b, interleaved_1f1b; not zero-bubble schedules, whose split backward would run every fused backward and its "
            "exchange twice, and fails with experts"
        )
    return schedule


def check_divides(key: str, part: int, whole: int, name: str) -> None:
    """Raises KeyedError where part, the value of key, does not divide whole, which is called name."""
    if whole % part:
        raise KeyedError(key, f"is {part}, allowed: a divisor of {name}, {whole}")


def check_precision(config: "Config") -> None:
    """Raises KeyedError where the kernels do not compute in the precision."""
    if config.kernels == "triton" and config.precision == "fp64":
        raise KeyedError("kernels", "is triton, whose kernels do not compute in precision fp64; allowed: auto, reference")


def check_start(config: "Config") -> None:
    """Raises KeyedError where a run would write into what it starts from."""
    if config.start_from is not None and config.start_from.resolve() == config.run.resolve():
        raise KeyedError("run", f"is {config.run}, as start_from is; allowed: another folder")


def check_rotated(attention: "AttentionConfig") -> None:
    """Raises KeyedError where rope cannot pair the dims that it rotates."""
    if attention.rope is not None and attention.rotated % 2:
        part = attention.rope.fraction
        raise KeyedError("attention.head_dim", f"is {attention.head_dim}, allowed with rope: of which {part:g} is an even number")


def check_tensor_degree(model: "ModelConfig", tp: int) -> None:
    """Raises KeyedError where tp cuts something that does not divide, with the degrees that would work."""
    mixers = {layer.mixer for layer in model.layers}
    feed_forwards = {layer.feed_forward for layer in model.layers}
    sizes = {"model.vocab_size": model.vocab_size}
    shared = {}
    if "mamba2" in mixers:
        sizes["the Mamba-2 heads"] = model.mamba2_heads
        shared["model.mamba2.groups"] = model.mamba2.groups
    if "mamba" in mixers:
        sizes["the Mamba channels"] = model.mamba_inner
    if "attention" in mixers:
        sizes["model.attention.heads"] = model.attention.heads
        shared["model.attention.kv_heads"] = model.attention.kv_heads
    if "mlp" in feed_forwards:
        sizes["model.mlp.hidden"] = model.mlp.hidden
    if "moe" in feed_forwards:
        sizes["model.moe.hidden"] = model.moe.hidden
        if model.moe.shared_hidden:
            sizes["model.moe.shared_hidden"] = model.moe.shared_hidden

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


def check_context(model: "ModelConfig", parallel: "ParallelConfig", context: int) -> None:
    """Raises KeyedError where the sequence does not cut into equal segments, each at least as long as the convs' reach."""
    mixers = {layer.mixer for layer in model.layers}
    widths = {"mamba2": model.mamba2.conv_width, "mamba": model.mamba.conv_width}
    segments, reach = parallel.segments, max((width - 1 for mixer, width in widths.items() if mixer in mixers), default=0)
    chunks = math.ceil(context / model.mamba2.chunk_size) if "mamba2" in mixers else context

    def fitting() -> str:
        return _fitting_cp(parallel, context, max(reach, 1), chunks)

    if context % segments:
        below = context - context % segments or segments
        raise KeyedError(
            "parallel.cp",
            f"is {parallel.cp}, whose {segments} {parallel.layout} segments do not divide data.context ({context}); "
            f"data.context={below} would, or cp of {fitting()}",
        )
    if segments > 1 and context // segments < reach:
        raise KeyedError(
            "parallel.cp",
            f"is {parallel.cp}: a segment of {context // segments} tokens is shorter than the conv's reach, {reach}; "
            f"allowed: cp of {fitting()}",
        )
    if parallel.cp != "auto" and parallel.cp > chunks:
        raise KeyedError(
            "parallel.cp",
            f"is {parallel.cp}, more ranks than the {chunks} chunks of model.mamba2.chunk_size ({model.mamba2.chunk_size}) "
            f"in data.context ({context}); allowed: cp of {fitting()}, or a chunk_size of at most {context // parallel.cp}",
        )


def check_attention(model: "ModelConfig", parallel: "ParallelConfig") -> None:
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


def check_sequence_parallel(parallel: "ParallelConfig", context: int) -> None:
    """Raises KeyedError where tp ranks cannot share a cp rank's tokens out evenly."""
    if parallel.sequence_parallel and parallel.cp != "auto" and context // parallel.cp % parallel.tp:
        raise KeyedError(
            "parallel.sequence_parallel",
            f"is True: {context // parallel.cp} tokens of a cp rank do not divide over tp {parallel.tp}; allowed: false, or for "
            f"data.context a multiple of cp * tp, {parallel.cp * parallel.tp}",
        )


def check_pipeline(model: "ModelConfig", parallel: "ParallelConfig", micro_steps: int) -> None:
    """Raises KeyedError where the layers, their cuts or the micro-steps do not make the pipeline that is asked for."""
    interleaved, each = parallel.schedule == "interleaved_1f1b", parallel.stages_per_rank
    if interleaved != (each > 1):
        allowed = "2 and more with interleaved_1f1b" if interleaved else "1 with 1f1b; 2 and more with interleaved_1f1b"
        raise KeyedError("parallel.stages_per_rank", f"is {each}, allowed: {allowed}")
    if parallel.pp == 1:
        if interleaved:
            raise KeyedError("parallel.schedule", "is interleaved_1f1b, allowed with parallel.pp 1: 1f1b")
        return
    stages, layers, parts = parallel.stages, len(model.layers), len(model.cuts) + 1
    if stages > layers:
        raise KeyedError("parallel.pp", f"gives {stages} stages, allowed: at most one for each of the {layers} layers")
    if parts > 1 and parts != stages:
        raise KeyedError(
            "parallel.pp",
            f"gives {stages} stages (parallel.stages_per_rank is {each}), and the {CUT} of model.pattern (model.repeat is "
            f"{model.repeat}) make {parts}; allowed: {parts} stages, or a pattern without {CUT}",
        )
    rounds = max(1, micro_steps // parallel.pp)
    if not interleaved and micro_steps < stages:
        raise KeyedError("batch.micro_steps", f"is {micro_steps}, allowed: at least one for each of the {stages} stages")
    if interleaved and micro_steps % rounds:
        raise KeyedError("batch.micro_steps", f"is {micro_steps}, allowed with interleaved_1f1b: a multiple of pp, {parallel.pp}")


def check_copies(parallel: "ParallelConfig") -> None:
    """Raises KeyedError where copies of the parameters do not divide over dp."""
    if parallel.dp != "auto" and parallel.dp % parallel.replicate:
        raise KeyedError("parallel.replicate", f"is {parallel.replicate}, allowed: a divisor of parallel.dp, {parallel.dp}")


def check_experts(model: "ModelConfig", parallel: "ParallelConfig") -> None:
    """Raises KeyedError where experts do not divide over the ranks."""
    ep, experts = parallel.ep, model.moe.experts
    if ep == 1:
        return
    if all(layer.feed_forward != "moe" for layer in model.layers):
        raise KeyedError("parallel.ep", f"is {ep}, and model.pattern has no experts (E); allowed: 1")
    if experts % ep:
        raise KeyedError("parallel.ep", f"is {ep}, allowed: a divisor of model.moe.experts, {experts}")
    if parallel.dp == "auto" or parallel.cp == "auto":
        return
    ranks = parallel.dp * parallel.cp // parallel.replicate
    if ranks % ep:
        whole = "dp * cp" if parallel.replicate == 1 else "dp * cp / replicate"
        raise KeyedError("parallel.ep", f"is {ep}, allowed: a divisor of {whole}, {ranks}")
    if not _cuts_experts(model, ranks, ep):
        fits = [n for n in range(1, ranks + 1) if ranks % n == 0 and experts % n == 0 and _cuts_experts(model, ranks, n)]
        raise KeyedError(
            "parallel.ep",
            f"is {ep}: an expert's matrices are cut over the {ranks // ep} ranks that hold the same experts, which do not divide "
            f"model.d_model ({model.d_model}); allowed: {', '.join(map(str, fits))}",
        )


def _cuts_experts(model: "ModelConfig", ranks: int, ep: int) -> bool:
    """Whether the ranks that hold the same experts cut each one's matrices evenly; with ep 1 they may be cut between experts."""
    return ep == 1 or model.d_model % (ranks // ep) == 0


def check_batch(config: "Config") -> None:
    """Raises KeyedError where a micro-step's sequences do not divide over dp, or its tokens are fewer than the experts."""
    dp, experts = config.parallel.dp, config.model.moe.experts
    sequences = config.batch.sequences // config.batch.micro_steps
    if dp != "auto" and sequences % dp:
        raise KeyedError("parallel.dp", f"is {dp}, allowed: a divisor of a micro-step's sequences, {sequences}")
    tokens = sequences * config.data.context
    if any(layer.feed_forward == "moe" for layer in config.model.layers) and experts > tokens:
        raise KeyedError("model.moe.experts", f"is {experts}, allowed: at most a micro-step's tokens, {tokens}")


def _fitting_cp(parallel: "ParallelConfig", context: int, reach: int, chunks: int) -> str:
    """Degrees, at most `chunks`, whose segments divide the context and are as long as `reach`."""
    each = 2 if parallel.layout == "zigzag" else 1
    fits = [cp for cp in range(1, chunks + 1) if cp == 1 or (context % (cp * each) == 0 and context // (cp * each) >= reach)]
    return ", ".join(str(cp) for cp in fits[:16]) + (" ..." if len(fits) > 16 else "")
