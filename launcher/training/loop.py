"""The training loop."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ...configs.errors import UserError
from ...configs.schema import Config
from ...kernels import accelerators
from ...kernels.cross_entropy import IGNORED
from ...models.hybrid import Losses, MicroStep
from ...models.stages import Stages, build_stages
from ...parallel.gradients import clip, total_norm
from ...parallel.mesh import Mesh, build_mesh
from ..checkpoints.manifest import find_checkpoint
from ..environment import Environment
from .checkpoint import Checkpointer
from .data import Loader, Samples
from .description import count_parameters, describe_mesh, describe_pipeline, summarize
from .diagnosis import anywhere, first_bad_gradient, first_bad_output, not_finite
from .metrics import Reporter
from .optimizer import build_optimizer, implementation, learning_rate
from .profile import WARM_UP, check_profile_folder, profiled
from .run_folder import check_run_folder, checkpoint_folder, checkpoints
from .sample import continue_greedily
from .throughput import Throughput
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
        self.stages: Stages = build_stages(config, self.mesh, environment.device)
        self.optimizer = build_optimizer(self.stages.named_parameters(), config.optimizer)
        self.throughput = Throughput(config, environment.world, environment.device)
        self.checkpointer = Checkpointer(config, self.stages, self.optimizer)
        self.done = 0
        """Optimizer steps taken."""
        self.consumed = 0
        """Training samples seen."""
        self.loads: dict[str, Tensor] = {}
        """How many tokens chose each expert in the last step, [E] for each MoE layer here."""

    def _loader(self, split: str, seed: int | None) -> Loader:
        samples = Samples(TokenStream(self.config.data.folder, split), self.config.data.context, seed)
        return Loader(samples, self.config, self.mesh, self.environment.device)

    def step(self) -> dict[str, float]:
        """One optimizer step -> its metrics. Raises UserError, the parameters untouched, when something is not finite."""
        started = time.perf_counter()
        micro_steps = list(self.train_data.step(self.consumed))
        tokens, pairs = self._sum(torch.stack([self._counts(micro_step) for micro_step in micro_steps]).sum(0), "dp_cp")
        losses = self.stages.forward_backward(micro_steps, tokens)
        norm = total_norm(self.stages.gradients())
        cross_entropy = self._sum(losses.cross_entropy, "dp_cp") / tokens
        auxiliary = losses.auxiliary / len(micro_steps)
        if not math.isfinite(float(norm)) or not math.isfinite(float(cross_entropy)):
            self._stop_not_finite(float(cross_entropy), micro_steps)
        # Also the copy of a tied embedding, which the norm counts once.
        clip((p.grad for p in self.stages.parameters() if p.grad is not None), norm, self.config.optimizer.clip)
        rate = learning_rate(self.done, self.config.optimizer.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._rebalance_experts()
        self.done += 1
        self.consumed += self.config.batch.sequences
        return {
            "loss": float(cross_entropy),
            "auxiliary_loss": float(auxiliary),
            "grad_norm": float(norm),
            "learning_rate": rate,
            **self.throughput.of_step(float(tokens), float(pairs) / self.mesh.size("cp"), time.perf_counter() - started),
        }

    def _counts(self, micro_step: MicroStep) -> Tensor:
        """Tokens with a label, and pairs that attention sees, which every cp rank counts; [2]."""
        tokens = _labelled(micro_step)
        return torch.stack([tokens, tokens.new_tensor(self.throughput.attended(micro_step))])

    def _rebalance_experts(self) -> None:
        for name, moe in self.stages.named_moes():
            self.loads[name.removesuffix(".feed_forward")] = moe.load.clone()
            moe.rebalance()

    def expert_tokens(self) -> dict[str, list[int]]:
        """How many tokens chose each expert in the last step, by layer of the whole model; all ranks call it and get the same."""
        model = self.config.model
        names = [f"layers.{i}" for i, layer in enumerate(model.layers) if layer.feed_forward == "moe"]
        counts = torch.zeros(len(names), model.moe.experts, dtype=torch.int64, device=self.environment.device)
        for name, load in self.loads.items():
            counts[names.index(name)] = load.long()
        return dict(zip(names, self._sum(counts, "pp").tolist(), strict=True))

    @torch.no_grad()
    def validate(self) -> float:
        """Cross entropy per token over the first evaluation.sequences samples of the validation split, or all it has."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.environment.device)
        count = min(self.config.evaluation.sequences, self.validation_data.samples.count)
        with self.stages.evaluation():
            for micro_step in self.validation_data.first(count):
                losses = self.stages.forward(micro_step)
                if isinstance(losses, Losses):
                    totals += torch.stack([losses.cross_entropy, _labelled(micro_step)])
        cross_entropy, tokens = self._sum(totals, "pp_dp_cp")
        return float(cross_entropy / tokens)

    def save(self) -> Path:
        """A checkpoint of the state now."""
        return self.checkpointer.save(self.done, self.consumed)

    def resume(self) -> None:
        """Goes to the newest checkpoint of the run's folder, if there is one."""
        if found := checkpoints(self.config.run):
            self.done, self.consumed = self.checkpointer.load(found[-1])

    def start(self) -> None:
        """Takes the weights that the config starts from, if it names any."""
        if self.config.start_from is not None:
            self.checkpointer.load_weights(find_checkpoint(self.config.start_from))

    def continue_prompt(self) -> str:
        """A prompt and what the model thinks follows."""
        ids = self.tokenizer.encode(PROMPT, add_special_tokens=False).ids
        count = self.config.logging.sample_tokens
        with self.stages.evaluation():
            return PROMPT + self.tokenizer.decode(continue_greedily(self.stages, ids, count))

    def describe(self) -> str:
        """What runs, where and how, in a line."""
        config, stages = self.config, self.stages
        text = f"{config.model.pattern * config.model.repeat}: {count_parameters(config.model) / 1e6:.2f} M parameters on "
        text += f"{self.environment.world} ranks ({describe_mesh(config, self.mesh)}, {self.environment.device.type}), "
        text += f"{config.data.context} tokens of context, {config.precision}, AdamW by {implementation(self.optimizer)}; "
        text += self.throughput.describe()
        if config.parallel.pp > 1:
            text += f"; {describe_pipeline(config)}"
        if stages.strategies:
            text += f"; states pass by {stages.strategies.exchange}, attention by {stages.strategies.attention}"
        if found := accelerators.found():
            text += f"; installed: {', '.join(found)}"
        return text + (f"; goes on after step {self.done}" if self.done else "")

    def _sum(self, tensor: Tensor, axis: str) -> Tensor:
        dist.all_reduce(tensor, group=self.mesh.group(axis))
        return tensor

    def _stop_not_finite(self, loss: float, micro_steps: list[MicroStep]) -> None:
        """Saves the state from before the step, unless it is damaged itself, and says where the first bad value arises."""
        where = first_bad_output(self.stages, micro_steps) or first_bad_gradient(self.stages)
        self.optimizer.zero_grad()
        lost = _error_of(self.checkpointer.finish)
        saved = checkpoint_folder(self.config.run, self.done).exists()
        damaged = not_finite(self.stages.parameters())
        if self.done > 0 and not any(anywhere([saved, damaged], self.environment.device)):
            lost += _error_of(self.save) + _error_of(self.checkpointer.finish)
        good = checkpoints(self.config.run)
        kept = f"{good[-1]} has the state before" if good else "no checkpoint was written before"
        raise UserError(f"step {self.done + 1}: the loss is {loss}: not finite first in {where}; {kept}{lost}")


