"""Checkpoints reshard: what any mesh saves any other goes on with; written beside training, looked into, merged."""

import errno
import io
import json
import re
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from baton.configs.errors import UserError
from baton.launcher.checkpoints.contents import read_contents
from baton.launcher.checkpoints.merge import merge
from baton.launcher.cli import app
from baton.launcher.environment import Environment
from baton.launcher.training.run_folder import checkpoint_folder, checkpoints
from baton.launcher.training.token_files import prepare
from baton.models.hybrid import Losses
from baton.parallel.gradients import local_part
from helpers import small_run

STOP, END = 2, 5
"""Steps before the checkpoint, and in all."""

COMMON = [
    "precision=fp64",
    "data.documents=packed",
    "model.tied_embeddings=true",
    "model.moe.bias_rate=0.01",
    "batch={sequences: 4, micro_steps: 2}",
    "optimizer.lr=1e-2",
]
"""Among them a matrix that both ends of a pipeline have, and what is kept beside parameters: biases of experts."""

MESHES = {
    "one": (1, []),
    "replicate2": (4, ["parallel={dp: 2, cp: 2, ep: 2, replicate: 2}"]),
    "cp2": (2, ["parallel={cp: 2, layout: contiguous}"]),
    "cp4ep2": (4, ["parallel={cp: 4, ep: 2, layout: zigzag}"]),
    "tp2ep2": (4, ["parallel={tp: 2, cp: 2, ep: 2, sequence_parallel: true}"]),
    "tp2cp2": (4, ["parallel={tp: 2, cp: 2, layout: zigzag, zero: 2}"]),
    "pp2": (2, ["parallel={pp: 2}", "model.pattern=M-|MEM-*E"]),
    "interleaved": (2, ["parallel={pp: 2, schedule: interleaved_1f1b, stages_per_rank: 2}"]),
    "tp2pp2": (4, ["parallel={tp: 2, pp: 2}"]),
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
    # With zero 2 this leaves whole parameters behind.
    trainer.validate()
    trainer.save()
    trainer.checkpointer.finish()
    return torch.tensor([(step["loss"], step["grad_norm"]) for step in metrics], dtype=torch.float64)


def assert_same(found, expected, rtol=1e-9):
    """The losses and norms of as many steps, on all ranks."""
    for rank in found:
        torch.testing.assert_close(rank, expected, rtol=rtol, atol=0)


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
            assert_same(pool.run(MESHES[mesh][0], train, config, STOP), reference[:STOP])
            folders[mesh] = checkpoint_folder(config.run, STOP)
        return folders[mesh]

    return save


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "cp4ep2"),
        ("cp4ep2", "one"),
        ("tp2cp2", "cp2"),
        ("cp4ep2", "replicate2"),
        ("tp2cp2pp2", "one"),
        ("tp2cp2pp2", "cp4ep2"),
        ("tp2cp2pp2", "pp2"),
        ("cp4ep2", "interleaved"),
        ("interleaved", "tp2ep2"),
        ("replicate2", "one"),
        ("tp2ep2", "pp2"),
    ],
)
def test_another_mesh_goes_on_with_the_same_losses(pool, runs, reference, saved, before, after):
    config = config_of(runs, f"{before}-{after}", after)
    assert_same(pool.run(MESHES[after][0], train, config, END, saved(before)), reference[STOP:])


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_the_losses_hang_on_the_optimizers_state(pool, runs, reference, saved, lost):
    """That the test above can fail."""
    (found,) = pool.run(1, train, config_of(runs, f"without-{lost}", "one"), END, saved("tp2cp2"), (lost,))
    assert_same([found[:1]], reference[STOP : STOP + 1])
    assert abs(found[-1, 0] / reference[-1, 0] - 1) > 1e-4


@pytest.mark.slow
def test_fp32_goes_on_with_the_same_losses(pool, runs):
    """What the optimizer's square roots make of rounding stays below 1e-5."""
    common = ["precision=fp32", "batch={sequences: 4, micro_steps: 2}"]
    straight = pool.run(1, train, config_of(runs, "fp32", "one", common=common), END)[0]
    stopped = config_of(runs, "fp32-stopped", "tp2cp2", common=common)
    pool.run(4, train, stopped, STOP)
    config = config_of(runs, "fp32-resumed", "pp2", common=common)
    found = pool.run(2, train, config, END, checkpoint_folder(stopped.run, STOP))
    assert_same([rank[:, 0] for rank in found], straight[STOP:, 0], 1e-5)


