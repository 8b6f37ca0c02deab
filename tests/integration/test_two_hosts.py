"""Two hosts with a real link between them, slow or cut."""

import json
import sys
import time
from pathlib import Path

import pytest
from network import EXCHANGE, join

from helpers import TINY

TRANSFER = """
import os, socket, sys, time
here = (os.environ["MASTER_ADDR"], 29500)
if os.environ["RANK"] == "0":
    connection, _ = socket.create_server(here).accept()
    started = time.perf_counter()
    while connection.recv(1 << 16):
        pass
    sys.stdout.write(str(time.perf_counter() - started))
else:
    for _ in range(100):
        try:
            socket.create_connection(here).sendall(bytes(1_000_000))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""


def test_the_link_is_as_slow_as_asked(two_hosts):
    """1 MB at 10 Mbit/s takes 0.8 s, less what the token bucket holds; without a limit a moment."""
    seconds = []
    for rate in ("10mbit", "10gbit"):
        two_hosts.limit(rate)
        first, second = two_hosts.run([sys.executable, "-P", "-c", TRANSFER], timeout=30)
        assert first.returncode == second.returncode == 0, (first, second)
        seconds.append(float(first.stdout))
    slow, quick = seconds
    assert slow > 0.5
    assert quick < slow / 2


@pytest.mark.slow
def test_a_cut_link_ends_both_sides_with_the_others_name(two_hosts):
    first, second = two_hosts.start(EXCHANGE, BATON_TIMEOUT="3", CUDA_VISIBLE_DEVICES="")
    join([first, second])
    two_hosts.cut()
    cut = time.monotonic()
    said = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert time.monotonic() - cut < 60
    assert [first.returncode, second.returncode] == [1, 1]
    assert "error: collective: rank 1 is gone (of 2)" in said[0]
    # The second host has lost the store as well.
    assert "rank 0 is gone or out of reach" in said[1]


@pytest.mark.slow
def test_verify_over_a_slow_link(two_hosts, tmp_path):
    two_hosts.limit("50mbit")
    options = ["--cp", "2", "--layout", "zigzag", "--strategy", "sliced", "--documents", "packed"]
    command = [sys.executable, "-P", "-m", "baton.launcher.cli", "verify", "quickstart", *TINY, *options]
    report = tmp_path / "report.json"
    done = two_hosts.run([*command, "--json", str(report)], CUDA_VISIBLE_DEVICES="", COLUMNS="200")
    assert [rank.returncode for rank in done] == [0, 0], done
    found = json.loads(report.read_text())
    assert found["ok"]
    assert [case["mesh"]["cp"] for case in found["cases"]] == [2]
    assert max(found["cases"][0]["max_relative_error"].values()) < 1e-10


@pytest.mark.slow
def test_a_slow_exchange_hides_behind_the_computation(two_hosts):
    """A Mamba-2 mixer at cp 2 over 10 Mbit/s: the step costs less than computation and exchanges one after another.

    Whatever else the machine does makes a step longer and never shorter, so one good measurement of three is enough.
    """
    two_hosts.limit("10mbit")
    command = [sys.executable, "-P", str(Path(__file__).with_name("overlapped_step.py"))]
    for _ in range(3):
        first, last = two_hosts.run(command, CUDA_VISIBLE_DEVICES="")
        assert first.returncode == last.returncode == 0, (first.stderr, last.stderr)
        times = json.loads(last.stdout)
        assert times["exchanges"] > 200, times
        if times["step"] < times["compute"] + 0.6 * times["exchanges"]:
            return
    raise AssertionError(times)