def _error_of(saving: Callable[[], object]) -> str:
    """What a message about something worse adds of a checkpoint that could not be written."""
    try:
        saving()
    except UserError as error:
        return f"; {error}"
    return ""


def _labelled(micro_step: MicroStep) -> Tensor:
    """How many of the micro-step's tokens here have a label, a scalar."""
    assert micro_step.labels is not None
    return (micro_step.labels != IGNORED).sum()


def run_training(config: Config, environment: Environment, resume: bool, stop_at: int | None, profile: Path | None = None) -> None:
    """Trains to schedule.steps, or `stop_at`, and leaves checkpoints, metrics and plots in the run's folder.

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
    if trainer.done == 0:
        trainer.start()
    last = min(config.schedule.steps, stop_at or config.schedule.steps)
    reporter = Reporter(config, trainer.done) if environment.leads else None
    try:
        if reporter:
            reporter.say(trainer.describe())
        _train(trainer, last, reporter, profile)
        sample = trainer.continue_prompt() if config.logging.sample_tokens else None
        if reporter:
            reporter.progress.stop()
            reporter.say(summarize(config, trainer.done, trainer.consumed, sample))
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
            _record_step(trainer, metrics, reporter)
        ends = trainer.done == last
        if ends or trainer.done % config.evaluation.every == 0:
            _record_validation(trainer, reporter)
        if ends or trainer.done % config.checkpoint.every == 0:
            trainer.save()
    trainer.checkpointer.finish()


def _record_step(trainer: Trainer, metrics: dict[str, float], reporter: Reporter | None) -> None:
    expert_tokens = trainer.expert_tokens()
    if reporter:
        reporter.write(trainer.done, metrics, expert_tokens)


def _record_validation(trainer: Trainer, reporter: Reporter | None) -> None:
    loss = trainer.validate()
    if reporter:
        reporter.write(trainer.done, {"validation_loss": loss})
        reporter.say(f"validation loss {loss:.4f} after step {trainer.done}")
