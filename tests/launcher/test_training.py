"""The training loop on real ranks: resumes bit-exactly, gives the same losses on every mesh, stops well when it must."""

import json
import math
import shutil
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from baton.configs.errors import UserError
from baton.launcher.checkpoints.manifest import read_manifest
from baton.launcher.environment import Environment
from baton.launcher.training.diagnosis import first_bad_gradient, first_bad_output
from baton.launcher.training.loop import Trainer, run_training
from baton.launcher.training.metrics import read_metrics
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


@pytest.mark.slow
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


STEPS = 3
COMMON = {
    "one document": [
        "batch={sequences: 4, micro_steps: 2}",
        "model.moe.bias_rate=0.05",
        "model.tied_embeddings=true",
    ],
    "packed": [
        "batch={sequences: 8, micro_steps: 4}",
        "data.documents=packed",
        "model.moe.bias_rate=0.05",
        "model.moe.balance=pooled",
        "model.moe.z_loss=0.01",
        "model.moe.shared_hidden=16",
        "model.moe.capacity=0.7",
    ],
}
MESHES = {
    "cp4": ("one document", 4, ["parallel.cp=4"], "dp 1 x cp 4 x tp 1, zigzag, cpu"),
    "dp2 cp2 of two copies": (
        "one document",
        4,
        ["parallel={dp: 2, cp: 2, ep: 2, replicate: 2, zero: 2, layout: zigzag}"],
        "dp 2 x cp 2 x tp 1, ep 2, replicate 2, zigzag, cpu",
    ),
    "tp2 cp2 pp2": (
        "packed",
        8,
        ["parallel={tp: 2, cp: 2, pp: 2, zero: 2}", "model.pattern=M-|MEM-*E"],
        "pp 2 x dp 1 x cp 2 x tp 2, contiguous, cpu",
    ),
    "interleaved": (
        "packed",
        4,
        ["parallel={pp: 2, dp: 2, ep: 2, schedule: interleaved_1f1b, stages_per_rank: 2}"],
        "pp 2 x dp 2 x cp 1 x tp 1, ep 2, contiguous, cpu",
    ),
    "sequence_parallel": (
        "one document",
        4,
        ["parallel={tp: 2, pp: 2, cp: 1, sequence_parallel: true}"],
        "pp 2 x dp 1 x cp 1 x tp 2, sequence_parallel, contiguous, cpu",
    ),
}


def trainer_of(rank, config):
    return Trainer(config, Environment(rank, dist.get_world_size(), torch.device("cpu")))


class Learned(NamedTuple):
    steps: list[list[float]]  # loss, auxiliary loss and norm
    expert_tokens: list[dict[str, list[int]]]  # of each step
    validation: float
    biases: dict[str, list[float]]  # of experts on this rank
    continued: str
    description: str


