"""The part of the model that a rank holds, whole or a pipeline's stages, and how micro-steps run through all of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..configs.schema import Config
from ..kernels import dispatch
from ..parallel.gradients import local_part
from ..parallel.mesh import Mesh
from .flops import stage_layers
from .hybrid import TIED, HybridModel, Losses, MicroStep
from .moe import MoE
from .parallelize import build_stage, choose_strategies, meet_neighbours
from .pipeline import Pipeline


def build_stages(config: Config, mesh: Mesh, device: torch.device) -> "Stages":
    """This rank's part of the config's model, sharded; the values are those of one device.

    The process runs the config's kernels from here on. All ranks call it. Raises ValueError for a mixer that cannot be sharded,
    and UserError for a file of links that cannot be read.
    """
    dispatch.choose(config.kernels, config.norms)
    meet_neighbours(config, mesh)
    strategies = choose_strategies(config, mesh, device)
    cuts = stage_layers(config.model, config.parallel.stages, config.data.context)
    own = range(mesh.rank("pp"), len(cuts), mesh.size("pp"))
    models = [build_stage(config, mesh, device, cuts[number], strategies) for number in own]
    return Stages(models, config, mesh, device)


class Stages:
    """A rank's stages of the model, ascending; without a pipeline one, the whole model."""

    def __init__(self, models: Sequence[HybridModel], config: Config, mesh: Mesh, device: torch.device) -> None:
        self.models, self.config, self.mesh, self.device = list(models), config, mesh, device
        self.strategies = models[0].strategies
        self._pipeline = Pipeline(self.models, config, mesh, device) if mesh.size("pp") > 1 else None
        self._ends = mesh.pipeline_ends() if self._pipeline and config.model.tied_embeddings else None

    def forward_backward(self, micro_steps: Sequence[MicroStep], tokens: Tensor) -> Losses:
        """Gradients of cross entropy / tokens + mean auxiliary loss -> the sums of both over the micro-steps, in fp64.

        There must be none from before: at a pipeline's ends they would be added up twice where embeddings are tied.
        tokens: labels that count, over all ranks and micro-steps. The cross entropy is of this rank's tokens, the same on every
        rank of its pipeline.
        """

        def weigh(losses: Losses) -> Tensor:
            return losses.cross_entropy / tokens + losses.auxiliary / len(micro_steps)

        if self._pipeline is None:
            return self._in_turn(micro_steps, weigh)
        losses = self._pipeline.forward_backward(micro_steps, weigh)
        if self._ends is not None:
            self._sum_tied_gradient(self._ends)
        return losses

    def _in_turn(self, micro_steps: Sequence[MicroStep], weigh: Callable[[Losses], Tensor]) -> Losses:
        (model,) = self.models
        assert isinstance(model, FSDPModule)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, micro_step in enumerate(micro_steps, 1):
            # Copies of the parameters (HSDP) meet once a step; in a copy gradients are never whole for longer than a layer.
            model.set_requires_all_reduce(number == len(micro_steps))
            losses = model(*micro_step)
            weigh(losses).backward()
            totals += torch.stack([losses.cross_entropy.detach(), losses.auxiliary.detach()])
        return Losses(*totals)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """In the body the model is not trained: a capacity of experts drops no token."""
        for model in self.models:
            model.eval()
        try:
            yield
        finally:
            for model in self.models:
                model.train()

    @torch.no_grad()
    def forward(self, micro_step: MicroStep) -> Tensor | Losses | None:
        """What the model gives, on ranks that hold its last stage; None on others."""
        if self._pipeline is None:
            return self.models[0](*micro_step)
        return self._pipeline.forward(micro_step)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Sharded, by their names in the whole model. Of a tied embedding each end of a pipeline has a copy, of one name."""
        self.reshard()
        for model in self.models:
            for name, parameter in model.named_parameters():
                yield (TIED.get(name, name) if self.config.model.tied_embeddings else name), parameter

    def reshard(self) -> None:
        """After a forward without a backward parameters may be whole still, which are copies of what is trained."""
        for module in (module for model in self.models for module in model.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What is kept beside parameters, such as experts' biases: the same on all ranks that hold the layer."""
        for model in self.models:
            kept = model.state_dict().keys()
            yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of this rank's."""
        return (parameter for _, parameter in self.named_parameters())

    def gradients(self) -> list[Tensor]:
        """This rank's gradients, each in the hands of one rank of a pipeline alone: what a norm adds up."""
        copy = self._tied_copy() if self._ends is not None else None
        return [p.grad for p in self.parameters() if p.grad is not None and p is not copy]

    def named_moes(self) -> Iterator[tuple[str, MoE]]:
        """This rank's mixtures of experts."""
        for model in self.models:
            yield from ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))

    def _tied_copy(self) -> nn.Parameter | None:
        head = self.models[-1].head
        return None if head is None else head.projection.weight

    def _sum_tied_gradient(self, ends: dist.ProcessGroup) -> None:
        """Both ends go on with the sum of their gradients, so that their copies stay the same."""
        embedding = self.models[0].embedding
        weight = self._tied_copy() if embedding is None else embedding.weight
        assert weight is not None
        assert weight.grad is not None
        dist.all_reduce(local_part(weight.grad), group=ends)
