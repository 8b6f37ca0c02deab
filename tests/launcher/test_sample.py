"""The continuation at the end of a run is the argmax of the whole forward, on any mesh."""

import pytest
import torch

from baton.launcher.training.sample import continue_greedily
from baton.models.hybrid import build_model
from baton.models.stages import build_stages
from baton.parallel.mesh import build_mesh
from helpers import tiny_config

PROMPT = [5, 17, 3]
MESHES = {
    "cp2 tp2": ["parallel={cp: 2, tp: 2}"],
    "pp2 dp2": ["parallel={pp: 2, dp: 2, cp: 1}", "batch={sequences: 4, micro_steps: 2}"],
    "pp2 tp2 packed": ["parallel={pp: 2, tp: 2, cp: 1, sequence_parallel: true}", "batch.micro_steps=2", "data.documents=packed"],
}


def sample(rank, config):
    stages = build_stages(config, build_mesh(config.parallel, "cpu"), torch.device("cpu"))
    return continue_greedily(stages, PROMPT, 8)


@pytest.fixture(scope="module")
def continued():
    model = build_model(tiny_config([]).model, 0, torch.float64)
    ids = list(PROMPT)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert len(set(ids[3:])) > 1, "a continuation that repeats one token shows little"
    return ids[3:]


@pytest.mark.parametrize("mesh", MESHES)
def test_every_rank_continues_as_one_device(pool, continued, mesh):
    config = tiny_config(["precision=fp64", *MESHES[mesh]], 4)
    assert pool.run(4, sample, config) == [continued] * 4


def test_copies_of_the_prompt_agree(pool):
    """With a capacity the prompt's copies on dp ranks do not lose the same tokens."""
    options = ["precision=fp64", "parallel={cp: 1, dp: 2}", "model.moe.capacity=0.05"]
    first, second = pool.run(2, sample, tiny_config(options, 2))
    assert first == second
