"""The one place where a single-device model meets a mesh: sharding tables, sequence-sharded twins, FSDP."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from ..configs.schema import Config
from ..kernels.attention import causal_attention
from ..kernels.scan import LocalScan
from ..parallel.affine_scan import SequenceScan
from ..parallel.attention import ATTENTION_FLOPS, SequenceAttention, choose_attention
from ..parallel.attention import Strategy as AttentionStrategy
from ..parallel.collectives import all_sum, copy_to, gather_from, reduce_from, scatter_to
from ..parallel.experts import ExpertCapacity, ExpertExchange
from ..parallel.halo import SequenceHalo
from ..parallel.layout import Layout
from ..parallel.links import Link, Links, Place, choose
from ..parallel.mesh import Mesh
from ..parallel.vocabulary import VocabularyShards
from .hybrid import HybridModel, initialize_part
from .mixers.attention import Attention
from .mixers.mamba import Selection, SelectiveStateSpace
from .mixers.mamba2 import StateSpace
from .mixers.short_conv import ShortConv
from .moe import Experts, MoE
from .norm import GatedGroupRMSNorm
from .sharding import Split, SplitExperts, SplitGroups
from .vocabulary import Embedding, Projection
from .workload import largest_state

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Of the parameters, by the config's precision."""
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Of the activations, by the config's precision."""

Read = Callable[[DTensor], Tensor]


def build_stage(
    config: Config, mesh: Mesh, device: torch.device, layers: range, strategies: "Strategies | None" = None
) -> HybridModel:
    """Some of the model's layers, each part filled and sharded before the next takes memory; the values are those of one device.

    strategies: of `choose_strategies`, over cp. Raises ValueError where the model does not fit the mesh.
    """
    with torch.device("meta"):
        model = HybridModel(config.model, layers).to(DTYPES[config.precision])
    model.packed = config.data.documents == "packed"
    model.strategies = strategies
    for layer in model.layers.values():
        layer.recompute = config.parallel.recompute
    shard_sequence(model, config, mesh)
    spread_experts(model, config, mesh)
    parts, tied = model.parts(), []
    for name, part in parts.items():
        part.to_empty(device=device)
        initialize_part(part, name, config.model, config.seed)
        shard_tensors(part, mesh, config.parallel.sequence_parallel)
        if part in model.tied_ends():
            tied.append(part)
        else:
            shard_data([part], mesh, config)
    if tied:
        # A matrix that two modules share has to be in one unit.
        model.tie()
        shard_data(tied, mesh, config)
    fully_shard_summing(model, mesh.data, MixedPrecisionPolicy(), free=False)
    _prefetch(parts)
    return model


def build_replica(config: Config, mesh: Mesh, device: torch.device) -> HybridModel:
    """The model that is not trained: without FSDP, every rank has all of it but for what tp shares out, in the compute dtype.

    Its parameters are empty: a checkpoint has to fill them. Over cp it reads one sequence, as `shard_sequence` says, until
    `leave_sequence`. All ranks call it. Raises ValueError where the model does not fit the mesh.
    """
    with torch.device("meta"):
        model = HybridModel(config.model).to(DTYPES[config.precision])
    for module in model.modules():
        if not getattr(module, "fp32", False):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(COMPUTE_DTYPES[config.precision])
    meet_neighbours(config, mesh)
    model.strategies = choose_strategies(config, mesh, device)
    shard_sequence(model, config, mesh)
    spread_experts(model, config, mesh)
    for part in model.parts().values():
        part.to_empty(device=device)
        shard_tensors(part, mesh, False)
    model.tie()
    return model.eval()


def leave_sequence(model: HybridModel) -> None:
    """Undoes `shard_sequence`, and what `spread_experts` says of other ranks' tokens: the rank goes on with tokens of its own."""
    for module in _of(model, (StateSpace, SelectiveStateSpace)):
        module.scan = LocalScan()
    for module in _of(model, ShortConv):
        module.halo = None
    for module in _of(model, Attention):
        module.attend = causal_attention
    for module in _of(model, MoE):
        module.sum_over_tokens = None


def shard_sequence(model: HybridModel, config: Config, mesh: Mesh) -> None:
    """Gives every operation that mixes tokens its twin over the cp axis. Raises ValueError for a mixer that has no such twin."""
    if mesh.size("cp") == 1:
        return
    layout, group, strategies = Layout(config.parallel.layout, mesh.size("cp")), mesh.group("cp"), model.strategies
    assert mesh.states is not None
    for layer in model.layers.values():
        if not getattr(layer.mixer, "sequence_sharded", False):
            raise ValueError(f"mixer {layer.kinds.mixer} has no sharded version: parallel.cp must be 1")
    transport = torch.bfloat16 if config.parallel.transport == "bf16" else None
    for module in _of(model, (StateSpace, SelectiveStateSpace)):
        module.scan = SequenceScan(layout, mesh.states, strategies.exchange, transport)
    for module in _of(model, ShortConv):
        module.halo = SequenceHalo(layout, group)
    for module in _of(model, Attention):
        module.attend = SequenceAttention(layout, group, strategies.attention)
    model.register_forward_pre_hook(_require_positions, with_kwargs=True)


