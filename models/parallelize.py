"""The one place where a single-device model meets a mesh: sharding tables, sequence-sharded twins, FSDP."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from ..configs.schema import Config, check_tensor_degree
from ..kernels import dispatch
from ..parallel.affine_scan import SequenceScan
from ..parallel.attention import ATTENTION_FLOPS, SequenceAttention, choose_attention
from ..parallel.attention import Strategy as AttentionStrategy
from ..parallel.collectives import all_sum, copy_to, reduce_from
from ..parallel.halo import SequenceHalo
from ..parallel.layout import Layout
from ..parallel.links import Link, Links, Place, choose
from ..parallel.mesh import Mesh
from ..parallel.vocabulary import VocabularyShards
from .hybrid import HybridModel, initialize_part
from .mixers.attention import Attention
from .mixers.mamba2 import ShortConv, StateSpace
from .moe import MoE
from .norm import GatedGroupRMSNorm
from .sharding import Split, SplitGroups
from .vocabulary import Embedding, Projection

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Of the parameters, by the config's precision."""
ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Of an element, by the config's precision."""


def build_sharded_model(config: Config, mesh: Mesh, device: torch.device) -> HybridModel:
    """The config's model, each part filled and sharded before the next takes memory; the values are those of one device.

    The process runs the config's kernels from here on. Raises ValueError where the model does not fit the mesh.
    """
    dispatch.choose(config.kernels)
    check_tensor_degree(config.model, mesh.size("tp"))
    with torch.device("meta"):
        model = HybridModel(config.model).to(DTYPES[config.precision])
    model.packed = config.data.documents == "packed"
    shard_sequence(model, config, mesh, device)
    for name, part in model.parts().items():
        part.to_empty(device=device)
        initialize_part(part, name, config.model, config.seed)
        shard_tensors(part, mesh)
        shard_data(part, mesh, config.precision)
    _fully_shard(model, mesh, MixedPrecisionPolicy())
    return model


def shard_sequence(model: HybridModel, config: Config, mesh: Mesh, device: torch.device) -> None:
    """Gives every operation that mixes tokens its twin over the cp axis. All ranks call it, since they agree on `auto`.

    Raises ValueError for a mixer that has no such twin, and UserError for a file of links that cannot be read.
    """
    if mesh.size("dp_cp") > 1:
        for module in _of(model, MoE):
            module.sum_over_tokens = lambda statistics: reduce_from(statistics, mesh.group("dp_cp"))
    if mesh.size("cp") == 1:
        return
    layout, group = Layout(config.parallel.layout, mesh.size("cp")), mesh.group("cp")
    assert mesh.states is not None
    for layer in model.layers:
        if not getattr(layer.mixer, "sequence_sharded", False):
            raise ValueError(f"mixer {layer.kinds.mixer} has no sharded version: parallel.cp must be 1")
    strategies = model.strategies = choose_strategies(config, mesh, device)
    transport = torch.bfloat16 if config.parallel.transport == "bf16" else None
    for module in _of(model, StateSpace):
        module.scan = SequenceScan(layout, mesh.states, strategies.exchange, transport)
    for module in _of(model, ShortConv):
        module.halo = SequenceHalo(layout, group)
    for module in _of(model, Attention):
        module.attend = SequenceAttention(layout, group, strategies.attention)
    model.register_forward_pre_hook(_require_positions, with_kwargs=True)


class Strategies(NamedTuple):
    """How what mixes tokens passes over cp."""

    exchange: str
    """Of boundary states: a key of `parallel.affine_scan.STRATEGIES`."""
    attention: AttentionStrategy


