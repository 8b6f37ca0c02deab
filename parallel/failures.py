"""Which ranks are gone when an exchange fails: every rank beats in the store, and whoever fails looks whose beat has stopped.

A collective that fails says which connection broke, which is often that of a rank that failed for the same reason itself. The
first rank that finds out leaves its verdict in the store, and every rank reports that one, so all name the cause.

A main thread that waits inside CUDA cannot raise. A thread of its own therefore ends a process some seconds after a verdict,
and each rank watches the next one, so that a silent rank is found with no failing collective at all.
"""

import json
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

INTERVAL = 1.0
"""Seconds between two beats of a rank."""

LOOK = 3
"""Intervals without a beat after which a rank is gone, once something failed."""

GRACE = 5
"""Intervals that a main thread has after a verdict to end by itself, with the operation's own error."""

ALIVE = "all ranks are alive"


class RankGone(RuntimeError):
    """Ranks that an exchange needs have ended or fallen silent: `ranks` are their numbers in the world."""

    def __init__(self, ranks: list[int], message: str) -> None:
        super().__init__(message)
        self.ranks = ranks


@contextmanager
def beating(silence: timedelta, end: Callable[[RankGone], None]) -> Iterator[None]:
    """Keeps this rank's heartbeat while the body runs; the default group must be there. All ranks enter and leave together.

    In the body `naming_the_missing` knows which ranks are gone, and a failing collective raises RankGone by itself. `end` is
    called on a thread, and must end the process, when a rank was silent for `silence` and the body did not notice.
    """
    if dist.get_world_size() == 1:
        yield
        return
    global _heartbeat
    _heartbeat = Heartbeat(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), silence, end)
    try:
        with naming_the_missing("collective"):
            yield
            # The rank that holds the store must not leave before the others' last beat.
            dist.barrier()
        _heartbeat.stop()
    except BaseException as error:
        _heartbeat.leave(error)
        raise
    finally:
        _heartbeat = None


