"""AdamW over sharded parameters, by torch, apex or Transformer Engine, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...configs.errors import UserError
from ...configs.schema import OptimizerConfig, ScheduleConfig
from ...kernels import accelerators
from ...parallel.gradients import local_part

Groups = list[dict[str, Any]]


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW of parameters by name; vectors (norms, biases, D, dt_bias) and A_log are not decayed.

    torch's fused one, or apex's or Transformer Engine's where the config asks for it or, where that can run, leaves it open. Raises
    UserError where one is asked for and cannot run.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in named:
        # Mamba's A_log is a matrix, of a row for each channel.
        (kept if parameter.ndim <= 1 or name.endswith("A_log") else decayed).append(parameter)
    parameters = decayed + kept
    groups: Groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    project = _project(config.implementation, parameters)
    if project is None:
        return torch.optim.AdamW(groups, fused=True, **options)
    return FusedAdamW(groups, project, accelerators.fused_adam(project), **options)


def implementation(optimizer: torch.optim.Optimizer) -> str:
    """The config's name for what `build_optimizer` took."""
    return optimizer.project if isinstance(optimizer, FusedAdamW) else "torch"


def _project(asked: str, parameters: list[nn.Parameter]) -> accelerators.Name | None:
    """Whose FusedAdam steps the parameters; None: torch's optimizer does. Raises UserError where what is asked for cannot."""
    if asked == "torch":
        return None
    names = [name for name in accelerators.INSTALL if asked in ("auto", name)]
    obstacles = {name: _obstacle(name, parameters) for name in names}
    able = [name for name, obstacle in obstacles.items() if obstacle is None]
    if asked != "auto" and not able:
        raise UserError(f"optimizer.implementation is {asked}, and {obstacles[names[0]]}; allowed: torch, auto")
    return able[0] if able else None


def _obstacle(name: accelerators.Name, parameters: list[nn.Parameter]) -> str | None:
    """Why its FusedAdam cannot step these parameters."""
    if any(p.device.type != "cuda" for p in parameters):
        return "its FusedAdam runs on GPUs alone"
    if any(p.dtype == torch.float64 for p in parameters):
        return "its FusedAdam does not compute in precision fp64"
    return None if accelerators.fused_adam(name) else accelerators.INSTALL[name]


class FusedAdamW(torch.optim.Optimizer):
    """apex's FusedAdam, or Transformer Engine's, on this rank's shards of DTensors, for they take plain tensors alone.

    `param_groups` and `state` are those of the DTensors, with what torch's AdamW keeps (step, exp_avg, exp_avg_sq), so that either
    reads what the other has saved; a state is to be loaded in place.
    """

    def __init__(self, groups: Groups, project: accelerators.Name, fused_adam: Any, **options: Any) -> None:
        """groups have params and weight_decay; options are lr, betas and eps. fused_adam: the project's class."""
        super().__init__(groups, options)
        self.project = project
        self.steps = torch.zeros(())
        """Taken so far. One for all parameters, and on the host, since they want a number."""
        self.fused: list[tuple[dict[str, Any], dict[nn.Parameter, nn.Parameter], Any]] = []
        """Of each group that has something on this rank: the group, the shard of each parameter, and the optimizer of these."""
        for group in self.param_groups:
            shards = {}
            for p in group["params"]:
                self.state[p] = {"step": self.steps, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                # They take no group without tensors, and lose tensors beside an empty one without a word.
                if local_part(p).numel():
                    shards[p] = nn.Parameter(local_part(p.detach()))
            if shards:
                fused = fused_adam(list(shards.values()), weight_decay=group["weight_decay"], adam_w_mode=True, **options)
                for p, shard in shards.items():
                    fused.state[shard] = {key: local_part(self.state[p][key]) for key in ("exp_avg", "exp_avg_sq")}
                self.fused.append((group, shards, fused))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step by the gradients of the DTensors."""
        for group, shards, fused in self.fused:
            # They count steps here; a loaded state has another number.
            fused.param_groups[0].update(lr=group["lr"], step=int(self.steps))
            for p, shard in shards.items():
                shard.grad = None if p.grad is None else local_part(p.grad)
            fused.step()
            fused.zero_grad()
        self.steps += 1


def learning_rate(step: int, highest: float, schedule: ScheduleConfig) -> float:
    """For optimizer step `step`, from 0: a linear warm-up to `highest`, then the decay to its fraction `final`."""
    if step < schedule.warmup:
        return highest * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - 1 - schedule.warmup)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, progress))),
        "linear": max(0.0, 1 - progress),
        "constant": 1.0,
    }[schedule.decay]
    return highest * (schedule.final + (1 - schedule.final) * remaining)
