"""`baton verify`: whether a model on a mesh is the model on one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ...configs.errors import UserError
from .train import CONFIG, OVERRIDES

if TYPE_CHECKING:
    from ..verification.cases import Plan

MOST = 64
"""Ranks that are tried where no GPUs say how many."""


def _fitting(plan: Callable[[int], "Plan"], share_device: bool) -> int:
    """The GPUs, without those that are too many; where there are none, or one is shared, the fewest ranks that fit, at least 2."""
    import torch

    devices = 0 if share_device else torch.cuda.device_count()
    candidates = range(devices, 0, -1) if devices else range(2, MOST + 1)
    return next((world for world in candidates if _fits(plan, world)), candidates[0])


def _fits(plan: Callable[[int], "Plan"], world: int) -> bool:
    try:
        plan(world)
    except UserError:
        return False
    return True


def verify(
    config: str = CONFIG,
    overrides: list[str] = OVERRIDES,
    nproc: int | None = typer.Option(
        None,
        min=1,
        help="Worker processes to start here; default: the GPUs, or the fewest that fit. Ignored under torchrun.",
    ),
    tp: int | None = typer.Option(None, help="As parallel.tp=..."),
    cp: int | None = typer.Option(None, help="As parallel.cp=...; default: the ranks that the others leave."),
    dp: int | None = typer.Option(None, help="As parallel.dp=..."),
    pp: int | None = typer.Option(None, help="As parallel.pp=..."),
    ep: int | None = typer.Option(None, help="As parallel.ep=..."),
    layout: str | None = typer.Option(None, help="As parallel.layout=..."),
    strategy: str | None = typer.Option(None, help="As parallel.strategy=..."),
    attention: str | None = typer.Option(None, help="As parallel.attention=..."),
    documents: str | None = typer.Option(None, help="As data.documents=..., with tokens that hit every border."),
    context: int | None = typer.Option(None, help="As data.context=...; one rank must hold it whole."),
    dtype: str | None = typer.Option(
        None, help="fp64 (the default, on GPUs too): exact; fp32, bf16: both sides are measured against one rank in fp64."
    ),
    sequences: int | None = typer.Option(
        None,
        min=1,
        help="Sequences in the batch; default: in each micro-step two for each dp rank, with --matrix one for each rank.",
    ),
    micro_steps: int | None = typer.Option(
        None,
        min=1,
        help="Micro-steps of the batch; default: one for each rank of the pipeline, with --matrix at least 2 of packed documents.",
    ),
    matrix: bool = typer.Option(False, "--matrix", help="Every mesh that fits the ranks, at 64 tokens unless told otherwise."),
    json: Path | None = typer.Option(None, "--json", help="Write the result to this file."),
    share_device: bool = typer.Option(False, "--share-device", help="All ranks on one GPU, which talk through the host."),
) -> None:
    """Check that a mesh computes what one rank does: loss, logits, every gradient, and the parameters after one SGD step.

    The weights are those of the config's seed, the tokens random; the config's batch is not used. Ends with 1 when an error is
    over its tolerance, and names the first part whose output differs.
    """
    from ..errors import under_torchrun, user_errors

    with user_errors():
        degrees = {"parallel.tp": tp, "parallel.cp": cp, "parallel.dp": dp, "parallel.pp": pp, "parallel.ep": ep}
        choices = {"parallel.layout": layout, "parallel.strategy": strategy, "parallel.attention": attention}
        given = {key: value for key, value in {**degrees, **choices, "data.documents": documents}.items() if value is not None}
        further = ("schedule", "stages_per_rank", "sequence_parallel", "replicate", "zero", "layout")
        varied = {*degrees, "parallel", *(f"parallel.{key}" for key in further), "data.documents"}
        fixed = [*given, *(key for key in (override.partition("=")[0] for override in overrides) if key in varied)]
        if matrix and fixed:
            raise UserError(f"--matrix compares every mesh, so {fixed[0]} is not for you to give")
        given |= {key: value for key, value in {"data.context": context, "precision": dtype}.items() if value is not None}
        values = ["precision=fp64", *overrides, *(f"{key}={value}" for key, value in given.items())]

        def plan(world: int) -> "Plan":
            from ..verification.cases import plan_matrix, plan_one

            return (plan_matrix if matrix else plan_one)(config, values, world, sequences, micro_steps)

        from ..environment import launch, process_group

        if not under_torchrun():
            if json is not None:
                from ..files import check_writable

                check_writable(json)
            processes = nproc or _fitting(plan, share_device)
            plan(processes)
            if processes > 1:
                options = ["--matrix"] * matrix + ["--share-device"] * share_device
                options += ["--sequences", str(sequences)] if sequences else []
                options += ["--micro-steps", str(micro_steps)] if micro_steps else []
                options += ["--json", str(json)] if json else []
                launch(["verify", config, *values, *options], processes, share_device)
                return
        with process_group(share_device) as environment:
            from ..verification.run import run_verification

            failure = run_verification(plan(environment.world), environment, json)
        # Outside, so that the group is gone: the ranks are all well.
        if failure:
            raise UserError(failure)
