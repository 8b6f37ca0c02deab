"""The comparison itself: one rank in fp64, the same step on a mesh, and where they part."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...configs.schema import BatchConfig, Config, Degrees, ModelConfig, ParallelConfig
from ...kernels import dispatch
from ...models.hybrid import MicroStep, build_model
from ...models.stages import build_stages
from ...parallel.mesh import Mesh, build_mesh, build_mesh_of_one, free_meshes
from ..environment import Environment
from .batch import Batch, Share, draw_batch
from .choices import record_choices, replay_choices
from .differences import Differences, Errors, Key
from .steps import BY_TOKEN, Alone, Found, Model, forward_backward, layer_outputs, update, visible_rate
from .verdict import Flips, Verdict, kind_of, over_limit, part_of

MESSAGE = 1 << 22
"""Elements of references that travel together: most tensors are small, and a message costs more than they do."""

Work = Callable[[Model, list[MicroStep], dist.ProcessGroup | None], Found]
"""What a model is made to do; the group has the ranks that hold the other tokens."""


@dataclass
class Reference:
    """What all meshes are compared with."""

    batch: Batch
    rate: float = 0.0
    """Of the SGD step."""
    choices: dict[str, Tensor] = field(default_factory=dict)
    """Below fp64, by MoE layer: the experts [m, B, L, k] that every run must use."""
    shapes: dict[Key, torch.Size] = field(default_factory=dict)
    """Of the whole tensors."""
    tensors: dict[Key, Tensor] = field(default_factory=dict)
    """Whole, on the host of rank 0; no other rank has any."""
    one_rank: Errors | None = None
    """Below fp64: of one rank in the dtype at hand."""
    one_rank_flips: int = 0

    def keep(self, found: Found) -> None:
        """Takes tensors in, on rank 0."""
        self.tensors |= {key: tensor.detach().cpu() for key, tensor in found.items()}
        self.shapes |= {key: tensor.shape for key, tensor in found.items()}

    def step(self, model: Model, micro_steps: list[MicroStep], data: dist.ProcessGroup | None) -> Found:
        """The step that a model is compared by."""
        return forward_backward(model, micro_steps, self.batch.labelled, data) | update(model, self.rate)


class Verifier:
    """Compares meshes over the default process group with rank 0 alone, one after another on the same weights and data.

    segments: packed documents are cut along the borders of as many equal segments. Below fp64 both the mesh and one rank in the
    same dtype are measured against fp64, all with the expert choices of fp64. All ranks call `verify`.
    """

    def __init__(self, environment: Environment, segments: int) -> None:
        self.device, self.leads, self.segments = environment.device, environment.leads, segments
        self.mesh: tuple[tuple[Degrees, int], Mesh] | None = None
        self.mesh_of_one: Mesh | None = None
        self.references: dict[tuple[str, BatchConfig], Reference] = {}
        self.lasting = _groups()

    def verify(self, config: Config) -> Verdict:
        """One mesh; the same verdict on every rank. Between calls only `parallel`, `batch` and `data.documents` may change."""
        reference = self._reference(config)
        started = time.perf_counter()
        errors, flips, chosen = self._on_mesh(config, reference, reference.step)
        counted = None
        if reference.choices:
            counted = Flips(reference.one_rank_flips, flips, len(reference.choices) * reference.batch.ids.numel())
        verdict = Verdict(config, errors, reference.one_rank, counted, time.perf_counter() - started, chosen)
        return verdict if verdict.ok else replace(verdict, first_difference=self._first_difference(verdict, reference))

    def _reference(self, config: Config) -> Reference:
        key = config.data.documents, config.batch
        if key not in self.references:
            self.references[key] = self._run_reference(config)
        return self.references[key]

    def _run_reference(self, config: Config) -> Reference:
        reference = Reference(draw_batch(config, self.segments))
        if self.leads:
            model = self._exact_model(config)
            micro_steps, chosen = reference.batch.micro_steps(Share.all(), self.device), record_choices(model.named_moes())
            with dispatch.chosen("reference"):
                reference.keep(forward_backward(model, micro_steps, reference.batch.labelled))
            reference.rate = visible_rate(model)
            reference.keep(update(model, reference.rate))
            reference.choices = {name: torch.stack(experts) for name, experts in chosen.items()}
            del model
            _free()
        reference.rate, reference.shapes = self._share((reference.rate, reference.shapes))
        if config.precision != "fp64":
            reference.choices = {name: choices.to(self.device) for name, choices in self._share(reference.choices).items()}
            reference.one_rank, reference.one_rank_flips = self._on_one_rank(config, reference, reference.step)
        else:
            reference.choices = {}
        return reference

    def _exact_model(self, config: Config) -> Alone:
        """Without any wiring."""
        return Alone(build_model(config.model, config.seed, torch.float64).to(self.device))

    def _on_one_rank(self, config: Config, reference: Reference, work: Work) -> tuple[Errors, int]:
        """Errors and flips of rank 0 alone, which computes as training on one rank does, FSDP's mixed precision with it."""
        if self.mesh_of_one is None:
            before = _groups()
            self.mesh_of_one = build_mesh_of_one(self.device.type)
            self.lasting |= _groups() - before
        result = None
        if self.leads:
            alone = config.model_copy(update={"parallel": ParallelConfig(dp=1)})
            stages = build_stages(alone, self.mesh_of_one, self.device)
            flips = replay_choices(stages.named_moes(), reference.choices)
            found = work(stages, reference.batch.micro_steps(Share.all(), self.device), None)
            differences = Differences(found)
            for key, tensor in found.items():
                differences.add(key, tensor, reference.tensors[key].to(self.device))
            result = differences.errors(), sum(flips.values())
            del stages, found
            _free()
        return self._share(result)

    def _on_mesh(self, config: Config, reference: Reference, work: Work) -> tuple[Errors, int, dict[str, str] | None]:
        """Errors of the config's mesh over all ranks, the tokens that would have chosen other experts, and `Verdict.chosen`."""
        mesh = self._mesh(config.parallel)
        shares = Share.of(mesh, config.parallel)
        share = shares[mesh.rank("dp_cp")]
        stages = build_stages(config, mesh, self.device)
        replayed = {name: share.between_regions(share.cut(whole)) for name, whole in reference.choices.items()}
        flips = replay_choices(stages.named_moes(), replayed) if replayed else {}
        found = work(stages, reference.batch.micro_steps(share, self.device), mesh.group("dp_cp"))
        assert found.keys() <= reference.shapes.keys()
        differences = Differences(reference.shapes)
        for key, part, expected in self._hand_out(reference, shares):
            if key in found and part in (None, share):
                differences.add(key, found[key], share.between_regions(expected) if _is_between(key) else expected)
        chosen = {"strategy": stages.strategies.exchange, "attention": stages.strategies.attention} if stages.strategies else None
        del stages, found
        _free()
        counted = torch.tensor(sum(flips.values()), device=self.device)
        dist.all_reduce(counted, group=None if config.parallel.sequence_parallel else mesh.group("pp_dp_cp"))
        return differences.errors(self.device), int(counted), chosen

    def _mesh(self, parallel: ParallelConfig) -> Mesh:
        """That of the call before where it is the same: building one takes a while, and each has threads that never rest."""
        key = parallel.degrees(dist.get_world_size()), parallel.replicate
        if self.mesh is None or self.mesh[0] != key:
            self.mesh = None
            for group in _groups() - self.lasting:
                dist.destroy_process_group(group)
            free_meshes()
            self.mesh = key, build_mesh(parallel, self.device.type)
        return self.mesh[1]

    def _hand_out(self, reference: Reference, shares: list[Share]) -> Iterator[tuple[Key, Share | None, Tensor]]:
        """From rank 0 to all, which all take part whether they have use for a tensor or not: those by token one share at a time."""
        pieces = [(key, share) for key in reference.shapes for share in (shares if key[0] in BY_TOKEN else [None])]
        shapes = [reference.shapes[key] if share is None else share.shape(reference.shapes[key]) for key, share in pieces]
        for run in _runs([shape.numel() for shape in shapes]):
            message = torch.empty(sum(shapes[i].numel() for i in run), dtype=torch.float64, device=self.device)
            parts = message.split([shapes[i].numel() for i in run])
            if self.leads:
                for i, part in zip(run, parts, strict=True):
                    key, share = pieces[i]
                    whole = reference.tensors[key]
                    part.view(shapes[i]).copy_(whole if share is None else share.cut(whole))
            dist.broadcast(message, 0)
            yield from ((*pieces[i], part.view(shapes[i])) for i, part in zip(run, parts, strict=True))

    def _share(self, value: object) -> Any:
        """Rank 0's on every rank."""
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def _first_difference(self, verdict: Verdict, reference: Reference) -> str:
        """Runs the forward again, looking at what each part hands on; where all agree, it is the backward or the step."""
        config, outputs = verdict.config, replace(reference, shapes={}, tensors={})
        if self.leads:
            micro_steps = reference.batch.micro_steps(Share.all(), self.device)
            with dispatch.chosen("reference"):
                outputs.keep(layer_outputs(self._exact_model(config), micro_steps))
        outputs.shapes = self._share(outputs.shapes)
        one_rank = None
        if config.precision != "fp64":
            one_rank, _ = self._on_one_rank(config, outputs, layer_outputs)
        errors, _, _ = self._on_mesh(config, outputs, layer_outputs)
        for first in over_limit(errors, one_rank, config.model):
            return f"the output of {_named(first.name, config.model)} is the first that differs: {first.error:.1e}"
        return _after_the_forward(verdict)


def _after_the_forward(verdict: Verdict) -> str:
    gradients = [over.name for over in verdict.over if over.quantity == "gradients"]
    if not gradients:
        return f"all outputs and gradients agree, but not the {verdict.over[0].quantity}"
    part = _named(part_of(gradients[-1]), verdict.config.model)
    return f"all outputs agree, so it is the backward: {part} is the last part, in order of the forward, whose gradients differ"


def _named(part: str, model: ModelConfig) -> str:
    return f"{part} ({kind_of(part, model)})" if part.startswith("layers") else part


def _is_between(key: Key) -> bool:
    """Whether a tensor by token lies between tensor regions; the head gives something for all of a rank's tokens."""
    return key[0] == "outputs" and key[1] != "head"


def _runs(sizes: list[int]) -> Iterator[range]:
    """Neighbours that make one message of at most MESSAGE elements, or one that is larger alone."""
    start = 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > MESSAGE:
            yield range(start, stop)
            start = stop


def _groups() -> set[dist.ProcessGroup]:
    """All that this process is in."""
    return set(dist.distributed_c10d._world.pg_map)


def _free() -> None:
    """FSDP's modules hold each other, so that their memory waits for the collector."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
