"""How plans are shown: the best in a table, one with its arithmetic, all as JSON, and why nothing fits."""

from collections.abc import Container, Iterable
from typing import Any

from rich import box
from rich.table import Table

from ...configs.schema import Config, ParallelConfig
from ...models.flops import stage_layers
from ...models.memory import Terms
from ..benchmarks.report import console, size
from ..training.description import count_parameters, describe_stages
from .estimate import Estimate, Estimator
from .machine import GiB, Machine
from .search import Found, Lacking

SHOWN_STAGES = 4
"""Columns of a memory table, if the pipeline is longer: the first, the fullest, the last and one between."""


def show(config: Config, machine: Machine, found: Found, fixed: Container[str]) -> None:
    """Prints what was planned, on what, and the best meshes; fixed: keys that were not chosen."""
    console.print("\n".join(describe(config, machine)), soft_wrap=True, markup=False)
    if "micro_steps" not in fixed and any(layer.feed_forward == "moe" for layer in config.model.layers):
        console.print(
            "Micro-steps are chosen too, over each of which the experts' auxiliary loss is a mean: batch.micro_steps=N keeps N",
            soft_wrap=True,
        )
    console.print(f"{found.tried:,} ways to lay it out tried, {found.fitting:,} fit; the fastest of each mesh:", soft_wrap=True)
    console.print(best_table(found.best, machine))


def describe(config: Config, machine: Machine) -> list[str]:
    """What is planned, and on what."""
    batch, model = config.batch, config.model
    tokens = batch.sequences * config.data.context
    nodes = f"{machine.nodes} node{'s' * (machine.nodes > 1)}"
    rates = "as measured" if machine.calibrated else "assumed, not measured (--calibrate measures those of the machine at hand)"
    return [
        f"{count_parameters(model) / 1e9:.3g} B parameters, {len(model.layers)} layers; a step: {batch.sequences} sequences of "
        f"{config.data.context:,} tokens ({tokens / 1e6:.3g} M), {config.precision}",
        f"{machine.gpus} {machine.name} of {machine.memory / GiB:.0f} GiB on {nodes}; links: {machine.linked}; rates: {rates}",
    ]


def best_table(best: Iterable[Estimate], machine: Machine) -> Table:
    """A plan has a row of several lines."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", min_width=2)
    table.add_column("mesh; layout, states, attention", no_wrap=True)
    for name in ("memory", "a step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("longest", no_wrap=True)
    for number, plan in enumerate(best, 1):
        memory = [f"{plan.largest / GiB:.0f} GiB", f"of {machine.memory / GiB:.0f}"]
        step = [f"{plan.seconds:.3g} s", f"{plan.tokens_per_second:,.0f} tok/s"]
        step += [] if plan.mfu is None else [f"{plan.mfu:.0%} MFU"]
        table.add_row(str(number), "\n".join(ways(plan.config)), "\n".join(memory), "\n".join(step), "\n".join(limits(plan)))
        if number == 1:
            table.rows[0].style = "bold"
    return table


def ways(config: Config) -> list[str]:
    """A plan in three lines, or more where there is more to it."""
    parallel, steps = config.parallel, config.batch.micro_steps
    experts = f", ep {parallel.ep}" if parallel.ep > 1 else ""
    copies = f", {parallel.replicate} copies" if parallel.replicate > 1 else ""
    sequence = "whole sequences"
    if parallel.cp != 1:
        sequence = f"{parallel.layout}, {parallel.strategy}, {parallel.attention}"
    return [
        f"{mesh(parallel)}{experts}",
        sequence,
        f"{steps} micro-step{'s' * (steps > 1)}, ZeRO {parallel.zero}{copies}",
        *([f"{parallel.stages_per_rank} stages a rank"] if parallel.stages_per_rank > 1 else []),
        *([f"{parallel.recompute} computed again"] if parallel.recompute != "none" else []),
    ]


def mesh(parallel: ParallelConfig) -> str:
    """Its degrees beyond 1."""
    degrees = [f"{axis} {degree}" for axis in ("tp", "cp", "dp", "pp") if (degree := getattr(parallel, axis)) != 1]
    return " x ".join(degrees) or "one rank"


def limits(plan: Estimate) -> list[str]:
    """The three causes that take most of the step."""
    largest = sorted(plan.times.items(), key=lambda item: -item[1])[:3]
    return [f"{cause} {time / plan.seconds:.0%}" for cause, time in largest]


def explain(estimator: Estimator, plan: Estimate) -> None:
    """Prints one plan's arithmetic: stages, memory, activations, traffic, time."""
    config, machine = plan.config, estimator.machine
    parallel, batch, w = config.parallel, config.batch, estimator.workload(config)
    console.print(
        f"Plan {mesh(parallel)}: in each of {batch.micro_steps} micro-steps each of {w.dp} dp ranks has {w.b} "
        f"sequence{'s' * (w.b > 1)}, each rank of cp {config.data.context // w.cp:,} tokens of it",
        soft_wrap=True,
    )
    console.print(_memory_table(config, plan.memory, machine))
    console.print(_activation_table(estimator, plan))
    console.print(_traffic_table(estimator, plan))
    console.print(_time_table(plan))
    flops = estimator.flops / batch.sequences / config.data.context
    peak = "" if machine.peak is None else f" / {machine.peak / 1e12:.0f} TFLOP/s = MFU {plan.mfu:.1%}"
    console.print(
        f"{flops / 1e9:.3g} GFLOP a token (forward 1, backward 2; nothing that is computed again) x {plan.tokens_per_second:,.0f} "
        f"tokens/s / {machine.gpus} = {flops * plan.tokens_per_second / machine.gpus / 1e12:.3g} TFLOP/s{peak}",
        soft_wrap=True,
    )


