"""How a rank's stages are built, gathered and run; that they compute what one rank does is `baton verify`'s."""

import gc
import itertools

import pytest
import torch

from helpers import compare, tiny_config


def build(config):
    from baton.models.stages import build_stages
    from baton.parallel.mesh import build_mesh

    mesh = build_mesh(config.parallel, "cpu")
    return build_stages(config, mesh, torch.device("cpu")), mesh


def micro_steps_of(config, stages, mesh):
    from baton.launcher.verification.batch import Share, draw_batch

    return draw_batch(config, 1).micro_steps(Share.of(mesh, config.parallel)[mesh.rank("dp_cp")], stages.device)


def numbers_held_while_building(rank, config):
    """At the start of each part: how many numbers the parts before it hold here, and how many they have."""
    from baton.models import parallelize
    from baton.models.hybrid import initialize_part
    from baton.parallel.gradients import local_part

    held, before = [], []

    def look(part, name, *args):
        parameters = [p for earlier in before for p in earlier.parameters()]
        held.append((name, sum(local_part(p).numel() for p in parameters), sum(p.numel() for p in parameters)))
        before.append(part)
        initialize_part(part, name, *args)

    parallelize.initialize_part = look
    try:
        build(config)
    finally:
        parallelize.initialize_part = initialize_part
    return held


def test_each_part_is_sharded_before_the_next_takes_memory(pool):
    """A tied embedding waits for the head, with which it is one unit."""
    for overrides, kept in (([], 0), (["model.tied_embeddings=true"], 64 * 32)):
        for held in pool.run(2, numbers_held_while_building, tiny_config(["parallel.dp=2", "parallel.cp=1", *overrides], 2)):
            assert [name for name, _, _ in held] == ["embedding", *(f"layers.{i}" for i in range(4)), "head"]
            for name, here, whole in held[1:]:
                # Vectors with an odd number of numbers are padded by FSDP, not here: one rank has one more.
                assert abs(here - kept - (whole - kept) / 2) <= 8, name


def order_of_gathers(rank, config):
    """Of one forward: by "gather" and "run", parts in the order in which they gather their parameters and compute."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    stages, _ = build(config)
    model = stages.models[0]
    part_of = {id(p): name for name, part in model.parts().items() for p in part.parameters()}
    events = []
    unshard = FSDPParamGroup.unshard

    def noted(group, *args):
        name = part_of[id(group.fsdp_params[0].sharded_param)]
        if ("gather", name) not in events:
            events.append(("gather", name))
        return unshard(group, *args)

    handles = [
        part.register_forward_pre_hook(lambda module, args, name=name: events.append(("run", name)))
        for name, part in model.parts().items()
    ]
    FSDPParamGroup.unshard = noted
    try:
        ids = torch.zeros(1, 48, dtype=torch.int64)
        model(ids, ids, torch.arange(48))
    finally:
        FSDPParamGroup.unshard = unshard
    for handle in handles:
        handle.remove()
    return events


@pytest.mark.parametrize("zero", [2, 3])
def test_the_next_part_is_gathered_before_one_computes(pool, zero):
    config = tiny_config(["parallel.dp=2", "parallel.cp=1", "parallel.ep=2", f"parallel.zero={zero}"], 2)
    parts = ["embedding", *(f"layers.{i}" for i in range(4)), "head"]
    for events in pool.run(2, order_of_gathers, config):
        for part, following in itertools.pairwise(parts):
            assert events.index(("gather", following)) < events.index(("run", part)), (part, events)


def gathered_after_forward(rank, config):
    """Whether the layers' parameters are whole after a forward with gradient."""
    stages, _ = build(config)
    model = stages.models[0]
    ids = torch.zeros(1, 48, dtype=torch.int64)
    model(ids, ids, torch.arange(48))
    return {type(layer.mixer_norm.weight).__name__ for layer in model.layers.values()}