def spoil(trainer):
    with torch.no_grad():
        for tensor in (*trainer.stages.parameters(), *(t for s in trainer.optimizer.state.values() for t in s.values())):
            local_part(tensor).add_(1)


def save_and_spoil(rank, config):
    """A checkpoint, and at once everything that it holds is overwritten; whether there was something left to `finish`."""
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
        assert pool.run(2, save_and_spoil, config) == [asynchronous] * 2
        folders.append(checkpoint_folder(config.run, 1))
    assert len(tensors(folders[0])) == 2
    assert tensors(folders[0]) == tensors(folders[1])


def save_on_a_full_disk(rank, config):
    """Three saves, of which the second fails on rank 1: its error, and after each what is there and in the newest checkpoint."""
    trainer, message, there, files = trainer_of(rank, config), None, [], []
    create_stream = FileSystem.create_stream
    for number in (1, 2, 3):
        if (rank, number) == (1, 2):
            FileSystem.create_stream = on_a_full_disk
        try:
            trainer.step()
            trainer.save()
            trainer.checkpointer.finish()
        except UserError as error:
            message = str(error)
        finally:
            FileSystem.create_stream = create_stream
        dist.barrier()
        there.append(sorted(path.name for path in (config.run / "checkpoints").iterdir()))
        files.append(sorted(path.name for path in checkpoints(config.run)[-1].iterdir()))
        dist.barrier()
    return message, there, files


class FillingUp(io.FileIO):
    """A file on a disk that has room for what is written first."""

    def write(self, data):
        if self.tell():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@contextmanager
def on_a_full_disk(self, path, mode):
    """In place of DCP's way to open a file."""
    with FillingUp(path, mode) as stream:
        yield stream


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_ends_all_ranks_and_costs_no_older_checkpoint(pool, runs, asynchronous):
    config = config_of(runs, f"full-{asynchronous}", "cp2", [f"checkpoint={{asynchronous: {asynchronous}, keep: 1}}"])
    for left in ("step-00000001.partial", "step-00000009.partial"):
        (config.run / "checkpoints" / left).mkdir(parents=True)
        (config.run / "checkpoints" / left / "of a run that was killed").touch()
    for message, there, files in pool.run(2, save_on_a_full_disk, config):
        assert message == f"{config.run}/checkpoints/step-00000002: cannot be written: [Errno 28] No space left on device"
        assert there == [["step-00000001"], ["step-00000001"], ["step-00000003"]]
        assert files == [[".metadata", "__0_0.distcp", "__1_0.distcp", "config.yaml", "manifest.json", "tokenizer.json"]] * 3


def save_after_a_full_disk(rank, config):
    """The error of a save that finds out that the one before it failed."""
    trainer, create_stream = trainer_of(rank, config), FileSystem.create_stream
    trainer.step()
    FileSystem.create_stream = on_a_full_disk
    trainer.save()
    trainer.checkpointer.unfinished[1].exception()
    FileSystem.create_stream = create_stream
    trainer.step()
    with pytest.raises(UserError) as raised:
        trainer.save()
    return str(raised.value)


def test_what_a_failed_save_ends_is_saved(pool, runs):
    config = config_of(runs, "full-once", "cp2")
    message = f"{config.run}/checkpoints/step-00000001: cannot be written: [Errno 28] No space left on device"
    assert pool.run(2, save_after_a_full_disk, config) == [message] * 2
    assert [folder.name for folder in checkpoints(config.run)] == ["step-00000002"]
    assert not list((config.run / "checkpoints").glob("*.partial"))


