"""Megatron's own hybrid model with our spec computes what our model does, on every mesh, also where its own mixer refuses."""

import megatron_peer as peer
import pytest
import torch
from megatron_cpu import megatron_on_cpu

from helpers import relative_error, tiny_config

CONTEXT = 48
MAMBA2 = "model.mamba2={head_dim: 8, state_dim: 8, groups: 2, chunk_size: 7}"
HYBRID = ["model.pattern=M-ME*-", MAMBA2]
"""Every kind of layer; of Megatron's three each on two stages."""
DENSE = ["model.pattern=M-*-", MAMBA2]
TP, CP, PP, EP = ({f"{axis}_parallel_size": 2} for axis in ("tensor_model", "context", "pipeline_model", "expert_model"))
SP = {"sequence_parallel": True}


def tokens(rows=2, length=CONTEXT):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, 64, (rows, length), generator=generator) for _ in range(2))


def one_step(rank, model, parallel, spec):
    """Of Megatron's model with our weights; spec: arguments of `build_hybrid_stack_spec`."""
    with megatron_on_cpu():
        from baton.models.megatron import build_hybrid_stack_spec

        module = peer.build(model, build_hybrid_stack_spec(**spec), **parallel)
        peer.fill(module, model, peer.scrambled(model))
        return peer.step(module, *tokens())


def case(name, overrides, *parallel, world=2, **spec):
    merged = {key: value for part in parallel for key, value in part.items()}
    return pytest.param(world, overrides, merged, spec, id=name)


ONE_GROUP = ["model.mamba2.groups=1"]


@pytest.mark.parametrize(
    ("world", "overrides", "parallel", "spec"),
    [
        case("alone", HYBRID, world=1),
        case("tp2", DENSE, TP),
        case("tp2-sp", HYBRID, TP, SP),
        case("cp2", HYBRID, CP, strategy="ring"),
        case("tp2-cp2", HYBRID, TP, CP, SP, {"cp_comm_type": "a2a"}, world=4, strategy="doubling"),
        case("pp2-tied", [*HYBRID, "model.tied_embeddings=true"], PP),
        case("cp2-ep2", HYBRID, CP, EP, strategy="sliced"),
        # What Megatron's own mixer refuses: fewer groups than tp, without and with sequence_parallel; heads that do not divide.
        case("one-group-tp2", [*DENSE, *ONE_GROUP], TP),
        case("one-group-tp2-sp-cp2", [*HYBRID, *ONE_GROUP], TP, SP, CP, {"cp_comm_type": "all_gather"}, world=4),
        case("two-groups-tp4", DENSE, {"tensor_model_parallel_size": 4}, world=4),
        case("six-heads-tp2-cp2", [*DENSE, "model.mamba2.heads=6"], TP, CP, world=4),
    ],
)
def test_the_loss_and_every_gradient(pool, world, overrides, parallel, spec):
    model = tiny_config(overrides).model
    loss, gradients = peer.expected(model, *tokens())
    found = pool.run(world, one_step, model, parallel, spec)
    losses = [rank.loss for rank in found if rank.loss is not None]
    total = sum(losses) / parallel.get("tensor_model_parallel_size", 1)
    assert relative_error(total, loss) <= 1e-5
    whole = peer.joined(found, gradients)
    errors = {name: relative_error(whole[name], gradients[name]) for name in gradients}
    assert all(error <= 1e-5 for error in errors.values()), errors
