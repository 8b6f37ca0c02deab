"""One training step, giving what is compared as it comes to be, so that no rank holds more than one whole tensor at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...models.hybrid import HybridModel, Losses
from .batch import Inputs

MOVES = 0.1
"""What an SGD step changes, as a fraction of the parameters' norm."""


class Found(NamedTuple):
    """One tensor to compare: whole, but of "logits" and "outputs" only this rank's tokens."""

    quantity: str
    name: str
    tensor: Tensor


BY_TOKEN = ("logits", "outputs")


def forward_backward(model: HybridModel, inputs: Inputs, labelled: int, data: dist.ProcessGroup | None = None) -> Iterator[Found]:
    """The loss, logits and gradients. `data`: the ranks that hold the other tokens; `labelled`: all tokens' labels."""
    losses = model(*inputs)
    assert isinstance(losses, Losses)
    cross_entropy = losses.cross_entropy / labelled
    (cross_entropy + losses.auxiliary).backward()
    cross_entropy = cross_entropy.detach().clone()
    if data is not None:
        dist.all_reduce(cross_entropy, group=data)
    yield Found("loss", "loss", cross_entropy + losses.auxiliary.detach())
    with torch.no_grad():
        yield Found("logits", "logits", model(inputs.ids, None, inputs.positions, inputs.documents))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        yield Found("gradients", name, _whole(parameter.grad))


def visible_rate(model: HybridModel) -> float:
    """The learning rate at which one SGD step moves the parameters by MOVES of their norm."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [torch.stack([t.detach().double().norm() for t in tensors]).norm() for tensors in (list(model.parameters()), gradients)]
    return float(MOVES * norms[0] / norms[1])


def update(model: HybridModel, rate: float) -> Iterator[Found]:
    """One SGD step, and the parameters after it."""
    torch.optim.SGD(model.parameters(), lr=rate, foreach=False).step()
    for name, parameter in model.named_parameters():
        yield Found("parameters", name, _whole(parameter.detach()))


def take_step(
    model: HybridModel, inputs: Inputs, labelled: int, rate: float, data: dist.ProcessGroup | None = None
) -> Iterator[Found]:
    """`forward_backward` and `update`."""
    yield from forward_backward(model, inputs, labelled, data)
    yield from update(model, rate)


def layer_outputs(model: HybridModel, inputs: Inputs, data: dist.ProcessGroup | None = None) -> Iterator[Found]:
    """The "outputs" of each part of the model, in order of the forward: embedding, mixers, feed-forwards, head."""
    with torch.no_grad(), _recording(model) as recorded:
        model(inputs.ids, None, inputs.positions, inputs.documents)
    for name, tensor in recorded.items():
        yield Found("outputs", name, tensor)


@contextmanager
def _recording(model: HybridModel) -> Iterator[dict[str, Tensor]]:
    recorded: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            recorded[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in _parts(model).items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: HybridModel) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"embedding": model.embedding}
    for i, layer in enumerate(model.layers):
        parts[f"layers.{i}.mixer"] = layer.mixer
        if layer.kinds.feed_forward:
            parts[f"layers.{i}.feed_forward"] = layer.feed_forward
    return parts | {"head": model.head}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