def learn(rank, config):
    trainer = trainer_of(rank, config)
    description = trainer.describe()
    steps, expert_tokens = [], []
    for _ in range(STEPS):
        metrics = trainer.step()
        steps.append([metrics[key] for key in ("loss", "auxiliary_loss", "grad_norm")])
        expert_tokens.append(trainer.expert_tokens())
    biases = {name: bias.tolist() for name, bias in trainer.stages.named_buffers()}
    return Learned(steps, expert_tokens, trainer.validate(), biases, trainer.continue_prompt(), description)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of runs on one corpus of short documents."""
    folder = tmp_path_factory.mktemp("runs")
    lines = (json.dumps({"text": f"{i} squared is {i * i}"}) for i in range(900))
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare(learning(folder, "one document", []))
    return folder


def learning(folder, common, options, world=1):
    """Clipped all along, at a rate that moves the choice of experts."""
    fixed = ["precision=fp64", "optimizer={lr: 1e-2, clip: 0.1}"]
    return small_run(folder, [*fixed, *COMMON[common], *options], folder / "text.jsonl", world)


@pytest.fixture(scope="module")
def alone(pool, folder):
    """Of one rank."""
    return {common: pool.run(1, learn, learning(folder, common, []))[0] for common in COMMON}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_learns_the_same(pool, folder, alone, mesh):
    """Three AdamW steps: losses, norms, tokens by expert, the experts' biases, validation, and what follows a prompt."""
    common, world, options, description = MESHES[mesh]
    expected = alone[common]
    biases = {}
    for found in pool.run(world, learn, learning(folder, common, options, world)):
        torch.testing.assert_close(found.steps, expected.steps, rtol=1e-9, atol=0)
        assert found.expert_tokens == expected.expert_tokens
        assert found.validation == pytest.approx(expected.validation, rel=1e-9)
        assert found.continued == expected.continued
        assert f"{world} ranks ({description})" in found.description
        biases |= found.biases
    assert set(biases) == set(expected.biases)
    for name, values in biases.items():
        assert values == pytest.approx(expected.biases[name], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("common", COMMON)
def test_what_is_compared_tells_meshes_apart(alone, folder, common):
    """Every step is clipped and changes the loss; every token counts top_k times in each step; biases have moved, not all alike."""
    found, config = alone[common], learning(folder, common, [])
    assert len({loss for loss, _, _ in found.steps}) == STEPS
    assert all(norm > 2 * config.optimizer.clip for _, _, norm in found.steps)
    tokens = config.batch.sequences * config.data.context * config.model.moe.top_k
    assert [{layer: sum(counts) for layer, counts in step.items()} for step in found.expert_tokens] == [
        {"layers.1": tokens, "layers.3": tokens}
    ] * STEPS
    assert set(found.biases) == {"layers.1.feed_forward.bias", "layers.3.feed_forward.bias"}
    for layer in ("layers.1", "layers.3"):
        moved = torch.tensor([step[layer] for step in found.expert_tokens], dtype=torch.float64)
        expected = 0.05 * (moved.mean(1, keepdim=True) - moved).sign().sum(0)
        assert expected.abs().max() > 0
        assert found.biases[f"{layer}.feed_forward.bias"] == pytest.approx(expected.tolist())


def first_step(rank, config):
    trainer = trainer_of(rank, config)
    samples = [trainer.train_data.samples[i] for i in range(config.batch.sequences)]
    return torch.stack(samples), trainer.step(), trainer.expert_tokens()


def test_a_step_is_its_definition(pool, tmp_path, text):
    """Of two micro-steps: all tokens weigh the same in the loss, and so do the micro-steps' auxiliary losses."""
    config = small_run(tmp_path, ["precision=fp64", "batch={sequences: 4, micro_steps: 2}", "model.moe.aux_loss=1.0"], text)
    prepare(config)
    samples, metrics, expert_tokens = pool.run(1, first_step, config)[0]
    model = build_model(config.model, config.seed, torch.float64)
    chosen = []
    model.layers["3"].feed_forward.router.register_forward_hook(lambda module, args, logits: chosen.append(logits.topk(2).indices))
    parts = [model(part[:, :-1], part[:, 1:]) for part in samples.chunk(2)]
    cross_entropy = sum(part.cross_entropy for part in parts) / (4 * config.data.context)
    auxiliary = sum(part.auxiliary for part in parts) / 2
    (cross_entropy + auxiliary).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert metrics["loss"] == pytest.approx(cross_entropy.item(), rel=1e-12)
    assert metrics["auxiliary_loss"] == pytest.approx(auxiliary.item(), rel=1e-12)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-10)
    assert expert_tokens["layers.3"] == torch.cat(chosen).flatten().bincount(minlength=4).tolist()


def save_and_load(rank, config):
    """The random state and every tensor of the optimizer, saved, spoilt, loaded: what differs then."""
    trainer = trainer_of(rank, config)
    trainer.step()
    torch.rand(rank + 3)
    expected = torch.get_rng_state()
    state = trainer.optimizer.state_dict()["state"]
    before = {(i, key): local_part(t).clone() for i, entry in state.items() for key, t in entry.items()}
    trainer.save()
    trainer.checkpointer.finish()
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
    common = ["batch.micro_steps=2", "model.mamba2.groups=1", "schedule.steps=20", "evaluation.every=100", "checkpoint.every=100"]
    meshes = {"alone": [], "cp4": ["parallel.cp=4", "parallel.layout=zigzag"], "pp2tp2": ["parallel={pp: 2, tp: 2}"]}
    worlds = [1, 4, 4]
    runs = [
        small_run(tmp_path, [*common, *extra], text, world, name)
        for (name, extra), world in zip(meshes.items(), worlds, strict=True)
    ]
    for config, world in zip(runs, worlds, strict=True):
        assert pool.run(world, train, config) == [None] * world
    reference = losses(runs[0])
    assert len(reference) == 20
    for config in runs[1:]:
        found = losses(config)
        assert max(abs(found[step][0] - loss) for step, (loss, _) in reference.items()) < 1e-4


def bad_gradient(rank, config):
    trainer = trainer_of(rank, config)
    micro_steps = list(trainer.train_data.step(0))
    trainer.stages.forward_backward(micro_steps, torch.tensor(64))
    for name, p in trainer.stages.named_parameters():
        if name == "layers.1.feed_forward_norm.weight":
            local_part(p.grad).fill_(float("inf"))
    return [first_bad_output(trainer.stages, micro_steps), first_bad_gradient(trainer.stages)]


