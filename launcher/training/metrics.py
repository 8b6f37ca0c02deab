"""What a run reports while it goes: metrics.jsonl, TensorBoard, a progress line, and at the end the loss curve."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ...configs.errors import UserError
from ...configs.schema import Config

LINES = 20
"""A run whose output is no terminal prints about this many lines instead of a progress line."""


class Reporter:
    """Writes what one run reports, and its config, to its folder; only the leading rank has one."""

    def __init__(self, config: Config, first_step: int) -> None:
        """Goes on after `first_step`: lines of later steps, which a run that ended without a checkpoint left, are dropped."""
        run, steps = config.run, config.schedule.steps
        try:
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(config.to_yaml())
        except OSError as error:
            raise UserError(f"run {run}: cannot be written: {error.strerror or error}") from None
        self.file = run / "metrics.jsonl"
        kept = [line for line in self._lines() if first_step and json.loads(line)["step"] <= first_step]
        self.file.write_text("".join(kept))
        self.stream = self.file.open("a", buffering=1)
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

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard; steps count from 1."""
        self.stream.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Moves the progress line on; without a terminal prints a line now and then."""
        text = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s  grad norm {values['grad_norm']:.2f}"
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(*zip(*_smooth(train), strict=True), color="tab:blue", label="training")
    axes.plot(*zip(*validation, strict=True), "o--", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="cross entropy (nats per token)", title=f"{run.name}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = run / "loss.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _smooth(points: list[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """An exponential moving average, its start corrected."""
    smoothed, total, norm = [], 0.0, 0.0
    for step, value in points:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append((step, total / norm))
    return smoothed