@contextmanager
def naming_the_missing(what: str) -> Iterator[None]:
    """Around an exchange, or as a decorator: an error of communication becomes RankGone, `what` and the ranks in its message.

    The original error stays its cause. It is raised itself, with a note, when all ranks are alive, and as it is without a
    heartbeat. Takes up to LOOK intervals, and 2 more when the store does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if _heartbeat is None or not _is_of_communication(error) or ALIVE in getattr(error, "__notes__", []):
            raise
        gone = _heartbeat.missing()
        if gone is None:
            error.add_note(ALIVE)
            raise
        raise RankGone(gone.ranks, f"{what}: {gone}; {_first_sentence(error)}") from error


class Heartbeat:
    """A rank's beat in the store, on a connection of its own: the store's other users block each other."""

    def __init__(
        self, store: Any, rank: int, world: int, silence: timedelta, end: Callable[[RankGone], None], interval: float = INTERVAL
    ) -> None:
        self.store = dist.PrefixStore("alive", store.clone())
        self.rank, self.world, self.silence, self.end, self.interval = rank, world, silence.total_seconds(), end, interval
        self.beats = 0
        self.neighbour, self.quiet = b"", 0
        """The next rank's beat, and for how many of ours it is the same."""
        self.verdict: RankGone | None = None
        self.answered = False
        """Whether the store has answered since the guard last looked."""
        self.requests: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        if rank == 0:
            self.store.set("verdict", "")
        self._beat()
        self.store.wait([*map(str, range(world)), "verdict"], silence)
        # Daemons: a thread that hangs in the store must not keep the process from ending.
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._serve, self._guard)]
        for thread in self.threads:
            thread.start()

    def missing(self) -> RankGone | None:
        """The ranks of the world that do not beat any more, by the first verdict; None when all do."""
        return self.verdict or self._ask(self._look, LOOK + 2)

    def leave(self, error: BaseException) -> None:
        """Says that this rank ends and why, unless another is the cause; with its own store it stays until that was read."""
        if self.verdict is None:
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self._ask(lambda: self._decide([self.rank], f"rank {self.rank} ended with {said}"), 2)
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self.stopped.wait(2 * self.interval)

    def stop(self) -> None:
        """Ends both threads."""
        self.stopped.set()
        self.requests.put(None)
        for thread in self.threads:
            thread.join(LOOK * self.interval)

    def _ask(self, function: Callable[[], Any], intervals: int) -> Any:
        """The thread's answer; a store that gives none lives with rank 0 or its launcher, which is then the missing one."""
        answer: Future[Any] = Future()
        self.requests.put((function, answer))
        try:
            return answer.result(intervals * self.interval)
        except (TimeoutError, RuntimeError):
            return self._store_is_lost()

    def _store_is_lost(self) -> RankGone:
        return self.verdict or RankGone([0], "rank 0 is gone or out of reach (the store on its host does not answer)")

    def _serve(self) -> None:
        """The only code that uses the store, which may hang at any time."""
        while True:
            try:
                self._beat()
                self._watch()
                request = self.requests.get(timeout=self.interval)
            except queue.Empty:
                continue
            except RuntimeError:
                return
            if request is None:
                return
            function, answer = request
            try:
                answer.set_result(function())
            except RuntimeError as error:
                answer.set_exception(error)
                return

    def _guard(self) -> None:
        """Ends the process when its main thread does not. Counts its own turns, so a job that is suspended loses no time."""
        decided = unanswered = 0
        while not self.stopped.wait(self.interval):
            decided += self.verdict is not None
            unanswered = 0 if self.answered else unanswered + 1
            self.answered = False
            if self.verdict is not None and decided > GRACE:
                self.end(self.verdict)
            if unanswered * self.interval > self.silence:
                self.end(self._store_is_lost())

    def _beat(self) -> None:
        self.beats += 1
        self.store.set(str(self.rank), str(self.beats))

    def _watch(self) -> None:
        """Reads the verdict, and gives one when the next rank has been silent for too long."""
        following = (self.rank + 1) % self.world
        beat, verdict = self.store.multi_get([str(following), "verdict"])
        self.answered = True
        self.quiet = self.quiet + 1 if beat == self.neighbour else 0
        self.neighbour = beat
        if verdict:
            self.verdict = _read(verdict)
        elif self.quiet * self.interval > self.silence:
            self._decide([following])

    def _look(self) -> RankGone | None:
        keys = [*map(str, range(self.world))]
        *first, verdict = self.store.multi_get([*keys, "verdict"])
        silent = [rank for rank in range(self.world) if rank != self.rank]
        for _ in range(4 * LOOK):
            if verdict:
                return _read(verdict)
            self.stopped.wait(self.interval / 4)
            self._beat()
            *beats, verdict = self.store.multi_get([*keys, "verdict"])
            self.answered = True
            silent = [rank for rank in silent if beats[rank] == first[rank]]
            if not silent:
                return None
        return self._decide(silent)

    def _decide(self, ranks: list[int], text: str = "") -> RankGone:
        """The first verdict of all ranks, which is this one if there is none."""
        names = " and ".join(map(str, ranks))
        text = text or (f"rank {names} is gone" if len(ranks) == 1 else f"ranks {names} are gone")
        self.verdict = _read(self.store.compare_set("verdict", "", json.dumps([ranks, f"{text} (of {self.world})"])))
        return self.verdict


_heartbeat: Heartbeat | None = None


def _read(verdict: bytes) -> RankGone:
    return RankGone(*json.loads(verdict))


def _is_of_communication(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors; the file that they name is its own.
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and re.search("gloo|NCCL", str(error)) is not None)


def _first_sentence(error: RuntimeError) -> str:
    """What the transport says, without its source file and its advice."""
    return re.sub(r"^\[[^]]*] ", "", str(error).splitlines()[0]).split(". ")[0]
