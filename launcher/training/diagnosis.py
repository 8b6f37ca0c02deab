"""Which part of the model the first value that is not finite comes from, on whatever rank or stage that is."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...models.hybrid import HybridModel, MicroStep
from ...models.stages import Stages
from ...parallel.gradients import local_part


def first_bad_output(stages: Stages, micro_steps: Sequence[MicroStep]) -> str | None:
    """The first part, in order of the forward, whose output is not finite on some rank. All ranks call it and get the same."""
    with _watching(stages.models) as bad:
        for micro_step in micro_steps:
            stages.forward(micro_step)
    found = _first(_names(stages), bad, stages.device)
    return f"the output of {found}" if found else None


def first_bad_gradient(stages: Stages) -> str:
    """The part, in order of the backward, with a gradient that is not finite on some rank. As above."""
    stages.reshard()
    parts = [part for model in stages.models for part in _named_parts(model)]
    bad = {name for name, module in parts if not_finite(p.grad for p in module.parameters())}
    return f"the gradients of {_first(_names(stages)[::-1], bad, stages.device)}"


def not_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether something in this rank's part of the tensors is inf or nan."""
    return any(not bool(local_part(tensor).isfinite().all()) for tensor in tensors if tensor is not None)


def anywhere(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of the flags are set on some rank of the default group."""
    set_ = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(set_, dist.ReduceOp.MAX)
    return [bool(flag) for flag in set_.tolist()]


def _first(names: Sequence[str], bad: set[str], device: torch.device) -> str | None:
    flags = anywhere([name in bad for name in names], device)
    return next((name for name, flag in zip(names, flags, strict=True) if flag), None)


def _names(stages: Stages) -> list[str]:
    """Of the whole model's parts, in order of the forward."""
    with torch.device("meta"):
        return [name for name, _ in _named_parts(HybridModel(stages.config.model))]


def _named_parts(model: HybridModel) -> Iterator[tuple[str, nn.Module]]:
    """What an error names; together they have every parameter."""
    if model.embedding is not None:
        yield "embedding", model.embedding
    for i, layer in model.layers.items():
        yield f"layers.{i}.mixer_norm", layer.mixer_norm
        yield f"layers.{i}.mixer ({layer.kinds.mixer})", layer.mixer
        if layer.kinds.feed_forward:
            yield f"layers.{i}.feed_forward_norm", layer.feed_forward_norm
            yield f"layers.{i}.feed_forward ({layer.kinds.feed_forward})", layer.feed_forward
    if model.head is not None:
        yield "head", model.head


@contextmanager
def _watching(models: Iterable[HybridModel]) -> Iterator[set[str]]:
    """Collects the names of the parts whose output is not finite."""
    bad: set[str] = set()

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not_finite(output if isinstance(output, tuple) else (output,)):
                bad.add(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for model in models for name, module in _named_parts(model)]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()
