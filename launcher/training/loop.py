"""The training loop."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ...configs.errors import UserError
from ...configs.schema import Config
from ...kernels.cross_entropy import IGNORED
from ...models.hybrid import HybridModel, Losses
from ...models.parallelize import build_sharded_model
from ...parallel.gradients import clip, local_part, total_norm
from ...parallel.mesh import Mesh, build_mesh
from ..environment import Environment, installed
from .checkpoint import Checkpointer
from .data import Batch, Loader, Samples
from .metrics import Reporter, plot_losses, read_metrics
from .optimizer import build_optimizer, learning_rate
from .profile import WARM_UP, check_profile_folder, profiled
from .run_folder import check_run_folder, checkpoint_folder, checkpoints
from .sample import continue_greedily
from .token_files import TokenStream, prepare, read_tokenizer

PROMPT = "def main("


class Trainer:
    """One run on one rank: what the loop works with, and how far it is."""

    def __init__(self, config: Config, environment: Environment) -> None:
        torch.manual_seed(config.seed)
        self.config, self.environment = config, environment
        self.mesh: Mesh = build_mesh(config.parallel, environment.device.type)
        self.tokenizer = read_tokenizer(config)
        self.train_data = self._loader("train", config.seed)
        self.validation_data = self._loader("validation", None)
        self.model: HybridModel = build_sharded_model(config, self.mesh, environment.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.checkpointer = Checkpointer(config, self.model, self.optimizer)
        self.done = 0
        """Optimizer steps taken."""
        self.consumed = 0
        """Training samples seen."""

    def _loader(self, split: str, seed: int | None) -> Loader:
        samples = Samples(TokenStream(self.config.data.folder, split), self.config.data.context, seed)
        return Loader(samples, self.config, self.mesh, self.environment.device)

    def step(self) -> dict[str, float]:
        """One optimizer step -> its metrics. Raises UserError, the parameters untouched, when something is not finite."""
        started = time.perf_counter()
        batches = list(self.train_data.step(self.consumed))
        tokens = self._over_data(torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum())
        losses = self._accumulate_gradients(batches, tokens)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = total_norm(gradients)
        cross_entropy = self._over_data(losses[0]) / tokens
        auxiliary = losses[1] / len(batches)
        if not math.isfinite(float(norm)) or not math.isfinite(float(cross_entropy)):
            self._stop_not_finite(float(cross_entropy), batches)
        clip(gradients, norm, self.config.optimizer.clip)
        rate = learning_rate(self.done, self.config.optimizer.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.consumed += self.config.batch.sequences
        return {
            "loss": float(cross_entropy),
            "auxiliary_loss": float(auxiliary),
            "grad_norm": float(norm),
            "learning_rate": rate,
            "tokens_per_second": float(tokens) / (time.perf_counter() - started),
        }

    def _accumulate_gradients(self, batches: list[Batch], tokens: Tensor) -> Tensor:
        """Forward and backward of every micro-step -> [cross entropy summed over this rank's tokens, auxiliary losses]."""
        assert isinstance(self.model, FSDPModule)
        totals = torch.zeros(2, dtype=torch.float64, device=self.environment.device)
        for i, batch in enumerate(batches):
            self.model.set_requires_gradient_sync(i == len(batches) - 1)
            losses = self.model(*batch)
            assert isinstance(losses, Losses)
            (losses.cross_entropy / tokens + losses.auxiliary / len(batches)).backward()
            totals += torch.stack([losses.cross_entropy.detach(), losses.auxiliary.detach()])
        return totals

    @torch.no_grad()
    def validate(self) -> float:
        """Cross entropy per token over the first evaluation.sequences samples of the validation split, or all it has."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.environment.device)
        for batch in self.validation_data.first(min(self.config.evaluation.sequences, self.validation_data.samples.count)):
            losses = self.model(*batch)
            assert isinstance(losses, Losses)
            totals += torch.stack([losses.cross_entropy, (batch.labels != IGNORED).sum()])
        cross_entropy, tokens = self._over_data(totals)
        return float(cross_entropy / tokens)

    def save(self) -> Path:
        """A checkpoint of the state now."""
        return self.checkpointer.save(self.done, self.consumed)

    def resume(self) -> None:
        """Goes to the newest checkpoint of the run's folder, if there is one."""
        if found := checkpoints(self.config.run):
            self.done, self.consumed = self.checkpointer.load(found[-1])

    def continue_prompt(self) -> str:
        """A prompt and what the model thinks follows."""
        layout, device = self.train_data.layout, self.environment.device
        ids = self.tokenizer.encode(PROMPT, add_special_tokens=False).ids
        count = self.config.logging.sample_tokens
        return PROMPT + self.tokenizer.decode(continue_greedily(self.model, ids, count, layout, self.mesh, device))

    def _over_data(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.mesh.group("dp_cp"))
        return tensor

    def _stop_not_finite(self, loss: float, batches: list[Batch]) -> None:
        """Saves the state from before the step, unless it is damaged itself, and says where the first bad value arises."""
        where = self._first_bad_output(batches) or self._first_bad_gradient()
        self.optimizer.zero_grad()
        saved = checkpoint_folder(self.config.run, self.done).exists()
        if self.done > 0 and not any(self._anywhere([saved, _not_finite(self.model.parameters())])):
            self.save()
        good = checkpoints(self.config.run)
        kept = f"{good[-1]} has the state before" if good else "no checkpoint was written before"
        raise UserError(f"step {self.done + 1}: the loss is {loss}: not finite first in {where}; {kept}")

    @torch.no_grad()
    def _first_bad_output(self, batches: list[Batch]) -> str | None:
        """The first part, in order of the forward, whose output is not finite on some rank."""
        names = [name for name, _ in _named_parts(self.model)]
        with _watching(self.model) as bad:
            for batch in batches:
                self.model(*batch)
        flags = self._anywhere([name in bad for name in names])
        return next((f"the output of {name}" for name, flag in zip(names, flags, strict=True) if flag), None)

    def _first_bad_gradient(self) -> str:
        """The parameter group, in order of the backward, whose gradient is not finite on some rank."""
        parts = list(_named_parts(self.model))[::-1]
        flags = self._anywhere([_not_finite(p.grad for p in module.parameters()) for _, module in parts])
        return next(f"the gradients of {name}" for (name, _), flag in zip(parts, flags, strict=True) if flag)

    def _anywhere(self, flags: list[bool]) -> list[bool]:
        """Which of the flags are set on some rank."""
        set_ = torch.tensor(flags, dtype=torch.float32, device=self.environment.device)
        dist.all_reduce(set_, dist.ReduceOp.MAX)
        return [bool(flag) for flag in set_.tolist()]


def _not_finite(tensors: Iterable[Tensor | None]) -> bool:
    return any(not bool(local_part(tensor).isfinite().all()) for tensor in tensors if tensor is not None)


def _named_parts(model: HybridModel) -> Iterator[tuple[str, nn.Module]]:
    """The parameter groups that an error names, in order of the forward; together they have every parameter."""
    yield "embedding", model.embedding
    for i, layer in enumerate(model.layers):
        yield f"layers.{i}.mixer_norm", layer.mixer_norm
        yield f"layers.{i}.mixer ({layer.kinds.mixer})", layer.mixer
        if layer.kinds.feed_forward:
            yield f"layers.{i}.feed_forward_norm", layer.feed_forward_norm
            yield f"layers.{i}.feed_forward ({layer.kinds.feed_forward})", layer.feed_forward
    yield "head", model.head


@contextmanager
def _watching(model: HybridModel) -> Iterator[set[str]]:
    """Collects the names of the parts whose output is not finite."""
    bad: set[str] = set()

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if _not_finite(output if isinstance(output, tuple) else (output,)):
                bad.add(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in _named_parts(model)]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()


def run_training(config: Config, environment: Environment, resume: bool, stop_at: int | None, profile: Path | None = None) -> None:
    """Trains to schedule.steps, or `stop_at`, and leaves a checkpoint, metrics and a loss curve in the run's folder.

    profile: a folder for the trace of one step and what it sent.
    Every rank calls it. Raises UserError for what the user can mend.
    """
    if profile:
        check_profile_folder(profile)
    if environment.leads:
        check_run_folder(config.run, resume)
        prepare(config)
    while not config.data.folder.exists():
        # The leading rank is preparing the corpus, which may take longer than a barrier waits.
        time.sleep(1)
    dist.barrier()
    trainer = Trainer(config, environment)
    if resume:
        trainer.resume()
    last = min(config.schedule.steps, stop_at or config.schedule.steps)
    reporter = Reporter(config, trainer.done) if environment.leads else None
    try:
        if reporter:
            reporter.say(_describe(trainer))
        _train(trainer, last, reporter, profile)
        sample = trainer.continue_prompt() if config.logging.sample_tokens else None
        if reporter:
            reporter.progress.stop()
            reporter.say(_summary(trainer, sample))
    finally:
        if reporter:
            reporter.close()


def _train(trainer: Trainer, last: int, reporter: Reporter | None, profile: Path | None) -> None:
    config = trainer.config
    to_profile = min(trainer.done + WARM_UP, last - 1)
    if trainer.done == 0:
        _record_validation(trainer, reporter)
    while trainer.done < last:
        if profile and trainer.done == to_profile:
            with profiled(profile, trainer.environment.rank):
                metrics = trainer.step()
        else:
            metrics = trainer.step()
        if reporter:
            reporter.show(trainer.done, metrics)
            if trainer.done % config.logging.every == 0:
                reporter.write(trainer.done, metrics)
        ends = trainer.done == last
        if ends or trainer.done % config.evaluation.every == 0:
            _record_validation(trainer, reporter)
        if ends or trainer.done % config.checkpoint.every == 0:
            trainer.save()


def _record_validation(trainer: Trainer, reporter: Reporter | None) -> None:
    loss = trainer.validate()
    if reporter:
        reporter.write(trainer.done, {"validation_loss": loss})
        reporter.say(f"validation loss {loss:.4f} after step {trainer.done}")


def _describe(trainer: Trainer) -> str:
    config, parallel = trainer.config, trainer.config.parallel
    count = sum(p.numel() for p in trainer.model.parameters())
    axes = " x ".join(f"{axis} {trainer.mesh.size(axis)}" for axis in ("dp", "cp", "tp"))
    where = f"{trainer.environment.world} ranks ({axes}, {parallel.layout}, {trainer.environment.device.type})"
    text = f"{config.model.pattern * config.model.repeat}: {count / 1e6:.2f} M parameters on {where}, "
    text += f"{config.data.context} tokens of context, {config.precision}"
    if chosen := trainer.model.strategies:
        text += f"; states pass by {chosen.exchange}, attention by {chosen.attention}"
    return text + (f"; goes on after step {trainer.done}" if trainer.done else "")


def _summary(trainer: Trainer, sample: str | None) -> str:
    config, run = trainer.config, trainer.config.run
    losses = [line["validation_loss"] for line in read_metrics(run) if "validation_loss" in line]
    ends = [(losses[0], losses[-1])] if losses else []
    more = f" schedule.steps={2 * config.schedule.steps}" if trainer.done >= config.schedule.steps else ""
    lines = [
        "",
        f"Trained {trainer.done} of {config.schedule.steps} steps, {trainer.consumed * config.data.context:,} tokens.",
        *(f"Validation loss {first:.3f} -> {last:.3f} ({last / first:.0%} of the untrained model's)." for first, last in ends),
        f"  checkpoint   {checkpoint_folder(run, trainer.done)}",
        f"  loss curve   {plot_losses(run)}",
        f"  metrics      {run}/metrics.jsonl",
        f"  TensorBoard  {installed('tensorboard')} --logdir {run}/tensorboard",
        f"  go on        {installed('baton')} train {run}/config.yaml --resume{more}",
    ]
    if sample:
        lines += ["A continuation (greedy):", *(f"  | {line}" for line in sample.splitlines())]
    return "\n".join(lines)
