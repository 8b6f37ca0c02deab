"""AdamW over sharded parameters, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from ...configs.schema import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW; vectors (norms, biases, A_log, D, dt_bias) are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
