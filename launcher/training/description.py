"""What a run says of itself: in a line when it begins, in some at its end."""

import torch

from ...configs.schema import Config, ModelConfig
from ...models.flops import stage_layers
from ...models.hybrid import HybridModel
from ...parallel.mesh import Mesh
from ..environment import installed
from .metrics import plot_experts, plot_losses, read_metrics
from .run_folder import checkpoint_folder


def count_parameters(model: ModelConfig) -> int:
    """Of the whole model; a matrix that embedding and head share counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in HybridModel(model).parameters())


def describe_mesh(config: Config, mesh: Mesh) -> str:
    """The axes, what else there is of the mesh, and the layout."""
    parallel = config.parallel
    axes = [f"{axis} {mesh.size(axis)}" for axis in ("pp", "dp", "cp", "tp") if axis != "pp" or mesh.size(axis) > 1]
    further = [f"{key} {degree}" for key, degree in (("ep", parallel.ep), ("replicate", parallel.replicate)) if degree > 1]
    further += ["sequence_parallel"] if parallel.sequence_parallel else []
    return ", ".join([" x ".join(axes), *further, parallel.layout])


def describe_pipeline(config: Config) -> str:
    """The schedule, and the layers of each stage."""
    stages = stage_layers(config.model, config.parallel.stages, config.data.context)
    return f"pipeline {config.parallel.schedule} of layers {' | '.join(describe_stages(stages))}"


def describe_stages(stages: list[range]) -> list[str]:
    """The layers of each stage."""
    return [str(own.start) if len(own) == 1 else f"{own.start}-{own.stop - 1}" for own in stages]


def summarize(config: Config, done: int, consumed: int, sample: str | None) -> str:
    """The end of a run: what came out, and where it lies. Draws the plots."""
    run = config.run
    losses = [line["validation_loss"] for line in read_metrics(run) if "validation_loss" in line]
    ends = [(losses[0], losses[-1])] if losses else []
    more = f" schedule.steps={2 * config.schedule.steps}" if done >= config.schedule.steps else ""
    experts = plot_experts(run)
    lines = [
        "",
        f"Trained {done} of {config.schedule.steps} steps, {consumed * config.data.context:,} tokens.",
        *(f"Validation loss {first:.3f} -> {last:.3f} ({last / first:.0%} of what it began with)." for first, last in ends),
        f"  checkpoint   {checkpoint_folder(run, done)}",
        f"  loss curve   {plot_losses(run)}",
        *([f"  experts      {experts}"] if experts else []),
        f"  metrics      {run}/metrics.jsonl",
        f"  TensorBoard  {installed('tensorboard')} --logdir {run}/tensorboard",
        f"  go on        {installed('baton')} train {run}/config.yaml --resume{more}",
    ]
    if sample:
        lines += ["A continuation (greedy):", *(f"  | {line}" for line in sample.splitlines())]
    return "\n".join(lines)
