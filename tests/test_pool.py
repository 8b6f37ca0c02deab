"""The spawn fixture itself: a rank that fails, dies or hangs fails the test, and no process stays behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from pool import WorkerPool


def fail_on_one_rank(rank):
    if rank == 1:
        raise ArithmeticError("rank one has had enough")
    dist.all_reduce(torch.zeros(1))


def die_on_one_rank(rank):
    if rank == 1:
        os._exit(3)
    dist.all_reduce(torch.zeros(1))


def hang(rank):
    time.sleep(60)


def my_process(rank):
    return os.getpid()


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def own_pool():
    pool = WorkerPool()
    yield pool
    pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        (fail_on_one_rank, 60, "rank one has had enough"),
        (die_on_one_rank, 60, "rank 1 died|Connection"),
        (hang, 1, "no answer within 1 s"),
    ],
)
def test_a_failure_ends_all_workers(own_pool, function, timeout, message):
    processes = own_pool.run(2, my_process)
    with pytest.raises(RuntimeError, match=message):
        own_pool.run(2, function, timeout=timeout)
    assert not any(is_running(process) for process in processes)
