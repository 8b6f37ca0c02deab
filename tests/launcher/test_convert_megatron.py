"""Checkpoints of Megatron's into ours and back: every number as it was, from any of its meshes onto any other."""

import functools
import shutil

import megatron_peer as peer
import pytest
import torch
from megatron_cpu import megatron_on_cpu

from baton.configs.loading import load_config
from baton.launcher.checkpoints.contents import read_contents
from baton.launcher.checkpoints.tensors import CheckpointTensors
from helpers import TINY, error_of_command, run_command, tiny_config

MODEL = [
    "model.pattern=M-ME*-",
    "model.mamba2={head_dim: 8, state_dim: 8, groups: 1, chunk_size: 7}",
    "model.moe={experts: 4, top_k: 2, hidden: 16, shared_hidden: 24, scores: sigmoid, renormalize: true, bias_rate: 0.1}",
    "model.vocab_size=60",
]
"""A group that two tp ranks share; an expert for all tokens; biases of experts."""
PADDED = 64
"""Rows of Megatron's vocabulary."""


def saved(rank, model, folder, parallel):
    """Megatron's own checkpoint of our weights."""
    with megatron_on_cpu():
        from megatron.core import dist_checkpointing

        from baton.models.megatron import hybrid_stack_spec

        module = peer.build(model, hybrid_stack_spec, vocab_size=PADDED, **parallel)
        peer.fill(module, model, peer.scrambled(model))
        if rank == 0:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(module.sharded_state_dict(), folder)


def loaded(rank, model, folder, parallel):
    """Whether every number that Megatron reads is ours; how many they are."""
    with megatron_on_cpu():
        from megatron.core import dist_checkpointing

        from baton.models.megatron import hybrid_stack_spec

        module = peer.build(model, hybrid_stack_spec, **parallel)
        module.load_state_dict(dist_checkpointing.load({"model": module.sharded_state_dict()}, folder)["model"])
        return peer.same(module, model, peer.scrambled(model))


run, error_of = (functools.partial(command, "convert") for command in (run_command, error_of_command))


@pytest.fixture(scope="module")
def theirs(pool, tmp_path_factory):
    """A run's folder of Megatron's, saved on tp 2 x cp 2."""
    folder = tmp_path_factory.mktemp("megatron")
    parallel = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True}
    pool.run(4, saved, tiny_config(MODEL).model, folder / "iter_0000012", parallel)
    (folder / "latest_checkpointed_iteration.txt").write_text("12\n")
    return folder


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "base"
    result = run("from-megatron", theirs, out, "--config", "quickstart", *TINY, *MODEL)
    assert result.exit_code == 0, result.stderr
    assert f"a model of Megatron-LM's of 36,656 parameters (float32) -> {out}" in result.stdout
    return out


