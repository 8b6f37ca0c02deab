"""A rank that dies or falls silent in an exchange ends all the others with its name."""

import json
import os
import signal
import socket
import subprocess
import time

import pytest
from network import EXCHANGE, join


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ranks(tmp_path):
    """Starts 4 ranks that exchange for ever, without an agent; ends them all, whatever state they are in."""
    processes = []

    def started(stuck="none", timeout=60):
        common = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "BATON_TIMEOUT": str(timeout)}
        for rank in range(4):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(tmp_path / f"{rank}.json")}
            variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **common, **own}
            command = [*EXCHANGE, stuck]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=variables, **pipes))
        join(processes)
        return processes

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def ends(process, rank, tmp_path, within):
    """What a rank prints and what it tells an agent; it ends with 1."""
    _, printed = process.communicate(timeout=within)
    assert process.returncode == 1, printed
    assert "Traceback" not in printed
    told = json.loads((tmp_path / f"{rank}.json").read_text())["message"]["message"]
    return [line for line in printed.splitlines() if line.startswith("error: ")], told


@pytest.mark.slow
@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_rank_is_named_by_all(ranks, tmp_path, victim):
    """Rank 0 holds the store."""
    processes = ranks()
    time.sleep(0.5)
    processes[victim].kill()
    survivors = [rank for rank in range(4) if rank != victim]
    for rank in survivors:
        lines, told = ends(processes[rank], rank, tmp_path, within=50)
        assert told.startswith(f"UserError: collective: rank {victim} is gone"), told
        assert lines == ([f"error: {told.removeprefix('UserError: ')}"] if rank == survivors[0] else [])


@pytest.mark.slow
def test_a_silent_rank_is_named_by_all(ranks, tmp_path):
    """The timeout finds rank 2, which is stopped; rank 3 waits where no error can reach it."""
    processes = ranks(stuck="3", timeout=3)
    processes[2].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    for rank in (0, 1, 3):
        lines, told = ends(processes[rank], rank, tmp_path, within=60)
        assert "rank 2 is gone (of 4)" in told
        assert bool(lines) == (rank == 0)
        assert [line for line in lines if "rank 2 is gone (of 4)" in line] == (lines if rank == 0 else [])
    # The timeout, the look, the grace of a main thread that does not end, and a loaded machine.
    assert time.monotonic() - started < 60
    assert processes[2].poll() is None
