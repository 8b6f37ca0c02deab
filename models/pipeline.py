"""A pipeline of stages over the pp axis: torch's schedules for training, a plain pass for what needs no gradient."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from ..configs.schema import Config
from ..parallel.collectives import point_to_point
from ..parallel.mesh import Mesh
from .hybrid import HybridModel, Losses, MicroStep
from .moe import auxiliary_size
from .parallelize import COMPUTE_DTYPES, fully_shard_summing

# A schedule that fails would print itself first, which are hundreds of lines.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)

Weigh = Callable[[Losses], Tensor]


class Pipeline:
    """This rank's stages among all: stage i is on rank i modulo pp.

    Every rank reads its own micro-steps, so that between stages only hidden states and parts of the auxiliary loss travel, never
    documents: torch's schedules would cut cu_seqlens into micro-steps like any tensor.
    """

    def __init__(self, models: Sequence[HybridModel], config: Config, mesh: Mesh, device: torch.device) -> None:
        self.config, self.device = config, device
        self.group, self.count = mesh.group("pp"), config.parallel.stages
        self.numbers = range(mesh.rank("pp"), self.count, mesh.size("pp"))
        self.token_ranks = mesh.size("tp") if config.parallel.sequence_parallel else 1
        self.modules = [_StageModule(model) for model in models]
        for module in self.modules:
            # Schedules reduce the gradients after a stage's last backward only where its module is FSDP's.
            fully_shard_summing(module, mesh.data, MixedPrecisionPolicy(), free=False)
        self._latest: tuple[tuple[int, torch.Size], Schedule1F1B | ScheduleInterleaved1F1B] | None = None
        self._weigh: Weigh = lambda losses: losses.cross_entropy
        self._totals = torch.zeros(2)

    def forward_backward(self, micro_steps: Sequence[MicroStep], weigh: Weigh) -> Losses:
        """Gradients of what `weigh` makes of each micro-step's losses -> the sums of these, in fp64, the same on every rank."""
        self._weigh, self._totals = weigh, torch.zeros(2, dtype=torch.float64, device=self.device)
        for module in self.modules:
            module.upcoming = iter(micro_steps)
        schedule = self._schedule(len(micro_steps), micro_steps[0].ids.shape)
        try:
            schedule.step(target=torch.arange(len(micro_steps)), return_outputs=False)
        except RuntimeError as error:
            raised = _of_the_stage(error)
            raise raised from raised.__cause__
        # Only the last stage's rank has any.
        dist.all_reduce(self._totals, group=self.group)
        return Losses(*self._totals)

    def forward(self, micro_step: MicroStep) -> Tensor | Losses | None:
        """What the last stage gives, on its rank; None on others."""
        sent: list[dist.Work] = []
        for number, module in zip(self.numbers, self.modules, strict=True):
            carried = () if number == 0 else self._receive(micro_step.ids.shape, number - 1)
            module.upcoming = iter([micro_step])
            out = module(*carried)
            if number == self.count - 1:
                return out if isinstance(out, Tensor) else Losses(*out)
            sent += self._exchange(dist.isend, out, number + 1)
        for work in sent:
            work.wait()
        return None

    def _receive(self, shape: torch.Size, number: int) -> tuple[Tensor, ...]:
        tensors = tuple(torch.empty_like(like, device=self.device) for like in self._carried(shape))
        for work in self._exchange(dist.irecv, tensors, number):
            work.wait()
        return tensors

    def _exchange(self, operation: Any, tensors: Sequence[Tensor], number: int) -> Sequence[dist.Work]:
        """Starts messages with the rank that has stage `number`."""
        peer = dist.get_global_rank(self.group, number % dist.get_world_size(self.group))
        return point_to_point([dist.P2POp(operation, tensor.contiguous(), peer, self.group) for tensor in tensors], self.group)

    def _carried(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """What goes from one stage to the next for ids of this shape, on no device."""
        dtype = COMPUTE_DTYPES[self.config.precision]
        x = torch.empty(shape[0], shape[1] // self.token_ranks, self.config.model.d_model, dtype=dtype, device="meta")
        size, exact = auxiliary_size(self.config.model.moe), torch.promote_types(dtype, torch.float32)
        # Schedules send gradients of what requires them.
        return x.requires_grad_(), torch.empty(size, dtype=exact, device="meta").requires_grad_()

    def _schedule(self, micro_steps: int, shape: torch.Size) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """With the shapes of what travels given: torch finds them out by a forward pass otherwise, collectives and all.

        It is the one before where it is for the same.
        """
        if self._latest is None or self._latest[0] != (micro_steps, shape):
            carried = self._carried(shape)
            losses = (carried[1].new_empty(()),) * len(Losses._fields)
            stages = [
                PipelineStage(
                    module,
                    number,
                    self.count,
                    self.device,
                    input_args=() if number == 0 else carried,
                    output_args=losses if number == self.count - 1 else carried,
                    group=self.group,
                )
                for number, module in zip(self.numbers, self.modules, strict=True)
            ]
            # The loss is a sum over micro-steps, so that gradients are not to be averaged over them.
            options: dict[str, Any] = {"n_microbatches": micro_steps, "loss_fn": self._loss, "scale_grads": False}
            interleaved = self.config.parallel.schedule == "interleaved_1f1b"
            schedule = ScheduleInterleaved1F1B(list(stages), **options) if interleaved else Schedule1F1B(stages[0], **options)
            self._latest = (micro_steps, shape), schedule
        return self._latest[1]

    def _loss(self, output: tuple[Tensor, Tensor], number: Tensor) -> Tensor:
        losses = Losses(*output)
        self._totals += torch.stack([losses.cross_entropy.detach(), losses.auxiliary.detach()])
        return self._weigh(losses)


def _of_the_stage(error: BaseException) -> BaseException:
    """What a stage has raised: schedules raise a plain RuntimeError in its place."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


class _StageModule(nn.Module):
    """A stage as schedules call it: with what the stage before gives, in the order of the micro-steps."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model
        self.upcoming: Iterator[MicroStep] = iter(())

    def forward(self, *carried: Tensor) -> Tensor | tuple[Tensor, ...]:
        ids, labels, positions, documents = next(self.upcoming)
        x, parts = carried or (ids, None)
        out = self.model(x, labels, positions, documents, parts)
        # Schedules take no named tuple.
        return out if isinstance(out, Tensor) else tuple(out)