def spread_experts(model: HybridModel, config: Config, mesh: Mesh) -> None:
    """Tells every mixture of experts of the tokens, and the experts, on other ranks."""
    others = "dp_cp_tp" if config.parallel.sequence_parallel else "dp_cp"
    for module in _of(model, MoE):
        if mesh.size(others) > 1:
            module.sum_over_tokens = lambda statistics: reduce_from(statistics, mesh.group(others))
        module.experts.token_ranks = mesh.size("dp_cp")
        if mesh.size("dp_cp") > 1:
            layout = Layout(config.parallel.layout, mesh.size("cp"))
            module.experts.within_capacity = ExpertCapacity(layout, mesh.group("dp_cp"))
        if mesh.size("ep") > 1:
            module.experts.exchange = ExpertExchange(mesh.group("ep"), config.model.moe.experts)


class Strategies(NamedTuple):
    """How what mixes tokens passes over cp."""

    exchange: str
    """Of boundary states: a key of `parallel.affine_scan.STRATEGIES`."""
    attention: AttentionStrategy


def choose_strategies(config: Config, mesh: Mesh, device: torch.device) -> Strategies | None:
    """The config's strategies, the fastest by the links' latency and bandwidth for those that are `auto`; alike on all ranks.

    None where cp is 1. All ranks call it. Raises UserError for a file of links that cannot be read.
    """
    if mesh.size("cp") == 1:
        return None
    parallel, model = config.parallel, config.model
    layout, tp = Layout(parallel.layout, mesh.size("cp")), mesh.size("tp")
    link = _link(config, mesh, device)
    b = max(1, config.batch.sequences // config.batch.micro_steps // mesh.size("dp"))
    exchange, attention = parallel.strategy, parallel.attention
    if exchange == "auto":
        states, decays = (b * numbers // tp for numbers in largest_state(model))
        size = 2 if parallel.transport == "bf16" else 4
        exchange = choose(layout, states * size, decays * 4, link, size)  # type: ignore[assignment]
    if attention == "auto":
        sizes = model.attention
        heads, kv_heads = sizes.heads // tp, max(1, sizes.kv_heads // tp)
        tokens, size = config.data.context // layout.ranks, COMPUTE_DTYPES[config.precision].itemsize
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


def shard_tensors(part: nn.Module, mesh: Mesh, sequence_parallel: bool) -> None:
    """Cuts the parameters of every table over the tp axis, experts over ep too, and wires the regions' inputs and outputs."""
    tables = {name: module for name, module in part.named_modules() if hasattr(module, "sharding")}
    for module in tables.values():
        for key, split in module.sharding.items():
            if mesh.size("tp") > 1 or (isinstance(split, SplitExperts) and mesh.size("ep") > 1):
                _split_parameter(module, key, split, mesh)
    if mesh.size("tp") == 1:
        return
    regions = {name: module for name, module in tables.items() if not any(_inside(name, outer) for outer in tables)}
    for name, module in part.named_modules():
        inside = any(name == region or _inside(name, region) for region in regions)
        _replicate_others(module, inside, mesh, sequence_parallel)
    for module in regions.values():
        _wire_region(module, mesh.group("tp"), sequence_parallel)
    for norm in _of(part, GatedGroupRMSNorm):
        _share_norm_groups(norm, mesh)
    for selection in _of(part, Selection):
        selection.sum_over_channels = lambda products: all_sum(products, mesh.group("tp"))
    for end in (*_of(part, Embedding), *_of(part, Projection)):
        end.shards = VocabularyShards(mesh.group("tp"), sequence_parallel)


def shard_data(modules: Sequence[nn.Module], mesh: Mesh, config: Config) -> None:
    """FSDP of a unit over dp and cp together, of experts spread over ep over the ranks that hold the same.

    Modules marked `fp32` form a group that bf16 does not touch; or one each, where one may run again without the other.
    """
    exact, free = MixedPrecisionPolicy(), config.parallel.zero == 3
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if config.precision == "bf16" else exact
    inside = [module for unit in modules for module in unit.modules()]
    if kept := [module for module in inside if getattr(module, "fp32", False)]:
        apart = config.parallel.recompute in ("mixer", "feed_forward")
        for together in [[module] for module in kept] if apart else [kept]:
            fully_shard_summing(together, mesh.data, exact, free)
    for experts in (module for module in inside if isinstance(module, Experts) and module.exchange):
        fully_shard_summing(experts.stacked, mesh.expert_data, policy, free)
    fully_shard_summing(list(modules) if len(modules) > 1 else modules[0], mesh.data, policy, free)


def fully_shard_summing(modules: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy, free: bool) -> None:
    """FSDP of a module, or of several as one unit, over the last of the mesh's axes; of two, the first holds copies.

    free: whether gathered parameters go after each forward.
    """
    ranks = mesh.size(mesh.ndim - 1)
    placement: Any = lambda parameter: _data_placement(parameter, ranks)  # noqa: E731
    fully_shard(modules, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=free)
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


def _prefetch(parts: dict[str, nn.Module]) -> None:
    """Each part gathers the next one's parameters before it computes: with ep the host waits inside, too late to be early."""
    for part, following in itertools.pairwise(parts.values()):
        if isinstance(part, FSDPModule):
            part.set_modules_to_forward_prefetch([module for module in following.modules() if isinstance(module, FSDPModule)])


def _require_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if len(args) < 3 and kwargs.get("positions") is None:
        raise ValueError("a model over cp needs positions: Layout.positions of this rank")


def _split_parameter(module: nn.Module, key: str, split: Split | SplitGroups | SplitExperts, mesh: Mesh) -> None:
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    parameter = getattr(owner, name)
    try:
        over, placements, read = _plan(split, parameter.shape, mesh)
    except ValueError as error:
        raise ValueError(f"{type(module).__name__}.{key}: {error}") from None
    sharded = distribute_tensor(parameter.data, over, placements, src_data_rank=None)
    owner.register_parameter(name, nn.Parameter(sharded))
    _read_locally(owner, name, read)


def _plan(split: Split | SplitGroups | SplitExperts, shape: torch.Size, mesh: Mesh) -> tuple[DeviceMesh, list[Placement], Read]:
    """The axes that a parameter is cut over, where it lies on them, and what a rank reads of it."""
    tp = mesh.size("tp")
    if isinstance(split, SplitGroups) and split.groups < tp and tp % split.groups == 0:
        block = mesh.rank("tp") * split.groups // tp
        read: Read = lambda p: p.to_local(grad_placements=[Partial()]).unflatten(0, (split.groups, -1))[block]  # noqa: E731
        return mesh.tensor, [Replicate()], read
    dim, pieces = (0, split.groups) if isinstance(split, SplitGroups) else (split.dim, shape[split.dim])
    if pieces % tp:
        raise ValueError(f"{pieces} pieces do not divide over tp {tp}")
    over, placements = mesh.tensor, [Shard(dim)]
    if isinstance(split, SplitExperts) and mesh.size("ep") > 1:
        over, placements = mesh.expert_tensor, [Shard(0), Shard(dim)]
    return over, [*placements], lambda p: p.to_local(grad_placements=placements)


def _replicate_others(module: nn.Module, inside_region: bool, mesh: Mesh, sequence_parallel: bool) -> None:
    """Parameters that no table names are the same on every rank of the axis.

    So are their gradients outside a region, unless ranks have different tokens there: then they are added up.
    """
    gradient = Partial() if sequence_parallel else Replicate()
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            continue
        if inside_region:
            raise ValueError(f"{type(module).__name__}.{name} is in no sharding table of its tensor region")
        whole = distribute_tensor(parameter.data, mesh.tensor, [Replicate()], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole))
        _read_locally(module, name, lambda p: p.to_local(grad_placements=[gradient]))


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


def _wire_region(module: nn.Module, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    count = getattr(module, "token_args", 1)

    def bring(arg: Tensor) -> Tensor:
        if sequence_parallel:
            return gather_from(arg, group, 1)
        return copy_to(arg, group) if arg.is_floating_point() else arg

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return *(bring(arg) for arg in args[:count]), *args[count:]

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return scatter_to(output, group, 1) if sequence_parallel else reduce_from(output, group)

    module.register_forward_pre_hook(enter)
    if not getattr(module, "output_sharded", False):
        module.register_forward_hook(leave)


def meet_neighbours(config: Config, mesh: Mesh) -> None:
    """Makes the groups that gated norms share, which ranks of a stage without any have to take part in as well."""
    groups, tp = config.model.mamba2.groups, mesh.size("tp")
    if groups % tp and any(layer.mixer == "mamba2" for layer in config.model.layers):
        mesh.tensor_neighbours(tp // groups)


def _share_norm_groups(norm: GatedGroupRMSNorm, mesh: Mesh) -> None:
    """With fewer groups than ranks, those that hold parts of one group add their sums of squares up."""
    tp = mesh.size("tp")
    if norm.groups % tp == 0:
        return
    sharing = mesh.tensor_neighbours(tp // norm.groups)
    norm.sum_over_group = lambda squares: all_sum(squares, sharing)


def _of(model: nn.Module, kind: type | tuple[type, ...]) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, kind))
