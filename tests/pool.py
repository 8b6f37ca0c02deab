"""Worker processes that stay: starting one costs seconds, so tests run their distributed functions on a pool."""

import gc
import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any

TIMEOUT = 120.0


class WorkerPool:
    """Runs a function on the ranks of a gloo group; workers start when a world first needs them.

    A failure ends all workers; the next run starts anew.
    """

    def __init__(self) -> None:
        self.workers: list[Any] = []
        self.tasks: list[Any] = []
        self.results: Any = None

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """`function(rank, *args)` on each rank -> results by rank. Raises RuntimeError with the first traceback."""
        self._start(world)
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world):
                self.tasks[rank].put((function, args, rank, world, f"{folder}/rendezvous", timeout))
            return self._collect(world, timeout)

    def _collect(self, world: int, timeout: float) -> list[Any]:
        found: dict[int, Any] = {}
        end = time.monotonic() + timeout
        while len(found) < world:
            try:
                rank, good, value = self.results.get(timeout=0.2)
            except queue.Empty:
                dead = [rank for rank in range(world) if rank not in found and not self.workers[rank].is_alive()]
                if dead or time.monotonic() > end:
                    self.stop()
                    what = f"rank {dead[0]} died" if dead else f"no answer within {timeout:.0f} s"
                    raise RuntimeError(f"{what} (world {world})") from None
                continue
            if not good:
                self.stop()
                raise RuntimeError(f"rank {rank} of {world} failed:\n{value}")
            found[rank] = pickle.loads(value)
        return [found[rank] for rank in range(world)]

    def _start(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        if not self.workers:
            self.results, self.tasks = context.Queue(), []
        while len(self.workers) < world:
            self.tasks.append(context.Queue())
            self.workers.append(context.Process(target=_work, args=(self.tasks[-1], self.results), daemon=True))
            self.workers[-1].start()

    def stop(self) -> None:
        """Ends every worker and waits until it is gone. Raises RuntimeError when one stays."""
        ended, self.workers = self.workers, []
        for worker in ended:
            worker.kill()
        for worker in ended:
            worker.join(10)
            if worker.is_alive():
                raise RuntimeError(f"worker {worker.pid} does not end")


def _work(tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        function, args, rank, world, path, timeout = tasks.get()
        try:
            store = dist.FileStore(path, world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
            # Here, so that what cannot be sent is an error and not an answer that never comes.
            value = bytes(ForkingPickler.dumps(function(rank, *args)))
            dist.barrier()
            dist.destroy_process_group()
            # Not earlier: it imports triton, which reads once whether it is to interpret.
            from baton.parallel.mesh import free_meshes

            free_meshes()
            # What is left is imported and need not be looked through again.
            gc.freeze()
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
            return
        results.put((rank, True, value))
