"""The process around a command: devices, process group, worker processes, and how errors leave them."""

import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..configs.errors import KeyedError, UserError
from ..configs.schema import Config
from ..parallel import staged
from ..parallel.failures import RankGone, beating
from .errors import AGENT, under_torchrun, user_errors

TIMEOUT = "BATON_TIMEOUT"
"""Environment variable: the seconds after which a rank that waits for another gives up; 600 unless set."""


@dataclass(frozen=True)
class Environment:
    """Where this process runs."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0


@contextmanager
def process_group(share_device: bool = False) -> Iterator[Environment]:
    """Joins torchrun's group, or makes one of this process alone: NCCL with a GPU for each process, else gloo.

    With `share_device` all ranks of a host use its first GPU, or the CPU, and exchange through the host (`parallel/staged.py`).
    A rank that dies or falls silent ends the others with a UserError that names it. Raises UserError for a bad BATON_TIMEOUT.
    """
    limit = _timeout()
    device = _choose_device(share_device)
    options: dict[str, Any] = {"backend": "gloo", "timeout": limit}
    if share_device:
        staged.register()
        options["backend"] = staged.NAME
    elif device.type == "cuda":
        # NCCL ends a process at its timeout without a word; the heartbeat is to be first.
        options = {"backend": "nccl", "timeout": limit + timedelta(minutes=1), "device_id": device}
    if not under_torchrun():
        _refuse_tasks_without_ranks()
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options)
    environment = Environment(dist.get_rank(), dist.get_world_size(), device)
    if environment.leads:
        _print_log()
    try:
        with beating(limit, _end_process):
            yield environment
    except RankGone as gone:
        _announce(gone)
        raise UserError(str(gone)) from gone
    except BaseException:
        if dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    # Not after an error: NCCL's teardown would wait for ranks that wait for this one.
    dist.destroy_process_group()


def _refuse_tasks_without_ranks() -> None:
    """Several tasks of srun that know no ranks would each be a run of their own, on the same files."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise UserError(
            f"srun started {tasks} tasks and none knows its rank; allowed: one torchrun for each node (srun --ntasks-per-node 1 "
            "torchrun --no-python baton ...), or RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each task"
        )


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT, "600")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{TIMEOUT} is {text!r}, allowed: whole seconds, 1 and more")
    return timedelta(seconds=int(text))


class _Lines(logging.Handler):
    """Messages as lines on standard error, wherever that leads at the time: a progress line prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)  # noqa: T201


def _print_log() -> None:
    """What parts of this package say of themselves once, such as which kernels run, is seen."""
    logger = logging.getLogger(__name__.partition(".")[0])
    if not logger.handlers:
        logger.addHandler(_Lines())
        logger.setLevel(logging.INFO)


def _choose_device(share_device: bool) -> torch.device:
    """This process's device, made the current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = 0 if share_device else int(os.environ.get("LOCAL_RANK", "0"))
    _check_devices(local_rank + 1)
    torch.cuda.set_device(local_rank)
    # DeviceMesh picks a device by LOCAL_RANK where CUDA is not in use yet.
    torch.cuda.init()
    return torch.device("cuda", local_rank)


def _end_process(gone: RankGone) -> None:
    """For a main thread that waits inside a library and cannot raise."""
    with user_errors():
        _announce(gone)
        raise UserError(str(gone))


def _announce(gone: RankGone) -> None:
    """Says it on this host where nobody else does: `user_errors` leaves it to rank 0, which may be gone or out of reach."""
    rank = int(os.environ["RANK"])
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))
    if AGENT not in os.environ and rank == next((r for r in range(first, rank) if r not in gone.ranks), rank) and rank != 0:
        print(f"error: {gone}", file=sys.stderr, flush=True)  # noqa: T201


def installed(command: str) -> str:
    """How to call a command of this installation: by its name, or with its path where that is not searched."""
    if shutil.which(command):
        return command
    return os.path.relpath(Path(sys.executable).with_name(command))


def choose_processes(asked: str, config: Config) -> int:
    """A number as it is; `auto`: as many GPUs as the config fits, without any the degrees it names, at least 2 for an open one.

    Raises UserError for anything else, and KeyedError as `Config.resolved`.
    """
    if asked != "auto":
        if not asked.isdigit() or int(asked) < 1:
            raise UserError(f"--nproc is {asked!r}, allowed: auto, or 1 and more")
        return int(asked)
    parallel = config.parallel
    named = math.prod(degree for degree in (parallel.tp, parallel.pp, parallel.cp, parallel.dp) if degree != "auto")
    if torch.cuda.is_available():
        preferred = [*range(torch.cuda.device_count(), 0, -1)]
    else:
        # What is open may have to make room for experts and copies.
        preferred = [max(named, 2), *range(named, named * parallel.ep * parallel.replicate + 1, named)]
    return next((n for n in preferred if _fits(config, n)), named)


def _fits(config: Config, world: int) -> bool:
    try:
        config.resolved(world)
    except KeyedError:
        return False
    return True


def launch(arguments: Sequence[str], processes: int, share_device: bool = False) -> None:
    """Runs `baton ARGUMENTS` on worker processes of this machine through torchrun's own agent, and waits.

    With `share_device` there may be more of them than GPUs. When one fails the others are ended. Raises UserError with the
    message of the first that failed.
    """
    if torch.cuda.is_available() and not share_device:
        _check_devices(processes)
    _refuse_tasks_without_ranks()
    _set_worker_variables(processes)
    # The agent reports a failure at length; what it found is raised here in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        _run_workers(arguments, processes, folder)


def _run_workers(arguments: Sequence[str], processes: int, folder: str) -> None:
    """The agent's own files, such as the errors that workers leave it, lie in the folder."""
    settings = LaunchConfig(
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    try:
        elastic_launch(settings, sys.executable)("-P", "-m", "baton.launcher.cli", *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise UserError(_message(rank, failure)) from None
    except SignalException as stopped:
        hint = "; --resume goes on from the newest checkpoint" if arguments[0] == "train" else ""
        raise UserError(f"stopped by {signal.Signals(stopped.sigval).name}{hint}") from None


def _message(rank: int, failure: ProcessFailure) -> str:
    """A worker's UserError as it was; of anything else the rank and what is known (its traceback is above)."""
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    kind, _, text = str(message).partition(": ")
    if kind == UserError.__name__:
        return text
    return f"rank {rank} ended with {failure.signal_name() if failure.exitcode < 0 else failure.exitcode}: {message}"


def _check_devices(processes: int) -> None:
    if processes > torch.cuda.device_count():
        raise UserError(f"{processes} processes on {torch.cuda.device_count()} GPUs; allowed: one process a GPU at most")


def _set_worker_variables(processes: int) -> None:
    os.environ[AGENT] = "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # Large buffers come and go at every step: glibc then maps and unmaps memory each time (a fifth of a CPU step).
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 32))
