"""Which meshes are compared, and the configs they have: one that was asked for, or every one that fits the world."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from ...configs.errors import KeyedError, UserError
from ...configs.loading import load_config
from ...configs.schema import BatchConfig, Config, ParallelConfig

SHORT = 256
"""Tokens of context where every mesh is compared."""


class Skipped(NamedTuple):
    """A mesh that the model cannot have."""

    mesh: dict[str, int]
    layout: str
    reason: str


class Plan(NamedTuple):
    """What is to be compared. Packed documents are cut along the borders of `segments` segments; notes are for the user."""

    configs: list[Config]
    skipped: list[Skipped]
    segments: int
    notes: list[str]


def plan_one(file: str, overrides: list[str], world: int, sequences: int | None) -> Plan:
    """The config's mesh on `world` ranks; cp and dp count as `auto` unless an override says otherwise.

    sequences: of the batch; None: two for each dp rank. Raises ConfigError.
    """
    open_degrees = ["parallel.cp=auto", "parallel.dp=auto"]
    config, chunk = _load(file, [*open_degrees, *overrides, _batch(sequences or 2 * world)], world)
    if sequences is None:
        degrees = config.parallel.degrees(world)
        config = config.model_copy(update={"batch": BatchConfig(sequences=2 * degrees.dp)})
    return _fitted(Plan([config], [], config.parallel.segments, []), chunk)


def plan_matrix(file: str, overrides: list[str], world: int, sequences: int | None) -> Plan:
    """Every mesh of `world` ranks with both layouts, documents single and packed, and on the mesh that is all cp every strategy.

    The batch is the same for all. sequences: of it; None: one for each rank, at least two. Raises UserError.
    """
    plain = ["parallel={}", f"data.context={SHORT}"]
    base, chunk = _load(file, [*plain, *overrides, _batch(sequences or max(2, world))])
    configs, skipped = [], []
    for parallel in _variants(base, world):
        try:
            configs.append(base.model_copy(update={"parallel": parallel}).resolved(world))
        except KeyedError as error:
            skip = Skipped(parallel.degrees(world)._asdict(), parallel.layout, f"{error.key} {error}")
            skipped += [skip] if skip not in skipped else []
    if not configs:
        raise UserError(f"no mesh of {world} ranks fits: {skipped[0].reason}")
    kinds = get_args(type(base.data).model_fields["documents"].annotation)
    data = [base.data.model_copy(update={"documents": kind}) for kind in kinds]
    configs = [config.model_copy(update={"data": each}) for each in data for config in configs]
    return _fitted(Plan(configs, skipped, max(config.parallel.segments for config in configs), []), chunk)


def _load(file: str, overrides: list[str], world: int | None = None) -> tuple[Config, int]:
    """The config with chunks of one token, which no mesh is too fine for, and the chunk size that it asks for."""
    config = load_config(file, [*overrides, "model.mamba2.chunk_size=1"], world)
    whole = load_config(file, [*overrides, "parallel.cp=1", "parallel.dp=auto"])
    return config, whole.model.mamba2.chunk_size


def _batch(sequences: int) -> str:
    return f"batch={{sequences: {sequences}, micro_steps: 1}}"


def _variants(base: Config, world: int) -> Iterator[ParallelConfig]:
    def variant(**values: Any) -> ParallelConfig:
        return base.parallel.model_copy(update=values)

    for tp, cp in itertools.product(range(1, world + 1), repeat=2):
        if world % (tp * cp):
            continue
        degrees = {"tp": tp, "cp": cp, "dp": world // (tp * cp)}
        for layout in _choices("layout") if cp > 1 else ["contiguous"]:
            yield variant(**degrees, layout=layout)
            if cp == world > 1:
                mixers = {layer.mixer for layer in base.model.layers}
                for key, mixer in (("strategy", "mamba2"), ("attention", "attention")):
                    for choice in _choices(key) if mixer in mixers else []:
                        yield variant(**degrees, layout=layout, **{key: choice})
            elif tp == 1 and cp > 1 and any(layer.mixer == "attention" for layer in base.model.layers):
                # Heads that do not divide over all ranks may over fewer.
                yield variant(**degrees, layout=layout, attention="ulysses")


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
