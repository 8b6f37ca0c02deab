"""The continuation at the end of a run is the argmax of the whole forward, on any mesh."""

import torch

from baton.launcher.training.sample import continue_greedily
from baton.models.hybrid import build_model
from baton.models.parallelize import build_sharded_model
from baton.parallel.layout import Layout
from baton.parallel.mesh import build_mesh
from helpers import tiny_config

PROMPT = [5, 17, 3]


def sample(rank, config):
    mesh = build_mesh(config.parallel, "cpu")
    model = build_sharded_model(config, mesh, torch.device("cpu"))
    layout = Layout(config.parallel.layout, mesh.size("cp"))
    return continue_greedily(model, PROMPT, 8, layout, mesh, torch.device("cpu"))


def test_every_rank_continues_as_one_device(pool):
    model = build_model(tiny_config([]).model, 0, torch.float64)
    ids = list(PROMPT)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert len(set(ids[3:])) > 1, "a continuation that repeats one token shows little"
    config = tiny_config(["precision=fp64", "parallel.cp=2", "parallel.tp=2"], 4)
    assert pool.run(4, sample, config) == [ids[3:]] * 4
