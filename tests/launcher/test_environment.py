"""How many processes a config is started with."""

import pytest
import torch

from baton.launcher.environment import choose_processes
from helpers import tiny_config


@pytest.mark.parametrize(
    ("options", "without", "on_8_gpus"),
    [
        (["parallel.cp=1"], 2, 2),
        (["parallel.cp=auto"], 2, 6),
        (["parallel={cp: 3, tp: 2}"], 6, 6),
        (["parallel={cp: 2, pp: 2}", "batch.micro_steps=2"], 4, 4),
        (["parallel={cp: auto, ep: 4}"], 4, 4),
        (["parallel={cp: 1, dp: auto, ep: 2, replicate: 2}", "batch.sequences=8"], 4, 8),
        (["parallel={cp: 1, dp: 1, tp: 1}"], 1, 1),
    ],
    ids=str,
)
def test_auto(monkeypatch, options, without, on_8_gpus):
    """Without GPUs as few as do what is asked, 2 where more are possible; else as many GPUs as fit."""
    config = tiny_config(options, world=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_processes("auto", config) == without
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert choose_processes("auto", config) == on_8_gpus
