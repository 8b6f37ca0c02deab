"""Work that goes on beside the computation: exchanges of several rounds, while the rest of the layer runs.

On a CPU a thread of its own runs them one after another; on a GPU they are queued on a stream of their own. All ranks must start
them in the same order, and use their group for nothing else until they have waited.
"""

import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.scan import Pending


def start(function: Callable[[], Tensor], device: torch.device) -> Pending[Tensor]:
    """Runs the function, which takes and gives tensors of `device`, and returns at once. Its errors are raised by `wait`."""
    if device.type == "cuda":
        return _on_stream(function, device)
    future: Future[Tensor] = Future()
    _tasks().put((function, future))
    return _Threaded(future)


@dataclass(frozen=True)
class _Threaded:
    future: "Future[Tensor]"

    def wait(self) -> Tensor:
        return self.future.result()


@functools.cache
def _tasks() -> "queue.Queue[Any]":
    """The queue of the process's one thread. A daemon: a rank that fails must not wait at its end for those it hangs on."""
    tasks: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_work, args=(tasks,), name="baton exchange", daemon=True).start()
    return tasks


@torch.no_grad()
def _work(tasks: "queue.Queue[Any]") -> None:
    while True:
        function, future = tasks.get()
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        # Else they would keep their group alive until the next task, and gloo's threads beyond the interpreter's end.
        del function, future


@dataclass(frozen=True)
class _Queued:
    result: Tensor
    end: torch.cuda.Event
    function: Callable[[], Tensor]
    """Kept until `wait`: what it reads is memory of the stream that started it, which would be written again too early."""

    def wait(self) -> Tensor:
        current = torch.cuda.current_stream(self.result.device)
        current.wait_event(self.end)
        self.result.record_stream(current)
        return self.result


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _on_stream(function: Callable[[], Tensor], device: torch.device) -> _Queued:
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad():
        result = function()
        end = stream.record_event()
    return _Queued(result, end, function)
