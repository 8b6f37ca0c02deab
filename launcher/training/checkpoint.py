"""Sharded checkpoints: written to a folder of another name, renamed when complete, listed file by file in a manifest."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ... import __version__
from ...configs.errors import UserError
from ...configs.schema import Config
from ...models.stages import Stages
from ...parallel.failures import RankGone, naming_the_missing
from ..checkpoints.manifest import MANIFEST, ORIGINAL, read_manifest
from ..checkpoints.model import check_model
from ..checkpoints.tensors import reason
from .run_folder import checkpoint_folder, checkpoints
from .token_files import tokenizer_digest

PARTIAL = ".partial"


class Checkpointer:
    """Saves and loads the parameters, buffers and optimizer of all stages, the CPU's random state, and how far the run is.

    Tensors have their names in the whole model and say which part of it they are, so that any mesh, with any layout and cuts of
    a pipeline, reads what any other has written.
    """

    def __init__(self, config: Config, stages: Stages, optimizer: torch.optim.Optimizer) -> None:
        """All ranks call it."""
        self.config, self.stages, self.optimizer = config, stages, optimizer
        self.group = _group_beside_training()
        on_gpu = torch.cuda.is_available()
        # Pinned memory is slow to get, so the stager stays, and the host's copy of the state with it.
        self.stager = DefaultStager(
            StagingOptions(use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu)
        )
        self.unfinished: tuple[Path, Future[Any]] | None = None
        self.original: dict[str, bytes] = {}
        """Files of Hugging Face's that what was loaded came with, by name: the checkpoint may go before the next is written."""

    def save(self, step: int, consumed: int) -> Path:
        """Writes the state after `step` steps and `consumed` samples; older checkpoints beyond checkpoint.keep go.

        With checkpoint.asynchronous the state is copied here, and written beside what follows until `finish`. Raises UserError,
        the same on all ranks, where this one cannot be written, and where the one before was not, after this one if it can.
        """
        try:
            self.finish()
        except UserError:
            with suppress(UserError):
                self._write(step, consumed, asynchronous=False)
            raise
        return self._write(step, consumed, self.config.checkpoint.asynchronous)

    def _write(self, step: int, consumed: int, asynchronous: bool) -> Path:
        target = checkpoint_folder(self.config.run, step)
        writer = _Writer(target, lambda folder: self._describe(folder, step, consumed), self.config.checkpoint.keep)
        if asynchronous:
            writing = dcp.async_save(self._state(), storage_writer=writer, process_group=self.group, async_stager=self.stager)
            assert isinstance(writing, Future)
            self.unfinished = target, writing
        else:
            with _writing(target):
                dcp.save(self._state(), storage_writer=writer, process_group=self.group)
        return target

    def finish(self) -> None:
        """Waits until the last `save` is complete. Raises UserError where it cannot be written."""
        if self.unfinished is not None:
            (target, writing), self.unfinished = self.unfinished, None
            with _writing(target):
                writing.result()

    def load(self, folder: Path) -> tuple[int, int]:
        """Reads a checkpoint in place -> steps and samples done. Raises UserError: truncated, or another model's."""
        self.finish()
        facts = self._check(folder)
        self._note_original(folder)
        _create_states(self.optimizer)
        state = self._state()
        if facts["world"] != dist.get_world_size():
            del state["random"]
        self._read(state, folder)
        if "random" in state:
            torch.set_rng_state(state["random"][str(dist.get_rank())])
        return facts["step"], facts["consumed"]

    def load_weights(self, folder: Path) -> None:
        """Reads the parameters and buffers of a checkpoint in place, whatever wrote it, and nothing else.

        Raises UserError: truncated, another model's, or trained with another tokenizer.
        """
        digest = read_manifest(folder)["tokenizer"]
        check_model(folder, self.config.model)
        self._note_original(folder)
        if digest is not None and digest != tokenizer_digest(self.config.data.folder):
            raise UserError(f"{folder} was trained with another tokenizer than {self.config.data.folder}/tokenizer.json")
        tensors = {**dict(self.stages.named_parameters()), **dict(self.stages.named_buffers())}
        self._read({"model": tensors}, folder)

    def _note_original(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            self.original = {path.name: path.read_bytes() for path in (folder / ORIGINAL).glob("*")}

    def _read(self, state: dict[str, dict[str, Tensor]], folder: Path) -> None:
        try:
            with naming_the_missing("checkpoint"):
                state["model"] = _without_new_buffers(state["model"], folder)
                dcp.load(state, checkpoint_id=folder, process_group=self.group)
        except RankGone:
            raise
        except (Exception, CheckpointException) as error:  # the library's own is no Exception
            raise UserError(f"{folder}: cannot be read: {reason(error)}") from None

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that are read in place. Settings such as the learning rate are not among them: the config's count."""
        parameters = dict(self.stages.named_parameters())
        for name, parameter in parameters.items():
            if parameter not in self.optimizer.state:
                raise ValueError(f"{name} has no optimizer state: it is not what the optimizer works on, or had no gradient yet")
        return {
            "model": {**parameters, **dict(self.stages.named_buffers())},
            "optimizer": {f"{name}.{key}": t for name, p in parameters.items() for key, t in self.optimizer.state[p].items()},
            "random": {str(dist.get_rank()): torch.get_rng_state()},
        }

    def _describe(self, folder: Path, step: int, consumed: int) -> None:
        """What is needed to use the checkpoint, and last the manifest, which makes it complete."""
        _write_durably(folder / "config.yaml", self.config.to_yaml())
        shutil.copyfile(self.config.data.folder / "tokenizer.json", folder / "tokenizer.json")
        if self.original:
            (folder / ORIGINAL).mkdir()
        for name, content in self.original.items():
            (folder / ORIGINAL / name).write_bytes(content)
        facts = {
            "step": step,
            "consumed": consumed,
            "world": dist.get_world_size(),
            "tokenizer": tokenizer_digest(folder),
            "data": self._data_facts(),
            "baton": __version__,
            "torch": torch.__version__,
            "files": {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()},
        }
        _write_durably(folder / MANIFEST, json.dumps(facts, indent=1))

    def _data_facts(self) -> dict[str, int]:
        """What the position in the data depends on."""
        sizes = {f"size of train{end}": (self.config.data.folder / f"train{end}").stat().st_size for end in (".bin", ".idx")}
        return {"seed": self.config.seed, "data.context": self.config.data.context, **sizes}

    def _check(self, folder: Path) -> dict[str, Any]:
        facts = read_manifest(folder)
        check_model(folder, self.config.model)
        if facts["tokenizer"] != tokenizer_digest(self.config.data.folder):
            raise UserError(f"{folder} was trained with another tokenizer than {self.config.data.folder}/tokenizer.json")
        for key, value in self._data_facts().items():
            if facts["data"][key] != value:
                raise UserError(f"{folder} was trained on other data: its {key} is {facts['data'][key]}, now {value}")
        return facts


class _Writer(FileSystemWriter):
    """Writes a checkpoint's files beside its place. What fails on one rank, also at the end, is raised on all of them.

    The one that coordinates makes the checkpoint complete when all have written: then it has its name, and older ones may go.
    """

    def __init__(self, target: Path, describe: Callable[[Path], None], keep: int) -> None:
        super().__init__(target.with_name(target.name + PARTIAL))
        self.target, self.describe, self.keep = target, describe, keep

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        """Removes what was left unfinished before: all ranks have the folder, and none has written yet."""
        for unfinished in self.target.parent.glob(f"*{PARTIAL}"):
            if unfinished != Path(self.path):
                shutil.rmtree(unfinished)
        for left in Path(self.path).iterdir():
            left.unlink()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        """Writes this rank's tensors. Raises OSError also where PyTorch's file format fails over it and says something else."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise _first_cause(error) from None

    def finish(self, metadata: dcp.Metadata, results: list[list[Any]]) -> None:
        """Gives the checkpoint its manifest and its name."""
        super().finish(metadata, results)
        folder = Path(self.path)
        written = {result.storage_data.relative_path for rank in results for result in rank}
        if missing := written - {path.name for path in folder.iterdir()}:
            where = "allowed: a run's folder on a file system that all hosts share"
            raise UserError(f"{len(missing)} of {len(written)} files, such as {min(missing)}, are on another host; {where}")
        self.describe(folder)
        os.rename(folder, self.target)
        for old in checkpoints(self.target.parent.parent)[: -self.keep]:
            # Its files do not go one by one under a name that says it is complete.
            going = old.with_name(old.name + PARTIAL)
            os.rename(old, going)
            shutil.rmtree(going, ignore_errors=True)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Around what raises the errors of a checkpoint's writing: a UserError in their place, and no part of it stays."""
    try:
        with naming_the_missing("checkpoint"):
            yield
    except CheckpointException as error:
        if dist.get_rank() == 0:
            shutil.rmtree(target.with_name(target.name + PARTIAL), ignore_errors=True)
        raise UserError(f"{target}: cannot be written: {reason(error)}") from None


def _write_durably(path: Path, text: str) -> None:
    """Older checkpoints go soon after: what makes this one complete must not be lost with the machine's memory."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _first_cause(error: BaseException) -> BaseException:
    """The OSError that an error came of while it was handled, or the error."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__context__
    return seen or error


def _group_beside_training() -> dist.ProcessGroup:
    """All ranks, on the host: collectives of the thread that writes must not meet those of training."""
    default = dist.distributed_c10d._get_default_group()
    limit = default._get_backend(default._device_types[0]).options._timeout
    return dist.new_group(backend="gloo", timeout=limit, group_desc="checkpoint")


def _create_states(optimizer: torch.optim.Optimizer) -> None:
    """By a step, where it has taken none yet, for it alone knows what it keeps; what that changes is then loaded."""
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _without_new_buffers(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Buffers that the checkpoint lacks, such as biases of experts that the run had no rate for, begin as in a new model."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter) or f"model.{name}" in saved}
