"""The training loop on real ranks: resumes bit-exactly, gives the same losses on every mesh, stops well when it must."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from baton.configs.errors import UserError
from baton.configs.schema import OptimizerConfig, ScheduleConfig
from baton.launcher.environment import Environment
from baton.launcher.checkpoints.manifest import read_manifest
from baton.launcher.training.loop import run_training
from baton.launcher.training.metrics import read_metrics
from baton.launcher.training.optimizer import build_optimizer, learning_rate
from baton.launcher.training.profile import check_profile_folder
from baton.launcher.training.run_folder import checkpoints
from baton.launcher.training.token_files import prepare
from baton.models.hybrid import build_model
from baton.parallel.gradients import local_part
from baton.parallel.layout import Layout
from baton.parallel.links import largest_sent
from helpers import small_run


def train(rank, config, resume=False, stop_at=None):
    """The UserError's message on this rank, if there is one."""
    try:
        run_training(config, Environment(rank, dist.get_world_size(), torch.device("cpu")), resume, stop_at)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}; " for i in range(700)))
    return path


def losses(config):
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in read_metrics(config.run) if "loss" in line}


@pytest.mark.parametrize("degree", ["cp", "tp"])
def test_a_resumed_run_is_bit_identical(pool, tmp_path, text, degree):
    options = [f"parallel.{degree}=2"]
    straight, stopped = (small_run(tmp_path, options, text, 2, name) for name in ("straight", "stopped"))
    assert pool.run(2, train, straight) == [None, None]
    assert pool.run(2, train, stopped, False, 3) == [None, None]
    assert max(losses(stopped)) == 3
    assert pool.run(2, train, stopped, True) == [None, None]
    assert losses(stopped) == losses(straight)
    assert len(losses(straight)) == 6


@pytest.mark.parametrize(
    "options", [["parallel.cp=4"], ["parallel.cp=2", "parallel.tp=2"], ["parallel.cp=2", "parallel.dp=2"]], ids=str
)
def test_every_mesh_learns_the_same(pool, tmp_path, text, options):
    """Six AdamW steps in fp64 with two micro-steps of two sequences; the loss falls, and no mesh changes it."""
    common = ["precision=fp64", "batch={sequences: 4, micro_steps: 2}", "optimizer.lr=1e-2"]
    alone = small_run(tmp_path, common, text, 1, "alone")
    mesh = small_run(tmp_path, [*common, *options], text, 4, "mesh")
    assert pool.run(1, train, alone) == [None]
    assert pool.run(4, train, mesh) == [None] * 4
    reference, found = losses(alone), losses(mesh)
    assert reference[6][0] < reference[1][0] - 0.3
    for step, values in reference.items():
        assert found[step] == pytest.approx(values, rel=1e-9)


def first_step(rank, config):
    from baton.launcher.training.loop import Trainer

    trainer = Trainer(config, Environment(rank, dist.get_world_size(), torch.device("cpu")))
    samples = [trainer.train_data.samples[i] for i in range(config.batch.sequences)]
    return torch.stack(samples), trainer.step()


def test_a_step_is_its_definition(pool, tmp_path, text):
    """Loss and gradient norm of two micro-steps: all tokens weigh the same, and so do the micro-steps' auxiliary losses."""
    config = small_run(tmp_path, ["precision=fp64", "batch={sequences: 4, micro_steps: 2}", "model.moe.aux_loss=1.0"], text)
    prepare(config)
    samples, metrics = pool.run(1, first_step, config)[0]
    model = build_model(config.model, config.seed, torch.float64)
    parts = [model(part[:, :-1], part[:, 1:]) for part in samples.chunk(2)]
    cross_entropy = sum(part.cross_entropy for part in parts) / (4 * config.data.context)
    auxiliary = sum(part.auxiliary for part in parts) / 2
    (cross_entropy + auxiliary).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert metrics["loss"] == pytest.approx(cross_entropy.item(), rel=1e-12)
    assert metrics["auxiliary_loss"] == pytest.approx(auxiliary.item(), rel=1e-12)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-10)


def save_and_load(rank, config):
    """The random state and every tensor of the optimizer, saved, spoilt, loaded: what differs then."""
    from baton.launcher.training.loop import Trainer

    trainer = Trainer(config, Environment(rank, dist.get_world_size(), torch.device("cpu")))
    trainer.step()
    torch.rand(rank + 3)
    expected = torch.get_rng_state()
    state = trainer.optimizer.state_dict()["state"]
    before = {(i, key): local_part(t).clone() for i, entry in state.items() for key, t in entry.items()}
    trainer.save()
    torch.rand(5)
    for entry in state.values():
        for tensor in entry.values():
            local_part(tensor).add_(1)
    trainer.resume()
    after = trainer.optimizer.state_dict()["state"]
    differing = [key for key, t in before.items() if not torch.equal(t, local_part(after[key[0]][key[1]]))]
    return differing, len(before), torch.equal(torch.get_rng_state(), expected), trainer.consumed


