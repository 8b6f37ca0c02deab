"""Kernels reach every element of tensors of 262,144 tokens: no offset wraps at 2^31."""

import subprocess
import sys
from pathlib import Path

import pytest

import case_modules

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.slow


def overflow(*arguments: str | Path) -> tuple[int, str]:
    """The script in its own process, which a wild offset may end -> its exit status and output."""
    command = [sys.executable, HERE / "overflow.py", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("op", case_modules.names())
def test_shipped_kernels(op):
    status, output = overflow("--op", op)
    assert status == 0, output


def test_faults_are_found():
    status, output = overflow("--cases", HERE / "samples")
    assert status == 1, output
    narrow, near, outside = (line.split(": ", 1)[1] for line in output.splitlines() if line.startswith("fault: "))
    assert narrow.startswith("faulty narrow: InterpreterError: ")
    assert "int32 overflow detected for operation mul" in narrow
    assert near == "faulty near: no element past 2^31 is reached: {'narrow_kernel': 16384}"
    assert outside == "faulty outside: the process died of signal 11"
    assert "faulty wide: reaches {'narrow_kernel': 4294950912}" in output