def diverge_on_a_full_disk(rank, config):
    """What a step says whose loss is no number, where the state before it cannot be saved."""
    trainer, create_stream = trainer_of(rank, config), FileSystem.create_stream
    trainer.step()
    forward_backward = trainer.stages.forward_backward
    trainer.stages.forward_backward = lambda *args: Losses(*(loss * float("nan") for loss in forward_backward(*args)))
    FileSystem.create_stream = on_a_full_disk
    try:
        with pytest.raises(UserError) as raised:
            trainer.step()
    finally:
        FileSystem.create_stream = create_stream
    return str(raised.value)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_does_not_hide_a_loss_that_is_not_finite(pool, runs, asynchronous):
    config = config_of(runs, f"diverged-{asynchronous}", "cp2", [f"checkpoint.asynchronous={asynchronous}"])
    for message in pool.run(2, diverge_on_a_full_disk, config):
        assert message.startswith("step 2: the loss is nan: not finite first in ")
        assert message.endswith("step-00000001: cannot be written: [Errno 28] No space left on device")


def save_on_hosts_of_their_own(rank, config):
    """What every rank says where each has its files in a folder that others do not see."""
    trainer = trainer_of(rank, config.model_copy(update={"run": config.run / str(rank)}))
    trainer.step()
    trainer.save()
    try:
        trainer.checkpointer.finish()
    except UserError as error:
        return str(error).partition(": cannot be written: ")[2]


def test_hosts_that_share_no_folder_are_told(pool, runs):
    message = (
        "1 of 2 files, such as __1_0.distcp, are on another host; allowed: a run's folder on a file system that all hosts share"
    )
    assert pool.run(2, save_on_hosts_of_their_own, config_of(runs, "hosts", "cp2")) == [message] * 2


def save_and_find_threads(rank, config):
    """Threads that a save leaves, by name."""
    before = threading.enumerate()
    trainer = trainer_of(rank, config)
    trainer.step()
    trainer.save()
    trainer.checkpointer.finish()
    time.sleep(0.1)
    return [thread.name for thread in threading.enumerate() if thread not in before and not thread.daemon]


def test_no_thread_stays(pool, runs):
    assert pool.run(2, save_and_find_threads, config_of(runs, "threads", "cp2")) == [[], []]


def load(rank, config, folder):
    """The error, if there is one."""
    try:
        trainer_of(rank, config).checkpointer.load(folder)
    except UserError as error:
        return str(error)
    return None


SMALL = ["model.pattern=ME", "model.repeat=2"]


@pytest.fixture(scope="module")
def small(pool, runs):
    """A checkpoint of a model without biases of experts."""
    config = config_of(runs, "small", "one", common=SMALL)
    pool.run(1, train, config, 1)
    return checkpoint_folder(config.run, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.pattern=ME|ME", "model.repeat=1"], None),
        ([f"model.moe.{change}" for change in ("aux_loss=0", "z_loss=0.1", "bias_rate=0.1", "balance=pooled", "capacity=2")], None),
        (["precision=fp64", "model.mamba2.chunk_size=8", "model.initializer_range=0.3"], None),
        (["model.pattern=M-"], "its model.pattern is 'MEME', the config's 'M-M-'"),
        (["model.moe.shared_hidden=8"], "its model.moe.shared_hidden is 0, the config's 8"),
        (["model.tied_embeddings=true"], "its model.tied_embeddings is False, the config's True"),
        (["model.attention.rope=null"], "its model.attention.rope.theta is 10000.0, the config's None"),
    ],
    ids=str,
)
def test_what_a_run_may_change(pool, runs, small, options, message):
    config = config_of(runs, "changed", "one", options, SMALL)
    expected = None if message is None else f"{small} is of another model: {message}"
    assert pool.run(1, load, config, small) == [expected]


def test_a_checkpoint_of_before_a_key_was_there(pool, runs, small):
    """What it does not say has the key's default."""
    older = shutil.copytree(small, runs / "older" / small.name)
    config = (older / "config.yaml").read_text()
    rewrite(older, "config.yaml", re.sub(r"  tied_embeddings:.*\n", "", config).encode())
    assert pool.run(1, load, config_of(runs, "changed", "one", common=SMALL), older) == [None]


def rewrite(folder, name, content):
    """A file that was changed, and the manifest does not show it."""
    (folder / name).write_bytes(content)
    facts = json.loads((folder / "manifest.json").read_text())
    facts["files"][name] = len(content)
    (folder / "manifest.json").write_text(json.dumps(facts))


def train_and_gather(rank, config):
    """Each tensor of the model, whole, as it is saved."""
    trainer = trainer_of(rank, config)
    trainer.step()
    trainer.save()
    trainer.checkpointer.finish()
    parameters = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trainer.stages.named_parameters()}
    return {name: t.detach().clone() for name, t in {**parameters, **dict(trainer.stages.named_buffers())}.items()}