@pytest.mark.parametrize("degrees", ["cp: 2, zero: 2", "pp: 2, cp: 1"])
def test_the_part_with_a_bad_gradient_is_named(pool, tmp_path, text, degrees):
    config = small_run(tmp_path, [f"parallel={{{degrees}}}", "batch.micro_steps=2"], text, 2)
    prepare(config)
    assert pool.run(2, bad_gradient, config) == [[None, "the gradients of layers.1.feed_forward_norm"]] * 2


def step_with_bad_weight(rank, config):
    trainer = trainer_of(rank, config)
    for name, p in trainer.stages.named_parameters():
        if name == "layers.3.mixer.o_proj.weight":
            local_part(p.detach()).fill_(float("nan"))
    with pytest.raises(UserError) as stopped:
        trainer.step()
    return str(stopped.value)


def test_a_bad_weight_of_the_last_stage_stops_all(pool, tmp_path, text):
    config = small_run(tmp_path, ["parallel={pp: 2, cp: 2}", "batch.micro_steps=2"], text, 4)
    prepare(config)
    where = "not finite first in the output of layers.3.mixer (attention)"
    assert pool.run(4, step_with_bad_weight, config) == [f"step 1: the loss is nan: {where}; no checkpoint was written before"] * 4


def step_in(rank, config):
    """The first loss, and the types of parameters and gradients."""
    trainer = trainer_of(rank, config)
    dtypes = set()
    forward_backward = trainer.stages.forward_backward

    def watched(*args):
        losses = forward_backward(*args)
        dtypes.update((p.dtype, p.grad.dtype) for p in trainer.stages.parameters())
        return losses

    trainer.stages.forward_backward = watched
    return trainer.step()["loss"], dtypes


def test_bf16_computes_alone(pool, tmp_path, text):
    """Parameters and the sums of their gradients are fp32; the loss is near that in fp32."""
    configs = [
        small_run(tmp_path, ["parallel={pp: 2, cp: 2}", "batch.micro_steps=2", f"precision={p}"], text, 4) for p in ("fp32", "bf16")
    ]
    prepare(configs[0])
    (exact, _), *_ = pool.run(4, step_in, configs[0])
    for loss, dtypes in pool.run(4, step_in, configs[1]):
        assert dtypes == {(torch.float32, torch.float32)}
        assert 0 < abs(loss - exact) < 0.05


def test_a_resumed_run_keeps_to_its_config(pool, tmp_path, text):
    """Optimizer settings are the config's, not the checkpoint's; another data order or context is refused."""
    config = small_run(tmp_path, [], text)
    pool.run(1, train, config, False, 2)
    other = small_run(tmp_path, ["optimizer.weight_decay=0.5", "optimizer.betas=[0.5, 0.6]"], text)
    assert pool.run(1, resumed_settings, other)[0] == ((0.5, 0.6), 0.5)
    assert "its seed is 0, now 5" in pool.run(1, train, small_run(tmp_path, ["seed=5"], text), True)[0]
    assert "its data.context is 64, now 32" in pool.run(1, train, small_run(tmp_path, ["data.context=32"], text), True)[0]


def resumed_settings(rank, config):
    trainer = trainer_of(rank, config)
    trainer.resume()
    group = trainer.optimizer.param_groups[0]
    return tuple(group["betas"]), group["weight_decay"]


def test_what_a_run_leaves(pool, tmp_path, text):
    config = small_run(tmp_path, [], text)
    pool.run(1, train, config)
    assert [path.name for path in checkpoints(config.run)] == ["step-00000004", "step-00000006"]
    assert {"config.yaml", "metrics.jsonl", "loss.png", "experts.png", "tensorboard", "checkpoints"} == {
        p.name for p in config.run.iterdir()
    }
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


def test_a_profile_of_a_pipeline(pool, tmp_path, text):
    """Hidden states [b, l, d] and a number of the auxiliary loss go there, once a micro-step, and their gradients come back."""
    config = small_run(tmp_path, ["parallel={pp: 2, cp: 1}", "batch={sequences: 4, micro_steps: 2}"], text, 2)
    prepare(config)
    pool.run(2, profile, config, check_profile_folder(tmp_path / "profile"))
    for rank in range(2):
        traffic = json.loads((tmp_path / "profile" / f"traffic-rank{rank}.json").read_text())
        sent = sum(row["bytes"] for row in traffic["by operation and group"] if "send" in row["operation"])
        assert sent == 2 * 4 * (2 * config.data.context * config.model.d_model + 1)
        assert json.loads((tmp_path / "profile" / f"trace-rank{rank}.json").read_text())["traceEvents"]
