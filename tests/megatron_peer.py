"""Megatron's `MambaModel` with our spec or its own, filled with our weights, stepped by Megatron's schedule on a CPU."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from baton.configs.schema import ModelConfig
from baton.models.hybrid import HybridModel, MicroStep, build_model
from baton.models.megatron_config import megatron_config
from baton.models.megatron_tensors import megatron_tensors
from baton.parallel.layout import Layout

LR, CLIP = 0.1, 0.5
"""Of the step that follows."""


class Found(NamedTuple):
    """What a rank has after one step."""

    loss: Tensor | None
    """Cross entropy summed over this rank's tokens, where the pipeline ends."""
    gradients: "list[Piece]"
    """Of its parameters."""
    norm: float
    """Of all gradients on all ranks, as Megatron's optimizer has it."""
    parameters: "list[Piece]"
    """After its step."""


def scrambled(model: ModelConfig, dtype: torch.dtype = torch.float32) -> HybridModel:
    """Ours, all numbers at random: norms of 1 and biases of 0 would hide what is missing."""
    built = build_model(model, 0, dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built


def expected(model: ModelConfig, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one process: cross entropy, summed, and the gradients of a micro-step a sequence, by the names of a checkpoint."""
    ours, total = scrambled(model), torch.zeros(())
    for row in range(len(ids)):
        losses = ours(*MicroStep(ids[row : row + 1], labels[row : row + 1], None, None))
        total = total + losses.cross_entropy.detach()
        (losses.cross_entropy / labels.numel() + losses.auxiliary / len(ids)).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    return total, in_checkpoint(model, gradients)


def in_checkpoint(model: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the names, and in the shapes, of Megatron's checkpoints."""
    return {each.name: each.join(tensors) for each in megatron_tensors(model)}


def build(model: ModelConfig, spec: Any, vocab_size: int | None = None, **parallel: Any) -> Any:
    """The part of `MambaModel` that this rank has, on groups that are made here.

    vocab_size: with rows that fill it up. parallel: of `TransformerConfig`, degrees and whatever else.
    """
    from megatron.core import parallel_state
    from megatron.core.models.mamba.mamba_model import MambaModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    degrees = {key: value for key, value in parallel.items() if key.endswith("_parallel_size")}
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**degrees)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    asked = megatron_config(model)
    here = {
        "activation_func": F.silu,
        "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32,
        "gradient_accumulation_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
        # Megatron's own way gives wrong gradients over gloo.
        "batch_p2p_comm": False,
    }
    config = TransformerConfig(**asked.transformer | here | parallel)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    options = asked.model | {"vocab_size": vocab_size or model.vocab_size, "pre_process": first, "post_process": last}
    return MambaModel(config, spec, max_sequence_length=4096, **options)


class Piece(NamedTuple):
    """A part of a checkpoint's tensor, on this rank."""

    name: str
    place: tuple[slice, ...]
    """In the whole tensor."""
    numbers: Tensor
    """In the shape of the place; the parameter itself where a checkpoint has it as it is."""


def pieces(module: Any, values: dict[str, Tensor] | None = None) -> Iterator[Piece]:
    """Of this rank's parameters and buffers, or of other values by their names here."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for key, entry in module.sharded_state_dict().items():
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            continue
        if values is not None and key not in values:
            continue
        data = entry.data if values is None else values[key]
        if isinstance(entry, ShardedTensorFactory):
            built = entry.build_fn(entry.key, data, entry.replica_id, entry.flattened_range)
            parts = [(each, each.data) for each in (built.values() if isinstance(built, dict) else built)]
        else:
            parts = [(entry, data)]
        for part, numbers in parts:
            shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
            place = tuple(slice(start, start + length) for start, length in zip(part.global_offset, shape, strict=True))
            yield Piece(part.key, place, numbers.reshape(shape))


def ours_whole(model: ModelConfig, ours: HybridModel) -> dict[str, Tensor]:
    """All of our numbers as a checkpoint of Megatron's has them."""
    return in_checkpoint(model, {name: tensor.detach() for name, tensor in ours.state_dict().items()})


def fill(module: Any, model: ModelConfig, ours: HybridModel) -> None:
    """Our weights into this rank's parameters, which a checkpoint's names connect; rows that fill the vocabulary up stay."""
    whole = ours_whole(model, ours)
    with torch.no_grad():
        for piece in pieces(module):
            values = whole[piece.name][piece.place]
            piece.numbers[tuple(slice(length) for length in values.shape)] = values


def same(module: Any, model: ModelConfig, ours: HybridModel) -> tuple[bool, int]:
    """Whether this rank's numbers are ours; how many they are."""
    whole = ours_whole(model, ours)
    found = [torch.equal(piece.numbers, whole[piece.name][piece.place]) for piece in pieces(module)]
    return all(found), sum(piece.numbers.numel() for piece in pieces(module))


def step(module: Any, ids: Tensor, labels: Tensor) -> Found:
    """Forward and backward of all sequences, a micro-step each, by Megatron's schedule, and its reductions of gradients."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = module.config
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
    config.finalize_model_grads_func = finalize_model_grads
    cp = parallel_state.get_context_parallel_world_size()
    layout, rank = Layout("zigzag" if cp > 1 else "contiguous", cp), parallel_state.get_context_parallel_rank()
    sums = []

    def forward_step(rows: Any, model: Any) -> Any:
        row, wanted = (layout.shard(t, rank) for t in next(rows))
        positions = layout.positions(rank, ids.shape[1])[None]
        losses = model(row, positions, None, labels=wanted)

        def loss_func(out: Tensor) -> Any:
            sums.append(out.detach().sum())
            # The mean over a sequence's tokens; Megatron multiplies by cp, since its reduction is a mean over ranks.
            return out.sum() / ids.shape[1], {}

        return losses, loss_func

    rows = iter([(ids[i : i + 1], labels[i : i + 1]) for i in range(len(ids))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=rows,
            model=[wrapped],
            num_microbatches=len(ids),
            seq_length=ids.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
    gradients = {name.removeprefix("module."): p.main_grad for name, p in wrapped.named_parameters()}
    parts = [piece._replace(numbers=piece.numbers.clone()) for piece in pieces(module, gradients)]
    norm = _optimize(wrapped)
    parameters = [piece._replace(numbers=piece.numbers.detach().clone()) for piece in pieces(module)]
    # Hooks of autograd's nodes hold it, where no collector looks, and with it the groups.
    vars(wrapped).clear()
    return Found(torch.stack(sums).sum() if sums else None, parts, norm, parameters)


def _optimize(wrapped: Any) -> float:
    """A step of SGD by Megatron's optimizer, which clips -> the norm of all gradients before."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(optimizer="sgd", lr=LR, sgd_momentum=0.0, weight_decay=0.0, clip_grad=CLIP)
    optimizer = get_megatron_optimizer(config, [wrapped])
    for group in optimizer.param_groups:
        group["lr"] = LR
    _, norm, _ = optimizer.step()
    return float(norm)


def joined(parts: list[list[Piece]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """All ranks' pieces, each compared with the others' of the same place -> whole tensors."""
    whole = {name: torch.full(tensor.shape, float("nan")) for name, tensor in like.items()}
    for rank in parts:
        for name, place, numbers in rank:
            there = whole[name][place]
            assert there.isnan().all() or torch.allclose(there, numbers, rtol=1e-4, atol=1e-6), name
            whole[name][place] = numbers
    return whole
