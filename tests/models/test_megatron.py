"""Megatron's own hybrid model with our spec computes what our model does, on every mesh, also where its own mixer refuses."""

import importlib.metadata
import sys

import megatron_bytes
import megatron_peer as peer
import pytest
import torch
from megatron_bytes import Sizes
from megatron_cpu import megatron_on_cpu

from baton.configs.errors import UserError
from baton.models.hybrid import MicroStep
from baton.models.megatron_version import check_version
from baton.parallel.halo import halo_messages
from baton.parallel.layout import Layout
from baton.parallel.links import sent_by
from helpers import relative_error, tiny_config

CONTEXT = 48
MAMBA2 = "model.mamba2={head_dim: 8, state_dim: 8, groups: 2, chunk_size: 7}"
HYBRID = ["model.pattern=M-ME*-", MAMBA2]
"""Every kind of layer; of Megatron's three each on two stages."""
DENSE = ["model.pattern=M-*-", MAMBA2]
TP, CP, PP, EP = ({f"{axis}_parallel_size": 2} for axis in ("tensor_model", "context", "pipeline_model", "expert_model"))
SP = {"sequence_parallel": True}
ONE_GROUP = ["model.mamba2.groups=1"]


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


@pytest.mark.slow
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
def test_a_step(pool, world, overrides, parallel, spec):
    """The loss, every gradient, their norm and every parameter after Megatron's optimizer, beside our model on one process."""
    model = tiny_config(overrides).model
    loss, gradients = peer.expected(model, *tokens())
    found = pool.run(world, one_step, model, parallel, spec)
    losses = [rank.loss for rank in found if rank.loss is not None]
    total = sum(losses) / parallel.get("tensor_model_parallel_size", 1)
    assert relative_error(total, loss) <= 1e-5
    whole = peer.joined([rank.gradients for rank in found], gradients)
    errors = {name: relative_error(whole[name], gradients[name]) for name in gradients}
    assert all(error <= 1e-5 for error in errors.values()), errors
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm > peer.CLIP
    assert all(abs(rank.norm - norm) <= 1e-5 * norm for rank in found)
    before = peer.ours_whole(model, peer.scrambled(model))
    stepped = {name: before[name] - peer.LR * peer.CLIP / norm * gradients[name] for name in gradients}
    after = peer.joined([rank.parameters for rank in found], stepped)
    assert all(relative_error(after[name] - before[name], stepped[name] - before[name]) <= 1e-3 for name in stepped)
    assert all(relative_error(after[name], stepped[name]) <= 1e-5 for name in stepped)


