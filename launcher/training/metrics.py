"""What a run reports while it goes: metrics.jsonl, TensorBoard, a progress line, and at the end the loss curve."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ...configs.errors import UserError
from ...configs.schema import Config

LINES = 20
"""A run whose output is no terminal prints about this many lines instead of a progress line."""
COLUMNS = 400
"""Columns at most in which the plot of the experts shows steps."""


class Reporter:
    """Writes what one run reports, and its config, to its folder; only the leading rank has one."""

    def __init__(self, config: Config, first_step: int) -> None:
        """Goes on after `first_step`: lines of later steps, which a run that ended without a checkpoint left, are dropped."""
        run, steps = config.run, config.schedule.steps
        try:
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(config.to_yaml())
            self.file = run / "metrics.jsonl"
            kept = [line for line in self._lines() if first_step and json.loads(line)["step"] <= first_step]
            partial = self.file.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(self.file)
            self.stream = self.file.open("a", buffering=1)
        except OSError as error:
            raise UserError(f"run {run}: cannot be written: {error.strerror or error}") from None
        self.events = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self.steps = steps
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self.task = self.progress.add_task("step", total=steps, completed=first_step, text="")
        self.progress.start()

    def write(self, step: int, values: dict[str, float], expert_tokens: dict[str, list[int]] | None = None) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard; steps count from 1.

        expert_tokens, how many tokens chose each expert, by layer, are for TensorBoard the largest over the mean.
        """
        line = {"step": step, **values} | ({"expert_tokens": expert_tokens} if expert_tokens else {})
        self.stream.write(json.dumps(line) + "\n")
        imbalance = {
            f"imbalance/{layer}": max(counts) * len(counts) / sum(counts) for layer, counts in (expert_tokens or {}).items()
        }
        for name, value in (values | imbalance).items():
            self.events.add_scalar(name, value, step)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Moves the progress line on; without a terminal prints a line now and then."""
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        text = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s{mfu}  grad norm {values['grad_norm']:.2f}"
        self.progress.update(self.task, completed=step, text=text)
        if self.progress.disable and (step % max(1, self.steps // LINES) == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """A line above the progress."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Flushes everything."""
        self.progress.stop()
        self.stream.close()
        self.events.close()

    def _lines(self) -> list[str]:
        """Whole lines of the file so far; one that a crash cut off is dropped."""
        if not self.file.exists():
            return []
        return [line for line in self.file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plot_losses(run: Path) -> Path:
    """Draws metrics.jsonl's training and validation loss to loss.png."""
    plt = pyplot()
    lines = read_metrics(run)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(*zip(*_smooth(train), strict=True), color="tab:blue", label="training")
    axes.plot(*zip(*validation, strict=True), "o--", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="cross entropy (nats per token)", title=f"{run.name}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    return _save(figure, run / "loss.png")


def plot_experts(run: Path) -> Path | None:
    """Draws each expert's share of the tokens over the steps to experts.png, a panel a layer; None for a model without experts."""
    lines = [line for line in read_metrics(run) if "expert_tokens" in line]
    if not lines:
        return None
    plt = pyplot()
    shares = {layer: _relative_shares([line["expert_tokens"][layer] for line in lines]) for layer in lines[0]["expert_tokens"]}
    columns = math.ceil(math.sqrt(len(shares) / 2))
    rows = math.ceil(len(shares) / columns)
    size = 4 + 4 * columns, 0.6 + 2.2 * rows
    figure, panels = plt.subplots(rows, columns, figsize=size, dpi=120, sharex=True, squeeze=False, layout="constrained")
    first, last = lines[0]["step"], lines[-1]["step"]
    for panel, (layer, share) in zip(panels.flat, shares.items(), strict=False):
        edges = np.linspace(first - 0.5, last + 0.5, len(share) + 1), np.arange(share.shape[1] + 1) - 0.5
        image = panel.pcolormesh(*edges, np.log2(share.T.clip(1e-9)), vmin=-2, vmax=2, cmap="RdBu_r")
        panel.set(ylabel="expert", title=layer)
        panel.yaxis.get_major_locator().set_params(integer=True)
    for panel in panels.flat[len(shares) :]:
        panel.set_axis_off()
    for panel in panels[-1]:
        panel.set_xlabel("step")
    bar = figure.colorbar(image, ax=panels, label="share of tokens / even share", extend="both", ticks=range(-2, 3))
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    figure.suptitle(f"{run.name}: tokens by expert")
    return _save(figure, run / "experts.png")


def _relative_shares(counts: list[list[int]]) -> np.ndarray:
    """Counts of each step and expert -> [at most COLUMNS, experts]: over runs of steps, relative to an even share."""
    parts = np.array_split(np.array(counts, dtype=float), min(len(counts), COLUMNS))
    sums = np.stack([part.sum(0) for part in parts])
    return sums / sums.mean(1, keepdims=True)


def pyplot() -> Any:
    """matplotlib where there is no screen; it is imported only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    pyplot().close(figure)
    return path


def _smooth(points: list[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """An exponential moving average, its start corrected."""
    smoothed, total, norm = [], 0.0, 0.0
    for step, value in points:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append((step, total / norm))
    return smoothed
