"""The comparison itself: one rank in fp64, the same step on a mesh, and where they part."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ...configs.schema import Config, Degrees, ModelConfig, ParallelConfig
from ...kernels import dispatch
from ...models.hybrid import HybridModel, build_model
from ...models.parallelize import build_sharded_model
from ...parallel.mesh import AXES, Mesh, build_mesh
from ..environment import Environment
from .batch import Batch, Inputs, Share, draw_batch
from .choices import record_choices, replay_choices
from .differences import Differences, Errors
from .steps import BY_TOKEN, Found, forward_backward, layer_outputs, take_step, update, visible_rate
from .verdict import Flips, Verdict, kind_of, over_limit, part_of

Work = Callable[[HybridModel, Inputs, dist.ProcessGroup | None], Iterator[Found]]
"""What a model is made to do; the group has the ranks that hold the other tokens."""


@dataclass
class Reference:
    """What all meshes are compared with. Tensors are whole, on the host of rank 0, by quantity and name."""

    batch: Batch
    rate: float = 0.0
    """Of the SGD step."""
    choices: list[Tensor] = field(default_factory=list)
    """Below fp64, by MoE layer: the experts [B, L, k] that every run must use."""
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    one_rank: Errors | None = None
    """Below fp64: of one rank in the dtype at hand."""
    one_rank_flips: int = 0

    def keep(self, found: Iterator[Found]) -> None:
        """Takes tensors in."""
        self.tensors |= {(one.quantity, one.name): one.tensor.detach().cpu() for one in found}

    def step(self, model: HybridModel, inputs: Inputs, data: dist.ProcessGroup | None) -> Iterator[Found]:
        """The step that a model is compared by."""
        return take_step(model, inputs, self.batch.labelled, self.rate, data)


class Verifier:
    """Compares meshes over the default process group with rank 0 alone, one after another on the same weights and data.

    segments: packed documents are cut along the borders of as many equal segments. Below fp64 both the mesh and one rank in the
    same dtype are measured against fp64, all with the expert choices of fp64. All ranks call `verify`.
    """

    def __init__(self, environment: Environment, segments: int) -> None:
        self.device, self.leads, self.segments = environment.device, environment.leads, segments
        self.meshes: dict[Degrees, Mesh] = {}
        self.mesh_of_one: Mesh | None = None
        self.references: dict[str, Reference] = {}

    def verify(self, config: Config) -> Verdict:
        """One mesh; the same verdict on every rank. Between calls only `parallel` and `data.documents` may change."""
        reference = self._reference(config)
        started = time.perf_counter()
        errors, flips, chosen = self._on_mesh(config, reference, reference.step)
        counted = None
        if reference.choices:
            counted = Flips(reference.one_rank_flips, flips, len(reference.choices) * reference.batch.ids.numel())
        verdict = Verdict(config, errors, reference.one_rank, counted, time.perf_counter() - started, chosen)
        return verdict if verdict.ok else replace(verdict, first_difference=self._first_difference(verdict, reference))

    def _reference(self, config: Config) -> Reference:
        kind = config.data.documents
        if kind not in self.references:
            # The one before goes first: each holds a whole model's gradients and parameters.
            self.references = {}
            self.references = {kind: self._run_reference(config)}
        return self.references[kind]

    def _run_reference(self, config: Config) -> Reference:
        reference = Reference(draw_batch(config, self.segments))
        if self.leads:
            model = self._exact_model(config)
            inputs, chosen = reference.batch.inputs(Share.all(), self.device), record_choices(model)
            with dispatch.chosen("reference"):
                reference.keep(forward_backward(model, inputs, reference.batch.labelled))
            reference.rate = visible_rate(model)
            reference.keep(update(model, reference.rate))
            reference.choices = [chosen[number].unflatten(0, inputs.ids.shape) for number in sorted(chosen)]
            del model
            _free()
        self._share_choices(config, reference)
        reference.rate = self._share(reference.rate)
        if config.precision != "fp64":
            reference.one_rank, reference.one_rank_flips = self._on_one_rank(config, reference, reference.step)
        return reference

    def _share_choices(self, config: Config, reference: Reference) -> None:
        if config.precision == "fp64":
            reference.choices = []
            return
        layers = [layer for layer in config.model.layers if layer.feed_forward == "moe"]
        shape = *reference.batch.ids.shape, config.model.moe.top_k
        if not self.leads:
            reference.choices = [torch.empty(shape, dtype=torch.int64, device=self.device) for _ in layers]
        for chosen in reference.choices:
            dist.broadcast(chosen, 0)

    def _exact_model(self, config: Config) -> HybridModel:
        """Without any wiring."""
        return build_model(config.model, config.seed, torch.float64).to(self.device)

    def _on_one_rank(self, config: Config, reference: Reference, work: Work) -> tuple[Errors, int]:
        """Errors and flips of rank 0 alone, which computes as training on one rank does, FSDP's mixed precision with it."""
        if self.mesh_of_one is None:
            self.mesh_of_one = _build_mesh_of_one(self.device.type)
        result = None
        if self.leads:
            alone = config.model_copy(update={"parallel": ParallelConfig(dp=1)})
            model = build_sharded_model(alone, self.mesh_of_one, self.device)
            flips, differences = replay_choices(model, [c.flatten(0, 1) for c in reference.choices]), Differences()
            for one in work(model, reference.batch.inputs(Share.all(), self.device), None):
                differences.add(one, reference.tensors[one.quantity, one.name].to(self.device))
            result = differences.errors(over_ranks=False), sum(flips.values())
            del model
            _free()
        return self._share(result)

    def _on_mesh(self, config: Config, reference: Reference, work: Work) -> tuple[Errors, int, dict[str, str] | None]:
        """Errors of the config's mesh over all ranks, the tokens that would have chosen other experts, and `Verdict.chosen`."""
        degrees = config.parallel.degrees(dist.get_world_size())
        if degrees not in self.meshes:
            self.meshes[degrees] = build_mesh(config.parallel, self.device.type)
        mesh = self.meshes[degrees]
        shares = Share.of(mesh, config.parallel.layout)
        share = shares[mesh.rank("dp_cp")]
        model = build_sharded_model(config, mesh, self.device)
        replayed = [share.cut(whole).flatten(0, 1) for whole in reference.choices]
        flips, differences = replay_choices(model, replayed) if replayed else {}, Differences()
        for one in work(model, reference.batch.inputs(share, self.device), mesh.group("dp_cp")):
            differences.add(one, self._hand_out(reference, one, shares, share))
        chosen = {"strategy": model.strategies.exchange, "attention": model.strategies.attention} if model.strategies else None
        del model
        _free()
        counted = torch.tensor(sum(flips.values()), device=self.device)
        dist.all_reduce(counted, group=mesh.group("dp_cp"))
        return differences.errors(over_ranks=True), int(counted), chosen

    def _hand_out(self, reference: Reference, one: Found, shares: list[Share], own: Share) -> Tensor:
        """From rank 0: the reference of what each rank has found, which for tokens is its share."""
        whole = reference.tensors[one.quantity, one.name] if self.leads else None
        if one.quantity not in BY_TOKEN:
            return self._broadcast(whole, one.tensor)
        for share in shares:
            part = self._broadcast(None if whole is None else share.cut(whole), one.tensor)
            if share == own:
                kept = part
        return kept

    def _broadcast(self, tensor: Tensor | None, like: Tensor) -> Tensor:
        out = torch.empty(like.shape, dtype=torch.float64, device=self.device)
        if tensor is not None:
            out.copy_(tensor)
        dist.broadcast(out, 0)
        return out

    def _share(self, value: object) -> Any:
        """Rank 0's on every rank."""
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def _first_difference(self, verdict: Verdict, reference: Reference) -> str:
        """Runs the forward again, looking at what each part hands on; where all agree, it is the backward or the step."""
        config = verdict.config
        if self.leads:
            inputs = reference.batch.inputs(Share.all(), self.device)
            with dispatch.chosen("reference"):
                reference.keep(layer_outputs(self._exact_model(config), inputs))
        one_rank = None
        if config.precision != "fp64":
            one_rank, _ = self._on_one_rank(config, reference, layer_outputs)
        errors, _, _ = self._on_mesh(config, reference, layer_outputs)
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


def _build_mesh_of_one(device_type: str) -> Mesh:
    """A mesh for each rank with nobody else on it. All ranks call it."""
    copies = init_device_mesh(device_type, (dist.get_world_size(), 1, 1, 1, 1), mesh_dim_names=("copies", *AXES))
    dense = copies[AXES]
    return Mesh(dense, dense["dp", "cp"]._flatten("dp_cp"))


def _free() -> None:
    """FSDP's modules hold each other, so that their memory waits for the collector."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
