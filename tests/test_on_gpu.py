"""`make gpu` says what a machine lacks before it runs anything."""

import os
import subprocess
import venv
import zipfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "on_gpu.sh"


def test_missing_packages_are_named(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "typer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("typer.py", "")
    environment = {**os.environ, "PYTHON": str(tmp_path / "bare/bin/python"), "WHEELS": str(wheels)}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "lacks torch, triton, numpy, pydantic, yaml, rich, pytest; put wheels of them" in done.stderr