def _memory_table(config: Config, memory: list[Terms], machine: Machine) -> Table:
    ranks = _shown_ranks(memory)
    stages = stage_layers(config.model, config.parallel.stages, config.data.context)
    table = Table("memory of a rank, GiB", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for rank in ranks:
        layers = ", ".join(describe_stages(stages[rank :: config.parallel.pp]))
        table.add_column(f"pp {rank}: layers {layers}" if config.parallel.pp > 1 else "all layers", justify="right")
    names = dict.fromkeys(name for rank in ranks for name in memory[rank])
    for name in names:
        table.add_row(name, *(f"{memory[rank].get(name, 0) / GiB:.2f}" for rank in ranks))
    table.add_row(
        f"in all, of {machine.memory / GiB:.0f}", *(f"{sum(memory[rank].values()) / GiB:.2f}" for rank in ranks), style="bold"
    )
    return table


def _shown_ranks(memory: list[Terms]) -> list[int]:
    if len(memory) <= SHOWN_STAGES:
        return [*range(len(memory))]
    totals = [sum(terms.values()) for terms in memory]
    return sorted({0, totals.index(max(totals)), len(memory) // 2, len(memory) - 1})


def _activation_table(estimator: Estimator, plan: Estimate) -> Table:
    """What one micro-step keeps of a layer of each kind."""
    w = estimator.workload(plan.config)
    table = Table("kept by a layer of a micro-step", "of which", "MiB", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[2].justify = "right"
    seen = set()
    for part in estimator.parts:
        for kind, terms in estimator.keeps(part, w).items():
            if kind in seen:
                continue
            seen.add(kind)
            table.add_row(kind, "", f"{sum(terms.values()) / 2**20:.1f}", style="bold")
            for name, number in terms.items():
                table.add_row("", name, f"{number / 2**20:.1f}")
    return table


def _traffic_table(estimator: Estimator, plan: Estimate) -> Table:
    table = Table("sent by a rank in a step, by axis", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    parallel = plan.config.parallel
    ranks = _shown_ranks(plan.memory)
    sent = [estimator.traffic(plan.config, rank, estimator.workload(plan.config).cp // 2) for rank in ranks]
    for rank in ranks:
        table.add_column(f"pp {rank}" if parallel.pp > 1 else "", justify="right")
    for axis in dict.fromkeys(axis for own in sent for axis, number in own.items() if number):
        table.add_row(axis, *(size(own[axis]) for own in sent))
    return table


def _time_table(plan: Estimate) -> Table:
    table = Table("a step on the rank that works longest", "s", "", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for cause, time in sorted(plan.times.items(), key=lambda item: -item[1]):
        if time / plan.seconds >= 0.0005:
            table.add_row(cause, f"{time:.3f}", f"{time / plan.seconds:.1%}")
    table.add_row("in all", f"{plan.seconds:.3f}", "", style="bold")
    return table


def why_not(lacking: Lacking, machine: Machine) -> str:
    """Of the mesh that lacks least memory: how much, where, and of what."""
    memory = [sum(terms.values()) for terms in lacking.memory]
    rank = memory.index(max(memory))
    most = sorted(lacking.memory[rank].items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {number / GiB:.1f}" for name, number in most)
    parallel, needed = lacking.config.parallel, max(memory) / GiB
    stage = f" on pipeline rank {rank} of {parallel.pp}" if parallel.pp > 1 else ""
    return (
        f"of all meshes {mesh(parallel)} (recompute {parallel.recompute}) lacks least: it needs {needed:.1f} GiB"
        f"{stage} ({named}), {needed - machine.memory / GiB:.1f} GiB more than one {machine.name} has"
    )


def as_json(config: Config, machine: Machine, found: Found) -> dict[str, Any]:
    """All that a search came to."""
    return {
        "machine": {
            **{key: getattr(machine, key) for key in ("name", "gpus", "per_node", "memory", "peak", "calibrated", "linked")},
            "rates": dict(machine.rates),
            "inside": machine.inside._asdict(),
            "between": machine.between._asdict(),
        },
        "parameters": count_parameters(config.model),
        "context": config.data.context,
        "sequences": config.batch.sequences,
        "tried": found.tried,
        "fitting": found.fitting,
        "plans": [
            {
                "parallel": plan.config.parallel.model_dump(mode="json"),
                "micro_steps": plan.config.batch.micro_steps,
                "memory": plan.memory,
                "seconds": plan.seconds,
                "times": plan.times,
                "tokens_per_second": plan.tokens_per_second,
                "mfu": plan.mfu,
            }
            for plan in found.best
        ],
    }
