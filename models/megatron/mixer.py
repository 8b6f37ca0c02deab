"""The Mamba-2 mixer for Megatron's `MambaLayer`: its parameters and names, with the state passed over cp.

Megatron's own mixer moves every token over cp twice, to heads and back; this one sends a halo of a few tokens and one state. So
heads need not divide over tp x cp, and one group of B and C goes with any tp.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import _split_tensor_factory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.conv import causal_conv
from ...kernels.documents import Documents
from ...kernels.scan import LocalScan, Scan
from ...kernels.ssd import start_ssd
from ...kernels.steps import NO_LIMIT
from ...parallel.affine_scan import SequenceScan
from ...parallel.collectives import all_sum, copy_to
from ...parallel.halo import SequenceHalo
from ...parallel.links import DEFAULTS, choose
from ..initialization import inverse_softplus_dt, log_uniform_decay
from ..megatron_config import GATED_NORM_EPS
from .norm import GatedNorm
from .sequence import cp_layout, group_of_neighbours, read_documents, state_group

Strategy = Literal["auto", "ring", "allgather", "doubling", "sliced"]


@dataclass
class Mamba2MixerSubmodules:
    """Megatron's linear layers: `ColumnParallelLinear` and `RowParallelLinear`, or others that are called as they are."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class CausalConv(nn.Conv1d):
    """Depthwise and causal, with SiLU: torch's holds the parameters, by Megatron's names.

    It is called, since Megatron waits for a module's gathered parameters where that is called.
    """

    def forward(self, inputs: Tensor, halo: Tensor | None, positions: Tensor | None) -> Tensor:  # type: ignore[override]
        """[b, l, c] -> [b, l, c], as `causal_conv`."""
        return causal_conv(inputs, self.weight.squeeze(1), self.bias, halo, positions)


