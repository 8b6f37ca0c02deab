"""Which meshes are compared, and the configs they have: one that was asked for, or every one that fits the world."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

from ...configs.checks import check_divides
from ...configs.errors import KeyedError, UserError
from ...configs.loading import load_config
from ...configs.pattern import RECURRENT
from ...configs.schema import BatchConfig, Config, DataConfig, ParallelConfig

SHORT = 64
"""Tokens of context where every mesh is compared."""
MANY = 720720
"""Micro-steps that do for every pipeline of up to 16 ranks, until its length is known."""


class Skipped(NamedTuple):
    """A mesh that the model cannot have."""

    mesh: dict[str, Any]
    layout: str
    reason: str


class Plan(NamedTuple):
    """What is to be compared. Packed documents are cut along the borders of `segments` segments; notes are for the user."""

    configs: list[Config]
    skipped: list[Skipped]
    segments: int
    notes: list[str]


Variant = Callable[[ParallelConfig, str], Config]
"""The config with a mesh and a kind of documents; raises KeyedError where they do not fit."""


def mesh_of(parallel: ParallelConfig) -> dict[str, Any]:
    """What a mesh is, without how the sequence lies on it."""
    degrees = ("tp", "cp", "pp", "ep", "dp")
    return parallel.model_dump(include={*degrees, "schedule", "stages_per_rank", "sequence_parallel", "replicate", "zero"})


def plan_one(file: str, overrides: list[str], world: int, sequences: int | None = None, micro_steps: int | None = None) -> Plan:
    """The config's mesh on `world` ranks; cp and dp count as `auto` unless an override says otherwise.

    sequences and micro_steps: of the batch. None: two sequences for each dp rank and micro-step; a micro-step for each rank of the
    pipeline. Raises ConfigError.
    """
    overrides = ["parallel.cp=auto", "parallel.dp=auto", *overrides]
    config, _ = _load(file, [*overrides, _batch(2 * world * MANY, MANY)], world)
    micro_steps = micro_steps or config.parallel.pp
    sequences = sequences or 2 * config.parallel.degrees(world).dp * micro_steps
    config, chunk = _load(file, [*overrides, _batch(sequences, micro_steps)], world)
    return _fitted(Plan([config], [], config.parallel.segments, []), chunk)


def plan_matrix(file: str, overrides: list[str], world: int, sequences: int | None = None, micro_steps: int | None = None) -> Plan:
    """Every mesh of `world` ranks, pipelines of one and of two stages on a rank, both layouts, documents single and packed.

    With tp > 1, sequence_parallel is on for contiguous packed and zigzag single documents, off for the others. On the mesh that is
    all cp, every strategy; on some with dp, copies of the parameters (HSDP) and ZeRO-2. sequences and micro_steps: of the batch.
    None: a sequence for each rank and micro-step; a micro-step for each rank of the pipeline, of packed documents at least two.
    Raises UserError.
    """
    plain = ["parallel={}", f"data.context={SHORT}", *overrides]
    base, chunk = _load(file, [*plain, _batch(world * MANY, MANY)])

    def variant(parallel: ParallelConfig, documents: str) -> Config:
        each = micro_steps or max(2 if documents == "packed" else 1, parallel.pp)
        of_all = sequences or max(2, world) * each
        check_divides("batch.micro_steps", each, of_all, "batch.sequences")
        batch = BatchConfig(sequences=of_all, micro_steps=each)
        data = base.data.model_copy(update={"documents": documents})
        return base.model_copy(update={"parallel": parallel, "data": data, "batch": batch}).resolved(world)

    configs: list[Config] = []
    skipped: dict[str, Skipped] = {}
    for documents in get_args(DataConfig.model_fields["documents"].annotation):
        configs += _fitting(base, documents, world, variant, skipped)
    if not configs:
        raise UserError(f"no mesh of {world} ranks fits: {next(iter(skipped.values())).reason}")
    # Those of one mesh after another, which is built once for them.
    configs.sort(key=lambda config: (config.parallel.degrees(world), config.parallel.replicate))
    return _fitted(Plan(configs, [*skipped.values()], max(config.parallel.segments for config in configs), []), chunk)


def _load(file: str, overrides: list[str], world: int | None = None) -> tuple[Config, int]:
    """The config with chunks of one token, which no mesh is too fine for, and the chunk size that it asks for."""
    config = load_config(file, [*overrides, "model.mamba2.chunk_size=1"], world)
    whole = load_config(file, [*overrides, "parallel.cp=1", "parallel.dp=auto"])
    return config, whole.model.mamba2.chunk_size


def _batch(sequences: int, micro_steps: int) -> str:
    return f"batch={{sequences: {sequences}, micro_steps: {micro_steps}}}"


def _fitting(base: Config, documents: str, world: int, variant: Variant, skipped: dict[str, Skipped]) -> Iterator[Config]:
    """The configs to compare; fills `skipped` with the meshes that do not fit."""

    def fitting(parallel: ParallelConfig) -> list[Config]:
        try:
            return [variant(parallel, documents)]
        except KeyedError as error:
            skip = Skipped(mesh_of(parallel), parallel.layout, f"{error.key} {error}")
            skipped.setdefault(str((skip.mesh | {"sequence_parallel": None}, skip.layout)), skip)
            return []

    for parallel in _meshes(base, documents, world):
        # What does not fit without ep would be listed once for each ep otherwise.
        if whole := fitting(parallel):
            updates = [*_spread(base, parallel), *_strategies(base, parallel, documents)]
            updates += _copies(base, parallel) if documents == "packed" else []
            yield from whole
            for update in updates:
                yield from fitting(parallel.model_copy(update=update))


def _meshes(base: Config, documents: str, world: int) -> Iterator[ParallelConfig]:
    degrees = _divisors(world)
    for tp, cp, dp, pp in itertools.product(degrees, repeat=4):
        if tp * cp * dp * pp != world:
            continue
        pipelines = [{"schedule": "1f1b", "stages_per_rank": 1}]
        if pp > 1:
            pipelines.append({"schedule": "interleaved_1f1b", "stages_per_rank": 2})
        for layout, pipeline in itertools.product(_choices("layout") if cp > 1 else ["contiguous"], pipelines):
            shared_out = tp > 1 and (layout == "zigzag") != (documents == "packed")
            mesh = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "layout": layout, "sequence_parallel": shared_out, **pipeline}
            yield base.parallel.model_copy(update=mesh)


def _spread(base: Config, parallel: ParallelConfig) -> Iterator[dict[str, Any]]:
    """Experts over every number of ranks."""
    if any(layer.feed_forward == "moe" for layer in base.model.layers):
        yield from ({"ep": degree} for degree in _divisors(_ranks(parallel)) if degree > 1)


def _strategies(base: Config, parallel: ParallelConfig, documents: str) -> Iterator[dict[str, Any]]:
    """Where cp is alone, every way to pass states and keys over it; each layout for one kind of documents."""
    if parallel.cp == 1 or parallel.tp > 1 or parallel.pp > 1 or (parallel.layout == "zigzag") != (documents == "packed"):
        return
    mixers = {layer.mixer for layer in base.model.layers}
    if parallel.dp == 1:
        for key, those in (("strategy", {*RECURRENT}), ("attention", {"attention"})):
            yield from ({key: choice} for choice in _choices(key) if mixers & those)
    elif "attention" in mixers:
        # Heads that do not divide over all ranks may over fewer.
        yield {"attention": "ulysses"}


def _copies(base: Config, parallel: ParallelConfig) -> Iterator[dict[str, Any]]:
    """On meshes of dp and at most one more axis, ZeRO-2, and copies of the parameters, each with experts spread over its ranks."""
    if parallel.cp == 1 and 1 in (parallel.tp, parallel.pp) and _ranks(parallel) > 1:
        spread = _ranks(parallel) > 2 and any(_spread(base, parallel))
        yield from ({"zero": 2}, {"replicate": 2, "ep": 2 if spread else 1})


def _ranks(parallel: ParallelConfig) -> int:
    """Those that a micro-step's tokens are shared out over, of a mesh without `auto`."""
    assert parallel.dp != "auto"
    assert parallel.cp != "auto"
    return parallel.dp * parallel.cp


def _divisors(number: int) -> list[int]:
    return [degree for degree in range(1, number + 1) if number % degree == 0]


def _choices(key: str) -> list[str]:
    return [choice for choice in get_args(ParallelConfig.model_fields[key].annotation) if choice != "auto"]


def _fitted(plan: Plan, chunk: int) -> Plan:
    """Chunks of `chunk` tokens, or of which a segment has two, and in fp64 nothing that travels as less."""
    first, notes = plan.configs[0], []
    run = first.data.context // plan.segments
    if run < chunk:
        chunk = -(-run // 2)
        notes.append(f"model.mamba2.chunk_size is {chunk} here, for segments of {run} tokens: the result does not depend on it")
    model = first.model.model_copy(update={"mamba2": first.model.mamba2.model_copy(update={"chunk_size": chunk})})
    exact = first.precision == "fp64" and first.parallel.transport != "fp32"
    if exact:
        notes.append("parallel.transport is fp32 here, whose states travel as they are: bf16 is not compared in fp64")
    configs = []
    for config in plan.configs:
        parallel = config.parallel.model_copy(update={"transport": "fp32"}) if exact else config.parallel
        configs.append(config.model_copy(update={"model": model, "parallel": parallel}))
    return plan._replace(configs=configs, notes=notes)
