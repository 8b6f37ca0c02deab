"""A model on a mesh is the model on one device: loss, logits and every gradient."""

import itertools

import pytest
import torch
import torch.distributed as dist

from baton.launcher.verification.batch import Share, draw_batch
from baton.launcher.verification.steps import Alone, forward_backward
from baton.launcher.verification.verdict import QUANTITIES
from baton.models.hybrid import build_model
from baton.models.mixers.attention import Attention
from baton.models.mixers.mamba2 import StateSpace
from baton.models.mlp import MLP
from baton.models.moe import MoE
from baton.models.parallelize import shard_sequence, shard_tensors
from baton.models.stages import build_stages
from baton.parallel.mesh import AXES, build_mesh
from helpers import compare, relative_error, tiny_config

MESHES = {
    "cp2": (2, ["parallel.cp=2"]),
    "cp4": (4, ["parallel.cp=4"]),
    "tp2": (2, ["parallel.tp=2"]),
    "tp4": (4, ["parallel.tp=4"]),
    "dp2": (2, ["parallel.cp=1", "parallel.dp=2"]),
    "tp2-cp2": (4, ["parallel.tp=2", "parallel.cp=2"]),
    "dp2-cp2": (4, ["parallel.dp=2", "parallel.cp=2"]),
}
"""A few axes alone."""

# With one group, tp ranks share B and C and the norm's statistics.
CASES = [
    ("cp2", "contiguous", 2),
    ("cp4", "zigzag", 1),
    ("tp2-cp2", "contiguous", 2),
    ("tp4", "zigzag", 2),
    ("dp2-cp2", "zigzag", 2),
]
PACKED = [("cp4", "contiguous", 1), ("tp2", "zigzag", 1), ("tp4", "zigzag", 1), ("tp2-cp2", "zigzag", 1), ("dp2", "zigzag", 1)]

TOGETHER = {
    "tp2 cp2 pp2 ep2": "{tp: 2, cp: 2, pp: 2, ep: 2, sequence_parallel: true, layout: zigzag, recompute: layer} packed",
    "cp2 dp2 pp2 ep2 interleaved HSDP": """{cp: 2, dp: 2, pp: 2, ep: 2, schedule: interleaved_1f1b, stages_per_rank: 2,
        replicate: 2, layout: zigzag, recompute: mixer} single""",
    "tp2 dp2 pp2 interleaved HSDP": """{tp: 2, cp: 1, dp: 2, pp: 2, schedule: interleaved_1f1b, stages_per_rank: 2,
        sequence_parallel: true, replicate: 2, zero: 2, recompute: feed_forward} packed""",
    "tp2 cp2 dp2 ep4": "{tp: 2, cp: 2, dp: 2, ep: 4, zero: 2, layout: zigzag} single",
    "tp2 dp4 ep2 HSDP": "{tp: 2, cp: 1, dp: 4, ep: 2, replicate: 2} single",
    "cp2 pp4": "{cp: 2, pp: 4, layout: contiguous} packed",
    "tp4 cp2 ep2": "{tp: 4, cp: 2, ep: 2, sequence_parallel: true, layout: contiguous} single",
}
"""Meshes of 8 ranks and the documents on them, so few that every two of FEATURES come together in one."""

FEATURES = {
    "tp": lambda config: config.parallel.tp > 1,
    "cp": lambda config: config.parallel.cp > 1,
    "pp": lambda config: config.parallel.pp > 1,
    "ep": lambda config: config.parallel.ep > 1,
    "dp": lambda config: config.parallel.dp > 1,
    "interleaved": lambda config: config.parallel.stages_per_rank > 1,
    "sequence_parallel": lambda config: config.parallel.sequence_parallel,
    "replicate": lambda config: config.parallel.replicate > 1,
    "zero 2": lambda config: config.parallel.zero == 2,
    "recompute": lambda config: config.parallel.recompute != "none",
    "zigzag": lambda config: config.parallel.cp > 1 and config.parallel.layout == "zigzag",
    "packed": lambda config: config.data.documents == "packed",
}


