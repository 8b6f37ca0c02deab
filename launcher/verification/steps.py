"""One training step, and what of it is compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...models.hybrid import HybridModel, Losses, MicroStep
from ...models.moe import MoE
from ...models.stages import Stages
from ...parallel.gradients import local_part

MOVES = 0.1
"""What an SGD step changes, as a fraction of the parameters' norm."""

Found = dict[tuple[str, str], Tensor]
"""What a rank has, by quantity and name: its parts of sharded tensors (DTensor), and its tokens of what is in BY_TOKEN."""

BY_TOKEN = ("logits", "outputs")
"""Quantities [m, b, l, ...] of all micro-steps."""


class Alone:
    """A model on one device in place of `Stages`: what these are compared with, so that it has nothing of them."""

    def __init__(self, model: HybridModel) -> None:
        self.models = [model]

    def forward_backward(self, micro_steps: Sequence[MicroStep], tokens: Tensor) -> Losses:
        """As `Stages.forward_backward`."""
        totals = torch.zeros(2, dtype=torch.float64, device=tokens.device)
        for micro_step in micro_steps:
            losses = self.models[0](*micro_step)
            (losses.cross_entropy / tokens + losses.auxiliary / len(micro_steps)).backward()
            totals += torch.stack([losses.cross_entropy.detach(), losses.auxiliary.detach()])
        return Losses(*totals)

    @torch.no_grad()
    def forward(self, micro_step: MicroStep) -> Any:
        """As `Stages.forward`."""
        return self.models[0](*micro_step)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""
        return self.models[0].parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them, a tied one once."""
        return self.models[0].named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """As `Stages.named_buffers`."""
        kept = self.models[0].state_dict().keys()
        return ((name, buffer) for name, buffer in self.models[0].named_buffers() if name in kept)

    def named_moes(self) -> Iterator[tuple[str, MoE]]:
        """The mixtures of experts."""
        return ((name, module) for name, module in self.models[0].named_modules() if isinstance(module, MoE))


Model = Stages | Alone


def forward_backward(model: Model, micro_steps: Sequence[MicroStep], labelled: int, data: dist.ProcessGroup | None = None) -> Found:
    """The loss, logits and gradients. `data`: the ranks that hold the other tokens; `labelled`: all tokens' labels."""
    with _recording_logits(model) as logits:
        losses = model.forward_backward(micro_steps, torch.tensor(labelled, device=micro_steps[0].ids.device))
    cross_entropy = losses.cross_entropy / labelled
    if data is not None:
        dist.all_reduce(cross_entropy, group=data)
    found: Found = {("loss", "loss"): cross_entropy + losses.auxiliary / len(micro_steps)}
    if logits:
        found["logits", "logits"] = torch.stack(logits)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found["gradients", name] = parameter.grad
    return found


def visible_rate(model: Model) -> float:
    """The learning rate at which one SGD step moves the parameters by MOVES of their norm."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [torch.stack([t.detach().double().norm() for t in tensors]).norm() for tensors in (list(model.parameters()), gradients)]
    return float(MOVES * norms[0] / norms[1])


def update(model: Model, rate: float) -> Found:
    """One SGD step and what follows it -> the parameters, and the experts' biases."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        # Not through DTensor, which first works out at length how each operation is sharded, for every mesh anew.
        local_part(parameter.detach()).add_(local_part(parameter.grad), alpha=-rate)
    for _, moe in model.named_moes():
        moe.rebalance()
    found = {("parameters", name): parameter.detach() for name, parameter in model.named_parameters()}
    return found | {("parameters", name): buffer for name, buffer in model.named_buffers()}


def layer_outputs(model: Model, micro_steps: Sequence[MicroStep], data: dist.ProcessGroup | None = None) -> Found:
    """The "outputs" of each part of the model, in order of the forward: embedding, mixers, feed-forwards, head."""
    with _recording(model) as recorded:
        for micro_step in micro_steps:
            model.forward(micro_step._replace(labels=None))
    return {("outputs", name): torch.stack(tensors) for name, tensors in recorded.items()}


@contextmanager
def _recording_logits(model: Model) -> Iterator[list[Tensor]]:
    """Those that the losses come from, though losses never see all at once: another forward would take long, and be another."""
    recorded: list[Tensor] = []

    def record(projection: nn.Module, args: tuple[Tensor, Tensor], output: Tensor) -> None:
        with torch.no_grad():
            recorded.append(projection.forward(args[0]))

    # First, while the module still has its weights at hand.
    handles = [each.head.projection.register_forward_hook(record, prepend=True) for each in model.models if each.head]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recording(model: Model) -> Iterator[dict[str, list[Tensor]]]:
    recorded: dict[str, list[Tensor]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            recorded.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [part.register_forward_hook(record(name)) for each in model.models for name, part in _parts(each).items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: HybridModel) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module | None] = {"embedding": model.embedding}
    for number, layer in model.layers.items():
        parts[f"layers.{number}.mixer"] = layer.mixer
        parts[f"layers.{number}.feed_forward"] = layer.feed_forward if layer.kinds.feed_forward else None
    parts["head"] = model.head
    return {name: part for name, part in parts.items() if part is not None}