def test_a_checkpoint_has_optimizer_and_random_state(pool, tmp_path, text):
    config = small_run(tmp_path, ["parallel.cp=2"], text, 2)
    prepare(config)
    for differing, count, same_random_state, consumed in pool.run(2, save_and_load, config):
        assert differing == []
        assert count == 3 * sum(1 for _ in build_model(config.model, 0).parameters())
        assert same_random_state
        assert consumed == 2


@pytest.mark.slow
def test_fp32_training_is_the_same_on_any_mesh(pool, tmp_path, text):
    """Twenty AdamW steps, B and C shared by the tp ranks: the losses differ by less than 1e-4."""
    common = ["model.mamba2.groups=1", "schedule.steps=20", "evaluation.every=100", "checkpoint.every=100"]
    meshes = {1: [], 4: ["parallel.cp=4", "parallel.layout=zigzag"], 2: ["parallel.cp=2", "parallel.tp=2"]}
    runs = [small_run(tmp_path, [*common, *extra], text, 1 if not extra else 4, f"run-{name}") for name, extra in meshes.items()]
    for config, world in zip(runs, (1, 4, 4), strict=True):
        assert pool.run(world, train, config) == [None] * world
    reference = losses(runs[0])
    assert len(reference) == 20
    for config in runs[1:]:
        found = losses(config)
        assert max(abs(found[step][0] - loss) for step, (loss, _) in reference.items()) < 1e-4


def bad_gradient(rank, config):
    from baton.launcher.training.loop import Trainer

    trainer = Trainer(config, Environment(rank, dist.get_world_size(), torch.device("cpu")))
    batches = list(trainer.train_data.step(0))
    trainer._accumulate_gradients(batches, torch.tensor(64))
    found = [trainer._first_bad_output(batches)]
    local_part(trainer.model.layers[1].feed_forward_norm.weight.grad).fill_(float("inf"))
    return [*found, trainer._first_bad_gradient()]


def test_the_group_with_a_bad_gradient_is_named(pool, tmp_path, text):
    config = small_run(tmp_path, ["parallel.cp=2"], text, 2)
    prepare(config)
    assert pool.run(2, bad_gradient, config) == [[None, "the gradients of layers.1.feed_forward_norm"]] * 2


def test_a_resumed_run_keeps_to_its_config(pool, tmp_path, text):
    """Optimizer settings are the config's, not the checkpoint's; another data order or context is refused."""
    config = small_run(tmp_path, [], text)
    pool.run(1, train, config, False, 2)
    other = small_run(tmp_path, ["optimizer.weight_decay=0.5", "optimizer.betas=[0.5, 0.6]"], text)
    assert pool.run(1, resumed_settings, other)[0] == ((0.5, 0.6), 0.5)
    assert "its seed is 0, now 5" in pool.run(1, train, small_run(tmp_path, ["seed=5"], text), True)[0]
    assert "its data.context is 64, now 32" in pool.run(1, train, small_run(tmp_path, ["data.context=32"], text), True)[0]


def resumed_settings(rank, config):
    from baton.launcher.training.loop import Trainer

    trainer = Trainer(config, Environment(rank, dist.get_world_size(), torch.device("cpu")))
    trainer.resume()
    group = trainer.optimizer.param_groups[0]
    return tuple(group["betas"]), group["weight_decay"]


def test_what_a_run_leaves(pool, tmp_path, text):
    config = small_run(tmp_path, [], text)
    pool.run(1, train, config)
    assert [path.name for path in checkpoints(config.run)] == ["step-00000004", "step-00000006"]
    assert {"config.yaml", "metrics.jsonl", "loss.png", "tensorboard", "checkpoints"} == {p.name for p in config.run.iterdir()}
    assert [line["step"] for line in read_metrics(config.run) if "validation_loss" in line] == [0, 3, 6]
    newest = checkpoints(config.run)[-1]
    assert {"config.yaml", "tokenizer.json", "manifest.json", ".metadata"} <= {path.name for path in newest.iterdir()}
    assert read_manifest(newest)["consumed"] == 12
    assert "--resume to go on with it" in pool.run(1, train, config)[0]


