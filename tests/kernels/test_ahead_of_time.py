"""Every kernel compiles for GPUs that are not here, does not spill, fits, and is what docs/performance/compiled.csv says."""

import csv
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compiled_table import SHARED, Row, compares, differences, table_text

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.slow


def ahead_of_time(*arguments: str | Path) -> tuple[int, str]:
    """The script in its own process, without the interpreter -> its exit status and output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "ahead_of_time.py", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def faults(output: str) -> list[str]:
    return [line.removeprefix("fault: ") for line in output.splitlines() if line.startswith("fault: ")]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cases", [("--first=1",), pytest.param((), marks=pytest.mark.exhaustive)], ids=["first", "all"])
def test_shipped_kernels(cases):
    """Each op's first case for every target; all of them in `make test-kernels-all`."""
    status, output = ahead_of_time("--check", *cases)
    assert not faults(output), "\n".join(faults(output))
    assert status == 0, output


def test_faults_are_found(tmp_path):
    table = "--table", tmp_path / "t"
    status, output = ahead_of_time("--cases", HERE / "samples", "--op=faulty", "--target=sm90", "--check", *table)
    *found, no_table = faults(output)
    assert status == 1, output
    assert [line.split(" sm90: ")[0] for line in found] == [
        "faulty spills product_kernel",
        "faulty too large product_kernel",
        "faulty two warps product_kernel",
        "faulty undefined undefined_kernel",
        "faulty refused (host)",
    ], output
    whys = [
        "spills: ",
        "bytes of shared memory, there are 232448",
        "no HGMMA",
        "nothing is not defined",
        "the host's own, tf32x3 on generation 9",
    ]
    assert all(why in line for why, line in zip(whys, found, strict=True)), output
    assert no_table == "t is not there; make compiled writes it"


def test_the_table_is_written(tmp_path):
    cases, table = tmp_path / "cases", tmp_path / "folder" / "table.csv"
    cases.mkdir()
    shutil.copy(HERE / "samples" / "sound.py", cases)
    status, output = ahead_of_time("--cases", cases, "--table", table, "--write")
    assert status == 0, output
    assert table.read_text() == output
    rows = list(csv.DictReader(output.splitlines()[1:]))
    assert [row["target"] for row in rows] == [target for target in SHARED for _ in range(2)]
    assert {row["fits"] for row in rows} == {"True"}
    assert all(int(row["registers"]) > 0 for row in rows)
    assert all(int(row["matrix"]) > 0 for row in rows)


def test_the_table_is_compared(tmp_path):
    table = tmp_path / "table.csv"
    row = Row("norm", 'd 4096, "wide"', "norm_kernel", "sm90", warps=4, registers=128, fits=True)
    others = [dataclasses.replace(row, target="sm80"), dataclasses.replace(row, op="conv")]
    table.write_text(table_text([row, *others], "3.7.1"))

    def compared(*rows, version="3.7.1"):
        return list(differences(list(rows), version, table, ["norm"], ["sm90"]))

    assert compared(row) == []
    (line,) = compared(dataclasses.replace(row, registers=129))
    assert line == f"{row.name}: table.csv has {row.line}, found {row.line.replace('128', '129')}"
    added, gone = compared(dataclasses.replace(row, case="d 5120"))
    assert added == "norm d 5120 norm_kernel sm90: not in table.csv; make compiled writes it"
    assert gone == f"{row.name}: in table.csv, but nothing compiles it; make compiled writes it"
    assert compared(version="3.6.0") == []
    assert compares("3.7.1", table)
    assert not compares("3.6.0", table)