def choose_strategies(config: Config, mesh: Mesh, device: torch.device) -> Strategies:
    """The config's strategies, the fastest by the links' latency and bandwidth for those that are `auto`; alike on all ranks.

    Raises UserError for a file of links that cannot be read.
    """
    parallel, model = config.parallel, config.model
    layout, tp = Layout(parallel.layout, mesh.size("cp")), mesh.size("tp")
    link = _link(config, mesh, device)
    b = max(1, config.batch.sequences // config.batch.micro_steps // mesh.size("dp"))
    exchange, attention = parallel.strategy, parallel.attention
    if exchange == "auto":
        states = b * model.inner * model.mamba2.state_dim // tp
        heads = b * model.inner // model.mamba2.head_dim // tp
        size = 2 if parallel.transport == "bf16" else 4
        exchange = choose(layout, states * size, heads * 4, link, size)  # type: ignore[assignment]
    if attention == "auto":
        sizes = model.attention
        heads, kv_heads = sizes.heads // tp, max(1, sizes.kv_heads // tp)
        tokens, size = config.data.context // layout.ranks, ACTIVATION_BYTES[config.precision]
        flops = ATTENTION_FLOPS[device.type]
        attention = choose_attention(layout, b, tokens, heads, kv_heads, sizes.head_dim, size, link, flops)
    return Strategies(exchange, attention)


def _link(config: Config, mesh: Mesh, device: torch.device) -> Link:
    """As one rank knows it, for all: others may see another file, and ranks that chose differently would wait for ever."""
    group = mesh.group("cp")
    known: list[Any] = [None]
    if mesh.rank("cp") == 0:
        links = Links(measured={}) if config.parallel.links is None else Links.read(config.parallel.links)
        known = [links.find(Place.of(group, device))]
    dist.broadcast_object_list(known, group=group, group_src=0, device=device)
    return known[0]


def shard_tensors(part: nn.Module, mesh: Mesh) -> None:
    """Cuts the parameters of every table over the tp axis, and wires the regions' inputs and outputs."""
    if mesh.size("tp") == 1:
        return
    tables = {name: module for name, module in part.named_modules() if hasattr(module, "sharding")}
    for module in tables.values():
        for key, split in module.sharding.items():
            _split_parameter(module, key, split, mesh)
    regions = {name: module for name, module in tables.items() if not any(_inside(name, outer) for outer in tables)}
    for name, module in part.named_modules():
        inside = any(name == region or _inside(name, region) for region in regions)
        _replicate_others(module, inside, mesh)
    for module in regions.values():
        _wire_region(module, mesh.group("tp"))
    for norm in _of(part, GatedGroupRMSNorm):
        _share_norm_groups(norm, mesh)
    for end in (*_of(part, Embedding), *_of(part, Projection)):
        end.shards = VocabularyShards(mesh.group("tp"))


def shard_data(part: nn.Module, mesh: Mesh, precision: str) -> None:
    """FSDP over dp and cp together; modules marked `fp32` form a group of their own, which bf16 does not touch."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kept = [module for module in part.modules() if getattr(module, "fp32", False)]
    if kept:
        _fully_shard(kept, mesh, MixedPrecisionPolicy())
    _fully_shard(part, mesh, bf16 if precision == "bf16" else MixedPrecisionPolicy())


def _fully_shard(modules: Any, mesh: Mesh, policy: MixedPrecisionPolicy) -> None:
    fully_shard(modules, mesh=mesh.data, mp_policy=policy, shard_placement_fn=lambda p: _data_placement(p, mesh.size("dp_cp")))
    for module in modules if isinstance(modules, list) else [modules]:
        assert isinstance(module, FSDPModule)
        # Gradients are summed, the loss being a sum over all tokens; FSDP's own default is the mean. gloo has no scaled sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _data_placement(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Stacked experts are cut along a dim that tp leaves whole, since there may be fewer experts than ranks; others along dim 0."""
    if parameter.ndim < 3:
        return None
    taken = {p.dim for p in parameter.placements if isinstance(p, Shard)} if isinstance(parameter, DTensor) else set()
    return next((Shard(dim) for dim in (2, 1) if dim not in taken and parameter.shape[dim] % ranks == 0), None)


def _require_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if len(args) < 3 and kwargs.get("positions") is None:
        raise ValueError("a model over cp needs positions: Layout.positions of this rank")


def _split_parameter(module: nn.Module, key: str, split: Split | SplitGroups, mesh: Mesh) -> None:
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    parameter = getattr(owner, name)
    try:
        placement, read = _plan(split, parameter.shape, mesh)
    except ValueError as error:
        raise ValueError(f"{type(module).__name__}.{key}: {error}") from None
    sharded = distribute_tensor(parameter.data, mesh.tensor, [placement], src_data_rank=None)
    owner.register_parameter(name, nn.Parameter(sharded))
    _read_locally(owner, name, read)


def _plan(split: Split | SplitGroups, shape: torch.Size, mesh: Mesh) -> tuple[Placement, Callable[[DTensor], Tensor]]:
    """Where a parameter lies over tp, and what a rank reads of it."""
    tp = mesh.size("tp")
    if isinstance(split, SplitGroups) and split.groups < tp and tp % split.groups == 0:
        block = mesh.rank("tp") * split.groups // tp
        return Replicate(), lambda p: p.to_local(grad_placements=[Partial()]).unflatten(0, (split.groups, -1))[block]
    dim, pieces = (split.dim, shape[split.dim]) if isinstance(split, Split) else (0, split.groups)
    if pieces % tp:
        raise ValueError(f"{pieces} pieces do not divide over tp {tp}")
    return Shard(dim), lambda p: p.to_local(grad_placements=[Shard(dim)])


def _replicate_others(module: nn.Module, inside_region: bool, mesh: Mesh) -> None:
    """Parameters that no table names are the same on every rank of the axis, and so are their gradients outside a region."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            continue
        if inside_region:
            raise ValueError(f"{type(module).__name__}.{name} is in no sharding table of its tensor region")
        whole = distribute_tensor(parameter.data, mesh.tensor, [Replicate()], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole))
        _read_locally(module, name, lambda p: p.to_local(grad_placements=[Replicate()]))


def _inside(name: str, outer: str) -> bool:
    return name != outer and (outer == "" or name.startswith(f"{outer}."))


def _read_locally(module: nn.Module, name: str, read: Callable[[DTensor], Tensor]) -> None:
    """While the module's forward runs, `module.name` is this rank's plain tensor: an attribute that hides the parameter."""

    def before(module: nn.Module, args: Any) -> None:
        module.__dict__[name] = read(getattr(module, name))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__.pop(name, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def _wire_region(module: nn.Module, group: Any) -> None:
    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(copy_to(a, group) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return reduce_from(output, group)

    module.register_forward_pre_hook(enter)
    if not getattr(module, "output_sharded", False):
        module.register_forward_hook(leave)


def _share_norm_groups(norm: GatedGroupRMSNorm, mesh: Mesh) -> None:
    """With fewer groups than ranks, those that hold parts of one group add their sums of squares up."""
    tp = mesh.size("tp")
    if norm.groups % tp == 0:
        return
    sharing = mesh.tensor_neighbours(tp // norm.groups)
    norm.sum_over_group = lambda squares: all_sum(squares, sharing)


def _of(model: nn.Module, kind: type) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, kind))