def together(name, *overrides):
    """The config of one of TOGETHER, with a micro-step for each rank of its pipeline, two at least."""
    parallel, _, documents = TOGETHER[name].rpartition(" ")
    m = 4 if "pp: 4" in parallel else 2
    batch = f"batch={{sequences: {4 * m}, micro_steps: {m}}}"
    return tiny_config([f"parallel={parallel}", f"data.documents={documents}", batch, *overrides], 8)


def check_exact(verdict):
    """Every error in fp64: of the loss on every rank, logits, every gradient, every parameter after a step."""
    for quantity in QUANTITIES:
        name, error = verdict.worst(quantity)
        assert error <= 1e-10, f"{quantity} of {name}: {error}; {verdict.first_difference}"


def check_as_good_as_one_device(verdict):
    """The error against fp64 is at most twice that of one device in the same dtype, or 1e-5, for each tensor alone."""
    for quantity in QUANTITIES:
        for name, error in verdict.errors[quantity].items():
            alone = verdict.one_rank[quantity][name]
            assert error <= max(2 * alone, 1e-5), f"{quantity} of {name}: {error}, one device {alone}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "layout", "groups", "documents"),
    [*((*case, "single") for case in CASES), *((*case, "packed") for case in PACKED)],
)
def test_fp64_is_exact(pool, mesh, layout, groups, documents):
    world, degrees = MESHES[mesh]
    overrides = ["precision=fp64", f"model.mamba2.groups={groups}", f"parallel.layout={layout}", f"data.documents={documents}"]
    check_exact(pool.run(world, compare, tiny_config([*overrides, *degrees], world))[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", TOGETHER)
def test_axes_together_are_exact(pool, case):
    """Gradients summed over ranks and micro-steps, the auxiliary loss of each micro-step, documents through a schedule."""
    check_exact(pool.run(8, compare, together(case, "precision=fp64"))[0])


def test_every_two_come_together():
    configs = [together(case) for case in TOGETHER]
    found = [{name for name, has in FEATURES.items() if has(config)} for config in configs]
    missing = [pair for pair in itertools.combinations(FEATURES, 2) if not any({*pair} <= features for features in found)]
    assert missing == []


@pytest.mark.parametrize(
    ("mesh", "layout", "groups"), [("cp4", "zigzag", 2), ("tp2-cp2", "zigzag", 1), ("dp2-cp2", "contiguous", 2)]
)
def test_fp32_is_as_good_as_one_device(pool, mesh, layout, groups):
    world, degrees = MESHES[mesh]
    overrides = [f"model.mamba2.groups={groups}", f"parallel.layout={layout}"]
    check_as_good_as_one_device(pool.run(world, compare, tiny_config([*overrides, *degrees], world))[0])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "precision"), [("tp2 cp2 pp2 ep2", "fp32"), ("cp2 dp2 pp2 ep2 interleaved HSDP", "bf16")])
def test_axes_together_below_fp64(pool, case, precision):
    """By kind of module, as `baton verify` has it: in bf16 the error of a small tensor alone is much a matter of chance."""
    verdict = pool.run(8, compare, together(case, f"precision={precision}"))[0]
    assert verdict.ok, (verdict.over, verdict.first_difference)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (4, "{tp: 2, cp: 1, dp: 2}"),
        (8, "{tp: 2, cp: 1, dp: 2, pp: 2, schedule: interleaved_1f1b, stages_per_rank: 2, sequence_parallel: true}"),
    ],
    ids=["tp2 dp2", "tp2 dp2 pp2"],
)
def test_tied_embeddings(pool, world, parallel):
    """One matrix with the gradient of both its uses, also where a pipeline's ends each have a copy."""
    batch = "batch={sequences: 8, micro_steps: 2}"
    verdict = pool.run(
        world, compare, tiny_config(["precision=fp64", f"parallel={parallel}", "model.tied_embeddings=true", batch], world)
    )[0]
    assert "head.projection.weight" not in verdict.errors["gradients"]
    check_exact(verdict)


