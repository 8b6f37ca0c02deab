"""What a run reports of its experts: counts as they are, their imbalance for TensorBoard, and a plot."""

import json

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from baton.launcher.training.metrics import COLUMNS, Reporter, _relative_shares, plot_experts, read_metrics
from helpers import small_run

METRICS = {"loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 10.0}


def test_expert_tokens_are_written(tmp_path):
    config = small_run(tmp_path, [], None)
    reporter = Reporter(config, 0)
    reporter.write(1, METRICS, {"layers.1": [6, 2], "layers.3": [4, 4]})
    reporter.write(1, {"validation_loss": 3.0})
    reporter.close()
    assert read_metrics(config.run) == [
        {"step": 1, **METRICS, "expert_tokens": {"layers.1": [6, 2], "layers.3": [4, 4]}},
        {"step": 1, "validation_loss": 3.0},
    ]
    events = EventAccumulator(str(config.run / "tensorboard"))
    events.Reload()
    assert {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "layers" in tag} == {
        "imbalance/layers.1": [1.5],
        "imbalance/layers.3": [1.0],
    }


def test_shares_of_a_long_run_are_those_of_runs_of_steps():
    assert _relative_shares([[3, 1], [0, 4]]).tolist() == [[1.5, 0.5], [0.0, 2.0]]
    counts = np.tile([[6, 2], [2, 6]], (COLUMNS, 1))
    assert _relative_shares(counts.tolist()).tolist() == [[1.0, 1.0]] * COLUMNS


def test_a_plot_of_the_experts(tmp_path):
    lines = [{"step": step, "expert_tokens": {f"layers.{i}": [6, 2, 0, 4 * step] for i in (1, 3, 5)}} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert plot_experts(tmp_path) == tmp_path / "experts.png"
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_experts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **METRICS}))
    assert plot_experts(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
