"""What memory is said to hold, against what autograd saves and FSDP shards."""

import gc
import weakref

import pytest
import torch
from models.test_stages import build, micro_steps_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baton.configs.loading import load_config
from baton.launcher.planner.estimate import Estimator
from baton.launcher.planner.machine import MEMORY, Measured, build_machine
from baton.models import hybrid, recompute
from baton.models.flops import FLOPS, HEAD, Work
from baton.models.memory import EMBEDDING, KEEPS, kept, parameter_shapes, part_keeps, units
from baton.models.parallelize import COMPUTE_DTYPES
from baton.models.traffic import SENDS
from baton.models.workload import Workload
from baton.parallel.gradients import local_part
from helpers import tiny_config

WIDE = [
    "model.d_model=64",
    "model.vocab_size=56",
    "model.mamba2={head_dim: 32, state_dim: 16, groups: 4, chunk_size: 16}",
    "model.mamba={state_dim: 8, dt_rank: 12}",
    "model.attention={heads: 4, kv_heads: 2, head_dim: 24}",
    "model.mlp.hidden=80",
    "model.moe={experts: 4, top_k: 3, hidden: 24, shared_hidden: 40}",
    "data.context=256",
]
"""Sizes that the kernels take, all different; enough tokens for what is a number a token not to count."""


def cpus(world):
    """Of this machine as plans see it, where PyTorch's operations run; its rates are of no matter."""
    rates = {str(work): 1e10 for work in Work} | {MEMORY: 1e10}
    measured = Measured(device="cpu", precision="fp32", rates=rates, memory=16)
    return build_machine("cpu", world, "fp32", None, "ib_ndr", [measured])


def workload(config, strategies=("sliced", "ring")):
    exchange, attention = strategies
    parallel = config.parallel.model_copy(update={"strategy": exchange, "attention": attention})
    b = config.batch.sequences // config.batch.micro_steps // parallel.dp
    fused = config.kernels == "triton"
    return Workload(config.model, parallel, b, config.data.context, COMPUTE_DTYPES[config.precision].itemsize, fused)


def in_balance(moe):
    """Every expert gets as many rows."""

    def choose(probabilities):
        b, l, count = probabilities.shape
        k = moe.sizes.top_k
        choice = torch.arange(b * l * k).view(b, l, k) % count
        # As the real choice does: nothing else is kept.
        return probabilities.topk(k, -1).indices * 0 + choice

    moe.choose = choose


def saved(rank, config):
    """Bytes of the storages that each part of this rank's model keeps for backward, and of its parameters, by part."""
    stages, mesh = build(config)
    micro_step, found = micro_steps_of(config, stages, mesh)[0], {}
    given = {tensor.untyped_storage().data_ptr() for tensor in micro_step[:3]}

    def counting(name, module, forward):
        storages = {}

        def note(tensor):
            own = {local_part(p).untyped_storage().data_ptr() for p in module.parameters()}
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and storage.data_ptr() not in given:
                storages[storage.data_ptr()] = storage
            return tensor

        def run(*args):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                out = forward(*args)
            found[name] = sum(storage.nbytes() for storage in storages.values())
            return out

        def again(function, *args):
            for each in args:
                if isinstance(each, torch.Tensor) and each.requires_grad:
                    note(each)
            return recompute.run_again(function, *args)

        return run, again

    for _, moe in stages.named_moes():
        in_balance(moe)
    (model,) = stages.models
    for name, part in model.parts().items():
        part.forward, again = counting(name, part, part.forward)
        if name.startswith("layers"):
            part._again = again
    hybrid.run_again, before = lambda function, *args: function.__self__._again(function, *args), hybrid.run_again
    try:
        model(*micro_step)
    finally:
        hybrid.run_again = before
    return found


CASES = {
    "one device": (1, "{}", []),
    "one device bf16": (1, "{}", ["precision=bf16"]),
    "kernels bf16": (1, "{}", ["kernels=triton", "precision=bf16", "data.context=128"]),
    "mamba": (1, "{}", ["model.pattern=m-mE"]),
    "mamba without norms tp": (2, "{cp: 1, tp: 2}", ["model.pattern=m-", "model.mamba.norms=false"]),
    "mamba kernels bf16": (1, "{}", ["model.pattern=m-", "kernels=triton", "precision=bf16", "data.context=128"]),
    "mamba cp zigzag": (2, "{cp: 2, layout: zigzag}", ["model.pattern=m-"]),
    "relu2": (1, "{}", ["model.pattern=M-ME", "model.mlp.activation=relu2", "model.moe.activation=relu2"]),
    "sigmoids": (1, "{}", ["model.pattern=ME", "model.moe.scores=sigmoid", "model.moe.renormalize=true"]),
    "scales": (1, "{}", ["model.pattern=ME*-", "model.residual_scale=0.5", "model.logits_divisor=2.0"]),
    "tp": (2, "{cp: 1, tp: 2}", []),
    "sequence_parallel bf16": (2, "{cp: 1, tp: 2, sequence_parallel: true}", ["precision=bf16"]),
    "cp ring": (2, "{cp: 2, strategy: sliced, attention: ring}", []),
    "cp ulysses": (2, "{cp: 2, strategy: ring, attention: ulysses}", []),
    "cp allgather zigzag": (2, "{cp: 2, strategy: doubling, attention: allgather, layout: zigzag}", []),
    "ep": (2, "{cp: 1, dp: 2, ep: 2}", []),
    "mixers again": (1, "{recompute: mixer}", []),
    "feed-forwards again": (2, "{cp: 1, dp: 2, ep: 2, recompute: feed_forward}", []),
    "layers again": (2, "{cp: 1, tp: 2, sequence_parallel: true, recompute: layer}", []),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if "kernels" in case else ()) for case in CASES])