def compare_biased(rank, config):
    """`compare` of experts whose biases are not zero at first."""
    from baton.models import hybrid

    def biased(part, *args):
        initialize(part, *args)
        for moe in (module for module in part.modules() if isinstance(module, MoE)):
            moe.bias.copy_(torch.linspace(-0.3, 0.3, len(moe.bias)))

    initialize = hybrid.initialize
    hybrid.initialize = biased
    try:
        return compare(rank, config)
    finally:
        hybrid.initialize = initialize


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tp2 cp2 pp2 ep2", "cp2 dp2 pp2 ep2 interleaved HSDP"])
def test_every_option_of_the_experts(pool, case):
    """The load-balancing loss pooled over a pipeline's stages, the same tokens dropped, the biases the same after a step."""
    options = {"balance": "pooled", "z_loss": 0.05, "shared_hidden": 8, "capacity": 0.8, "bias_rate": 0.1}
    overrides = [f"model.moe.{key}={value}" for key, value in options.items()]
    verdict = pool.run(8, compare_biased, together(case, "precision=fp64", *overrides))[0]
    assert "layers.3.feed_forward.bias" in verdict.errors["parameters"]
    check_exact(verdict)


HYBRIDS = {
    "Jamba": [
        "model.pattern=mEM-*-m-",
        "model.mamba={state_dim: 4, dt_rank: 3}",
        "model.moe.balance=pooled",
    ],
    "Granite": [
        "model.pattern=mE*EmE*E",
        "model.moe={experts: 4, top_k: 2, hidden: 16, shared_hidden: 8, aux_loss: 0.1, balance: pooled, renormalize: true}",
        "model.attention={heads: 4, kv_heads: 2, head_dim: 8, scale: 0.2, rope: {fraction: 0.5}}",
        "model.tied_embeddings=true",
        "model.embedding_scale=3.0",
        "model.residual_scale=0.4",
        "model.logits_divisor=2.5",
        "model.padding_token=3",
    ],
    "NemotronH": [
        "model.pattern=mEM-*M-",
        "model.mamba={state_dim: 4, norms: false}",
        "model.mamba2={heads: 12, head_dim: 8, state_dim: 8, groups: 1, chunk_size: 7, dt_min: 0.3, dt_max: 0.9}",
        """model.moe={experts: 8, groups: 4, top_groups: 2, top_k: 3, hidden: 16, shared_hidden: 8, aux_loss: 0.1,
            activation: relu2, scores: sigmoid, renormalize: true, scale: 2.5, bias_rate: 0.1}""",
        "model.mlp={hidden: 32, activation: relu2}",
        "model.padding_token=40",
    ],
}
"""What Hugging Face's hybrids compute, and each with Mamba."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hybrid", "case"),
    [
        ("Jamba", "tp2 cp2 pp2 ep2"),
        ("Granite", "tp2 dp2 pp2 interleaved HSDP"),
        ("NemotronH", "tp4 cp2 ep2"),
        ("Jamba", "tp2 cp2 dp2 ep4"),
    ],
)
def test_other_hybrids(pool, hybrid, case):
    """Mamba's sums over channels, routing by groups, scales, and a padding token on whichever rank it lies."""
    compared = compare_biased if hybrid == "NemotronH" else compare
    check_exact(pool.run(8, compared, together(case, "precision=fp64", "model.repeat=1", *HYBRIDS[hybrid]))[0])


@pytest.mark.parametrize(("mesh", "layout", "documents"), [("cp4", "zigzag", "packed"), ("tp4", "contiguous", "single")])
def test_mamba_below_fp64(pool, mesh, layout, documents):
    world, degrees = MESHES[mesh]
    overrides = ["model.pattern=mm-", f"parallel.layout={layout}", f"data.documents={documents}"]
    check_as_good_as_one_device(pool.run(world, compare, tiny_config([*overrides, *degrees], world))[0])


def test_the_auxiliary_loss_is_of_a_micro_step():
    """It is not linear in the batch, so that another number of micro-steps is another loss; else the tests above show nothing."""
    losses = []
    for m in (1, 2):
        config = tiny_config([f"batch={{sequences: 4, micro_steps: {m}}}"])
        micro_steps = draw_batch(config, 1).micro_steps(Share.all(), torch.device("cpu"))
        model = Alone(build_model(config.model, 0, torch.float64))
        losses.append(model.forward_backward(micro_steps, torch.tensor(1)).auxiliary / m)
    assert abs(losses[0] - losses[1]) > 1e-4 * losses[0]


