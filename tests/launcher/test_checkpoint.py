"""Checkpoints reshard: what any mesh saves any other goes on with; written beside training, looked into, merged."""

import json
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from baton.configs.errors import UserError
from baton.launcher.checkpoints.contents import read_contents
from baton.launcher.checkpoints.merge import merge
from baton.launcher.cli import app
from baton.launcher.environment import Environment
from baton.launcher.training.run_folder import checkpoint_folder, checkpoints
from baton.launcher.training.token_files import prepare
from baton.parallel.gradients import local_part
from helpers import small_run

STOP, END = 2, 5
"""Steps before the checkpoint, and in all."""

COMMON = [
    "precision=fp64",
    "data.documents=packed",
    "model.tied_embeddings=true",
    "model.moe={aux_loss: 0.1, bias_rate: 0.01}",
    "batch={sequences: 4, micro_steps: 2}",
    "optimizer.lr=1e-2",
]
"""Among them a matrix that both ends of a pipeline have, and what is kept beside parameters: biases of experts."""

MESHES = {
    "one": (1, []),
    "replicate2": (2, ["parallel={dp: 2, replicate: 2}"]),
    "cp2": (2, ["parallel={cp: 2, layout: contiguous}"]),
    "cp4ep2": (4, ["parallel={cp: 4, ep: 2, layout: zigzag}"]),
    "tp2cp2": (4, ["parallel={tp: 2, cp: 2, layout: zigzag, zero: 2}"]),
    "pp2": (2, ["parallel={pp: 2}", "model.pattern=M-|MEM-*E"]),
    "interleaved": (2, ["parallel={pp: 2, schedule: interleaved_1f1b, stages_per_rank: 2}"]),
    "tp2cp2pp2": (8, ["parallel={tp: 2, cp: 2, pp: 2, layout: zigzag}"]),
}


def trainer_of(rank, config):
    from baton.launcher.training.loop import Trainer

    return Trainer(config, Environment(rank, dist.get_world_size(), torch.device("cpu")))


def train(rank, config, last, load=None, forget=()):
    """Loss and norm of each step up to the last, where a checkpoint is left. `forget`: what of the optimizer is lost on the way."""
    trainer = trainer_of(rank, config)
    if load:
        trainer.done, trainer.consumed = trainer.checkpointer.load(load)
    for state in trainer.optimizer.state.values():
        for key in forget:
            local_part(state[key]).zero_()
    metrics = [trainer.step() for _ in range(trainer.done, last)]
    trainer.save()
    trainer.checkpointer.finish()
    return [(step["loss"], step["grad_norm"]) for step in metrics]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the module's runs, with a text of short documents."""
    folder = tmp_path_factory.mktemp("runs")
    lines = (json.dumps({"text": f"{i} squared is {i * i}"}) for i in range(900))
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare(config_of(folder, "data", "one"))
    return folder


def config_of(runs, name, mesh, options=(), common=COMMON):
    world, degrees = MESHES[mesh]
    return small_run(runs, [*common, *degrees, *options], runs / "text.jsonl", world, name)


@pytest.fixture(scope="module")
def reference(pool, runs):
    """Of one rank that never stopped."""
    return pool.run(1, train, config_of(runs, "reference", "one"), END)[0]