@pytest.mark.parametrize(
    ("ranks", "groups", "strategy"), [(2, 4, "ring"), (4, 4, "sliced"), pytest.param(8, 4, "allgather", marks=pytest.mark.slow)]
)
def test_beside_megatrons_own_mixer(pool, ranks, groups, strategy):
    """The same weights by the same names: outputs, gradients; and what each sends, to the byte."""
    sizes = Sizes(d=32, heads=8, head_dim=8, state_dim=8, groups=groups, tokens=64)
    layout = Layout("zigzag", ranks)
    shared = sizes.groups * sizes.state_dim
    moved = 2 * sizes.inner + 2 * max(groups, ranks) * sizes.state_dim + sizes.heads + sizes.inner
    state, decay = 4 * sizes.inner * sizes.state_dim, 4 * sizes.heads
    for rank, (theirs, ours) in enumerate(pool.run(ranks, megatron_bytes.both, sizes, strategy)):
        assert relative_error(ours.out, theirs.out) <= 1e-5
        assert ours.gradients.keys() == theirs.gradients.keys()
        assert all(relative_error(ours.gradients[name], theirs.gradients[name]) <= 1e-5 for name in ours.gradients)
        assert theirs.sent == 2 * 4 * moved * (sizes.tokens // ranks) * (ranks - 1) // ranks
        messages = halo_messages(layout, rank) + halo_messages(layout, rank, reverse=True)
        states = sum(sent_by(rank, strategy, layout, state, decay, reverse=reverse) for reverse in (False, True))
        assert ours.sent == states + messages * 3 * 4 * (sizes.inner + 2 * shared)


BOUNDARIES = [0, 7, 8, 30, CONTEXT]
"""Of documents."""


def packed(rank, model, ids, labels):
    """Losses of packed documents, their gradients, and what packed documents over cp are said to be."""
    with megatron_on_cpu():
        from megatron.core.packed_seq_params import PackedSeqParams

        from baton.models.megatron import hybrid_stack_spec
        from baton.models.megatron.sequence import read_documents

        module = peer.build(model, hybrid_stack_spec)
        peer.fill(module, model, peer.scrambled(model))
        boundaries = torch.tensor(BOUNDARIES, dtype=torch.int32)
        documents = PackedSeqParams("thd", boundaries, boundaries, max_seqlen_q=CONTEXT, max_seqlen_kv=CONTEXT)
        losses = module(ids, torch.arange(CONTEXT)[None], None, labels=labels, packed_seq_params=documents)
        losses.mean().backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        with pytest.raises(ValueError, match=r"packed .* over context parallel 2: .* allowed: context_parallel_size 1"):
            read_documents(documents, CONTEXT, Layout("zigzag", 2), ids.device)
        padded = PackedSeqParams("thd", boundaries[:3], boundaries[:3], cu_seqlens_q_padded=torch.tensor([0, 9, 11, 11]))
        rows = read_documents(padded, CONTEXT, Layout("contiguous", 1), ids.device).cu_seqlens
        return losses.detach(), [*peer.pieces(module, gradients)], rows


def test_packed_documents(pool):
    """Do not see each other; positions begin anew. What follows the last boundary is padding, a document of its own."""
    model = tiny_config(DENSE).model
    ids, labels = tokens(1)
    ours = peer.scrambled(model)
    documents = Layout("contiguous", 1).documents([BOUNDARIES], 0)
    loss = ours(*MicroStep(ids, labels, None, documents)).cross_entropy
    (loss / CONTEXT).backward()
    expected = peer.in_checkpoint(model, {name: p.grad for name, p in ours.named_parameters()})
    ((losses, gradients, rows),) = pool.run(1, packed, model, ids, labels)
    assert rows == ((0, 9, 11, CONTEXT),)
    assert relative_error(losses.sum(), loss.detach()) <= 1e-5
    whole = peer.joined([gradients], expected)
    assert all(relative_error(whole[name], expected[name]) <= 1e-5 for name in expected)


def started(rank, overrides, parallel):
    """Parameters as they begin."""
    with megatron_on_cpu():
        from baton.models.megatron import hybrid_stack_spec

        module = peer.build(tiny_config(overrides).model, hybrid_stack_spec, **parallel)
        return {name: p.detach() for name, p in module.named_parameters()}


def test_how_it_begins(pool):
    """As Mamba-2 does; what tp ranks share is the same on them."""
    one, other = pool.run(2, started, [*DENSE, *ONE_GROUP], TP)
    mixer = "decoder.layers.0.mixer."
    for rank in (one, other):
        rates, steps = rank[mixer + "A_log"].exp(), torch.nn.functional.softplus(rank[mixer + "dt_bias"])
        assert 1 <= rates.min() < rates.max() <= 16
        assert 0.999e-3 <= steps.min() < steps.max() <= 0.1001
        assert (rank[mixer + "D"] == 1).all()
    for name in ("bc_weight", "bc_conv1d.weight", "bc_conv1d.bias"):
        assert torch.equal(one[mixer + name], other[mixer + name])
        assert one[mixer + name].std() > 0
    assert not torch.equal(one[mixer + "A_log"], other[mixer + "A_log"])


def in_bf16(rank):
    """The loss in bf16 and in fp32; and a step of Megatron's optimizer, whose state it can name for a checkpoint."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    with megatron_on_cpu():
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.transformer.module import Float16Module

        from baton.models.megatron import hybrid_stack_spec

        model, (ids, labels) = tiny_config(DENSE).model, tokens()
        losses = []
        for options in ({}, {"bf16": True, "params_dtype": torch.bfloat16}):
            module = peer.build(model, hybrid_stack_spec, **options)
            peer.fill(module, model, peer.scrambled(model))
            if options:
                module = Float16Module(module.config, module)
            losses.append(module(ids, torch.arange(CONTEXT)[None], None, labels=labels).detach().double().mean())
        wrapped = DistributedDataParallel(module.config, DistributedDataParallelConfig(), module)
        for parameter in wrapped.parameters():
            parameter.main_grad.fill_(0.1)
        config = OptimizerConfig(optimizer="adam", lr=0.1, bf16=True, params_dtype=torch.bfloat16)
        optimizer = get_megatron_optimizer(config, [wrapped])
        optimizer.step()
        named = optimizer.sharded_state_dict(wrapped.sharded_state_dict())
        vars(wrapped).clear()
        return losses, sum(isinstance(key, int) for key in named["optimizer"]["state"])


def test_bf16(pool):
    """The loss is near that in fp32; what Megatron's optimizer keeps has the shape of the parameter that it is named after."""
    (((exact, rounded), states),) = pool.run(1, in_bf16)
    assert 0 < abs(rounded - exact) <= 2e-2 * exact
    assert states == len(pool.run(1, started, DENSE, {})[0])


def test_transformer_engines_extra_state():
    """Is in no checkpoint of other norms: neither written nor missed. With something in the norm's place."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from baton.models.megatron.norm import without_extra_state

    class Stand(torch.nn.RMSNorm):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            raise AssertionError(state)

    inside = torch.nn.Sequential(without_extra_state(Stand(4)))
    assert inside.state_dict().keys() == {"0.weight"}
    inside.load_state_dict({"0.weight": torch.full((4,), 2.0)})
    assert inside[0].weight.tolist() == [2.0] * 4


PURE = ["model.pattern=M", MAMBA2, "model.attention.rope=null"]
SEVEN = TP | {"mamba_num_heads": 7, "mamba_num_groups": 1}


def refused(rank, overrides, changed, length):
    """What building, or calling, says."""
    with megatron_on_cpu():
        from baton.models.megatron import hybrid_stack_spec

        try:
            module = peer.build(tiny_config(overrides).model, hybrid_stack_spec, **changed)
            if length < 0:
                module.decoder.layers[0].mixer(torch.zeros(-length, 1, 32), inference_context=object())
            ids = torch.zeros(1, abs(length), dtype=torch.int64)
            module(ids, ids, None, labels=ids)
        except ValueError as error:
            return str(error)


@pytest.mark.parametrize(
    ("overrides", "changed", "length", "message"),
    [
        (DENSE, {"normalization": "LayerNorm"}, 1, "normalization is 'LayerNorm', allowed with this spec: 'RMSNorm'"),
        (DENSE, {"attention_dropout": 0.1}, 1, "attention_dropout is 0.1, allowed with this spec: 0"),
        (DENSE, {"softmax_type": "learnable"}, 1, "softmax_type is learnable, allowed with this spec: vanilla"),
        (
            DENSE,
            CP | {"cp_comm_type": "x"},
            1,
            "cp_comm_type is 'x', allowed: p2p, a2a, all_gather, a2a+p2p",
        ),
        (DENSE, SEVEN, 1, "tensor_model_parallel_size is 2, allowed: a divisor of the 7 Mamba heads"),
        (DENSE, {"mamba_num_groups": 3}, 1, "mamba_num_groups is 3, allowed: a divisor of the 8 heads"),
        (PURE, CP, 7, "14 tokens do not cut into 4 equal segments (zigzag, cp 2)"),
        (
            PURE,
            {},
            -4,
            "inference is not in this spec; `baton convert from-megatron`, then",
        ),
    ],
)
def test_what_is_refused_is_named(pool, overrides, changed, length, message):
    found = pool.run(2, refused, overrides, changed, length)
    assert all(said.startswith(message) for said in found), found


def with_norm(rank, kind):
    """A model whose norms are of another project, by something that keeps to its interface; or what is said without it."""
    from types import ModuleType, SimpleNamespace

    with megatron_on_cpu(), pytest.MonkeyPatch.context() as patch:
        from baton.models.megatron import build_hybrid_stack_spec

        try:
            build_hybrid_stack_spec(norm=kind)
        except UserError as error:
            said = str(error)
        parts = {
            "apex.multi_tensor_apply": {"multi_tensor_applier": SimpleNamespace(available=True)},
            "apex.normalization": {"FusedRMSNorm": torch.nn.RMSNorm},
        }
        for name, contents in {"apex": {}, **parts}.items():
            module = ModuleType(name)
            vars(module).update({"__path__": []} | contents)
            patch.setitem(sys.modules, name, module)
        model = tiny_config(DENSE).model
        module = peer.build(model, build_hybrid_stack_spec(norm=kind))
        peer.fill(module, model, peer.scrambled(model))
        return said, peer.step(module, *tokens()), type(module.decoder.final_norm).__name__


def test_norms_by_apex(pool):
    """Not run with apex itself, which needs a GPU."""
    model = tiny_config(DENSE).model
    loss, gradients = peer.expected(model, *tokens())
    ((said, found, kind),) = pool.run(1, with_norm, "apex")
    assert said.startswith("norm is apex, and NVIDIA's apex with its CUDA extensions is not installed (git clone ")
    assert kind == "RMSNorm"
    assert relative_error(found.loss, loss) <= 1e-5
    whole = peer.joined([found.gradients], gradients)
    assert all(relative_error(whole[name], gradients[name]) <= 1e-5 for name in gradients)


@pytest.mark.parametrize("version", ["0.15.2", "0.17.0", None])
def test_another_megatron_is_refused(monkeypatch, version):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("baton.models.megatron_version.version", found)
    with pytest.raises(ImportError) as caught:
        check_version()
    what = "needs megatron-core 0.16, which is not installed" if version is None else "is written for megatron-core 0.16, found "
    assert str(caught.value) == f"baton.models.megatron {what}{version or ''}: pip install 'megatron-core>=0.16,<0.17'"