def test_layers_keep_what_is_planned(pool, case):
    """Within 2% for each layer: what is smaller than a number a token is not counted."""
    world, parallel, overrides = CASES[case]
    config = tiny_config([*WIDE, f"parallel={parallel}", "batch={sequences: 2, micro_steps: 1}", *overrides], world)
    w = workload(config, (config.parallel.strategy, config.parallel.attention))
    for found in pool.run(world, saved, config):
        for number, kinds in enumerate(config.model.layers):
            planned = kept(kinds, w, config.parallel.recompute)
            assert sum(sum(terms.values()) for terms in planned.values()) == pytest.approx(found[f"layers.{number}"], rel=0.02)
        assert sum(part_keeps(HEAD, w).values()) == pytest.approx(found["head"], rel=0.02)


def test_every_kind_of_part_is_counted():
    for counted in (FLOPS, KEEPS, SENDS):
        assert hybrid.BUILDERS.keys() <= counted.keys()


def parameters_here(rank, config):
    """By part: numbers of parameters on this rank, whether sharded, and while they are gathered."""
    stages, _ = build(config)
    found = {}
    for name, part in stages.models[0].parts().items():
        own = sum(local_part(p).numel() for p in part.parameters())
        for module in part.modules():
            if hasattr(module, "unshard"):
                module.unshard()
        found[name] = own, sum(local_part(p).numel() for p in part.parameters())
    return found


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, "{cp: 1, tp: 2}"),
        (4, "{cp: 1, dp: 4, ep: 2}"),
        pytest.param(8, "{cp: 2, tp: 2, dp: 2, ep: 4}", marks=pytest.mark.slow),
        pytest.param(8, "{cp: 1, dp: 8, ep: 2, replicate: 2}", marks=pytest.mark.slow),
    ],
)
def test_parameters_are_where_they_are_planned(pool, world, parallel):
    config = tiny_config([*WIDE, "model.mamba2.groups=1", f"parallel={parallel}", "batch={sequences: 8, micro_steps: 1}"], world)
    data = config.parallel.dp * config.parallel.cp // config.parallel.replicate
    ranks = pool.run(world, parameters_here, config)
    for name in ranks[0]:
        part = config.model.layers[int(name[7:])] if name.startswith("layers") else {"embedding": EMBEDDING, "head": HEAD}[name]
        planned = units(parameter_shapes(config.model, part), config.parallel, data)
        assert sum(unit.held for unit in planned) == ranks[0][name][0]
        gathered = sum(unit.gathered for unit in planned)
        assert {gathered} == {found[name][1] for found in ranks}


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations have seen and that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.most = max(self.most, self.now)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((out, args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.see(leaf)
        return out


def most_alive(rank, config):
    """Bytes of tensors at the fullest moment of a second step, with the optimizer's."""
    from baton.launcher.training.optimizer import build_optimizer

    stages, mesh = build(config)
    optimizer, micro_steps = build_optimizer(stages.named_parameters(), config.optimizer), micro_steps_of(config, stages, mesh)
    for _ in range(2):
        gc.collect()
        with Alive() as alive:
            kept = [value for state in optimizer.state.values() for value in state.values()]
            for tensor in (*stages.parameters(), *kept):
                alive.see(local_part(tensor))
            stages.forward_backward(micro_steps, torch.tensor(96))
            optimizer.step()
            optimizer.zero_grad()
    return alive.most


@pytest.mark.parametrize(
    ("world", "parallel", "batch"),
    [
        (2, "{cp: 2, strategy: ring, attention: ring}", "{sequences: 1, micro_steps: 1}"),
        (2, "{cp: 1, tp: 2, sequence_parallel: true}", "{sequences: 1, micro_steps: 1}"),
        (2, "{cp: 1, dp: 2, zero: 2}", "{sequences: 2, micro_steps: 1}"),
        (2, "{cp: 1, dp: 2, ep: 2, recompute: layer}", "{sequences: 2, micro_steps: 1}"),
        (2, "{cp: 1, pp: 2}", "{sequences: 4, micro_steps: 4}"),
        (2, "{cp: 1, pp: 2, recompute: layer}", "{sequences: 4, micro_steps: 4}"),
    ],
)
def test_no_rank_holds_more_than_is_planned(pool, world, parallel, batch):
    """And not much less: at least 70% of it, on the rank that holds most."""
    config = load_config("quickstart", [f"parallel={parallel}", "data.context=1024", f"batch={batch}"], world)
    planned = [sum(terms.values()) for terms in Estimator(config, cpus(world)).memory(config)]
    found = pool.run(world, most_alive, config)
    for rank, most in enumerate(found):
        assert most <= planned[rank % len(planned)]
    assert max(found) >= 0.7 * max(planned)