def forward_alone(rank, config):
    """Errors of what a forward without gradient gives: the losses of the step before it, and of that the logits."""
    mesh, device = build_mesh(config.parallel, "cpu"), torch.device("cpu")
    stages, batch = build_stages(config, mesh, device), draw_batch(config, config.parallel.segments)
    micro_steps = batch.micro_steps(Share.of(mesh, config.parallel)[mesh.rank("dp_cp")], device)
    trained = forward_backward(stages, micro_steps, batch.labelled, mesh.group("dp_cp"))
    losses = [stages.forward(micro_step) for micro_step in micro_steps]
    logits = [stages.forward(micro_step._replace(labels=None)) for micro_step in micro_steps]
    if mesh.rank("pp") < mesh.size("pp") - 1:
        assert {*losses, *logits} == {None}
        return []
    cross_entropy, auxiliary = (sum(each) for each in zip(*losses, strict=True))
    dist.all_reduce(cross_entropy, group=mesh.group("dp_cp"))
    loss = cross_entropy / batch.labelled + auxiliary / len(micro_steps)
    pairs = ((loss, trained["loss", "loss"]), (torch.stack(logits), trained["logits", "logits"]))
    return [relative_error(found, expected) for found, expected in pairs]


def test_a_forward_without_gradient(pool):
    mesh = "{tp: 1, cp: 2, pp: 2, schedule: interleaved_1f1b, stages_per_rank: 2, layout: zigzag}"
    overrides = ["precision=fp64", f"parallel={mesh}", "batch={sequences: 4, micro_steps: 2}", "data.documents=packed"]
    found = pool.run(4, forward_alone, tiny_config(overrides, 4))
    assert [len(errors) for errors in found] == [0, 0, 2, 2]
    assert max(error for errors in found for error in errors) <= 1e-12


def forwards_of_stages(rank, config):
    """How often each of this rank's stages runs forward, in each of two steps."""
    mesh, device = build_mesh(config.parallel, "cpu"), torch.device("cpu")
    stages, batch = build_stages(config, mesh, device), draw_batch(config, config.parallel.segments)
    counts = [0] * len(stages.models)
    for number, model in enumerate(stages.models):
        model.register_forward_pre_hook(lambda module, args, number=number: counts.__setitem__(number, counts[number] + 1))
    micro_steps = batch.micro_steps(Share.of(mesh, config.parallel)[mesh.rank("dp_cp")], device)
    seen = []
    for _ in range(2):
        stages.forward_backward(micro_steps, torch.tensor(batch.labelled))
        seen.append(tuple(counts))
    return seen


def test_stages_know_their_shapes(pool):
    """A stage that finds shapes out by itself runs one more forward, collectives and all."""
    overrides = ["parallel={cp: 2, pp: 2, schedule: interleaved_1f1b, stages_per_rank: 2}", "batch={sequences: 8, micro_steps: 4}"]
    assert pool.run(4, forwards_of_stages, tiny_config(overrides, 4)) == [[(4, 4), (8, 8)]] * 4


def dtypes_inside_forward(rank, config):
    """The dtypes that modules meet under the precision policy: parameters by name, and the residual stream."""
    mesh, device = build_mesh(config.parallel, "cpu"), torch.device("cpu")
    stages = build_stages(config, mesh, device)
    seen = {}

    def look(path):
        def hook(module, args):
            seen.update({f"{path}.{name}": p.dtype for name, p in module.named_parameters(recurse=False)})
            seen[path] = next((a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()), None)

        return hook

    for path, module in (named for model in stages.models for named in model.named_modules()):
        module.register_forward_pre_hook(look(path))
    batch = draw_batch(config, config.parallel.segments)
    share = Share.of(mesh, config.parallel)[mesh.rank("dp_cp")]
    stages.forward_backward(batch.micro_steps(share, device), torch.tensor(batch.labelled))
    seen["gradients"] = {p.grad.dtype for p in stages.parameters()}
    return seen