@pytest.fixture(scope="module")
def saved(pool, runs, reference):
    """Checkpoints after the first steps, each made once: by mesh."""
    folders = {}

    def save(mesh):
        if mesh not in folders:
            config = config_of(runs, f"saved-{mesh}", mesh)
            for losses in pool.run(MESHES[mesh][0], train, config, STOP):
                assert losses == pytest.approx(reference[:STOP], rel=1e-9)
            folders[mesh] = checkpoint_folder(config.run, STOP)
        return folders[mesh]

    return save


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "cp4ep2"),
        ("cp4ep2", "one"),
        ("tp2cp2", "cp2"),
        ("cp4ep2", "replicate2"),
        ("tp2cp2", "pp2"),
        ("tp2cp2pp2", "one"),
        ("tp2cp2pp2", "cp4ep2"),
        ("tp2cp2pp2", "interleaved"),
        ("pp2", "tp2cp2"),
        ("pp2", "tp2cp2pp2"),
    ],
)
def test_another_mesh_goes_on_with_the_same_losses(pool, runs, reference, saved, before, after):
    config = config_of(runs, f"{before}-{after}", after)
    for losses in pool.run(MESHES[after][0], train, config, END, saved(before)):
        assert losses == pytest.approx(reference[STOP:], rel=1e-9)


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_the_losses_hang_on_the_optimizers_state(pool, runs, reference, saved, lost):
    """That the test above can fail."""
    losses = pool.run(1, train, config_of(runs, f"without-{lost}", "one"), END, saved("tp2cp2"), (lost,))[0]
    assert losses[0] == pytest.approx(reference[STOP], rel=1e-9)
    assert abs(losses[-1][0] / reference[-1][0] - 1) > 1e-5


def test_fp32_goes_on_with_the_same_losses(pool, runs):
    """What the optimizer's square roots make of rounding stays below 1e-5."""
    common = ["precision=fp32", "batch={sequences: 4, micro_steps: 2}"]
    straight = pool.run(1, train, config_of(runs, "fp32", "one", common=common), END)[0]
    stopped = config_of(runs, "fp32-stopped", "tp2cp2pp2", common=common)
    pool.run(8, train, stopped, STOP)
    for mesh in ("cp4ep2", "one"):
        config = config_of(runs, f"fp32-{mesh}", mesh, common=common)
        losses = pool.run(MESHES[mesh][0], train, config, END, checkpoint_folder(stopped.run, STOP))[0]
        assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in straight[STOP:]], rel=1e-5)


def spoil(trainer):
    with torch.no_grad():
        for tensor in (*trainer.stages.parameters(), *(t for s in trainer.optimizer.state.values() for t in s.values())):
            local_part(tensor).add_(1)


def save_and_train_on(rank, config, asynchronous):
    """A checkpoint, and at once everything that it holds is overwritten; whether it was complete before `finish`, and threads."""
    trainer = trainer_of(rank, config)
    trainer.step()
    trainer.save()
    unfinished = trainer.checkpointer.unfinished is not None
    spoil(trainer)
    trainer.checkpointer.finish()
    return unfinished


def tensors(folder):
    """The bytes of a checkpoint's tensors."""
    return {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


def test_asynchronous_saves_are_the_same(pool, runs):
    """What is written beside training is the state when `save` returned, bit for bit."""
    folders = []
    for asynchronous in (False, True):
        options = [f"checkpoint.asynchronous={str(asynchronous).lower()}"]
        config = config_of(runs, f"asynchronous-{asynchronous}", "cp2", options)
        assert pool.run(2, save_and_train_on, config, asynchronous) == [asynchronous] * 2
        folders.append(checkpoint_folder(config.run, 1))
    assert len(tensors(folders[0])) == 2
    assert tensors(folders[0]) == tensors(folders[1])


class DiskFull(FileSystemWriter):
    """Stands for a disk that is full on one rank."""

    @staticmethod
    def write_data(*args):
        raise OSError(28, "No space left on device")


def save_on_a_full_disk(rank, config, monkeypatched):
    """The message of a save that fails on one rank; what is there then; and whether the next save is good."""
    trainer = trainer_of(rank, config)
    trainer.step()
    trainer.save()
    trainer.checkpointer.finish()
    trainer.step()
    original = FileSystemWriter.write_data
    message = None
    try:
        if rank == 1:
            FileSystemWriter.write_data = DiskFull.write_data
        trainer.save()
        trainer.checkpointer.finish()
    except UserError as error:
        message = str(error)
    finally:
        FileSystemWriter.write_data = original
    dist.barrier()
    there = sorted(path.name for path in (config.run / "checkpoints").iterdir())
    dist.barrier()
    trainer.step()
    trainer.save()
    trainer.checkpointer.finish()
    return message, there
