"""Heartbeats: who is gone, who says so first, and what is raised; `integration/test_dying_ranks.py` has processes that die."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from baton.configs.errors import UserError
from baton.launcher.environment import process_group
from baton.parallel import failures
from baton.parallel.failures import Heartbeat, RankGone, naming_the_missing

INTERVAL = 0.1


@pytest.fixture
def start():
    """Starts the heartbeats of a whole world in this process, on one store."""
    started = []

    def heartbeats(world, silence=60.0):
        store, ended = dist.HashStore(), [[] for _ in range(world)]

        def one(rank):
            return Heartbeat(store, rank, world, timedelta(seconds=silence), ended[rank].append, INTERVAL)

        with ThreadPoolExecutor(world) as pool:
            started.extend(pool.map(one, range(world)))
        return started, ended

    yield heartbeats
    for heartbeat in started:
        heartbeat.stop()


def test_all_are_alive(start):
    beats, _ = start(4)
    assert [beat.missing() for beat in beats] == [None] * 4


def test_the_first_verdict_is_everyones(start):
    """Rank 1 finds rank 3 gone and ends too; the others still name rank 3 alone."""
    beats, _ = start(4)
    beats[3].stop()
    assert str(beats[1].missing()) == "rank 3 is gone (of 4)"
    beats[1].stop()
    assert [beats[rank].missing().ranks for rank in (0, 2)] == [[3], [3]]


def test_several_at_once(start):
    beats, _ = start(4)
    beats[1].stop()
    beats[3].stop()
    assert str(beats[0].missing()) == "ranks 1 and 3 are gone (of 4)"


def test_a_rank_that_ends_says_why(start):
    beats, _ = start(2)
    beats[1].leave(MemoryError("64 GiB asked"))
    assert str(beats[0].missing()) == "rank 1 ended with MemoryError: 64 GiB asked (of 2)"


def test_silence_is_found_without_a_failing_collective(start):
    beats, ended = start(4, silence=0.5)
    beats[2].stop()
    deadline = time.monotonic() + 20
    while not all(ended[rank] for rank in (0, 1, 3)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [ended[rank][0].ranks for rank in (0, 1, 3)] == [[2]] * 3
    assert not ended[2]


@pytest.mark.parametrize("hangs", [True, False])
def test_a_store_that_does_not_answer(start, monkeypatch, hangs):
    """Rank 0, or the launcher on its host, holds it: a dead one refuses, one behind a cut link hangs."""
    beats, ended = start(2, silence=1.0)
    hung = threading.Event()

    class Lost:
        def set(self, key, value):
            if not hangs:
                raise dist.DistNetworkError("Broken pipe")
            hung.wait(30)

        def multi_get(self, keys):
            raise dist.DistNetworkError("Broken pipe")

    beats[1].store = Lost()
    asked = time.monotonic()
    assert "rank 0 is gone or out of reach" in str(beats[1].missing())
    assert time.monotonic() - asked < 20 * INTERVAL
    time.sleep(1.0 + 5 * INTERVAL)
    assert ended[1][0].ranks == [0]
    hung.set()


def test_what_is_raised(start, monkeypatch):
    beats, _ = start(2)
    monkeypatch.setattr(failures, "_heartbeat", beats[0])
    broken = "[/src/gloo/transport/tcp/pair.cc:537] Connection closed by peer [::1]:5. This is typically caused by a crash."

    @naming_the_missing("state exchange")
    def exchange(error):
        raise error

    with pytest.raises(RuntimeError) as alive, naming_the_missing("outer"):
        exchange(RuntimeError(broken))
    assert alive.value.__notes__ == ["all ranks are alive"]
    started = time.monotonic()
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as unrelated:
        exchange(other)
    assert unrelated.value is other
    assert time.monotonic() - started < INTERVAL / 4
    beats[1].stop()
    with pytest.raises(RankGone) as gone, naming_the_missing("outer"):
        exchange(RuntimeError(broken))
    assert str(gone.value) == "state exchange: rank 1 is gone (of 2); Connection closed by peer [::1]:5"
    assert str(gone.value.__cause__) == broken


def test_the_timeout_is_a_number_of_seconds(monkeypatch):
    monkeypatch.setenv("BATON_TIMEOUT", "soon")
    with pytest.raises(UserError, match="BATON_TIMEOUT is 'soon', allowed: whole seconds, 1 and more"), process_group():
        pass