def test_in_and_out(pool, theirs, ours, tmp_path):
    """Bit by bit, and onto other meshes; rows that fill the vocabulary up are left out."""
    model = tiny_config(MODEL).model
    assert load_config(str(ours / "config.yaml")).model == model
    reader = CheckpointTensors(read_contents(ours))
    wanted = peer.scrambled(model).state_dict()
    assert wanted.keys() == reader.entries.keys()
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in wanted.items())
    result = run("to-megatron", ours, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    options = [line.strip() for line in result.stdout.splitlines()[2:]]
    assert options[:2] == ["--spec baton.models.megatron hybrid_stack_spec --is-hybrid-model", "--hybrid-override-pattern M-ME*-"]
    for option in ("--swiglu", "--num-experts 4", "--mamba-num-groups 1", "--hidden-dropout 0.0", f"--load {tmp_path / 'out'}"):
        assert option in options
    whole = sum(tensor.numel() for tensor in wanted.values())
    for parallel in ({"pipeline_model_parallel_size": 2}, {"expert_model_parallel_size": 2}):
        found = pool.run(2, loaded, model, tmp_path / "out" / "release", parallel)
        assert all(same for same, _ in found)
        assert sum(count for _, count in found) >= whole
    assert run("to-megatron", ours, tmp_path / "bf16", "--dtype", "bf16").exit_code == 0
    again = run("from-megatron", tmp_path / "bf16", tmp_path / "back", "--config", "quickstart", *TINY, *MODEL)
    assert "parameters (bfloat16, float32)" in again.stdout
    back = CheckpointTensors(read_contents(tmp_path / "back"))
    for name, tensor in wanted.items():
        exact = ".ssm." in name or name.endswith("feed_forward.bias")
        assert torch.equal(back.read(name), tensor if exact else tensor.bfloat16())


def test_bad_input_leaves_nothing(theirs, ours, tmp_path):
    asked = ["--config", "quickstart", *TINY, *MODEL]
    other = [*TINY, *MODEL, "model.mamba2.state_dim=16"]
    newest, out = theirs / "iter_0000012", tmp_path / "out"
    assert error_of("from-megatron", theirs, out, "--config", "quickstart", *other) == (
        f"error: {newest}: decoder.layers.0.mixer.in_proj.weight.B is [8, 32], expected [16, 32] by quickstart"
    )
    deeper = [*TINY, *MODEL, "model.pattern=M-ME*-M"]
    assert error_of("from-megatron", theirs, out, "--config", "quickstart", *deeper).startswith(
        f"error: {newest}: decoder.layers.6.mixer.A_log, "
    )
    assert error_of("from-megatron", theirs, out, "--config", "quickstart", *TINY, *MODEL, "model.pattern=M-ME*").startswith(
        f"error: {newest}: decoder.layers.5.mlp.linear_fc1.layer_norm_weight, "
    )
    assert "no distributed checkpoint of Megatron (--ckpt-format torch_dist)" in error_of("from-megatron", tmp_path, out, *asked)
    assert error_of("from-megatron", theirs, ours, *asked) == f"error: {ours} exists; allowed: a folder that does not"
    copy = shutil.copytree(theirs, tmp_path / "copy")
    (copy / "latest_checkpointed_iteration.txt").write_text("13")
    assert error_of("from-megatron", copy, out, *asked).endswith(f"says 13, and {copy / 'iter_0000013'} is not there")
    mamba = error_of("from-megatron", theirs, out, "--config", "jamba_tiny")
    assert mamba == "error: model.pattern is m-mEm-*E, allowed for Megatron: M, *, - and E, since Megatron has no Mamba-1 (m)"
    assert error_of("to-megatron", ours, out, "--dtype", "int8") == "error: --dtype is 'int8', allowed: bf16, fp32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


REFUSED = {
    "residual_scale=0.5": "residual_scale is 0.5, allowed for Megatron: 1",
    "norm_eps=1.0e-6": "norm_eps is 1e-06, allowed for Megatron: 1e-05, as in Megatron's mixer",
    "mamba2.dt_max=0.5": "mamba2.dt_min and dt_max is (0.0, 0.5), allowed for Megatron: 0 and null",
    "attention.rope={theta: 0.5}": "attention.rope.theta is 0.5, allowed for Megatron: a whole number",
    "moe.activation=relu2": "moe.activation is relu2, allowed for Megatron: that of model.mlp, swiglu",
    "moe.renormalize=false": "moe.renormalize is False, allowed for Megatron: with scores sigmoid true, but with top_k 1 false",
    "moe.capacity=2": "moe.capacity is 2.0, allowed for Megatron: null",
    "moe.balance=pooled": "moe.balance is pooled, allowed for Megatron: layer, or moe.aux_loss of 0",
    "moe.scores=softmax": "moe.choice_bias is True, allowed for Megatron: false with scores softmax",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_megatron_does_not_compute_is_named(override):
    from baton.configs.errors import UserError
    from baton.models.megatron_config import megatron_config

    with pytest.raises(UserError) as caught:
        megatron_config(tiny_config([*MODEL, f"model.{override}"]).model)
    assert str(caught.value) == f"model.{REFUSED[override]}"