def test_a_loss_that_is_not_finite_stops_the_run(pool, tmp_path, text):
    """A learning rate that blows the weights up: the state from before the bad step is saved and can be loaded."""
    config = small_run(tmp_path, ["optimizer.lr=1e30", "parallel.cp=2", "checkpoint.every=100"], text, 2)
    messages = pool.run(2, train, config)
    assert messages[0] == messages[1]
    step = max(losses(config)) + 1
    assert messages[0].startswith(f"step {step}: the loss is nan: not finite first in the output of layers.")
    assert [path.name for path in checkpoints(config.run)] == [f"step-{step - 1:08d}"]
    assert read_manifest(checkpoints(config.run)[0])["step"] == step - 1
    assert all(math.isfinite(loss) for loss, _ in losses(config).values())


def test_a_checkpoint_that_cannot_be_written(pool, tmp_path, text):
    config = small_run(tmp_path, [], text)
    config.run.mkdir()
    (config.run / "checkpoints").write_text("a file where a folder should be")
    message = pool.run(1, train, config)[0]
    assert message == f"{config.run}/checkpoints/step-00000002: cannot be written: [Errno 20] Not a directory: " + repr(
        f"{config.run}/checkpoints/step-00000002.partial"
    )


def test_checkpoints_that_cannot_be_used_say_why(pool, tmp_path, text):
    config = small_run(tmp_path, [], text)
    pool.run(1, train, config)
    other = small_run(tmp_path, ["model.mamba2.state_dim=16"], text)
    assert pool.run(1, train, other, True)[0].endswith("its model.mamba2.state_dim is 8, the config's 16")
    newest = checkpoints(config.run)[-1]
    shards = next(newest.glob("*.distcp"))
    shards.write_bytes(shards.read_bytes()[:-100])
    message = pool.run(1, train, config, True)[0]
    assert f"{newest} is truncated: {shards.name} has" in message
    assert f"remove {newest} to resume from step-00000004" in message
    (newest / "manifest.json").unlink()
    assert "manifest.json is missing" in pool.run(1, train, config, True)[0]
    shutil.rmtree(newest)
    tokenizer = config.data.folder / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"truncation": None}, indent=7))
    assert "another tokenizer" in pool.run(1, train, config, True)[0]


def test_vectors_are_not_decayed():
    config = small_run(Path("nowhere"), [], None)
    model = build_model(config.model, 0)
    decayed, kept = (group["params"] for group in build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in kept} == {"A_log", "D", "dt_bias", "x_bias", "bc_bias", "weight"}
    assert all("norm" in names[id(p)] for p in kept if names[id(p)].endswith("weight"))
    assert len(decayed) + len(kept) == len(names)


def test_learning_rate():
    schedule = ScheduleConfig(steps=11, warmup=2, decay="linear", final=0.2)
    rates = [learning_rate(step, 1.0, schedule) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.6)
    assert rates[10] == pytest.approx(0.2)
    assert learning_rate(10, 1.0, schedule.model_copy(update={"decay": "cosine"})) == pytest.approx(0.2)
    assert learning_rate(10, 1.0, schedule.model_copy(update={"decay": "constant"})) == 1.0


def profile(rank, config, folder):
    run_training(config, Environment(rank, dist.get_world_size(), torch.device("cpu")), False, 3, folder)


def test_a_profile_has_what_was_sent_and_when(pool, tmp_path, text):
    """Of one step on two ranks: bytes as the cost model has them, and exchanges beside the model's own thread."""
    config = small_run(tmp_path, ["parallel.cp=2", "parallel.strategy=sliced"], text, 2)
    prepare(config)
    pool.run(2, profile, config, check_profile_folder(tmp_path / "profile"))
    heads, state, mixers = 8, 8 * 8 * 8 * 2, 3
    expected = largest_sent("sliced", Layout("zigzag", 2), 4 * state, 4 * heads * 2)
    for rank in range(2):
        traffic = json.loads((tmp_path / "profile" / f"traffic-rank{rank}.json").read_text())
        (states,) = [row for row in traffic["by operation and group"] if row["group"] == "mesh_states"]
        # Forward and backward, two rounds each.
        assert states == {
            "operation": "all_to_all",
            "group": "mesh_states",
            "bytes": mixers * 2 * expected,
            "rounds": mixers * 2 * 2,
        }
        events = json.loads((tmp_path / "profile" / f"trace-rank{rank}.json").read_text())["traceEvents"]
        spans = [event for event in events if event.get("cat") == "mesh_states"]
        # The clocks agree, and exchanges have a thread of their own.
        linear = [event for event in events if event.get("name") == "aten::linear"]
        assert min(event["ts"] for event in linear) < spans[0]["ts"] < max(event["ts"] for event in linear)
        assert {span["tid"] for span in spans}.isdisjoint(event["tid"] for event in linear)
