"""The norm of all gradients and their clipping, by name: over every axis, dense and expert meshes, copies and a tied matrix."""

import pytest
import torch

from baton.kernels.cross_entropy import IGNORED
from baton.launcher.verification.batch import Share, draw_batch
from baton.models.hybrid import build_model
from baton.models.stages import build_stages
from baton.parallel.gradients import clip, local_part, total_norm
from baton.parallel.layout import Layout
from baton.parallel.mesh import build_mesh
from helpers import relative_error, tiny_config

LIMIT = 0.3
COMMON = ["precision=fp64", "batch={sequences: 8, micro_steps: 4}", "model.tied_embeddings=true"]
MESHES = {
    "pp2 tp2 cp2 ep2": (8, ["parallel={pp: 2, tp: 2, cp: 2, ep: 2}"]),
    "pp2 tp2 cp2 sequence_parallel": (8, ["parallel={pp: 2, tp: 2, cp: 2, sequence_parallel: true}"]),
    "tp2, B and C on both": (2, ["parallel.tp=2", "model.mamba2.groups=1", "model.attention.kv_heads=1"]),
    "interleaved pp2, zero 2": (2, ["parallel={pp: 2, schedule: interleaved_1f1b, stages_per_rank: 2, zero: 2}"]),
    "copies of dp2 ep2": (4, ["parallel={dp: 2, cp: 2, replicate: 2, ep: 2}"]),
    "cp4 ep2, rows that do not divide": (4, ["parallel={cp: 4, ep: 2}", "model.vocab_size=66"]),
}


def clipped_step(rank, config):
    """The norm, and every parameter after an SGD step with clipped gradients; of those that two ranks have, both."""
    mesh = build_mesh(config.parallel, "cpu")
    stages = build_stages(config, mesh, torch.device("cpu"))
    batch = draw_batch(config, config.parallel.segments)
    share = Share(Layout(config.parallel.layout, mesh.size("cp")), mesh.rank("cp"), mesh.rank("dp"), mesh.size("dp"))
    stages.forward_backward(batch.micro_steps(share, torch.device("cpu")), torch.tensor(batch.labelled))
    norm = total_norm(stages.gradients())
    clip((p.grad for p in stages.parameters()), norm, LIMIT)
    torch.optim.SGD(stages.parameters(), lr=1.0).step()
    stages_parameters = [(name, p.detach()) for name, p in stages.named_parameters()]
    return norm, [(name, p.full_tensor() if hasattr(p, "full_tensor") else p) for name, p in stages_parameters]


def clipped_step_of_one(config):
    """As its definition, with one backward for the whole batch."""
    model, batch = build_model(config.model, config.seed, torch.float64), draw_batch(config, config.parallel.segments)
    losses = [model(ids, labels) for ids, labels in zip(batch.ids, batch.labels, strict=True)]
    tokens = sum((labels != IGNORED).sum() for labels in batch.labels)
    (sum(loss.cross_entropy for loss in losses) / tokens + sum(loss.auxiliary for loss in losses) / len(losses)).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm > 2 * LIMIT, "nothing would be clipped"
    return norm, {name: p.detach() - p.grad * LIMIT / (norm + 1e-6) for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_norm_and_clipping_are_those_of_one_process(pool, name):
    world, degrees = MESHES[name]
    config = tiny_config([*COMMON, *degrees], world)
    expected_norm, expected = clipped_step_of_one(config)
    found = set()
    for norm, parameters in pool.run(world, clipped_step, config):
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-12)
        for key, value in parameters:
            assert relative_error(value, expected[key]) < 1e-12, key
            found.add(key)
    assert found == set(expected)


def norm_of_nothing(rank):
    with pytest.raises(ValueError, match="total_norm: no gradients"):
        total_norm([])
    gradients = [torch.full((3,), 2.0), torch.empty(0, 4)]
    return total_norm(gradients), local_part(gradients[0])


def test_plain_and_empty_gradients(pool):
    """A plain tensor is this rank's own."""
    for norm, own in pool.run(2, norm_of_nothing):
        assert norm.item() == pytest.approx(24**0.5)
        assert own.tolist() == [2.0] * 3


def test_what_is_within_the_limit_stays():
    gradients = [torch.full((4,), 0.5, dtype=torch.float64)]
    clip(gradients, torch.tensor(1.0, dtype=torch.float64), 2.0)
    assert gradients[0].tolist() == [0.5] * 4
    clip(gradients, torch.tensor(1.0, dtype=torch.float64), 0.5)
    assert gradients[0].tolist() == pytest.approx([0.25] * 4, rel=1e-5)
