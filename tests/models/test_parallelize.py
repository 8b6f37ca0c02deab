"""A model on a mesh is the model on one device: loss, logits and every gradient."""

import pytest
import torch

from baton.launcher.verification.batch import Share, draw_batch
from baton.launcher.verification.verdict import QUANTITIES
from baton.models.mixers.attention import Attention
from baton.models.mixers.mamba2 import StateSpace
from baton.models.mlp import MLP
from baton.models.parallelize import shard_sequence, shard_tensors
from baton.models.stages import build_stages
from baton.parallel.mesh import AXES, build_mesh
from helpers import compare, tiny_config

MESHES = {
    "cp2": (2, ["parallel.cp=2"]),
    "cp4": (4, ["parallel.cp=4"]),
    "tp2": (2, ["parallel.tp=2"]),
    "tp4": (4, ["parallel.tp=4"]),
    "dp2": (2, ["parallel.cp=1", "parallel.dp=2"]),
    "tp2-cp2": (4, ["parallel.tp=2", "parallel.cp=2"]),
    "dp2-cp2": (4, ["parallel.dp=2", "parallel.cp=2"]),
}
CASES = [(mesh, layout, 2) for mesh in ("cp2", "cp4", "tp2-cp2", "dp2-cp2") for layout in ("contiguous", "zigzag")]
CASES += [("tp2", "zigzag", 2), ("tp4", "zigzag", 2), ("dp2", "zigzag", 2)]
# With one group, tp ranks share B and C and the norm's statistics.
CASES += [("cp4", "zigzag", 1), ("tp2", "zigzag", 1), ("tp2-cp2", "zigzag", 1), ("tp4", "zigzag", 1)]


@pytest.mark.parametrize(
    ("mesh", "layout", "groups", "documents"),
    [(*case, "single") for case in CASES] + [(mesh, "zigzag", 1, "packed") for mesh in MESHES],
)
def test_fp64_is_exact(pool, mesh, layout, groups, documents):
    world, degrees = MESHES[mesh]
    overrides = ["precision=fp64", f"model.mamba2.groups={groups}", f"parallel.layout={layout}", f"data.documents={documents}"]
    verdict = pool.run(world, compare, tiny_config([*overrides, *degrees], world))[0]
    for quantity in QUANTITIES:
        name, error = verdict.worst(quantity)
        assert error <= 1e-10, f"{quantity} of {name}: {error}; {verdict.first_difference}"


@pytest.mark.parametrize(("mesh", "layout", "groups"), CASES)
def test_fp32_is_as_good_as_one_device(pool, mesh, layout, groups):
    """The error against fp64 is at most twice that of one device in fp32, or 1e-5, for each tensor alone."""
    world, degrees = MESHES[mesh]
    overrides = [f"model.mamba2.groups={groups}", f"parallel.layout={layout}"]
    verdict = pool.run(world, compare, tiny_config([*overrides, *degrees], world))[0]
    for quantity in QUANTITIES:
        for name, error in verdict.errors[quantity].items():
            alone = verdict.one_rank[quantity][name]
            assert error <= max(2 * alone, 1e-5), f"{quantity} of {name}: {error}, one device {alone}"


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
    losses = stages.forward_backward(batch.micro_steps(share, device), torch.tensor(batch.labelled))
    seen["gradients"] = {p.grad.dtype for p in stages.parameters()}
    return seen


def test_bf16_keeps_what_must_be_fp32(pool):
    seen = pool.run(2, dtypes_inside_forward, tiny_config(["precision=bf16", "parallel.cp=2"], 2))[0]
    for name in ("A_log", "D", "dt_bias"):
        assert seen[f"layers.0.mixer.ssm.{name}"] == torch.float32
    assert seen["layers.1.feed_forward.router.weight"] == torch.float32
    assert seen["layers.0.mixer.x_proj.weight"] == torch.bfloat16
    assert seen["layers.0.mixer.ssm"] == torch.bfloat16
    assert seen["layers.1.feed_forward.experts"] == torch.bfloat16
    assert seen["loss"] == torch.float32


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
        shard_tensors(StateSpace(3, 8), mesh, sequence_parallel=False)


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
