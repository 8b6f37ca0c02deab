"""The whole hybrid on Triton kernels: training's mesh against one exact process, as `baton verify` compares them."""

import pytest

from baton.configs.errors import UserError
from baton.launcher.verification.verdict import over_limit
from helpers import DEVICE, compare, tiny_config

SIZES = [
    "kernels=triton",
    "model.pattern=ME*-",
    "model.repeat=1",
    "model.mamba2={head_dim: 32, state_dim: 16, groups: 1, chunk_size: 16}",
    "batch.sequences=1",
]
"""A layer of each kind, of sizes that every kernel takes."""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="several ranks on one GPU: `baton verify --share-device` does that")
@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        pytest.param(1, ["data.documents=packed"], marks=pytest.mark.exhaustive),
        (2, ["parallel.cp=2", "parallel.layout=zigzag", "data.documents=packed"]),
        pytest.param(2, ["parallel.tp=2", "data.documents=single"], marks=pytest.mark.exhaustive),
    ],
    ids=["one rank", "cp2", "tp2"],
)
def test_the_hybrid_on_kernels(pool, world, overrides):
    """Loss, logits, gradients and updated parameters in bf16: by the same limits as PyTorch's, and no worse than with those."""
    config = tiny_config([*SIZES, "precision=bf16", *overrides], world)
    (plain,) = pool.run(1, compare, tiny_config([*SIZES, "precision=bf16", "kernels=reference", *overrides[-1:]], 1))
    for verdict in pool.run(world, compare, config):
        assert verdict.ok, (verdict.over, verdict.first_difference)
        assert over_limit(verdict.errors, plain.one_rank, config.model) == []


def test_what_kernels_cannot_take_is_one_line(pool):
    config = tiny_config(["kernels=triton", "precision=fp32"])
    with pytest.raises(RuntimeError, match=r"ssd: x has head dim 8, allowed: 32, 64, 128 \(kernels: triton\)"):
        pool.run(1, compare, config)


def test_fp64_is_refused():
    with pytest.raises(UserError, match="kernels.*fp64.*allowed: auto, reference"):
        tiny_config([*SIZES, "precision=fp64"])