@pytest.mark.parametrize("parallel", ["{cp: 4}", "{cp: 2, pp: 2, ep: 2}"])
def test_bf16_keeps_what_must_be_fp32(pool, parallel):
    config = tiny_config(["precision=bf16", f"parallel={parallel}", "batch={sequences: 4, micro_steps: 2}"], 4)
    found = pool.run(4, dtypes_inside_forward, config)
    seen = found[0] | found[-1]
    assert all(rank["gradients"] == {torch.float32} for rank in found)
    for layer in (0, 1, 2):
        for name in ("A_log", "D", "dt_bias"):
            assert seen[f"layers.{layer}.mixer.ssm.{name}"] == torch.float32
        assert seen[f"layers.{layer}.mixer.x_proj.weight"] == torch.bfloat16
        assert seen[f"layers.{layer}.mixer.ssm"] == torch.bfloat16
    for layer in (1, 3):
        assert seen[f"layers.{layer}.feed_forward.router.weight"] == torch.float32
        assert seen[f"layers.{layer}.feed_forward.experts"] == torch.bfloat16
        assert seen[f"layers.{layer}.feed_forward.experts.stacked.up_proj"] == torch.bfloat16
    assert seen["layers.3"] == torch.bfloat16
    assert seen["head.projection.weight"] == torch.bfloat16


def build_without_positions(rank, config):
    mesh = build_mesh(config.parallel, "cpu")
    (model,) = build_stages(config, mesh, torch.device("cpu")).models
    with pytest.raises(ValueError, match="needs positions"):
        model(torch.zeros(1, 8, dtype=torch.int64))
    for layer in model.layers.values():
        layer.mixer.sequence_sharded = False
    with pytest.raises(ValueError, match="mixer mamba2 has no sharded version"):
        shard_sequence(model, config, mesh)


def test_what_would_be_silently_wrong_is_refused(pool):
    pool.run(2, build_without_positions, tiny_config(["parallel.cp=2"], 2))


def refused_tables(rank, config):
    """A parameter that no table names, and one whose rows do not divide."""
    mesh = build_mesh(config.parallel, "cpu")
    forgotten = MLP(config.model.d_model, config.model.mlp.hidden)
    forgotten.bias = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="MLP.bias is in no sharding table"):
        shard_tensors(forgotten, mesh, sequence_parallel=False)
    with pytest.raises(ValueError, match="StateSpace.A_log: 3 pieces do not divide over tp 2"):
        shard_tensors(StateSpace(3, config.model.mamba2), mesh, sequence_parallel=False)


def test_tables_that_do_not_fit_are_refused(pool):
    pool.run(2, refused_tables, tiny_config(["parallel.tp=2"], 2))


def wired(rank, config):
    """What the config has made of the model, and how long its groups wait."""
    mesh = build_mesh(config.parallel, "cpu")
    modules = list(build_stages(config, mesh, torch.device("cpu")).models[0].modules())
    scans = {(m.scan.strategy, m.scan.transport) for m in modules if isinstance(m, StateSpace)}
    groups = [mesh.states, *(mesh.group(axis) for axis in AXES)]
    limits = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    return scans, {m.attend.strategy for m in modules if isinstance(m, Attention)}, limits


def test_the_config_decides(pool):
    keys = ["parallel.cp=2", "parallel.strategy=doubling", "parallel.transport=bf16", "parallel.attention=ring"]
    found = pool.run(2, wired, tiny_config(keys, 2), timeout=77.0)
    assert found == [({("doubling", torch.bfloat16)}, {"ring"}, {77.0})] * 2


def test_auto_goes_by_the_measured_links(pool, tmp_path):
    """A link on which a round costs nothing and a byte very much; only the first rank reads the file."""
    links = tmp_path / "links.yaml"
    links.write_text("[{backend: gloo, device: cpu, ranks: 4, nodes: 1, latency: 1.0e-12, bandwidth: 1000.0}]")
    chosen = [pool.run(4, wired, tiny_config(["parallel.cp=4", *more], 4)) for more in ([], [f"parallel.links={links}"])]
    assert [found[0][0] for found in chosen] == [{("allgather", None)}, {("sliced", None)}]
    assert [found[0][1] for found in chosen] == [{"allgather"}, {"ring"}]
    assert all(rank == found[0] for found in chosen for rank in found)