@pytest.fixture(scope="module")
def gathered(pool, runs):
    """A pipeline's checkpoint, and its tensors."""
    config = config_of(runs, "gathered", "tp2pp2")
    parts = pool.run(4, train_and_gather, config)
    return config, {name: tensor for part in parts for name, tensor in part.items()}


def test_merge_writes_what_was_trained(gathered, tmp_path):
    config, expected = gathered
    file = tmp_path / "model.safetensors"
    result = CliRunner().invoke(app, ["checkpoint", "merge", str(config.run), str(file)])
    assert result.exit_code == 0, result.output
    found = load_file(file)
    assert found.keys() == expected.keys()
    assert "embedding.weight" in found
    assert "head.projection.weight" not in found
    assert {str(tensor.dtype) for tensor in found.values()} == {"torch.float64"}
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["step"]) == ("pt", "1")
    assert yaml.safe_load(metadata["config"]) == config.model_dump(mode="json")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_merge_overwrites_nothing_and_leaves_nothing_half_written(small, tmp_path):
    damaged = shutil.copytree(small, tmp_path / small.name)
    shards = next(damaged.glob("*.distcp"))
    rewrite(damaged, shards.name, bytes(shards.stat().st_size))
    contents = read_contents(damaged)
    with pytest.raises(UserError, match=rf"^{damaged}: embedding.weight cannot be read: .+"):
        merge(contents, tmp_path / "new.safetensors")
    (tmp_path / "old.safetensors").write_text("good")
    with pytest.raises(UserError, match=r"old.safetensors exists; allowed: a file that does not$"):
        merge(contents, tmp_path / "old.safetensors")
    for folder in ("nowhere", "old.safetensors"):
        with pytest.raises(UserError, match=rf"{folder} is no folder; allowed: a file in one that exists$"):
            merge(contents, tmp_path / folder / "new.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {small.name, "old.safetensors"}


def test_inspect_says_what_is_there(gathered):
    config, expected = gathered
    newest = checkpoints(config.run)[-1]
    shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(config.run)])
    assert shown.exit_code == 0, shown.output
    count = sum(tensor.numel() for tensor in expected.values())
    for text in (
        f"{newest}\n  step        1: 4 samples, 256 tokens\n",
        "on          4 ranks: dp 1 x cp 1 x tp 2 x pp 2 x ep 1, schedule 1f1b, contiguous\n  precision   fp64\n",
        "  pattern     M-MEM-*E\n",
        f"model       {count:,} parameters",
        "files       8, ",
    ):
        assert text in shown.output
    rows = {row.split()[0]: row.split()[1:] for row in shown.output.splitlines() if row.startswith((" layers", " embedding"))}
    assert rows["embedding"][:3] == ["float64", "1", "9,216"]
    assert rows["layers.3"][:3] == ["attention,", "moe", "float64"]
    lines = CliRunner().invoke(app, ["checkpoint", "inspect", str(newest), "--all"]).output
    rows = {row.split()[0]: " ".join(row.split()[1:]) for row in lines.splitlines() if row.split()}
    assert expected.keys() <= rows.keys()
    # Cut over tp alone.
    (experts,) = (rows[name] for name in expected if name.startswith("layers.1.") and name.endswith("gate_proj"))
    assert experts.startswith("4 x 16 x 32 float64 2 2,048 16 KiB 32 KiB")


def test_inspect_reads_no_tensor_and_names_damage(small, tmp_path):
    damaged = shutil.copytree(small, tmp_path / small.name)
    shards = next(damaged.glob("*.distcp"))
    rewrite(damaged, shards.name, bytes(shards.stat().st_size))
    assert CliRunner().invoke(app, ["checkpoint", "inspect", str(damaged)]).exit_code == 0
    rewrite(damaged, ".metadata", b"nonsense")
    shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(damaged)])
    assert shown.exit_code == 1
    assert shown.stderr == f"error: {damaged}: config.yaml or .metadata is damaged, or of another version of baton or torch\n"
    shards.write_bytes(b"")
    shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(damaged)])
    assert shown.stderr.startswith(f"error: {damaged} is truncated: {shards.name} has 0 bytes where ")
