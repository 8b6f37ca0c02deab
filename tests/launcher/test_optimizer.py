"""AdamW: what is decayed, at which rate, and apex's in torch's place, by something that keeps to its interface."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from baton.configs.errors import UserError
from baton.configs.schema import OptimizerConfig, ScheduleConfig
from baton.kernels import accelerators
from baton.launcher.environment import Environment
from baton.launcher.training import loop, optimizer
from baton.launcher.training.optimizer import FusedAdamW, build_optimizer, implementation, learning_rate
from baton.launcher.training.token_files import prepare
from baton.models.hybrid import build_model
from baton.parallel.gradients import local_part
from helpers import relative_error, small_run


class FusedAdam(torch.optim.Optimizer):
    """apex's on a CPU: plain tensors that are not empty, the count of steps in the group, its own kinds of errors."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["params"][0].device  # noqa: B018  # as apex: a group has tensors
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int
            stepped = [p for p in group["params"] if p.grad is not None]
            for p in stepped:
                assert type(p.grad) is torch.Tensor
                assert p.numel() > 0
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            averages, squares = ([self.state[p][key] for p in stepped] for key in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            adamw(
                [p.data for p in stepped],
                [p.grad for p in stepped],
                averages,
                squares,
                [],
                [torch.tensor(group["step"] - 1.0) for _ in stepped],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def with_stand_in(named, config):
    """As build_optimizer, where apex can run."""
    groups = build_optimizer(named, config).param_groups
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    return FusedAdamW(groups, "apex", FusedAdam, lr=config.lr, betas=config.betas, eps=config.eps)


def train(rank, config, build, resume, last):
    """Steps up to the last, where a checkpoint is left -> parameters here, and how many of them are empty."""
    loop.build_optimizer = build
    try:
        trainer = loop.Trainer(config, Environment(rank, dist.get_world_size(), torch.device("cpu")))
    finally:
        loop.build_optimizer = build_optimizer
    if resume:
        trainer.resume()
    while trainer.done < last:
        trainer.step()
    trainer.save()
    trainer.checkpointer.finish()
    assert all(p.grad is None for p in trainer.stages.parameters())
    parameters = [local_part(p.detach()).clone() for p in trainer.stages.parameters()]
    return [p for p in parameters if p.numel()], sum(p.numel() == 0 for p in parameters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}; " for i in range(700)))
    return folder


def sharded(folder, name):
    """Rows that do not divide, some ranks without any."""
    options = ["precision=fp64", "parallel.cp=4", "model.mamba2.head_dim=32", "model.vocab_size=290"]
    return small_run(folder, options, folder / "text.txt", 4, name)


@pytest.fixture(scope="module")
def straight(pool, folder):
    """What torch's own leaves after three steps."""
    config = sharded(folder, "straight")
    prepare(config)
    return pool.run(4, train, config, build_optimizer, False, 3)


@pytest.mark.slow
@pytest.mark.parametrize("order", [(with_stand_in,) * 2, (with_stand_in, build_optimizer), (build_optimizer, with_stand_in)])
def test_apex_steps_as_torch_does(pool, folder, straight, order):
    """Three steps with a checkpoint after two, which either reads of the other."""
    config = sharded(folder, "-".join(build.__name__ for build in order))
    pool.run(4, train, config, order[0], False, 2)
    found = pool.run(4, train, config, order[1], True, 3)
    assert max(empty for _, empty in found) > 4
    for (parameters, _), (expected, _) in zip(found, straight, strict=True):
        for p, like in zip(parameters, expected, strict=True):
            assert relative_error(p, like) < 1e-12


def test_a_rank_without_any_row():
    """apex would lose tensors beside an empty one, and takes no group without tensors."""
    empty, vector = torch.nn.Parameter(torch.empty(0, 3)), torch.nn.Parameter(torch.ones(2))
    options = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": [empty], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    built = FusedAdamW(groups, "apex", FusedAdam, **options)
    empty.grad, vector.grad = torch.empty(0, 3), torch.ones(2)
    built.step()
    assert vector.tolist() == pytest.approx([0.5, 0.5])
    assert set(built.state) == {empty, vector}
    FusedAdamW([{"params": [empty], "weight_decay": 0.1}], "apex", FusedAdam, **options).step()


def test_which_one_is_taken(monkeypatch):
    """auto: one that can run; by name: an error in one line where it cannot."""
    named = {"w": torch.nn.Parameter(torch.ones(2, 2))}.items()
    for name in ("auto", "torch"):
        built = build_optimizer(named, OptimizerConfig(implementation=name))
        assert implementation(built) == "torch"
        assert built.param_groups[0]["fused"]
    for name in ("apex", "transformer_engine"):
        with pytest.raises(UserError) as caught:
            build_optimizer(named, OptimizerConfig(implementation=name))
        assert (
            str(caught.value) == f"optimizer.implementation is {name}, and its FusedAdam runs on GPUs alone; allowed: torch, auto"
        )
    on_gpu = {"device": torch.device("cuda"), "dtype": torch.float32}
    assert "git clone https://github.com/NVIDIA/apex" in optimizer._obstacle("apex", [SimpleNamespace(**on_gpu)])
    assert "transformer_engine[pytorch]" in optimizer._obstacle("transformer_engine", [SimpleNamespace(**on_gpu)])
    monkeypatch.setattr(accelerators, "fused_adam", lambda name: FusedAdam)
    assert optimizer._obstacle("apex", [SimpleNamespace(**on_gpu)]) is None
    assert "fp64" in optimizer._obstacle("apex", [SimpleNamespace(**on_gpu | {"dtype": torch.float64})])
    taken = {"auto": "apex", "apex": "apex", "transformer_engine": "transformer_engine", "torch": "torch"}
    monkeypatch.setattr(optimizer, "_obstacle", lambda name, parameters: None)
    for name, expected in taken.items():
        assert implementation(build_optimizer(named, OptimizerConfig(implementation=name))) == expected
    monkeypatch.setattr(optimizer, "_obstacle", lambda name, parameters: "x" if name == "apex" else None)
    assert implementation(build_optimizer(named, OptimizerConfig())) == "transformer_engine"


def test_vectors_are_not_decayed():
    config = small_run(Path("nowhere"), ["model.pattern=M-mEM-*E"], None)
    model = build_model(config.model, 0)
    groups = build_optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    decayed, kept = (group["params"] for group in groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in kept} == {"A_log", "D", "dt_bias", "x_bias", "bc_bias", "weight"}
    assert all("norm" in names[id(p)] for p in kept if names[id(p)].endswith("weight"))
    assert not any(names[id(p)].endswith("A_log") for p in decayed)
    assert len(decayed) + len(kept) == len(names)


def test_learning_rate():
    schedule = ScheduleConfig(steps=11, warmup=2, decay="linear", final=0.2)
    rates = [learning_rate(step, 1.0, schedule) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.6)
    assert rates[10] == pytest.approx(0.2)
    assert learning_rate(10, 1.0, schedule.model_copy(update={"decay": "cosine"})) == pytest.approx(0.2)
    assert learning_rate(10, 1.0, schedule.model_copy(update={"decay": "constant"})) == 1.0
