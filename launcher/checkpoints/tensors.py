"""A checkpoint's tensors one at a time, read and written without a process group and without holding more than one."""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ...configs.errors import UserError
from .contents import MODEL, Contents

FILE_BYTES = 1 << 28
"""Of a file that is written here, unless a tensor alone is larger."""


class StoredTensors:
    """The tensors of a folder that PyTorch's distributed checkpoint has written."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.metadata = folder, metadata
        self.reader = FileSystemReader(folder)
        self.reader.set_up_storage_reader(metadata, True)

    def read(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One, put together from its pieces. Raises UserError."""
        tensor = torch.empty(shape, dtype=dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner({key: tensor}, self.metadata, True)
        try:
            self.reader.read_data(planner.create_local_plan(), planner)
        except (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.folder}: {key.removeprefix(MODEL)} cannot be read: {error}") from None
        return tensor


class CheckpointTensors:
    """The tensors of a checkpoint's model."""

    def __init__(self, contents: Contents) -> None:
        self.entries = {entry.name: entry for entry in contents.entries}
        self.stored = StoredTensors(contents.folder, contents.metadata)

    def read(self, name: str) -> Tensor:
        """One. Raises UserError."""
        entry = self.entries[name]
        return self.stored.read(MODEL + name, entry.shape, entry.dtype)


class _Lazily(DefaultSavePlanner):
    """Asks for a tensor when it is written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.read = read

    def resolve_data(self, write_item: WriteItem) -> Any:
        """As the writer calls it."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self.read(write_item.index.fqn)


class _InFiles(FileSystemWriter):
    """Writes several files one after another: PyTorch's writer holds what a file has until that is complete."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        """As the library calls it."""
        lots: list[list[WriteItem]] = [[]]
        filled = 0
        for item in plan.items:
            data = item.tensor_data
            size = 0 if data is None else data.size.numel() * data.properties.dtype.itemsize
            if lots[-1] and filled + size > FILE_BYTES:
                lots.append([])
                filled = 0
            lots[-1].append(item)
            filled += size
        written: list[WriteResult] = []
        for number, items in enumerate(lots):
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            written += super().write_data(replace(plan, items=items, storage_data=prefix), planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done


def reason(error: BaseException) -> str:
    """In a line, what went wrong on the first rank where something did."""
    if isinstance(error, CheckpointException):
        error = error.failures[min(error.failures)][0]
    said = (str(error).strip().splitlines() or [""])[0]
    return said if isinstance(error, (OSError, UserError)) else f"{type(error).__name__}: {said}"


def _as_os_error(error: BaseException) -> BaseException:
    """What PyTorch's file format says where a disk is full, say, in a line."""
    return OSError(str(error).splitlines()[0]) if isinstance(error, RuntimeError) else error


def write_tensors(folder: Path, tensors: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Writes the model's tensors, of which `tensors` has the shapes and dtypes, on no device, and `read` gives the numbers.

    Raises what `read` does, and OSError.
    """
    write_stored(folder, {MODEL + name: tensor for name, tensor in tensors.items()}, lambda key: read(key.removeprefix(MODEL)))


def write_stored(folder: Path, state: dict[str, Any], read: Callable[[str], Tensor]) -> None:
    """Writes what PyTorch's distributed checkpoint has by these keys: tensors as `write_tensors`, other objects as they are."""
    with warnings.catch_warnings():
        # That one process writes is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            dcp.save(state, storage_writer=_InFiles(folder), planner=_Lazily(read), no_dist=True)
        except CheckpointException as error:
            raise _as_os_error(error.failures[0][0]) from None
