"""The commands as a user runs them: worker processes, exit codes, one line for an error, no process left."""

import os
import subprocess
import sys

import pytest

from helpers import SMALL_RUN, TINY


def baton(*arguments, timeout=120, **environment):
    return subprocess.run(
        [sys.executable, "-P", "-m", "baton.launcher.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""} | environment,
        check=False,
    )


def options(tmp_path):
    return [*TINY, *SMALL_RUN, f"run={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}"]


def error_line(done):
    """The one line that an error is."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert done.stderr.rstrip().endswith(lines[0])
    return lines[0]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}; " for i in range(700)))
    return path


@pytest.mark.slow
def test_train_starts_its_workers_and_goes_on(tmp_path, text):
    done = baton("train", "quickstart", *options(tmp_path), "--input", str(text), "--nproc", "2", "--stop-at", "4")
    assert done.returncode == 0, done.stderr
    assert "2 ranks (dp 1 x cp 2 x tp 1, zigzag, cpu)" in done.stderr
    assert "Trained 4 of 6 steps, 512 tokens." in done.stderr
    assert f"baton train {tmp_path}/run/config.yaml --resume\n" in done.stderr
    again = baton("train", f"{tmp_path}/run/config.yaml", "--resume")
    assert again.returncode == 0, again.stderr
    assert "goes on after step 4" in again.stderr
    assert "Trained 6 of 6 steps" in again.stderr


@pytest.mark.slow
def test_a_failing_worker_ends_all_with_one_line(tmp_path, text):
    """One that a worker finds, not the process that starts it: the loss stops being finite."""
    done = baton("train", "quickstart", *options(tmp_path), "--input", str(text), "--nproc", "2", "optimizer.lr=1e30")
    line = error_line(done)
    assert line.startswith("error: step ")
    assert "not finite first in" in line
    assert done.stderr.count("not finite first in") == 1


@pytest.mark.slow
def test_torchrun_gives_the_ranks(tmp_path, text):
    """As under torchrun, a world of one."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = baton("train", "quickstart", *options(tmp_path), "--input", str(text), "schedule.steps=2", **variables)
    assert done.returncode == 0, done.stderr
    assert "on 1 ranks" in done.stderr
    assert "Trained 2 of 2 steps" in done.stderr


def test_errors_before_anything_starts(tmp_path, text):
    assert error_line(baton("train", "nowhere.yaml")).startswith("error: nowhere.yaml: no such file")
    assert "model.d_model is 'x'" in error_line(baton("train", "quickstart", "model.d_model=x"))
    (tmp_path / "run").write_text("a file")
    assert "is no folder that can be written" in error_line(baton("train", "quickstart", *options(tmp_path), "--nproc", "1"))
    (tmp_path / "run").unlink()
    assert "--nproc is 'many', allowed: auto, or 1 and more" in error_line(baton("train", "quickstart", "--nproc", "many"))
    missing = baton("train", "quickstart", *options(tmp_path), "--input", str(tmp_path / "nowhere.txt"), "--nproc", "1")
    assert "nowhere.txt: cannot be read: No such file" in error_line(missing)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_tasks_of_srun_need_ranks(tmp_path, text):
    started = baton("train", "quickstart", *options(tmp_path), "--input", str(text), "--nproc", "2", SLURM_STEP_NUM_TASKS="8")
    assert error_line(started).startswith("error: srun started 8 tasks and none knows its rank; allowed: one torchrun")


def test_data_prepare(tmp_path, text):
    done = baton("data", "prepare", "quickstart", *options(tmp_path), "--input", str(text))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json", "corpus.json"}
