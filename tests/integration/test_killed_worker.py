"""A worker that is killed while `baton train` runs: one line that names it, and no process left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import SMALL_RUN, TINY

PIPELINE = [
    "parallel={pp: 2, ep: 2, cp: 2, schedule: interleaved_1f1b, stages_per_rank: 2}",
    "batch={sequences: 4, micro_steps: 4}",
]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mesh"), [(2, []), (4, PIPELINE)])
def test_a_killed_worker_is_named(tmp_path, processes, mesh):
    (tmp_path / "text.txt").write_text("".join(f"{i} squared is {i * i}; " for i in range(700)))
    options = [*TINY, *SMALL_RUN, f"run={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}"]
    options += ["schedule.steps=100000", "checkpoint.every=100000", "evaluation.every=100000", *mesh, "--nproc", str(processes)]
    command = [
        sys.executable,
        "-P",
        "-m",
        "baton.launcher.cli",
        "train",
        "quickstart",
        *options,
        "--input",
        str(tmp_path / "text.txt"),
    ]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl", started)
        workers = {rank: pid for pid in children(started.pid) if (rank := environment(pid).get("RANK"))}
        os.kill(workers["1"], 9)
        _, printed = started.communicate(timeout=60)
    finally:
        # Where it still runs: workers have sessions of their own.
        for pid in children(started.pid) if started.poll() is None else []:
            os.kill(pid, 9)
        started.kill()
    assert started.returncode == 1
    assert "Traceback" not in printed
    assert [line for line in printed.splitlines() if line.startswith("error: ")] == [printed.splitlines()[-1]]
    assert printed.splitlines()[-1].startswith("error: rank 1 ended with SIGKILL")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())


def wait_for(file, process):
    """Until the file has something in it."""
    end = time.monotonic() + 120
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "no step within 120 s"
        time.sleep(0.1)


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def environment(pid):
    return dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry)