def test_zero_2_keeps_what_3_frees(pool):
    for zero, kind in ((2, "Parameter"), (3, "DTensor")):
        config = tiny_config(["parallel.dp=2", "parallel.cp=1", f"parallel.zero={zero}"], 2)
        assert pool.run(2, gathered_after_forward, config)[0] == {kind}


def sharded_gradients(rank, config):
    """Whether the last layer has its gradients in shards, at the start of each micro-step."""
    stages, mesh = build(config)
    first, *_, last = stages.models[0].layers.values()
    found = []
    first.register_forward_pre_hook(lambda *_: found.append({p.grad is not None for p in last.parameters()}))
    stages.forward_backward(micro_steps_of(config, stages, mesh), torch.tensor(96))
    return found


@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_are_sharded_between_micro_steps(pool, zero):
    options = [f"parallel={{dp: 2, cp: 1, zero: {zero}}}", "batch={sequences: 6, micro_steps: 3}"]
    for found in pool.run(2, sharded_gradients, tiny_config(options, 2)):
        assert found == [{False}, {True}, {True}]


def refused(rank, config):
    with pytest.raises(ValueError, match="4 experts do not divide over 3 ranks"):
        build(config)


def test_experts_that_do_not_divide_are_refused(pool):
    """By the config first; here without its check."""
    config = tiny_config(["parallel.dp=3", "parallel.cp=1", "batch.sequences=3"], 3)
    parallel = config.parallel.model_copy(update={"ep": 3})
    pool.run(3, refused, config.model_copy(update={"parallel": parallel}))


@pytest.mark.slow
def test_a_stage_without_mamba_takes_part_in_the_others_groups(pool):
    """2 ranks share a group of the gated norms, in the first stage alone; the group of the tied ends is made after that."""
    options = ["model.pattern=M-M|*-", "model.repeat=1", "model.tied_embeddings=true", "batch={sequences: 2, micro_steps: 2}"]
    config = tiny_config(["precision=fp64", "parallel={tp: 4, cp: 1, pp: 2}", *options], 8)
    assert pool.run(8, compare, config)[0].ok


def hooks_after_steps(rank, config):
    """The most hooks that a tensor here has, after 2 steps and after 4."""
    stages, mesh = build(config)
    found = []
    for _ in range(2):
        for _ in range(2):
            stages.forward_backward(micro_steps_of(config, stages, mesh), torch.tensor(96))
            for parameter in stages.parameters():
                parameter.grad = None
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.is_leaf]
        found.append(max(len(each._backward_hooks or ()) for each in tensors))
    return found


def test_steps_leave_no_hooks(pool):
    """The stage in the middle has no experts, whose losses would be added to what comes in."""
    options = ["model.pattern=M-|M-|*-", "model.repeat=1", "batch={sequences: 3, micro_steps: 3}"]
    config = tiny_config(["parallel={pp: 3, cp: 1}", *options], 3)
    for earlier, later in pool.run(3, hooks_after_steps, config):
        assert earlier == later


def error_of_a_stage(rank, config, kind, *args):
    """What comes of an error in a stage's layer: in the second's first micro-step, the first's second, so that neither waits."""
    stages, mesh = build(config)
    calls = []

    def fail(*_):
        calls.append(rank)
        if len(calls) == 2 - rank:
            raise kind(*args)

    next(iter(stages.models[0].layers.values())).register_forward_pre_hook(fail)
    try:
        stages.forward_backward(micro_steps_of(config, stages, mesh), torch.tensor(96))
    except Exception as raised:
        return type(raised).__name__, str(raised)


def test_a_stages_error_is_raised_as_it_is(pool):
    """And not as the schedule's own, which would hide that a rank is gone."""
    from baton.parallel.failures import RankGone

    config = tiny_config(["parallel={pp: 2, cp: 1}", "batch={sequences: 2, micro_steps: 2}"], 2)
    for kind, *args in ((RankGone, [1], "said"), (ValueError, "said")):
        assert pool.run(2, error_of_a_stage, config, kind, *args) == [(kind.__name__, "said")] * 2