class Mamba2Mixer(MegatronModule):
    """[l, b, d] of this rank's tokens, zigzag over cp as Megatron cuts sequences -> the same, and no bias.

    Parameters and `sharded_state_dict` have the names of Megatron's `MambaMixer`, so either reads the other's checkpoints. With
    fewer groups than tp ranks, which Megatron refuses, B and C have parameters of their own, the same on every tp rank.
    """

    vectors: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    """Parameters of one number a head; what they are used for is computed in fp32, whatever Megatron makes them."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mamba2MixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        d_conv: int = 4,
        expand: int = 2,
        chunk_size: int = 64,
        strategy: Strategy = "auto",
        transport: torch.dtype | None = None,
    ) -> None:
        """Sizes are the config's mamba_*; the rest comes from `ModuleSpec.params`.

        strategy: how states pass over cp, `auto` by latency and bandwidth. transport: what they travel as, None: fp32. chunk_size:
        of PyTorch's implementation, which runs where the Triton kernels do not. Raises ValueError for sizes that do not fit.
        """
        super().__init__(config)
        assert pg_collection is not None, "Megatron's stack hands the process groups on"
        self.layer_number, self.chunk_size, self.reach = layer_number, chunk_size, d_conv - 1
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.head_dim, self.state_dim, self.groups = config.mamba_head_dim, config.mamba_state_dim, config.mamba_num_groups
        self.heads = config.mamba_num_heads or expand * d_model // self.head_dim
        self.inner = self.heads * self.head_dim
        tp = self.tp_group.size()
        self._check_sizes(tp)
        self.shares_groups = self.groups < tp
        self.local_heads, self.local_inner, self.local_groups = self.heads // tp, self.inner // tp, max(1, self.groups // tp)
        self.local_states = self.local_groups * self.state_dim
        self._build_projections(submodules, d_model)
        self._build_ssm(d_conv)
        self.norm = GatedNorm(self.inner, self.groups, GATED_NORM_EPS, config, self.tp_group)
        if self.shares_groups:
            sharing = group_of_neighbours(self.tp_group, tp // self.groups)
            self.norm.sum_over_group = lambda squares: all_sum(squares, sharing)
        # Last: Megatron gathers parameters in the order in which they are registered, a forward ahead.
        self._build_output(submodules, d_model)
        self._shard_sequence(strategy, transport)

    def _check_sizes(self, tp: int) -> None:
        if self.heads % self.groups:
            raise ValueError(f"mamba_num_groups is {self.groups}, allowed: a divisor of the {self.heads} heads")
        if self.heads % tp:
            raise ValueError(f"tensor_model_parallel_size is {tp}, allowed: a divisor of the {self.heads} Mamba heads")
        if self.groups % tp and tp % self.groups:
            raise ValueError(f"mamba_num_groups is {self.groups}, allowed with tensor parallel {tp}: a divisor or a multiple of it")

    def _build_projections(self, submodules: Mamba2MixerSubmodules, d_model: int) -> None:
        config, shared = self.config, 2 * self.groups * self.state_dim
        common: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            2 * self.inner + (0 if self.shares_groups else shared) + self.heads,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        if self.shares_groups:
            # Of this rank's tokens: under sequence_parallel Megatron adds the ranks' gradients up.
            weight = nn.Parameter(self._empty(shared, d_model))
            if config.perform_initialization:
                # Outside the tracker, so that it is the same on every tp rank.
                config.init_method(weight.data)
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.bc_weight = weight

    def _build_output(self, submodules: Mamba2MixerSubmodules, d_model: int) -> None:
        common: dict[str, Any] = {"config": self.config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.out_proj = build_module(
            submodules.out_proj,
            self.inner,
            d_model,
            init_method=self.config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )

    def _build_ssm(self, d_conv: int) -> None:
        channels, shared = self.local_inner, 2 * self.groups * self.state_dim
        with get_cuda_rng_tracker().fork():
            self.conv1d = self._conv(channels if self.shares_groups else channels + 2 * self.local_states, d_conv)
            dt_bias, A_log = (torch.empty(self.local_heads, device=torch.cuda.current_device()) for _ in range(2))
            inverse_softplus_dt(dt_bias)
            log_uniform_decay(A_log)
        self.dt_bias, self.A_log = nn.Parameter(dt_bias), nn.Parameter(A_log)
        self.D = nn.Parameter(torch.ones_like(A_log))
        for parameter in (*self.conv1d.parameters(), self.dt_bias, self.A_log, self.D):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        if self.shares_groups:
            self.bc_conv1d = self._conv(shared, d_conv)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.config.params_dtype, device=torch.cuda.current_device())

    def _conv(self, channels: int, width: int) -> "CausalConv":
        place = {"dtype": self.config.params_dtype, "device": torch.cuda.current_device()}
        return CausalConv(channels, channels, width, groups=channels, **place)

    def _shard_sequence(self, strategy: Strategy, transport: torch.dtype | None) -> None:
        self.layout = cp_layout(self.cp_group)
        self.halo: SequenceHalo | None = None
        self.scan: Scan = LocalScan()
        if self.layout.ranks == 1:
            return
        if strategy == "auto":
            link = DEFAULTS.get(dist.get_backend(self.cp_group), DEFAULTS["gloo"])
            size = 4 if transport is None else transport.itemsize
            states = self.local_heads * self.head_dim * self.state_dim
            strategy = choose(self.layout, states * size, self.local_heads * 4, link, size)  # type: ignore[assignment]
        self.halo = SequenceHalo(self.layout, self.cp_group)
        self.scan = SequenceScan(self.layout, state_group(self.cp_group), strategy, transport)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, None]:
        """[l, b, d], under sequence_parallel [l / tp, b, d] -> the same. packed_seq_params: Megatron's, of packed documents.

        Raises ValueError for inference, lengths that do not cut into the layout's segments, and packed documents over cp.
        """
        if inference_context is not None or inference_params is not None:
            raise ValueError("inference is not in this spec; `baton convert from-megatron`, then `baton generate`, do it")
        z, dt, inputs = self._project(hidden_states)
        length = dt.shape[1]
        self.layout.check(length * self.layout.ranks)
        documents = read_documents(packed_seq_params, length, self.layout, dt.device)
        x, B, C = self._convolve(inputs, documents)
        resets = None if documents is None else documents.resets
        A, D, dt_bias = -self.A_log.float().exp(), self.D.float(), self.dt_bias.float()
        scan = start_ssd(x, dt, A, B, C, D, dt_bias, NO_LIMIT, None, resets, self.chunk_size, self.scan)
        y, _ = scan.finish()
        out, _ = self.out_proj(self.norm(y.flatten(2), z).transpose(0, 1).contiguous())
        return out, None

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """z [b, l, inner], dt [b, l, heads], and the convolution's inputs: x, B and C in one, or x, and B and C of all groups."""
        projected = self.in_proj(u)[0].transpose(0, 1)
        if not self.shares_groups:
            z, inputs, dt = projected.split([self.local_inner, self.local_inner + 2 * self.local_states, self.local_heads], -1)
            return z, dt, [inputs]
        z, x, dt = projected.split([self.local_inner, self.local_inner, self.local_heads], -1)
        bc = F.linear(u, self.bc_weight)
        if self.config.sequence_parallel:
            # Every rank will have the whole gradient, see `_convolve`.
            bc = gather_from_sequence_parallel_region(bc, tensor_parallel_output_grad=False, group=self.tp_group)
        return z, dt, [x, bc.transpose(0, 1)]

    def _convolve(self, inputs: list[Tensor], documents: Documents | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, l, h, p], B and C [b, l, g, n] of this rank's heads and groups."""
        inputs = [tensor.contiguous() for tensor in inputs]
        halos: list[Tensor] | list[None] = [None] * len(inputs)
        if self.halo is not None:
            halos = self.halo.start_last(inputs, self.reach).wait().split([tensor.shape[-1] for tensor in inputs], -1)
        positions = None if documents is None else documents.positions
        convs = [self.conv1d, self.bc_conv1d] if self.shares_groups else [self.conv1d]
        outputs = [conv(tensor, halo, positions) for tensor, conv, halo in zip(inputs, convs, halos, strict=True)]
        if self.shares_groups:
            x, bc = outputs
            # Each rank uses its own group's; their gradients are added up, so that all that is before has the whole of them.
            B, C = copy_to(bc, self.tp_group).chunk(2, -1)
            group = self.tp_group.rank() * self.groups // self.tp_group.size()
            B, C = (t[..., group * self.state_dim : (group + 1) * self.state_dim] for t in (B, C))
        else:
            x, B, C = outputs[0].split([self.local_inner, self.local_states, self.local_states], -1)
        return x.unflatten(-1, (-1, self.head_dim)), *(t.unflatten(-1, (-1, self.state_dim)) for t in (B, C))

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Megatron asks for them, for inference: of the convolution and of the recurrence."""
        return (self.conv1d.weight.shape[0], self.reach + 1), (self.local_heads, self.head_dim, self.state_dim)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """By the names of Megatron's mixer, z, x, B, C and dt apart: a checkpoint is of any tp, and of either mixer."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        own = {name: getattr(self, name) for name in self.vectors}
        found = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(self.vectors, 0), sharded_offsets, **groups)
        for name in ("in_proj", "out_proj", "norm"):
            module, path = getattr(self, name), f"{prefix}{name}."
            found |= sharded_state_dict_default(module, path, sharded_offsets, metadata, tp_group=self.tp_group)
        cut = {"weight": 0, "bias": 0}
        conv = self.conv1d.state_dict(keep_vars=True)
        found |= make_sharded_tensors_for_checkpoint(conv, f"{prefix}conv1d.", cut, sharded_offsets, **groups)
        inner, shared = [self.local_inner], [] if self.shares_groups else [self.local_states] * 2
        BC = [] if self.shares_groups else ["B", "C"]
        parts = {"in_proj.weight": (inner * 2 + shared + [self.local_heads], ["z", "x", *BC, "dt"])}
        parts |= dict.fromkeys(("conv1d.weight", "conv1d.bias"), (inner + shared, ["x", *BC]))
        for name, (sizes, names) in parts.items():
            found[prefix + name] = _split_tensor_factory(found[prefix + name], sizes, names, 0)
        return found | (self._shared_state_dict(prefix, sharded_offsets, groups) if self.shares_groups else {})

    def _shared_state_dict(self, prefix: str, sharded_offsets: tuple[Any, ...], groups: dict[str, Any]) -> dict[str, Any]:
        """B and C where every tp rank has all of them."""
        there = {
            "bc_weight": "in_proj.weight",
            "bc_conv1d.weight": "conv1d.weight",
            "bc_conv1d.bias": "conv1d.bias",
        }
        tensors = {"bc_weight": self.bc_weight, "bc_conv1d.weight": self.bc_conv1d.weight, "bc_conv1d.bias": self.bc_conv1d.bias}
        found = make_sharded_tensors_for_checkpoint(tensors, prefix, {}, sharded_offsets, **groups)
        half = self.groups * self.state_dim
        for name, theirs in there.items():
            found[prefix + name].key = prefix + theirs
            found[prefix + name] = _split_tensor_factory(found[prefix + name], [half, half], ["B", "C"], 0)
        return found
